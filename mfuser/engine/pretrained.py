"""A trained model as a folder of plain files, to keep, to hand on or to publish.

config.json         the resolved pairing and run, as JSON
model.safetensors   a checkpoint (`engine.checkpoints`): what trained, or all weights
README.md           a model card (`reporting.card`)

Every command that takes a run takes such a folder, too. Nothing in it is code, and nothing that it
names is loaded but components that are installed here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mfuser.config.pairing import PairingSpec
from mfuser.config.registry import Registry
from mfuser.engine import checkpoints
from mfuser.engine.checkpoints import FINAL, Checkpoint
from mfuser.engine.convert import statistics
from mfuser.engine.folder import RUN
from mfuser.errors import CheckpointError
from mfuser.files import check_writable, write_json, write_text
from mfuser.model.dgss import DGSSModel
from mfuser.plugins.origins import origins
from mfuser.reporting.card import Facts, card
from mfuser.reporting.report import Report
from mfuser.version import __version__

CONFIG, CARD = "config.json", "README.md"
FILES = (CONFIG, FINAL, CARD)
SHARED = ("pairing", "run", "step")
"""Metadata of the weights that config.json repeats, for people and for the hub."""


def save_pretrained(
    model: DGSSModel, folder: str | os.PathLike[str], *, full: bool = False
) -> Path:
    """Write a model into a folder that `from_pretrained` loads, with bit-identical outputs.

        mfuser.save_pretrained(run.model, "garden")  # or run.model.save_pretrained("garden")
        model = mfuser.from_pretrained("garden")

    Frozen encoders stay outside, by reference: loading builds them from the weights that the
    pairing names, and compares them. full: put all weights in, so that no other file is needed, the
    tokenizer's neither. Weights of less than float32 are kept as they are and loaded as float32.

    Raises CheckpointError for a folder that holds a run or cannot be written.
    """
    folder = Path(folder)
    write_folder(snapshot(model, full), model.spec, folder, name=_name(model.record, folder))
    return folder


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    registry: Registry | None = None,
    settings: Sequence[str] = (),
    weights: str | None = None,
    token: str | None = None,
) -> DGSSModel:
    """The model in a folder, in a run, or in a repository "owner/name" of the Hugging Face hub.

        model = mfuser.from_pretrained("runs/garden")
        masks = model.segment(images).argmax(1)

    Returns it on the CPU, in eval mode. A folder of that name goes before the hub.

    revision: branch, tag or commit of a repository. registry: whose components and plugins serve;
    by default those installed. settings: changes such as "vfm.weights=PATH", where the encoders'
    weights have moved. weights: of a run that holds several, "last", "averaged" or "best"; by
    default averaged ones where there are some. token: for the hub; by default that of its login.

    Raises CheckpointError for what is not a model, is damaged or needs a plugin that is missing (it
    is named), WeightsError for encoders' weights, HubError for a repository that cannot be had.
    """
    path = Path(source)
    if not path.exists():
        from mfuser.engine.hub import download

        path = download(str(source), revision=revision, token=token)
    elif revision is not None:
        raise CheckpointError(f"{path} is here, on disk: it has no revision '{revision}'")
    model, checkpoint = checkpoints.load_model(path, registry, list(settings), weights)
    check_config(path, checkpoint)
    return model


def snapshot(model: DGSSModel, full: bool = False) -> Checkpoint:
    """The model as a checkpoint without an optimizer. One that was loaded from a complete file is
    complete again: its encoders came from nowhere else. A complete one answers and does not train:
    what belongs to the losses is left out."""
    record, spec = model.record, model.spec
    complete = full or bool(record.get("complete"))
    if complete and isinstance(model.ids, Tensor):
        # The class names need no tokenizer any more.
        prompt = spec.prompt.model_copy(update={"ids": tuple(map(tuple, model.ids.tolist()))})
        spec = spec.model_copy(update={"prompt": prompt})
    pairing = spec.model_dump(mode="json")
    run = dict(record.get("run", {}))
    if "pairing" in run:
        run["pairing"] = pairing
    meta = {
        "pairing": pairing,
        "run": run,
        "step": record.get("step", 0),
        "frozen": {} if complete else checkpoints.frozen_fingerprint(model),
        "origins": origins(spec),
    }
    if complete:
        meta |= {"complete": True, "statistics": statistics(model)}
    meta |= {key: record[key] for key in ("converted", "weights") if key in record}
    state = model.state_dict() if complete else checkpoints.trained_state(model)
    if complete:
        state = {n: t for n, t in state.items() if not n.startswith(checkpoints.TRAINING)}
    return Checkpoint(state, {}, meta)


def write_folder(
    checkpoint: Checkpoint,
    spec: PairingSpec,
    folder: Path,
    *,
    name: str,
    report: Report | None = None,
    license: str | None = None,
    repo: str | None = None,
) -> None:
    """The three files, weights first.

    Raises CheckpointError for a folder that holds a run or cannot be written.
    """
    if (folder / RUN).is_file():
        raise CheckpointError(f"{folder} holds a run; choose another folder")
    check_writable(folder)
    folder.mkdir(parents=True, exist_ok=True)
    meta, run = checkpoint.meta, checkpoint.meta["run"]
    checkpoints.write(folder / FINAL, checkpoint)
    facts = Facts(
        name=name,
        spec=spec,
        step=checkpoint.step,
        steps=run.get("recipe", {}).get("steps"),
        complete=bool(meta.get("complete")),
        bytes=(folder / FINAL).stat().st_size,
        report=report,
        license=license,
        repo=repo,
    )
    config: dict[str, Any] = {"library_name": "mfuser", "mfuser": __version__}
    write_json(folder / CONFIG, config | {key: meta[key] for key in SHARED})
    write_text(folder / CARD, card(facts))


def check_config(folder: Path, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError where config.json is not that of the weights beside it."""
    file = folder / CONFIG
    if not file.is_file():
        return  # a run folder, a checkpoint file
    try:
        config = json.loads(file.read_text("utf-8"))
        shared = {key: config[key] for key in SHARED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); copy or download it again") from error
    differing = next((key for key in SHARED if shared[key] != checkpoint.meta.get(key)), None)
    if differing is not None:
        raise CheckpointError(
            f"{file} does not belong to {FINAL} beside it: its {differing} is another; download "
            'both again, and give changes as settings (e.g. "vfm.weights=PATH")'
        )


def _name(record: dict[str, Any], folder: Path) -> str:
    return str(record.get("run", {}).get("pairing_name") or folder.resolve().name)
