"""Inferences on a model and on a network of a few numbers; the model is left as it was."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mfuser import DGSSModel, InferenceSpec, MFuserError, Network, Registry, build_model, components
from mfuser.engine.inference import of_record
from mfuser.model.network import TrainedNetwork
from mfuser.testing.stand_ins import StandIn

SIZE = (101, 133)


def spec(name: str, **options: Any) -> InferenceSpec:
    found = components("inference")[name].model_validate({"name": name, **options})
    assert isinstance(found, InferenceSpec)
    return found


def ask(network: Network, images: Tensor, name: str, **options: Any) -> Tensor:
    inference = spec(name, **options).build()
    with torch.no_grad():
        return inference(network, images)


@pytest.fixture(scope="module")
def model(tiny: Registry) -> DGSSModel:
    return build_model("tiny", tiny)


@pytest.fixture(scope="module")
def network() -> StandIn:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return StandIn()


# ---- one against the other


@pytest.mark.parametrize("options", [{}, {"stride": [20, 30]}, {"window_batch": 3}], ids=str)
def test_sliding_is_what_segment_does(model: DGSSModel, options: dict[str, Any]) -> None:
    images = torch.rand(2, 3, *SIZE)
    expected = model.segment(images, **{"window_batch": "auto", **options})
    assert torch.equal(model.segment_by(spec("sliding", **options).build(), images), expected)


def test_whole_at_the_windows_size_is_sliding(model: DGSSModel) -> None:
    images = torch.rand(1, 3, *model.spec.image_size)
    assert torch.equal(model.segment_by(spec("whole").build(), images), model.segment(images))


def test_whole_at_any_size_is_a_model_built_for_it(tiny: Registry, model: DGSSModel) -> None:
    """101 x 133 pixels: 7 x 9 patches of 16, the last ones filled by repeating the border."""
    larger = build_model("tiny", tiny, image_size=[112, 144])
    images = torch.rand(2, 3, *SIZE)
    got = model.segment_by(spec("whole").build(), images)
    expected = larger.segment(F.pad(images, (0, 11, 0, 11), mode="replicate"))
    torch.testing.assert_close(got, expected[..., :101, :133], rtol=1e-4, atol=1e-5)
    small = torch.rand(1, 3, 9, 40)  # no window, not even a patch
    linear = build_model("lone", tiny)
    assert linear.segment_by(spec("whole").build(), small).shape == (1, 19, 9, 40)


def test_one_scale_without_its_mirror_image_is_the_inner_inference(network: StandIn) -> None:
    images = torch.rand(2, 3, 41, 67)
    got = ask(network, images, "multi_scale_flip", scales=[1.0], flip=False)
    assert torch.equal(got, ask(network, images, "sliding"))
    got = ask(network, images, "multi_scale_flip", scales=[1.0], flip=False, inner="whole")
    assert torch.equal(got, ask(network, images, "whole"))


def test_scales_and_mirror_images_are_averaged(network: StandIn) -> None:
    images = torch.rand(2, 3, 40, 64)
    got = ask(network, images, "multi_scale_flip", scales=[1.0, 0.75], inner="whole")
    total = torch.zeros(2, 3, 40, 64)
    for size, antialias in (((40, 64), False), ((30, 48), True)):
        given = F.interpolate(images, size, mode="bilinear", antialias=antialias)
        for mirrored in (False, True):
            scores = ask(network, given.flip(-1) if mirrored else given, "whole")
            scores = scores.flip(-1) if mirrored else scores
            total += F.interpolate(scores, (40, 64), mode="bilinear")
    torch.testing.assert_close(got, total / 4)


def test_coarse_to_fine_between_its_ends(network: StandIn) -> None:
    images = torch.rand(3, 3, 41, 67)
    small = F.interpolate(images, (20, 34), mode="bilinear", antialias=True)
    coarse = F.interpolate(ask(network, small, "whole"), (41, 67), mode="bilinear")
    fine = ask(network, images, "sliding")
    assert (coarse - fine).abs().max() > 1e-2
    nothing = ask(network, images, "coarse_to_fine", threshold=0)
    torch.testing.assert_close(nothing, coarse)
    everything = ask(network, images, "coarse_to_fine", threshold=1)
    torch.testing.assert_close(everything, fine)
    confidence = network.confidence(coarse)
    threshold = float(confidence.median())
    some = ask(network, images, "coarse_to_fine", threshold=threshold, share=0)
    uncertain = (confidence <= threshold).unsqueeze(1)
    assert 0.4 < uncertain.float().mean() < 0.6
    # Every uncertain pixel lies in windows that are asked again, if not in all that cover it.
    torch.testing.assert_close(some.where(~uncertain, fine), coarse.where(~uncertain, fine))
    assert ((some != coarse) | ~uncertain).all()
    no_window_is_uncertain_throughout = ask(
        network, images, "coarse_to_fine", threshold=threshold, share=1
    )
    torch.testing.assert_close(no_window_is_uncertain_throughout, coarse)


def test_only_uncertain_windows_of_each_image_are_asked_again(network: StandIn) -> None:
    """An image is not segmented again because another one in its batch is uncertain."""
    asked: list[int] = []
    scores = network.scores

    class Counting(StandIn):
        def scores(self, images: Tensor) -> Tensor:
            if tuple(images.shape[-2:]) == self.window:
                asked.append(len(images))
            return scores(images)

        def confidence(self, scores: Tensor) -> Tensor:
            sure = torch.ones(len(scores), *scores.shape[-2:])
            sure[0, :10, :10] = 0  # the first image, its corner
            return sure

    ask(Counting(), torch.rand(2, 3, 48, 96), "coarse_to_fine", threshold=0.5, stride=[24, 32])
    assert asked == [1]


@pytest.fixture(scope="module")
def half(tiny: Registry) -> DGSSModel:
    return build_model("lone", tiny).to(torch.bfloat16)


@pytest.mark.parametrize("name", ["sliding", "whole", "multi_scale_flip", "coarse_to_fine"])
def test_half_precision_and_single_images(half: DGSSModel, name: str) -> None:
    model = half
    inference = spec(name, **({"scales": [1.0, 1.5]} if name == "multi_scale_flip" else {})).build()
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    scores = model.segment_by(inference, image)
    assert scores.shape == (1, 19, *SIZE) and scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert model.segment_by(inference, torch.rand(0, 3, *SIZE)).shape == (0, 19, *SIZE)


# ---- the model stays as it was


def test_a_training_goes_on_as_if_nothing_had_been_segmented(tiny: Registry) -> None:
    """Positions that train are resampled for the image, in a copy: the optimizer keeps its own."""
    ends = []
    for interrupted in (False, True):
        model = build_model("plain", tiny, vfm={"freeze": False}, vlm={"freeze": False}).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for step in range(2):
            torch.manual_seed(step)
            losses = model(torch.rand(1, 3, 64, 96), torch.randint(0, 19, (1, 64, 96)))
            torch.stack(list(losses.values())).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if interrupted:
                for size in ((112, 144), (96, 64)):  # the latter has as many patches as the window
                    model.segment_by(spec("whole").build(), torch.rand(1, 3, *size))
        assert model.training
        ends.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_trained_positions_are_those_that_are_resampled(tiny: Registry) -> None:
    model = build_model("tiny", tiny, vfm={"freeze": False})
    images = torch.rand(1, 3, 112, 144)
    before = model.segment_by(spec("whole").build(), images)
    with torch.no_grad():
        model.encoder.vfm.model.pos_embed.mul_(3)  # type: ignore[union-attr]
    after = model.segment_by(spec("whole").build(), images)
    assert (after - before).abs().max() > 1e-4


def test_a_copy_takes_little_memory(model: DGSSModel) -> None:
    from mfuser.model.network import resized

    own = {p.data_ptr() for p in model.parameters()}
    copied = resized(model, (112, 144))
    new = [p for p in copied.parameters() if p.data_ptr() not in own]
    assert {id(p) for p in copied.decoder.parameters()} == {
        id(p) for p in model.decoder.parameters()
    }
    vfm = model.encoder.vfm
    assert vfm is not None and vfm.image_size == (64, 96)
    linear = sum(m.weight.numel() for m in vfm.modules() if isinstance(m, torch.nn.Linear))
    assert sum(p.numel() for p in new) < sum(p.numel() for p in model.parameters()) - linear


# ---- what makes no sense


def test_sizes_are_refused_before_anything_is_run(network: StandIn) -> None:
    cases: list[tuple[str, dict[str, Any], tuple[int, int], str]] = [
        ("sliding", {}, (20, 30), "an image of 20x30 pixels is smaller than the window of 24x32"),
        ("sliding", {"stride": 40}, (48, 64), "a stride of 40x40 leaves gaps"),
        ("multi_scale_flip", {}, (40, 60), "at scale 0.5: an image of 20x30 pixels is smaller"),
        ("coarse_to_fine", {}, (20, 60), "an image of 20x60 pixels is smaller than the window"),
        ("coarse_to_fine", {"coarse": "sliding"}, (40, 60), "at scale 0.5: an image of 20x30"),
    ]
    for name, options, size, reason in cases:
        with pytest.raises(MFuserError, match=reason):
            spec(name, **options).build().check(network, size)
    spec("whole").build().check(network, (5, 7))


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("multi_scale_flip", {"scales": []}, "at least 1 item"),
        ("multi_scale_flip", {"scales": [1.0, 1.0]}, "a scale is given twice"),
        ("multi_scale_flip", {"scales": [-1.0]}, "greater than 0"),
        ("multi_scale_flip", {"inner": "sidling"}, "no inference component is called 'sidling'"),
        ("coarse_to_fine", {"scale": 2}, "less than or equal to 1"),
        ("coarse_to_fine", {"threshold": 1.5}, "less than or equal to 1"),
        ("whole", {"stride": 3}, "stride"),
    ],
)
def test_options_that_make_no_sense(name: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        spec(name, **options)


def test_a_part_of_one_size_is_named(tiny: Registry) -> None:
    model = build_model("lone", tiny)
    weights = torch.nn.Parameter(torch.ones(24, 1))  # of the 4 x 6 patches of the window

    def fixed(module: Any, args: Any, output: Any) -> Any:
        return output.masks[0].flatten(2) * weights[:, 0] and output

    model.decoder.register_forward_hook(fixed)
    with pytest.raises(MFuserError, match=r"at the size of its window alone \(64x96\), and was"):
        model.segment_by(spec("whole").build(), torch.rand(1, 3, 112, 144))


# ---- on the command line


def protocol(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))["protocol"]
    return found


@pytest.fixture
def registry_file(write_registry: Any) -> Path:
    path: Path = write_registry()
    return path


def test_the_stride_of_a_recorded_recipe(tiny: Registry, begin: Any) -> None:
    """What predict, serve and visualize ask a run for: as evaluate, that of its recipe."""
    record = begin("plain", "stride=[30, 40]").model_dump(mode="json")
    assert of_record(tiny, record, "r").stride == (30, 40)
    assert of_record(tiny, record, "r", stride=(20, 20)).stride == (20, 20)
    assert of_record(tiny, {"recipe": {}}, "r").stride is None


def test_evaluate_by_another_inference(
    mfuser: Any, trained: Path, registry_file: Path, tmp_path: Path
) -> None:
    run = ("evaluate", trained, "--registry", registry_file, "--targets", "toy", "--limit", 1)
    options = ("--set", "inference.scales=[1.0, 1.5]", "--set", "inference.flip=false")
    done = mfuser(*run, "--out", tmp_path / "a", "--inference", "multi_scale_flip", *options)
    assert done.code == 0, done.err
    told = (
        "window 64x96; inference multi_scale_flip (scales 1/1.5, flip no, inner sliding (stride "
        "43x64, window_batch auto))"
    )
    assert told in done.out and told in (tmp_path / "a/report.md").read_text("utf-8")
    assert protocol(tmp_path / "a")["inference"] == {
        "name": "multi_scale_flip",
        "scales": [1.0, 1.5],
        "flip": False,
        "inner": {"name": "sliding", "stride": [43, 64], "window_batch": "auto"},
    }
    batched = ("--set", "inference.window_batch=2")
    done = mfuser(*run, "--out", tmp_path / "b", "--stride", 30, *batched)
    assert "window 64x96; inference sliding (stride 30x30, window_batch 2)" in done.out
    for given, reason in (
        (("--inference", "whole", "--stride", 30), "inference 'whole' has none of its own; leave"),
        (
            ("--inference", "multi_scale_flip", "--stride", 30),
            "has none of its own; --set inference.inner.stride=… or leave it out",
        ),
        (("--inference", "hole"), "no inference component is called 'hole'"),
        (("--inference", "whole", "--set", "inference.flip=true"), "--set inference: flip: there"),
        (("--inference", "multi_scale_flip"), "toy, game_val_0_00000: at scale 0.5: an image of"),
    ):
        refused = mfuser(*run, "--out", tmp_path / "d", *given)
        assert refused.code == 2 and reason in refused.err, refused.err
        assert len(refused.err.strip().splitlines()) == 1 or "game_val" in reason


def test_a_recipe_names_the_inference_of_its_runs(
    begin: Any, tiny: Registry, trained: Path, tmp_path: Path
) -> None:
    import shutil

    from mfuser.config.run import RunSpec
    from mfuser.engine.evaluate import evaluate
    from mfuser.engine.folder import RUN, read_run

    run = begin("plain", "inference=whole", "test_images=1")
    shutil.copytree(trained, tmp_path / "run")
    from mfuser.engine import checkpoints

    saved = checkpoints.read(tmp_path / "run" / "model.safetensors")
    saved.meta["run"] = run.model_dump(mode="json")
    checkpoints.write(tmp_path / "run" / "model.safetensors", saved)
    (tmp_path / "run" / RUN).write_text(json.dumps(saved.meta["run"]), "utf-8")
    assert read_run(tiny, tmp_path / "run") == run
    assert isinstance(run, RunSpec)
    report = evaluate(tiny, tmp_path / "run")
    assert report.protocol["inference"] == {"name": "whole"}
    assert "window 64x96; inference whole;" in report.markdown()
    report = evaluate(tiny, tmp_path / "run", inference="sliding")
    assert report.protocol["inference"]["stride"] == [43, 64]
    with pytest.raises(MFuserError, match="'stride' is of the sliding window that is used without"):
        begin("plain", "inference=whole", "stride=30")


def test_predict_takes_photographs_of_any_size_whole(
    mfuser: Any, trained: Path, registry_file: Path, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("RGB", (50, 40), "gray").save(tmp_path / "small.png")
    run = ("predict", trained, tmp_path / "small.png", "--registry", registry_file)
    refused = mfuser(*run, "--out", tmp_path / "out")
    assert refused.code == 2 and "small.png: an image of 40x50 pixels is smaller" in refused.err
    done = mfuser(*run, "--out", tmp_path / "out", "--inference", "whole")
    assert done.code == 0, done.err
    assert Image.open(tmp_path / "out" / "small.mask.png").size == (50, 40)


def test_the_network_says_how_sure_it_is(model: DGSSModel, half: DGSSModel) -> None:
    scores = torch.rand(2, 19, 4, 5)
    logits = TrainedNetwork(half).confidence(scores)
    torch.testing.assert_close(logits, scores.softmax(1).amax(1))
    shares = TrainedNetwork(model).confidence(scores)
    torch.testing.assert_close(shares, (scores / scores.sum(1, keepdim=True)).amax(1))
