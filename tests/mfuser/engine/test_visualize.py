"""Pictures of what a model sees: what is drawn is what the model computes, in the image's place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mfuser import Registry, build_model
from mfuser.config.run import domains
from mfuser.engine.checkpoints import load_model
from mfuser.engine.inputs import find
from mfuser.engine.similarity import similarity
from mfuser.engine.visualize import Canvas, before, pca
from mfuser.errors import DataError
from mfuser.model.sliding_window import blended
from mfuser.reporting import draw
from mfuser.reporting.pca import Components

SEED = torch.Generator().manual_seed(0)
TURNED = 6
"""EXIF: shown a quarter turn clockwise."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photographs of unequal sizes, one of them turned and smaller than the window."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 9, 3), np.uint8))
    coarse.resize((120, 80), Image.Resampling.BICUBIC).save(folder / "a.png")
    exif = Image.Exif()
    exif[0x0112] = TURNED
    coarse.resize((60, 50), Image.Resampling.BICUBIC).save(folder / "b.jpg", exif=exif)
    return folder


@pytest.fixture
def run(mfuser: Callable[..., Any], write_registry: Callable[..., Path], tmp_path: Path) -> Any:
    """`mfuser visualize …` with the tiny registry into tmp_path/out; returns its JSON."""

    def call(*arguments: object) -> Any:
        registry = ("--registry", write_registry(), "--out", tmp_path / "out", "--json")
        done = mfuser("visualize", *arguments, *registry)
        assert done.code == 0, done.err
        return json.loads(done.out)

    return call


def shown(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_pca_of_a_pairing(run: Any, photos: Path, tmp_path: Path) -> None:
    written = run("pca", "tiny", photos)
    stages = ["vfm-before", "vfm-after", "vlm-before", "vlm-after"]
    assert [list(entry["pictures"]) for entry in written["images"]] == [stages, stages]
    a, b = written["images"]
    assert {shown(p).shape for p in a["pictures"].values()} == {(80, 120, 3)}
    assert {shown(p).shape for p in b["pictures"].values()} == {(60, 50, 3)}  # upright
    assert shown(written["sheets"][0]).shape[1] == 5 * 384 + 4 * 4
    picture = shown(a["pictures"]["vfm-before"]).reshape(-1, 3).astype(float)
    assert (picture.std(0) > 20).all()
    # Pictures drawn earlier are not inputs when the folder is searched again.
    with pytest.raises(DataError, match="holds no images"):
        find([tmp_path / "out"])


def test_before_is_the_encoder_for_itself(tiny: Registry, photos: Path, tmp_path: Path) -> None:
    model, towers = build_model("tiny", tiny), build_model("tiny", tiny, fusion="none")
    for adapter in model.encoder.adapters.values():
        adapter.mvfuser.scale.data.fill_(5.0)
        for layer in adapter.modules():  # ends that map widths start at zero
            if isinstance(layer, torch.nn.Linear) and not layer.weight.any():
                torch.nn.init.normal_(layer.weight)
    assert before(model, 0) is model
    paths = find([photos]).images
    fused = pca(model, model, paths, Canvas(tmp_path / "fused"))["images"][0]["pictures"]
    alone = pca(towers, towers, paths, Canvas(tmp_path / "alone"))["images"][0]["pictures"]
    assert list(alone) == ["vfm-after", "vlm-after"]  # nothing is between before and after
    for role in ("vfm", "vlm"):
        first, last = shown(fused[f"{role}-before"]), shown(fused[f"{role}-after"])
        assert np.abs(first - shown(alone[f"{role}-after"]).astype(int)).max() <= 1
        assert np.abs(first - last.astype(int)).mean() > 1


def test_before_undoes_training_of_the_encoders(tiny: Registry) -> None:
    model = build_model("tiny", tiny, vfm={"freeze": False}, tuning={"name": "lora"}, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    start = before(model, 3)
    wanted = build_model("tiny", tiny, vfm={"freeze": False}, seed=3)
    for role, tower in wanted.encoder.backbones.items():
        found = start.encoder.backbones[role].state_dict()
        assert all(torch.equal(found[name], value) for name, value in tower.state_dict().items())


def test_components_are_those_of_the_covariance() -> None:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(500, 8, generator=rng) * torch.tensor([9.0, 1, 5, 1, 1, 7, 1, 1]) + 3
    found = Components.of(features)
    covariance = torch.cov(features.T)
    values, vectors = torch.linalg.eigh(covariance)
    assert torch.allclose(
        (found.directions @ vectors.flip(1)[:, :3]).abs(), torch.eye(3), atol=1e-3
    )
    assert torch.allclose(found.spread**2, values.flip(0)[:3], rtol=1e-3)
    assert (found.colors(found.project(features.mean(0))) == 128).all()
    flipped = Components.of(-features).facing(-features, found, features)
    assert torch.allclose(
        flipped.project(-features), found.project(features), atol=1e-3
    )  # one picture, whatever the sign of the features


def test_similarity_maps_have_one_scale(
    run: Any, tiny: Registry, trained: Path, photos: Path
) -> None:
    asked = ("--text", "car", "--text", "a wet road", "--scale", "auto")
    written = run("similarity", trained, photos, *asked)
    model, _ = load_model(trained, tiny)
    pixels = torch.from_numpy(shown(str(photos / "a.png")).copy()).permute(2, 0, 1)
    near = similarity(model, pixels, ["car", "a wet road"])[0]
    for values, title in zip(near, ("car", "a wet road"), strict=True):
        least, most = written["scales"][title]
        assert least - 1e-3 <= values.min() and values.max() <= most + 1e-3
        drawn = shown(written["images"][0]["pictures"][title]).astype(int)
        wanted = draw.heat(values.numpy(), least, most).astype(int)
        assert np.abs(drawn - wanted).mean() < 2
    ends = [shown(entry["pictures"]["car"]) for entry in written["images"]]
    assert ends[1].shape == (60, 50, 3)
    darkest, brightest = draw.heat(np.array([[0.0, 1.0]]), 0, 1)[0].astype(int)
    for end in (darkest, brightest):  # over both images, not in each
        assert min(np.abs(e - end).sum(-1).min() for e in ends) <= 8


def test_similarity_before_fusion(run: Any, photos: Path) -> None:
    written = run("similarity", "tiny", photos, "--text", "car", "--before")
    assert list(written["scales"]) == ["car (vlm alone)", "car (fused)"]
    alone, fused = (shown(p) for p in written["images"][0]["pictures"].values())
    assert np.abs(alone - fused.astype(int)).mean() > 1


def test_compare_runs_on_photographs(run: Any, trained: Path, photos: Path, tiny: Registry) -> None:
    written = run("compare", trained, trained / "last.safetensors", photos, "--width", 120)
    model, _ = load_model(trained, tiny)
    photograph = shown(str(photos / "a.png"))
    ids = model.segment(torch.from_numpy(photograph.copy()).permute(2, 0, 1))[0].argmax(0).numpy()
    wanted = draw.color(ids, draw.palette(model.classes))
    sheet = shown(written["sheets"][0])
    top = sheet[18 : 18 + 80]
    assert (top[20:, :120] == photograph[20:]).all()  # its name is over the corner
    for column in (1, 2):
        assert (top[:, column * 124 : column * 124 + 120] == wanted).all()
    assert written["images"] == ["a", "b"]


def test_compare_beside_the_target(run: Any, trained: Path, tiny: Registry) -> None:
    written = run("compare", trained, "--dataset", "toy", "--count", 2, "--width", 96)
    dataset = domains(tiny, "toy")[0].build(tiny, "val")
    assert written["images"] == [dataset.name(0), dataset.name(len(dataset) - 1)]
    sheet = shown(written["sheets"][0])
    table = draw.palette(dataset.classes)
    assert (sheet[18 : 18 + 64, 100 : 100 + 96] == table[dataset[0].label]).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["pca", "tinny", "PHOTOS"], "there is no run folder or checkpoint tinny"),
        (["similarity", "lone", "PHOTOS", "--text", "car"], "no vision-language encoder"),
        (["similarity", "tiny", "PHOTOS", "--text", "word " * 99], "the text encoder cannot take"),
        (["similarity", "tiny", "PHOTOS", "--text", " "], "no text"),
        (["pca", "tiny", "PHOTOS", "--scale", "0.1"], "smaller than the window"),
        (["compare", "PHOTOS"], "none of these is a run"),
        (["compare", "RUN"], "give images, or --dataset NAME"),
        (["compare", "RUN", "PHOTOS", "--dataset", "toy"], "one of the two"),
        (["compare", "RUN", "--dataset", "toi"], "toi"),
    ],
)
def test_bad_input(
    mfuser: Any,
    write_registry: Callable[..., Path],
    trained: Path,
    photos: Path,
    tmp_path: Path,
    arguments: list[str],
    says: str,
) -> None:
    given = [{"PHOTOS": photos, "RUN": trained}.get(a, a) for a in arguments]
    done = mfuser("visualize", *given, "--registry", write_registry(), "--out", tmp_path / "out")
    assert done.code == 2 and says in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_words_become_file_names(run: Any, photos: Path) -> None:
    texts = ("car", "car!", "道路", "../up")
    asked = [part for text in texts for part in ("--text", text)]
    pictures = run("similarity", "tiny", photos / "a.png", *asked)["images"][0]["pictures"]
    assert [Path(p).name for p in pictures.values()] == [
        "a.car-0.similarity.png",
        "a.car-1.similarity.png",
        "a.道路.similarity.png",
        "a.up.similarity.png",
    ]


def test_windows_fade_into_each_other() -> None:
    """Maps that know their place in the window: no step where one begins, no change in between."""

    def slope(windows: torch.Tensor) -> torch.Tensor:
        return torch.linspace(0, 1, 8).expand(len(windows), 1, 8, 8)

    line = blended(slope, torch.rand(1, 3, 8, 32), (8, 8), 4)[0, 0, 0]
    assert line[0] == 0 and line[-1] == 1
    assert line.diff().abs().max() < 0.2  # 0.5 by plain averages
    whole = blended(lambda w: w[:, :1], torch.rand(1, 3, 8, 32, generator=SEED), (8, 8), 3)
    wanted = torch.rand(1, 3, 8, 32, generator=SEED.manual_seed(0))[:, :1]
    assert torch.allclose(whole, wanted, atol=1e-6)
