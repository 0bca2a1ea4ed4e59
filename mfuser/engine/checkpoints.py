"""Checkpoints: what trains, in one safetensors file with the resolved spec inside.

A checkpoint holds the tensors that training changes (adapters, prompt, enhancer, pyramid,
decoder, encoders that are not frozen) and, for resuming, the optimizer's; its metadata holds the
resolved pairing and run, and a checksum of all. A complete one (converted from a released model)
holds the frozen encoders' tensors too, and nothing else is needed to run it. It is written under a
temporary name, flushed and renamed: the file of that name is always a whole one, and the one before
it is kept beside it. Nothing in it is code. Where the recipe averages weights, the averages are a
second set in the checkpoint to resume from, and a file of their own in the end.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mfuser.config.pairing import PairingSpec, option_of
from mfuser.config.registry import Registry, load_registry
from mfuser.config.run import needed_plugins
from mfuser.engine import shards
from mfuser.engine.runfiles import AVERAGED as AVERAGED
from mfuser.engine.runfiles import BEST as BEST
from mfuser.engine.runfiles import FINAL as FINAL
from mfuser.engine.runfiles import LAST as LAST
from mfuser.engine.runfiles import PREVIOUS as PREVIOUS
from mfuser.engine.runfiles import RUN as RUN
from mfuser.engine.runfiles import find as find
from mfuser.engine.runfiles import holds_run as holds_run
from mfuser.engine.runfiles import without
from mfuser.errors import CheckpointError, MFuserError
from mfuser.files import clear_leftovers, replacing, utf8_name
from mfuser.model.assembly import build_model, unfilled
from mfuser.model.dgss import DGSSModel
from mfuser.model.precision import sampled
from mfuser.plugins.origins import missing
from mfuser.released import recognize, translate
from mfuser.weightfiles.contents import described
from mfuser.weightfiles.unwrapping import foreign

FORMAT = "mfuser-1"
MODEL, OPTIMIZER, AVERAGE = "model.", "optimizer.", "averaged."

TRAINING = ("criteria.", "before.")
"""Parts of a model that its losses alone read; an `unfilled` one has none."""

CHECKSUM = "checksum"


class DamagedError(CheckpointError):
    """A file that is cut off or not what its checksum says."""


@dataclass
class Checkpoint:
    """model: trained tensors by name. optimizer: "exp_avg.NAME", …; empty in a finished model.
    meta: "pairing" and "run" as resolved, "step", "frozen" (fingerprints of what is not inside);
    of one to resume float16 from, "scaler" (the loss scale and the steps since it changed);
    of a complete one "complete" and "statistics" (mean and std of each encoder's images); of other
    weights than the last, "weights" (their "kind" and what more a report says of them).
    averaged: a second set of the trained tensors, in one to resume from."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    meta: dict[str, Any]
    averaged: dict[str, Tensor] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return int(self.meta["step"])


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of the state dict that training changes: all but what lies in frozen encoders."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen_modules = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if name
        and any(True for _ in module.parameters())
        and not any(p.requires_grad for p in module.parameters())
    )
    state = {}
    for name, tensor in model.state_dict().items():
        parameter = parameters.get(name)
        if parameter is None:
            keep = not name.startswith(frozen_modules) if frozen_modules else True
        else:
            keep = parameter.requires_grad
        if keep:
            state[name] = tensor
    return state


def frozen_fingerprint(model: nn.Module) -> dict[str, list[float]]:
    """Two values of every frozen tensor, by encoder: they tell other weights from these.

    Values, not a checksum: positions resampled on another machine differ in their last bits.
    """
    prints: dict[str, list[float]] = {}
    backbones: Mapping[str, nn.Module] = getattr(getattr(model, "encoder", None), "backbones", {})
    for role, backbone in backbones.items():
        exact = getattr(backbone, "exact", {})  # of what is held in half precision now
        values: list[float] = []
        for name, parameter in sorted(backbone.named_parameters()):
            if not parameter.requires_grad and parameter.device.type != "meta":
                values += exact.get(name) or sampled(shards.whole(parameter.detach()))
        prints[role] = [float(f"{v:.7g}") for v in values]
    return prints


def _same_weights(one: list[float], other: list[float]) -> bool:
    """Equal but for rounding: 1e-4 is far above that of a resampling, far below a training's."""
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in zip(one, other, strict=True)
    )


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write whole or not at all, with a checksum. Raises CheckpointError if the folder takes no
    files."""
    tensors = {MODEL + k: v for k, v in checkpoint.model.items()}
    tensors |= {OPTIMIZER + k: v for k, v in checkpoint.optimizer.items()}
    tensors |= {AVERAGE + k: v for k, v in checkpoint.averaged.items()}
    tensors = _apart({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    meta = {"format": FORMAT, **{k: json.dumps(v) for k, v in checkpoint.meta.items()}}
    meta[CHECKSUM] = _checksum(tensors, meta)
    clear_leftovers(path.parent, path.name)  # first: they take the space that this one needs
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=meta)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def write_last(folder: Path, checkpoint: Checkpoint) -> None:
    """The checkpoint to resume from; the one before it is kept as PREVIOUS.

    Both names stand for whole files at any moment: a second name first, then the new file.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    if last.is_file():
        with contextlib.suppress(OSError), replacing(previous) as temporary:
            temporary.unlink()
            try:
                os.link(last, temporary)
            except OSError:  # a file system without second names
                shutil.copyfile(last, temporary)
    write(last, checkpoint)


def read_last(folder: Path) -> tuple[Path, Checkpoint | None, str]:
    """The checkpoint to resume from and its file, and a sentence if it is not the last one written.

    A damaged one is renamed, so that it does not replace the previous one. None if there is none.
    Raises CheckpointError for a whole file that is not a checkpoint of this project.
    """
    said: list[str] = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            return path, read(path), "; ".join(said)
        except DamagedError as error:
            with contextlib.suppress(OSError):
                os.replace(path, path.with_name(f"damaged-{name}"))
            said.append(f"{error} (kept as damaged-{name})")
    return folder / LAST, None, "; ".join(said)


def _checksum(tensors: Mapping[str, Tensor], meta: Mapping[str, str]) -> str:
    """SHA-256 of every name, type, shape, value and piece of metadata."""
    digest = sha256()
    for key in sorted(meta):
        digest.update(f"{key}={meta[key]}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without shared memory, which safetensors refuses; copies only what shares some."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shared = storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen
        seen.add(storage.data_ptr())
        apart[name] = tensor.clone() if shared else tensor
    return apart


def read(path: Path) -> Checkpoint:
    """Raises CheckpointError if the file is missing, cut off, or not one of ours."""
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with utf8_name(path) as name, safe_open(name, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        if (other := foreign(path)) is not None:
            raise CheckpointError(
                f"{path} is not a checkpoint of this project: {other}; released models are "
                "converted by `mfuser convert`"
            ) from error
        raise DamagedError(
            f"{path} is not a whole safetensors file ({error}); copy or download it again"
        ) from error
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds tensors but is not a checkpoint of this project (format "
            f"{meta.get('format', 'none')!r}, expected {FORMAT!r}): {described(tensors)}"
        )
    checksum = meta.pop(CHECKSUM, None)  # files from before have none
    if checksum is not None and checksum != _checksum(tensors, meta):
        raise DamagedError(
            f"{path} is damaged: its content is not what its checksum says; copy it again, or "
            "train --resume from the checkpoint before it"
        )
    try:
        decoded = {k: json.loads(v) for k, v in meta.items() if k != "format"}
        int(decoded["step"])
        if not isinstance(decoded["pairing"], dict) or not isinstance(decoded["run"], dict):
            raise TypeError("no tables")
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error})") from error
    parts = (
        {k.removeprefix(part): v for k, v in tensors.items() if k.startswith(part)}
        for part in (MODEL, OPTIMIZER, AVERAGE)
    )
    model, optimizer, averaged = parts
    return Checkpoint(model, optimizer, decoded, averaged)


def restore(model: DGSSModel, checkpoint: Checkpoint, path: Path) -> None:
    """Put the trained tensors into a model assembled from the same spec.

    Raises CheckpointError naming the first tensors that do not fit, or the encoder whose frozen
    weights are not those the checkpoint was trained with.
    """
    expected = trained_state(model)
    given = shards.as_in(expected, checkpoint.model)
    _check_names(expected, given, path)
    trained_on = checkpoint.meta.get("frozen", {})
    for role, found in frozen_fingerprint(model).items():
        if not _same_weights(trained_on.get(role, found), found):
            raise CheckpointError(
                f"{path}: the frozen weights of its {role} are not those it was trained with; give "
                f"the same weights (--set {option_of(role)}.weights=…)"
            )
    model.load_state_dict(given, strict=False)


def fill(model: DGSSModel, tensors: Mapping[str, Tensor], path: Path | str) -> None:
    """Give an `unfilled` model its tensors, all of them; they are taken over, not copied, where
    they have its precision. Raises CheckpointError naming the first that do not fit.
    """
    expected = model.state_dict()
    _check_names(expected, tensors, path)
    cast = {n: t.to(expected[n].dtype) for n, t in tensors.items()}
    model.load_state_dict(cast, assign=True)


def _check_names(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], path: Path | str
) -> None:
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in expected]
    problems += [
        f"{name} is {tuple(given[name].shape)}, the model has {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not fit this pairing: {'; '.join(problems[:3])}"
            + (f" (and {len(problems) - 3} more)" if len(problems) > 3 else "")
        )


def load_model(
    path: str | os.PathLike[str],
    registry: Registry | None = None,
    settings: list[str] | None = None,
    weights: str | None = None,
) -> tuple[DGSSModel, Checkpoint]:
    """A trained model from a run folder or a checkpoint file, from its own spec alone.

    settings: "vfm.weights=PATH" and the like, where the frozen encoders' weights have moved.
    weights: "last", "averaged" or "best"; None: what the run's recipe says, else averaged ones
    where there are some, else the last.
    """
    file = find(Path(path), weights)
    checkpoint = chosen(read(file), weights, file)
    spec = saved_spec(registry or load_registry(), checkpoint, settings or (), file)
    if checkpoint.meta.get("complete"):
        model = unfilled(spec)
        if model.encoder.vlm is not None and model.ids is None:
            raise CheckpointError(f"{file}: {model.without_ids} (--set vlm.tokenizer=FOLDER)")
        fill(model, checkpoint.model, file)
        for role, (mean, std) in checkpoint.meta.get("statistics", {}).items():
            model.encoder.backbones[role].set_statistics(tuple(mean), tuple(std))
    else:
        model = build_model(spec, seed=checkpoint.meta["run"].get("seed", 0))
        restore(model, checkpoint, file)
        model.before = None  # only training compares with it
    model.record = dict(checkpoint.meta)
    return model.eval(), checkpoint


def saved_spec(
    registry: Registry, checkpoint: Checkpoint, settings: Sequence[str], file: Path
) -> PairingSpec:
    """The pairing of a checkpoint, typed again. Raises CheckpointError naming the plugins that it
    needs and that are not here."""
    try:
        return registry.saved_pairing(checkpoint.meta["pairing"], settings, str(file))
    except MFuserError as error:
        hint = needed_plugins(registry, checkpoint.meta["run"])
        hint += missing(registry.components, checkpoint.meta.get("origins"))
        raise CheckpointError(f"{error}{hint}") from error


def load_released(state_dict: Mapping[str, Tensor], spec: PairingSpec) -> DGSSModel:
    """A released MFuser's (or tqdm's) state dict -> the assembled model of a spec that fits it.

    The kind is recognized from the keys; the spec's own weights are not looked for, so "random"
    will do. The tensors are copied. Where the spec's tokenizer cannot be loaded, or is not the
    one (a reduced vocabulary), give spec.prompt.ids, or set `model.ids` (K, slots) before use.

    Raises CheckpointError listing every key that is missing, unexpected or of another shape.
    """
    model = unfilled(spec)
    shapes = {n: t.shape for n, t in model.state_dict().items()}
    translation = translate(state_dict, shapes, recognize(state_dict))
    fill(model, {n: t.detach().clone() for n, t in translation.tensors.items()}, "the state dict")
    model.record = {"complete": True}
    return model


def chosen(checkpoint: Checkpoint, weights: str | None, path: Path) -> Checkpoint:
    """The checkpoint with the weights that are asked for (see `load_model`) as its model.

    Raises CheckpointError where the file holds others alone.
    """
    kind = checkpoint.meta.get("weights", {}).get("kind", "last")
    asked = weights or checkpoint.meta["run"].get("recipe", {}).get("weights")
    if checkpoint.averaged and asked in (None, "averaged"):
        meta = checkpoint.meta | {"weights": {"kind": "averaged"}}
        return replace(checkpoint, model=checkpoint.averaged, meta=meta)
    if weights not in (None, kind):
        raise without(path, str(weights))
    return checkpoint
