"""The conformance suite: every built-in component keeps to it, and it finds what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mfuser import Dataset, DatasetSpec, FusionAdapter, FusionSpec, MFuserError, Sample
from mfuser.plugins.discovery import load_components
from mfuser.testing import Report, check_component, check_plugin, conforms
from mfuser.testing.verdict import judge

COMPONENTS = [(c.kind, c.name) for c in load_components()]


@pytest.mark.parametrize(("kind", "name"), COMPONENTS, ids=[f"{k}-{n}" for k, n in COMPONENTS])
def test_built_in_components_conform(kind: str, name: str) -> None:
    # One pairing each: `mfuser plugin check` tries them all.
    conforms(load_components().kind(kind)[name].spec, pairings=1)


class Fault(FusionAdapter):
    """A sound adapter; `how` breaks one promise of it."""

    def __init__(self, how: str, vfm: Any, vlm: Any) -> None:
        super().__init__()
        self.how = how
        self.to_vfm = nn.Linear(vlm.embed_dim, vfm.embed_dim)
        self.to_vlm = nn.Linear(vfm.embed_dim, vlm.embed_dim)
        self.plain = torch.randn(vfm.embed_dim)
        if how == "unused":
            self.spare = nn.Parameter(torch.zeros(3))
        if how == "numpy":
            nn.init.constant_(self.to_vfm.bias, float(np.random.default_rng().random()))

    def forward(
        self, vfm_tokens: Tensor, vlm_tokens: Tensor, vfm_grid: Any = None, vlm_grid: Any = None
    ) -> tuple[Tensor, Tensor]:
        vfm = self.to_vfm(vlm_tokens.mean(1, keepdim=True)).expand_as(vfm_tokens)
        vlm = self.to_vlm(vfm_tokens.mean(1, keepdim=True)).expand_as(vlm_tokens)
        if self.how == "shape":
            vlm = vlm[:, 1:]
        elif self.how == "in place":
            vfm_tokens += 1
        elif self.how == "nan":
            vfm = vfm / torch.zeros(1, device=vfm.device)
        elif self.how == "random":
            vfm = vfm + torch.rand_like(vfm)
        elif self.how == "batch":
            vfm = vfm - vfm.mean(0)
        elif self.how == "unregistered":
            vfm = vfm + self.plain.to(vfm)
        elif self.how == "device":
            vfm = vfm + torch.ones(vfm.shape[-1], dtype=vfm.dtype)
        elif self.how == "dtype":
            vfm = vfm.float()
        elif self.how == "detached":
            vfm, vlm = vfm.detach(), vlm.detach()
        return vfm, vlm


def faulty(how: str) -> type[FusionSpec]:
    class FaultSpec(FusionSpec, name="fault"):
        """A fault."""

        def build(self, vfm: Any, vlm: Any) -> Fault:
            return Fault(how, vfm, vlm)

    return FaultSpec


@pytest.mark.parametrize(
    ("how", "check", "said"),
    [
        ("shape", "shapes at odd sizes", "vlm_offset: shape (1, 7, 32)"),
        ("in place", "shapes at odd sizes", "the inputs have changed"),
        ("nan", "shapes at odd sizes", "has NaN or infinity"),
        ("random", "determinism", "draw random numbers only while self.training"),
        ("numpy", "determinism", "initialize with torch's generator"),
        ("batch", "training and evaluation", "never mix over the batch axis"),
        ("unregistered", "state dict", "make it an nn.Parameter or a persistent buffer"),
        ("dtype", "dtypes", "vfm_offset is torch.float32"),
        ("device", "devices", "register_buffer"),
        ("unused", "gradients", "no gradient reaches 'spare'"),
        ("detached", "gradients", "look for no_grad(), detach()"),
    ],
)
def test_faults_are_found_and_the_fix_is_named(how: str, check: str, said: str) -> None:
    report = check_component(faulty(how), pairings=0)
    verdicts = {v.check: v for v in report.failed}
    assert check in verdicts, report
    verdict = verdicts[check]
    assert said in str(verdict)
    assert verdict.tried and verdict.got and verdict.expected and verdict.fix


def test_sound_adapter_passes() -> None:
    class Sound(Fault):
        def __init__(self, vfm: Any, vlm: Any) -> None:
            super().__init__("", vfm, vlm)

    class SoundSpec(FusionSpec, name="sound"):
        """Nothing is wrong with it."""

        def build(self, vfm: Any, vlm: Any) -> Sound:
            return Sound(vfm, vlm)

    assert conforms(SoundSpec, pairings=2).passed


def test_conforms_raises_with_all_that_failed() -> None:
    with pytest.raises(AssertionError, match="fusion 'fault' does not conform") as error:
        conforms(faulty("unused"), pairings=0)
    assert "expected" in str(error.value) and "fix" in str(error.value)


def test_in_a_pairing_the_wrong_shape_is_named() -> None:
    report = check_component(faulty("shape"), pairings=1)
    (verdict,) = [v for v in report.failed if v.check.startswith("with ")]
    assert "fusion 'fault' (plugin " in verdict.got
    assert "the offset of the vlm has shape" in verdict.got


def spec_with(**members: Any) -> type[FusionSpec]:
    """A fusion spec of these class members and annotations."""

    class Base(FusionSpec, name="options"):
        """Options."""

        tiny: ClassVar[dict[str, Any]] = {}
        heads: int = 4

        def build(self, vfm: Any, vlm: Any) -> Any:
            return members["build"](self, vfm, vlm)

    return Base


def failures(report: Report) -> dict[str, str]:
    return {v.check: str(v) for v in report.failed}


def test_bad_options_that_crash_are_found() -> None:
    def build(self: Any, vfm: Any, vlm: Any) -> Any:
        nn.MultiheadAttention(vfm.embed_dim, self.heads)  # asserts that heads divide the width
        return Fault("", vfm, vlm)

    found = failures(check_component(spec_with(build=build), pairings=0))
    assert "heads = -1" in found["bad options"] or "heads = 0" in found["bad options"]
    assert "PositiveInt" in found["bad options"]


def test_bad_options_that_are_refused_pass() -> None:
    def build(self: Any, vfm: Any, vlm: Any) -> Any:
        if self.heads < 1 or vfm.embed_dim % self.heads:
            raise MFuserError(f"heads = {self.heads} do not divide the width {vfm.embed_dim}")
        return Fault("", vfm, vlm)

    assert "bad options" not in failures(check_component(spec_with(build=build), pairings=0))


def test_a_required_option_without_tiny_is_explained() -> None:
    class NeedySpec(FusionSpec, name="needy"):
        """Needs a width."""

        width: int

        def build(self, vfm: Any, vlm: Any) -> None:
            return None

    text = failures(check_component(NeedySpec))["tiny options"]
    assert "width: missing; fusion 'needy' needs it" in text and "NeedySpec.tiny" in text


def test_help_is_asked_for() -> None:
    class MuteSpec(FusionSpec, name="mute"):
        def build(self, vfm: Any, vlm: Any) -> None:
            return None

    assert "there is none" in failures(check_component(MuteSpec, pairings=0))["help"]


class Bad(Dataset):
    classes = ("road", "sky")
    class_ids = (0, 1)

    def __init__(self, how: str) -> None:
        self.how = how
        self.reads = 0

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < 2:
            raise IndexError(index)
        self.reads += 1
        image = np.zeros((4, 6, 3), np.uint8 if self.how != "image" else np.float32)
        label = np.zeros((4, 6), np.int64 if self.how != "dtype" else np.uint8)
        if self.how == "values":
            label[0, 0] = 7
        if self.how == "augments":
            image[0, 0, 0] = self.reads
        return Sample(image, label, "same" if self.how == "names" else str(index))

    def name(self, index: int) -> str:
        return "same" if self.how == "names" else str(index)

    def image_file(self, index: int) -> Path | None:
        other = Path(__file__).parents[3] / "docs" / "demo.png"
        return other if self.how == "file" else None

    def fingerprint(self) -> str:
        return "bad"


@pytest.mark.parametrize(
    ("how", "check", "said"),
    [
        ("image", "samples", "an image of float32"),
        ("dtype", "samples", "a label of uint8"),
        ("values", "samples", "the label values [7]"),
        ("names", "names and classes", "'same' twice"),
        ("file", "names and classes", "other pixels"),
        ("augments", "repeatable", "augmentation is the recipe's business"),
    ],
)
def test_faults_of_datasets_are_found(how: str, check: str, said: str) -> None:
    class BadSpec(DatasetSpec, name="bad"):
        """A dataset with a fault."""

        needs_root: ClassVar[bool] = False

        def build(self, root: Path | None, split: str) -> Bad:
            return Bad(how)

    found = failures(check_component(BadSpec))
    assert list(found) == [check] and said in found[check]


def test_a_dataset_that_crashes_without_data_is_found() -> None:
    class RashSpec(DatasetSpec, name="rash"):
        """Reads whatever lies there."""

        def build(self, root: Path | None, split: str) -> Bad:
            sorted((root / split).iterdir())  # type: ignore[operator]
            return Bad("")

    report = check_component(RashSpec)
    assert "TypeError" in failures(report)["missing data"]
    skipped = {v.check: v for v in report.verdicts if v.outcome == "skipped"}
    assert "--data-root rash=FOLDER" in str(skipped["samples"])


def test_an_exception_names_the_authors_line() -> None:
    def check() -> str:
        """What was tried"""
        raise KeyError("lost")

    (verdict,) = judge([("a check", check)], Fault)
    assert verdict.outcome == "failed" and verdict.tried == "What was tried"
    assert "KeyError" in verdict.got and "test_testing.py, line" in verdict.fix


@pytest.mark.parametrize("name", ["no_fusion", "mfuser_plugins.fusion.none"])
def test_plugin_by_its_name_and_by_its_module(name: str) -> None:
    (report,) = check_plugin(name, pairings=1)
    assert (report.kind, report.name) == ("fusion", "none") and report.passed


def test_plugin_that_is_not_there() -> None:
    with pytest.raises(MFuserError, match="there is no module 'nothing_here'"):
        check_plugin("nothing_here")


def crashing() -> type[FusionSpec]:
    def build(self: Any, vfm: Any, vlm: Any) -> Any:
        return nn.MultiheadAttention(7, 2)  # 2 heads do not divide 7: torch raises

    return spec_with(build=build)


def test_one_fault_is_printed_once_with_what_it_stopped() -> None:
    report = check_component(crashing(), pairings=2)
    assert len(report.failed) > 8 and len(report.faults) == 1
    text = str(report)
    assert text.count("FAIL") == 1 and text.count("embed_dim must be divisible") == 1
    (stopped,) = [line for line in text.split("\n") if "stopped" in line]
    for verdict in report.failed[1:]:
        assert verdict.check in stopped
    # For machines each check keeps its own verdict.
    checks = {c["check"]: c["outcome"] for c in report.as_json()["checks"]}
    assert checks["determinism"] == checks["gradients"] == "failed"


def test_causes_point_into_the_plugin() -> None:
    """Not into torch, which raised, nor into our code, which found a wrong result."""
    for spec in (crashing(), faulty("shape")):
        for verdict in check_component(spec, pairings=1).failed:
            named = [text for text in (verdict.got, verdict.fix) if ", line " in text]
            assert all(f"{__file__}, line " in text for text in named), verdict
            assert named or verdict.check not in ("determinism", "with tuning lora")


def test_two_faults_are_two() -> None:
    report = check_component(faulty("unused"), pairings=0)
    assert [f[0].check for f in report.faults] == ["gradients"]
    report = check_component(faulty("dtype"), pairings=0)
    assert {f[0].check for f in report.faults} == {v.check for v in report.failed}


def test_a_taken_name_is_a_finding_among_others() -> None:
    class Taken(Fault):
        def __init__(self, vfm: Any, vlm: Any) -> None:
            super().__init__("", vfm, vlm)

    class TakenSpec(FusionSpec, name="mvfuser"):
        """Has a name that is taken."""

        def build(self, vfm: Any, vlm: Any) -> Taken:
            return Taken(vfm, vlm)

    report = check_component(TakenSpec, pairings=1)
    assert list(failures(report)) == ["name"]
    text = failures(report)["name"]
    assert "'mvfuser' is also offered by plugin 'mvfuser'" in text
    assert 'class TakenSpec(FusionSpec, name="…")' in text
    assert len(report.verdicts) > 12  # all else is checked, with this component in its place
    # Where nothing is wrong with a name, nothing is said.
    assert "name" not in failures(check_component(faulty("nan"), pairings=0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda: torch.manual_seed(0), "changed the seed of torch's random generator"),
        (lambda: np.random.random(), "changed NumPy's random generator"),
        (lambda: torch.set_default_dtype(torch.float64), "changed the default dtype"),
    ],
)
def test_a_build_that_changes_the_process_is_found(change: Any, said: str) -> None:
    def build(self: Any, vfm: Any, vlm: Any) -> Any:
        change()
        return Fault("", vfm, vlm)

    found = failures(check_component(spec_with(build=build), pairings=0))
    assert said in found["global state"] and "--seed" in found["global state"]
    assert torch.get_default_dtype() == torch.float32
