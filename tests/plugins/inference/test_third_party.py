"""A stranger's inference, in a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mfuser.testing import check_plugin

PLUGIN = '''
from mfuser import Inference, InferenceSpec, hookimpl


class Center(Inference):
    """The window in the middle; around it the class of the margin."""

    def __init__(self, margin):
        self.margin = margin

    def __call__(self, network, images):
        top = (images.shape[-2] - network.window[0]) // 2
        left = (images.shape[-1] - network.window[1]) // 2
        place = (..., slice(top, top + network.window[0]), slice(left, left + network.window[1]))
        inside = network.scores(images[place])
        scores = inside.new_full((*inside.shape[:2], *images.shape[-2:]), -1e4)
        scores[:, self.margin] = 0
        scores[place] = inside
        return scores


class CenterSpec(InferenceSpec, name="center"):
    """The window in the middle alone.

    margin: the class of all that lies outside.
    """

    margin: int = 0

    def build(self):
        return WRONG if self.margin == 99 else Center(self.margin)


WRONG = "no inference"


@hookimpl
def mfuser_components():
    return [CenterSpec]
'''


def test_from_a_file(mfuser: Any, trained: Path, write_registry: Any, tmp_path: Path) -> None:
    file = tmp_path / "center.py"
    file.write_text(PLUGIN, "utf-8")
    run = ("evaluate", trained, "--registry", write_registry(), "--plugin", file)
    run = (*run, "--targets", "toy", "--limit", 1, "--out", tmp_path / "out")
    done = mfuser(*run, "--inference", "center")
    assert done.code == 0 and "inference center (margin 0)" in done.out, done.err
    refused = mfuser(*run, "--inference", "center", "--set", "inference.margin=99")
    assert refused.code == 2
    assert "inference 'center'" in refused.err and "not an Inference" in refused.err
    listed = mfuser("list", "inference", "--plugin", file)
    assert "center" in listed.out and "The window in the middle alone." in listed.out


def test_the_suite_finds_what_is_wrong_with_it(tmp_path: Path, monkeypatch: Any) -> None:
    """It takes images smaller than the window and does not say so; a class that is not there."""
    (tmp_path / "stranger_center.py").write_text(PLUGIN, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    (report,) = check_plugin("stranger_center", pairings=1)
    assert {v.check for v in report.failed} == {"bad options"}, report
