"""The loop that pretrains a tower: seeded, resumable at any moment, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfuser.errors import CheckpointError
from mfuser_streets import towers
from mfuser_streets.pretrain.batches import captioned, one_thread, pairs
from mfuser_streets.pretrain.losses import ImageLosses, WordLosses, start
from mfuser_streets.pretrain.recipe import Recipe
from mfuser_streets.world.scenes import WORLD_VERSION

CHECKPOINT = "pretraining.pt"
Report = Callable[[int, dict[str, float], float], None]
"""step, mean losses since the last report, seconds a step."""


def tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(bpe_path=str(towers.FOLDER / "mini-vlm.bpe.gz"))


class Pretraining(nn.Module):
    """A tower, its heads, and what trains them."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        if recipe.tower == "vfm":
            import timm

            self.tower: Any = timm.create_model(towers.VFM_MODEL)
            self.vit = self.tower
        else:
            import open_clip

            towers.register()
            cfg = open_clip.get_model_config(towers.VLM)
            assert cfg is not None
            self.tower = open_clip.CLIP(**cfg)
            self.vit = self.tower.visual.trunk
            self.words = WordLosses(tokenizer(), cfg["text_cfg"]["context_length"])
        start(self.vit)
        for block in self.vit.blocks:
            block.attn.fused_attn = False  # its backward pass is four times slower here
        self.images = ImageLosses(self.vit.embed_dim)
        self.train()
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
        )

    def step(self, step: int) -> dict[str, Tensor]:
        """One update; the losses by name."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed * 1_000_003 + step)  # a resumed run draws the same
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            if recipe.on_words(step):
                crops = captioned(recipe.seed, step, recipe.captions)
                losses = self.words(self.tower, crops, recipe)
            else:
                batch = pairs(recipe.seed, step, recipe.pairs)
                losses = self.images(self.vit, batch, recipe)
            loss = sum(losses.values(), torch.zeros(()))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), recipe.clip)
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}


def pretrain(
    recipe: Recipe, out: Path, save_every: int = 100, report: Report | None = None
) -> Path:
    """Train from the beginning or from the folder's last checkpoint; the weights file.

    Raises CheckpointError for a folder that another recipe or world was begun in.
    """
    one_thread()
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    model = Pretraining(recipe)
    done = _resume(model, out / CHECKPOINT)
    sums: dict[str, float] = {}
    since, counted = time.perf_counter(), 0
    for step in range(done, recipe.steps):
        for name, value in model.step(step).items():
            sums[name] = sums.get(name, 0.0) + float(value)
        counted += 1
        last = step + 1 == recipe.steps
        if last or (step + 1) % 25 == 0:
            if report:
                seconds = (time.perf_counter() - since) / counted
                report(step + 1, {k: v / counted for k, v in sums.items()}, seconds)
            sums, counted, since = {}, 0, time.perf_counter()
        if last or (step + 1) % save_every == 0:
            _save(model, step + 1, out / CHECKPOINT)
    return export(model, out)


def _plateau(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings that the beginning of a run depends on: all but its length."""
    return {k: v for k, v in recipe.items() if k not in ("steps", "decay")}


def _save(model: Pretraining, step: int, path: Path) -> None:
    state = {
        "step": step,
        "world": WORLD_VERSION,
        "recipe": model.recipe.as_json(),
        "model": model.state_dict(),
        "optimizer": model.optimizer.state_dict(),
    }
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _resume(model: Pretraining, path: Path) -> int:
    """Load a checkpoint if there is one; the steps that are done."""
    if not path.is_file():
        return 0
    try:
        state = torch.load(path, weights_only=True)
        step, world, made = state["step"], state["world"], state["recipe"]
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}): delete it to begin again"
        ) from error
    if world != WORLD_VERSION:
        raise CheckpointError(
            f"{path} was begun on version {world} of the world, and this is {WORLD_VERSION}: give "
            "another --out, or delete the folder"
        )
    recipe = model.recipe
    ours = recipe.as_json()
    other = [k for k, v in _plateau(ours).items() if made.get(k) != v]
    if other:
        raise CheckpointError(
            f"{path} was begun with {', '.join(f'{k} = {made.get(k)}' for k in other)}, and now "
            f"{', '.join(f'{k} = {ours[k]}' for k in other)} is asked for: give another --out"
        )
    same = (made["steps"], made["decay"]) == (recipe.steps, recipe.decay)
    if not same and step > min(made["steps"] - made["decay"], recipe.steps - recipe.decay):
        raise CheckpointError(
            f"{path} is {step} steps long and its learning rate has begun to fall, or would have "
            f"with steps = {recipe.steps}, decay = {recipe.decay}: give another --out"
        )
    model.load_state_dict(state["model"])
    model.optimizer.load_state_dict(state["optimizer"])
    return int(step)


def export(model: Pretraining, out: Path) -> Path:
    """The tower alone as float16 safetensors that say what they are."""
    from safetensors.torch import save_file

    name = {"vfm": towers.VFM, "vlm": towers.VLM}[model.recipe.tower]
    path = out / f"{name}.safetensors"
    tensors = {k: v.detach().half().contiguous() for k, v in model.tower.state_dict().items()}
    tensors.pop("attn_mask", None)
    told = {"name": name, "world": WORLD_VERSION, "recipe": model.recipe.as_json()}
    # Under one key: safetensors writes several in any order, and the file would never be the same.
    save_file(tensors, path, metadata={towers.TOLD: json.dumps(told, sort_keys=True)})
    return path


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
