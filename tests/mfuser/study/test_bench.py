"""`mfuser plugin bench`: a stranger's part against the built-in ones, and the page of records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mfuser.errors import MFuserError, PluginError, RegistryError
from mfuser.study import bench

SWAP = '''
import torch
from torch import nn
from mfuser import FusionAdapter, FusionSpec, hookimpl

class Swap(FusionAdapter):
    def __init__(self, vfm, vlm, share):
        super().__init__()
        self.to_vfm = nn.Linear(vlm.embed_dim, vfm.embed_dim)
        self.to_vlm = nn.Linear(vfm.embed_dim, vlm.embed_dim)
        self.share = nn.Parameter(torch.tensor(share))

    def forward(self, vfm_tokens, vlm_tokens, vfm_grid=None, vlm_grid=None):
        a, b = vfm_tokens.mean(1, keepdim=True), vlm_tokens.mean(1, keepdim=True)
        vfm, vlm = self.share * self.to_vfm(b), self.share * self.to_vlm(a)
        return vfm.expand_as(vfm_tokens), vlm.expand_as(vlm_tokens)

class SwapSpec(FusionSpec, name="swap"):
    """Each encoder receives a learned share of the other's mean token."""
    share: float = 0.1
    def build(self, vfm, vlm):
        return Swap(vfm, vlm, self.share)

@hookimpl
def mfuser_components():
    return [SwapSpec]
'''

# The study of the real command, on towers that take seconds.
QUICK = """
[pairing.quick]
extends    = "plain"
image_size = [32, 64]

[dataset.quick]
extends = "toy"
size    = [32, 64]
count   = 2

[dataset.quick-night]
extends = "quick"
domain  = "night"

[recipe.quick]
extends      = "tiny"
source       = "quick"
targets      = ["quick", "quick-night"]
steps        = 1
warmup       = 0
augmentation = { scale = [1.0, 1.0] }

[study.bench_fusion]
base            = "quick"
recipe          = "quick"
recipe_settings = {}
seeds           = [0, 1]
axes            = { fusion = ["none"] }
"""


@pytest.fixture
def here(inside: Path, write_registry: Callable[..., Path]) -> Path:
    (inside / "swap.py").write_text(SWAP, "utf-8")
    write_registry(QUICK)
    return inside


def test_a_part_is_measured(here: Path, mfuser: Callable, forked_runs: None) -> None:
    ran = mfuser("plugin", "bench", "swap.py", "--set", "share=0.2", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told == json.loads((here / "bench" / "swap" / "bench.json").read_text("utf-8"))
    assert told["kind"] == "fusion" and told["options"] == {"share": 0.2}
    labels = [s["label"] for s in told["standings"]]
    assert sorted(labels) == ["none", "swap (yours)"]
    assert all(s["seeds"] == 2 for s in told["standings"])
    (against,) = told["verdict"]
    assert (against["first"], against["second"]) == ("swap (yours)", "none")
    means = {s["label"]: s["mean"] for s in told["standings"]}
    assert against["mean"] == pytest.approx(means["swap (yours)"] - means["none"])
    assert against["pairs"] == 2 and 0 <= against["p"] <= 1
    records = here / "records"
    records.mkdir()
    (records / "swap.json").write_text(json.dumps(told), "utf-8")
    page = bench.leaderboard(records)
    assert "## fusion" in page and "| swap | swap |" in page and "| none | swap |" in page
    again = mfuser("plugin", "bench", "swap.py", "--set", "share=0.2")
    assert again.code == 0 and "already finished" in again.err
    assert "swap (yours) against none: " in again.out and "paired t-test over 2 seeds" in again.out


def test_the_study_that_ships_takes_parts_of_every_kind(here: Path) -> None:
    (here / "registry.toml").unlink()
    for module, kind in (
        ("swap.py", "fusion"), ("mtenhancer", "enhancer"), ("linear", "decoder"), ("lora", "tuning")
    ):  # fmt: skip
        component = bench.offered(module, None)
        plan = bench.prepared(module, component, seeds="0", steps=40)
        assert plan.study == f"bench_{kind}"
        assert plan.spec.seeds == (0,) and plan.spec.recipe_settings["steps"] == 40
        assert plan.spec.axes[kind][-1]["label"] == plan.label
        assert plan.plugins == ((module,) if module == "swap.py" else ())


def test_a_decoder_that_joins_blocks_comes_without_the_enhancer(
    here: Path, mfuser: Callable
) -> None:
    (here / "registry.toml").unlink()
    ran = mfuser("plugin", "bench", "eomt", "--component", "eomt", "--dry-run")
    assert ran.code == 0, ran.err
    plan = bench.prepared("eomt", bench.offered("eomt", "text_eomt"), ["blocks=2"])
    assert plan.spec.axes["decoder"][-1]["set"] == {
        "decoder": {"name": "text_eomt", "blocks": 2},
        "enhancer": "none",
    }


def test_what_cannot_be_measured_is_refused(here: Path, mfuser: Callable) -> None:
    for arguments, said in (
        (["streets"], "offers no part of a kind that is measured (fusion, enhancer"),
        (["swap.py", "--component", "swop"], "offers no 'swop'; did you mean 'swap'"),
        (["nothing_of_this_name"], "nothing_of_this_name"),
        (["swap.py", "--seeds", "a"], "'a' is not a whole number"),
        (["swap.py", "--set", "shares=1", "--dry-run"], "shares"),
    ):
        ran = mfuser("plugin", "bench", *arguments)
        assert ran.code == 2 and said in ran.err, ran.err
    assert not (here / "bench").exists()
    with pytest.raises(PluginError):
        bench.offered("streets", None)
    component = bench.offered("swap.py", None)
    with pytest.raises((RegistryError, MFuserError), match="share"):
        from mfuser.study import grid

        plan = bench.prepared("swap.py", component, ["share='a'"])
        grid.variants(plan.registry, plan.study, plan.spec)


def test_a_file_that_is_not_a_record_is_named(tmp_path: Path) -> None:
    assert "No part has been measured yet" in bench.leaderboard(tmp_path)
    (tmp_path / "x.json").write_text("{}", "utf-8")
    with pytest.raises(MFuserError, match=r"x.json is not a record of `mfuser plugin bench`"):
        bench.leaderboard(tmp_path)


def test_the_page_that_ships_is_made_of_its_records(root: Path) -> None:
    made = bench.leaderboard(root / "docs" / "leaderboard")
    assert (root / "docs" / "leaderboard.md").read_text("utf-8") == made, (
        "run `python -m mfuser.study.bench docs/leaderboard > docs/leaderboard.md`"
    )
