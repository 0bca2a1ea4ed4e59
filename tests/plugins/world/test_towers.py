"""The towers that ship: whole, known to both libraries, stepped like their big siblings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mfuser
from mfuser.errors import WeightsError
from mfuser_plugins.backbones.open_clip import OpenClipSpec
from mfuser_plugins.backbones.timm import TimmSpec
from mfuser_streets import probe, towers
from mfuser_streets.pretrain.recipe import RECIPES
from mfuser_streets.pretrain.run import digest
from mfuser_streets.world.scenes import WORLD_VERSION

FILES = {name: towers.FOLDER / f"{name}.safetensors" for name in (towers.VFM, towers.VLM)}
SIZE = towers.SIZE


def test_the_files_are_small_and_whole() -> None:
    expected = json.loads(towers.CHECKSUMS.read_text("utf-8"))
    assert {f.name for f in FILES.values()} == set(expected)
    for file in FILES.values():
        assert digest(towers.shipped(file)) == expected[file.name]
        assert {t.dtype for t in load_file(file).values()} == {torch.float16}
    assert sum(f.stat().st_size for f in FILES.values()) < 12e6


@pytest.mark.parametrize(("tower", "name"), [("vfm", towers.VFM), ("vlm", towers.VLM)])
def test_the_files_were_made_by_the_recipe_that_ships(tower: str, name: str) -> None:
    with safe_open(FILES[name], "pt") as file:
        told = json.loads(file.metadata()[towers.TOLD])
    assert told["world"] == WORLD_VERSION
    assert told["recipe"] == RECIPES[tower].as_json()  # type: ignore[index]


@torch.no_grad()
def test_stepping_is_the_libraries_forward() -> None:
    import timm

    images = torch.rand(2, 3, *SIZE)
    vfm = TimmSpec(model=towers.VFM_MODEL, weights=towers.VFM).build(SIZE)
    assert (vfm.mean, vfm.std) != ((0.5,) * 3, (0.5,) * 3) and vfm.license == "apache-2.0"
    own = timm.create_model(f"{towers.VFM_MODEL}.{towers.VFM}", pretrained=True).eval()
    x = vfm.normalize(images)
    stream = vfm.embed(x)
    tokens = stream.tokens
    for i in range(vfm.depth):
        tokens = vfm.block(i, tokens, stream.state)
    assert torch.equal(vfm.finish(tokens, stream.state), own.forward_features(x))


@torch.no_grad()
def test_the_language_tower_is_open_clips() -> None:
    import open_clip

    images = torch.rand(2, 3, *SIZE)
    vlm = OpenClipSpec(model=towers.VLM, weights=towers.VLM).build(SIZE)
    own = open_clip.CLIP(**open_clip.get_model_config(towers.VLM)).eval()
    own.load_state_dict(load_file(FILES[towers.VLM]))
    assert vlm.license == "apache-2.0"
    x = vlm.normalize(images)
    stream = vlm.embed(x)
    tokens = stream.tokens
    for i in range(vlm.depth):
        tokens = vlm.block(i, tokens, stream.state)
    whole, dense = vlm.project(vlm.finish(tokens, stream.state), stream.state)
    assert torch.allclose(whole[:, 0], own.encode_image(x), atol=1e-5)
    assert dense.shape == (2, 288, 128)
    ids = vlm.tokenize(["traffic light", "road"], own.context_length)
    assert torch.allclose(vlm.encode_text(ids), own.encode_text(ids), atol=1e-5)


def test_weights_that_are_missing_or_damaged_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / FILES[towers.VFM].name
    with pytest.raises(WeightsError, match=r"missing: reinstall.*mfuser world pretrain vfm"):
        towers.shipped(copy)
    content = bytearray(FILES[towers.VFM].read_bytes())
    content[-5] ^= 1
    copy.write_bytes(content)
    with pytest.raises(WeightsError, match=r"damaged \(SHA-256 .*mfuser world pretrain vfm"):
        towers.shipped(copy)
    copy.write_bytes(content[:5000])
    with pytest.raises(WeightsError, match="damaged"):
        towers.shipped(copy)
    told = json.dumps({"name": towers.VFM, "world": WORLD_VERSION + 1})
    save_file(load_file(FILES[towers.VFM]), copy, metadata={towers.TOLD: told})
    with pytest.raises(WeightsError, match=f"version {WORLD_VERSION + 1} of the miniature world"):
        towers.shipped(copy)


def test_a_damaged_file_stops_a_pairing_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(towers.FOLDER, tmp_path / "towers")
    broken = tmp_path / "towers" / FILES[towers.VLM].name
    broken.write_bytes(broken.read_bytes()[:-100])
    monkeypatch.setattr(towers, "FOLDER", tmp_path / "towers")
    with pytest.raises(WeightsError, match="mini-vlm.safetensors are damaged"):
        mfuser.build_model("demo")


def test_other_tags_get_the_nearest_name() -> None:
    with pytest.raises(WeightsError, match="did you mean 'mini-vfm'"):
        TimmSpec(model=towers.VFM_MODEL, weights="mini-vfn").build(SIZE)
    with pytest.raises(WeightsError, match="did you mean 'mini-vlm'"):
        OpenClipSpec(model=towers.VLM, weights="mini-vln").build(SIZE)


def test_the_demo_trains_nothing_in_its_towers() -> None:
    model = mfuser.build_model("demo")
    frozen = [p for b in model.encoder.backbones.values() for p in b.parameters()]
    assert frozen and not any(p.requires_grad for p in frozen)
    assert any(p.requires_grad for p in model.encoder.adapters.parameters())


@pytest.mark.slow
def test_pretraining_is_worth_something() -> None:
    """Far below the figures of docs/world.md, so that it holds for small samples: a probe on
    mini-vfm beats one on a random tower on unseen domains, and mini-vlm's words find patches."""
    train = probe.pictures("game", "train", 24)
    tests = {d: probe.pictures(d, "val", 3) for d in probe.TARGETS}
    unseen = {}
    for which in ("random", "vfm"):
        vit = probe.tower(which)
        head = probe.train_probe(probe.features(vit, train.images), train.labels, "linear", 0, 40)
        scores = {
            d: probe.miou(
                probe.confusion(probe.predict(head, probe.features(vit, p.images)), p.labels)
            )
            for d, p in tests.items()
        }
        unseen[which] = probe.averaged(scores)
    assert unseen["vfm"] > 1.15 * unseen["random"]
    maps = probe.word_maps(probe.clip(), tests["camera"].images)
    aucs = probe.word_aucs(maps, tests["camera"].labels)
    assert sum(aucs.values()) / len(aucs) > 0.7


def test_a_probe_reads_what_the_features_hold() -> None:
    """On features that are the labels a linear probe is nearly right; on noise it is not."""
    shown = probe.pictures("game", "train", 12)
    cells = torch.from_numpy(shown.labels[:, ::2, ::2].astype("int64")).clamp(max=19)
    patches = cells.unfold(1, 4, 4).unfold(2, 4, 4).reshape(12, 288, 16)
    clear = torch.nn.functional.one_hot(patches, 20).flatten(2).half()
    noise = torch.randn(12, 288, 256).half()
    found = {}
    for name, x in {"clear": clear, "noise": noise}.items():
        head = probe.train_probe(x, shown.labels, "linear", 0, 40)
        found[name] = probe.miou(probe.confusion(probe.predict(head, x), shown.labels))
    assert found["clear"] > 60 and found["noise"] < 25


def test_word_aucs() -> None:
    shown = probe.pictures("game", "val", 3)
    n, (h, w) = 3, probe.GRID
    cells = shown.labels.reshape(n, h, 8, w, 8).transpose(0, 1, 3, 2, 4).reshape(n, h * w, 64)
    perfect = torch.stack([torch.from_numpy((cells == c).mean(-1)) for c in range(19)], -1).float()
    assert min(probe.word_aucs(perfect, shown.labels).values()) > 0.999
    assert max(probe.word_aucs(-perfect, shown.labels).values()) < 0.001
    chance = probe.word_aucs(torch.rand(n, h * w, 19), shown.labels)
    assert abs(sum(chance.values()) / len(chance) - 0.5) < 0.1


def test_the_oracle_is_right_where_either_is() -> None:
    import numpy as np

    labels = np.array([[0, 1, 2, 3]])
    best = probe.oracle(np.array([[0, 0, 2, 0]]), np.array([[1, 1, 1, 1]]), labels)
    np.testing.assert_array_equal(best, [[0, 1, 2, 1]])
