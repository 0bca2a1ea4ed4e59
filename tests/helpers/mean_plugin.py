"""The text of a plugin: a sound adapter, in whose parts a test puts lines of its own."""

from __future__ import annotations

TEXT = """
from mfuser import FusionAdapter, FusionSpec, hookimpl
from torch import nn

class Mean(FusionAdapter):
    def __init__(self, vfm, vlm):
        super().__init__()
        self.to_vfm = nn.Linear(vlm.embed_dim, vfm.embed_dim)
        self.to_vlm = nn.Linear(vfm.embed_dim, vlm.embed_dim)

    def forward(self, vfm_tokens, vlm_tokens, vfm_grid=None, vlm_grid=None):
        BEFORE
        vfm = self.to_vfm(vlm_tokens.mean(1, keepdim=True)).expand_as(vfm_tokens)
        vlm = self.to_vlm(vfm_tokens.mean(1, keepdim=True)).expand_as(vlm_tokens)
        AFTER
        return vfm, vlm

class MeanSpec(FusionSpec, name="mean"):
    "Means."

    def build(self, vfm, vlm):
        made = Mean(vfm, vlm)
        BUILD
        return made

@hookimpl
def mfuser_components():
    HOOK
    return [MeanSpec]
"""


def mean_plugin(head: str = "", **lines: str) -> str:
    """head: of the module. before, after: in forward(), around what it computes. build, hook: in
    these two."""
    text = head + TEXT
    for place in ("BEFORE", "AFTER", "BUILD", "HOOK"):
        text = text.replace(place, lines.get(place.lower(), "pass"))
    return text
