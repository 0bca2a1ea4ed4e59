"""Describes a file of tensors in words, for users who gave the wrong one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

OPTIMIZER = re.compile(
    r"^(?:\w*optim\w*|amp|grad_scaler|loss_scaler|scaler|\w*scheduler\w*|state\.\d+)\."
    r"|\.?(exp_avg|exp_avg_sq|max_exp_avg_sq|momentum_buffer)(\.|$)"
)
LOW_RANK = re.compile(
    r"(^|[._])(lora|hada|lokr|dora)[._]|\.parametrizations\.weight\.0\.(up|down)$"
)

# The end of a name by which a kind is told, the kind, and what takes it.
KINDS = (
    ("visual.conv1.weight", "a model of OpenAI's CLIP or open_clip", 'name = "open_clip"'),
    ("visual.trunk.patch_embed.proj.weight", "a model of open_clip", 'name = "open_clip"'),
    (
        "embeddings.patch_embeddings.projection.weight",
        "a vision transformer in the naming of transformers",
        'name = "transformers", with the folder that has its config.json',
    ),
    (
        "embeddings.patch_embedding.weight",
        "a CLIP or SigLIP model in the naming of transformers",
        'name = "transformers", with the folder that has its config.json',
    ),
    ("embeddings.word_embeddings.weight", "a text encoder in the naming of transformers", ""),
    ("relative_position_bias_table", "a transformer with windows or position biases", ""),
    ("downsample_layers.0.0.weight", "a ConvNeXt in the official naming", ""),
    ("stages.0.blocks.0.conv_dw.weight", "a ConvNeXt in timm's naming", ""),
    ("layer1.0.conv1.weight", "a ResNet", "a vision transformer"),
)  # fmt: skip
SHOWN = 4


def is_optimizer(name: str) -> bool:
    """Whether a tensor of that name belongs to an optimizer, a scheduler or a loss scaler."""
    return OPTIMIZER.search(name) is not None


def described(tensors: Mapping[str, Tensor]) -> str:
    """One phrase: "a vision transformer of width 384 with 12 blocks and patches of 14 pixels …"."""
    weights = {k: v for k, v in tensors.items() if not is_optimizer(k)}
    return f"{_kind(weights)}: {_listed(weights)}"


def without_model(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
    """A file's contents, and what to give instead, where it holds no weights of a model."""
    weights = {k: v for k, v in tensors.items() if not is_optimizer(k)}
    if metadata.get("format", "").startswith("mfuser"):
        return (
            f"a checkpoint of this project ({len(weights)} tensors), in which frozen encoders are "
            "left out; it is for `mfuser evaluate` and `mfuser predict`, and weights are those the "
            "encoder itself was published with"
        )
    if not any(v.dim() for v in weights.values()):
        held = f"the state of an optimizer ({len(tensors)} tensors)" if tensors else "no tensors"
        return f"{held} and no model; give the file that was saved beside it with the weights"
    low_rank = [name for name in weights if LOW_RANK.search(name)]
    if 2 * len(low_rank) > len(weights):
        return (
            f"low-rank updates alone (LoRA, {len(low_rank)} tensors), not the weights that they "
            "change; merge them into the model (peft: merge_and_unload) and save that"
        )
    return None


def _kind(weights: Mapping[str, Tensor]) -> str:
    for end, kind, remedy in KINDS:
        if any(name == end or name.endswith(f".{end}") for name in weights):
            return f"{kind} ({remedy})" if remedy else kind
    for name, kernel in weights.items():
        if name.endswith("patch_embed.proj.weight") and kernel.dim() >= 2:
            start = name.removesuffix("patch_embed.proj.weight")
            blocks = {
                match[1]
                for other in weights
                if (
                    match := re.match(
                        rf"{re.escape(start)}blocks\.(?:\d+\.(?=\d+\.))?(\d+)\.", other
                    )
                )
            }
            patch = f" and patches of {kernel.shape[-1]} pixels" if kernel.dim() == 4 else ""
            return (
                f"a vision transformer of width {kernel.shape[0]} with {len(blocks)} blocks{patch}"
            )
    return "a model of an unknown kind"


def _listed(weights: Mapping[str, Tensor]) -> str:
    """Below which names its tensors are."""
    tops: Counter[str] = Counter(name.partition(".")[0] for name in weights)
    # A wrapper says nothing: show what is in it.
    start = ""
    while len(tops) == 1 and f"{start}{next(iter(tops))}" not in weights:
        start += f"{next(iter(tops))}."
        tops = Counter(name[len(start) :].partition(".")[0] for name in weights)
    shown = ", ".join(f"{start}{name} ({count})" for name, count in tops.most_common(SHOWN))
    return f"{len(weights)} tensors, {shown}" + (", …" if len(tops) > SHOWN else "")
