"""`mfuser data new` and `mfuser data check`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mfuser import load_registry
from mfuser.engine.run import resolve


def garden(root: Path, count: int = 10, top: int = 2) -> Path:
    rng = np.random.default_rng(0)
    for name in ("photos", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for k in range(count):
        label = rng.integers(0, top + 1, (4, 6)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        image = (label[..., None] * [60, 20, 90]).astype(np.uint8)
        Image.fromarray(image).save(root / f"photos/{k}.jpg")
        Image.fromarray(label).save(root / f"masks/{k}.png")
    return root


def test_new_writes_tables_that_check_and_train_accept(mfuser: Any, inside: Path) -> None:
    garden(inside / "My Garden")
    Path("registry.toml").write_text(
        '[data]\n"gta" = "elsewhere/gta"\n\n[recipe.mine]\nextends="demo"\n'
    )
    result = mfuser("data", "new", "My Garden", "--classes", "grass,path,shed")
    assert result.code == 0, result.err
    registry = load_registry()
    assert registry.pairing("my-garden").classes == ("grass", "path", "shed")
    assert registry.recipe("my-garden").source == "my-garden"
    assert registry.recipe("my-garden").note == ""  # the demo's is of the demo's data
    assert registry.pairing("my-garden").vfm.freeze is False  # pretrained on drawn scenes only
    assert {"mine", "my-garden"} <= set(registry.names("recipe"))
    checked = json.loads(mfuser("data", "check", "my-garden", "--json").out)
    assert [(e["split"], e["images"]) for e in checked] == [("train", 8), ("val", 2)]
    assert set(checked[0]["classes"]) == {"grass", "path", "shed"}
    assert not checked[0]["problems"] and not checked[0]["warnings"]


def test_what_new_writes_trains_with_any_names(mfuser: Any, inside: Path) -> None:
    garden(inside / "garden", count=6)
    names = "yellowish grass,cobblestone,shed"  # in no vocabulary of the small text tower
    assert mfuser("data", "new", "garden", "--classes", names).code == 0
    result = mfuser("train", "garden", "--steps", 1, "--no-evaluate", "--out", "run",
                    "--set", "image_size=[32, 48]", "--set-recipe", "batch_size=1",
                    "--set-recipe", "augmentation.min_pixels=0")  # fmt: skip
    assert result.code == 0, result.err


def test_new_fits_large_photographs_to_the_window(mfuser: Any, inside: Path) -> None:
    """Small ones as they are; with a look at the held-out ones on the way, also in a short run."""
    for name, size in (("small", (480, 360)), ("large", (2400, 1600))):
        for part in ("images", "masks"):
            Path(name, part).mkdir(parents=True)
        for k in range(5):
            Image.new("RGB", size, (40 * k, 90, 50)).save(f"{name}/images/{k}.jpg")
            mask = Image.new("L", size, 1)
            mask.paste(0, (0, 0, size[0] // 2, size[1]))
            mask.save(f"{name}/masks/{k}.png")
        done = mfuser("data", "new", name, "--classes", "sky,grass")
        assert done.code == 0 and ("mfuser predict --scale 0.24" in done.out) == (name == "large")
    registry = load_registry()
    assert registry.dataset("small").test_size is None
    assert registry.recipe("small").augmentation.scale == (1.0, 1.5)
    assert registry.dataset("large").test_size == (576, 384)
    assert registry.recipe("large").augmentation.scale == (0.24, 0.36)
    assert registry.recipe("large").augmentation.min_pixels == 0  # the demo's
    assert registry.recipe("large").validate_every == 100
    assert resolve(registry, "large", recipe_settings=["steps=7"]).recipe.validate_every == 7


def test_new_changes_nothing_where_it_cannot(mfuser: Any, inside: Path) -> None:
    garden(inside / "garden")
    assert mfuser("data", "new", "garden", "--dry-run").code == 0
    assert not Path("registry.toml").exists()
    assert mfuser("data", "new", "garden").code == 0
    before = Path("registry.toml").read_text()
    for arguments, sentence in (
        (["garden"], "[data] garden already"),
        (["garden", "--name", "a/b"], "'a/b' cannot name a dataset"),
        (["garden", "--name", "g2", "--classes", "a,b"], "names 2 classes, and the masks hold 3"),
        (["garden", "--name", "g2", "--pairing", "demos"], "did you mean 'demo'"),
        (["nowhere"], "there is no folder nowhere"),
        (["garden/photos"], "no images with masks that pair up"),
    ):
        result = mfuser("data", "new", *arguments)
        assert result.code == 2 and sentence in result.err, result.err
    assert Path("registry.toml").read_text() == before


def problems(mfuser: Any, *arguments: str) -> tuple[int, str]:
    result = mfuser("data", "check", "garden", "--json", *arguments)
    entries = json.loads(result.out)
    return result.code, " | ".join(
        sentence for e in entries for sentence in [*e.get("problems", ()), *e.get("warnings", ())]
    )


@pytest.mark.parametrize(
    ("spoil", "code", "sentence"),
    [
        (lambda mask: np.full_like(mask, 255), 0, "1 of 8 labels are ignored everywhere"),
        (lambda mask: mask + 100, 2, "holds the label value 100"),
        (lambda mask: mask[:8], 2, "they must be equal"),
        (lambda mask: np.stack([mask, mask * 3, mask], -1), 2, "is a color picture"),
    ],
    ids=["ignored", "values outside", "another size", "picture"],
)
def test_check_names_what_is_wrong(
    mfuser: Any, inside: Path, spoil: Callable[[Any], Any], code: int, sentence: str
) -> None:
    garden(inside / "garden")
    assert mfuser("data", "new", "garden").code == 0
    path = sorted((inside / "garden/masks").iterdir())
    trained = load_registry().dataset("garden").build(inside / "garden", "train")
    path = inside / f"garden/masks/{trained.name(0)}.png"
    Image.fromarray(spoil(np.array(Image.open(path)))).save(path)
    found = problems(mfuser)
    assert found[0] == code and sentence in found[1], found


def test_blurred_ids_and_one_class_labels(mfuser: Any, inside: Path) -> None:
    garden(inside / "garden")
    assert mfuser("data", "new", "garden", "--classes", "a,b,c").code == 0
    for path in (inside / "garden/masks").iterdir():
        wide = Image.fromarray(np.array(Image.open(path)) * np.uint8(100)).resize((90, 60))
        wide.resize((480, 320), Image.Resampling.BICUBIC).save(path)
        Image.new("RGB", (480, 320)).save(inside / f"garden/photos/{path.stem}.jpg")
    code, text = problems(mfuser, "--full")
    assert code == 2 and "values between those of the classes" in text, text
    for path in (inside / "garden/masks").iterdir():
        Image.new("L", (480, 320)).save(path)
    code, text = problems(mfuser)
    assert code == 0 and "show one class alone" in text, text


def test_a_dataset_without_val_is_no_error(mfuser: Any, inside: Path) -> None:
    garden(inside / "garden")
    Path("registry.toml").write_text(
        '[data]\ngarden = "garden"\n[dataset.garden]\nname = "folder"\nimages = "photos"\n'
        'classes = ["a", "b", "c"]\n'
    )
    result = mfuser("data", "check", "garden", "--json")
    train, val = json.loads(result.out)
    assert result.code == 0 and train["images"] == 10 and "no val split" in val["absent"]
