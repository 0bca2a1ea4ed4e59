"""A released checkpoint file -> one of ours, complete: nothing else is needed to run it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mfuser.config.registry import Registry
from mfuser.config.run import RunSpec, Source, sources
from mfuser.engine import checkpoints
from mfuser.errors import CheckpointError
from mfuser.model.assembly import unfilled
from mfuser.model.dgss import DGSSModel
from mfuser.released import Translation, recognize, translate
from mfuser.released.files import Released, read_released

RECIPES = {"clip": "paper-clip"}
"""The recipe that released files of a kind were trained with; all others: "paper"."""


def convert(
    registry: Registry,
    path: Path,
    pairing: str,
    out: Path,
    *,
    settings: Sequence[str] = (),
    source: str | None = None,
) -> dict[str, Any]:
    """Write `out` (.safetensors) and return what became of every key.

    settings: on top of the pairing, e.g. "vlm.tokenizer=FOLDER". source: the dataset it was
    trained on, for reports; a released file does not say.

    Raises CheckpointError for a file that is broken, of another kind or does not fit the pairing,
    with the list of what does not.
    """
    if out.suffix != ".safetensors":
        raise CheckpointError(f"--out {out}: give a name that ends in .safetensors")
    spec = registry.pairing(pairing, list(settings))
    released = read_released(path)
    form = recognize(released.state, str(path))
    _check_classes(path, released, spec.classes)
    model = unfilled(spec)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    translation = translate(released.state, shapes, form, str(path))
    ids = model.ids
    if isinstance(ids, Tensor):
        # The class names need no tokenizer any more.
        prompt = spec.prompt.model_copy(update={"ids": tuple(map(tuple, ids.tolist()))})
        spec = spec.model_copy(update={"prompt": prompt})
    name = RECIPES.get(form.name, "paper")
    recipe = registry.recipe(name)
    step = released.step or recipe.steps
    run = RunSpec(
        pairing_name=pairing,
        recipe_name=name,
        pairing=spec,
        recipe=recipe,
        sources=sources(registry, source) if source else (Source(name="not stated", spec=None),),
        source_classes=spec.classes,
        plugins=registry.plugins,
    )
    meta = {
        "pairing": spec.model_dump(mode="json"),
        "run": run.model_dump(mode="json"),
        "step": step,
        "frozen": {},
        "complete": True,
        "statistics": statistics(model),
        "converted": {"kind": form.name, "file": path.name},
    }
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out.parent} cannot be written: {error.strerror}") from error
    checkpoints.write(out, checkpoints.Checkpoint(translation.tensors, {}, meta))
    return _account(translation, released, out, None if ids is not None else model.without_ids)


def _check_classes(path: Path, released: Released, classes: Sequence[str]) -> None:
    if released.classes is not None and tuple(released.classes) != tuple(classes):
        differing = [
            f"{theirs} for {ours}"
            for theirs, ours in zip(released.classes, classes, strict=False)
            if theirs != ours
        ]
        raise CheckpointError(
            f"{path} was trained on {len(released.classes)} classes, the pairing has {len(classes)}"
            + (f" ({', '.join(differing[:3])})" if differing else "")
            + "; give its classes in their order (--set 'classes=[…]')"
        )


def statistics(model: DGSSModel) -> dict[str, list[list[float]]]:
    """Mean and standard deviation of each encoder's images."""
    return {
        role: [backbone.mean.flatten().tolist(), backbone.std.flatten().tolist()]
        for role, backbone in model.encoder.backbones.items()
    }


def _account(
    translation: Translation, released: Released, out: Path, no_ids: str | None
) -> dict[str, Any]:
    mapped = {name for names in translation.sources.values() for name in names}
    return {
        "kind": translation.form.name,
        "title": translation.form.title,
        "keys": len(released.state),
        "mapped": len(mapped),
        "unused": translation.reasons(),
        "kept": translation.kept,
        "out": str(out),
        "bytes": out.stat().st_size,
        "without_ids": no_ids,
    }
