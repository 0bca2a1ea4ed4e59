"""Makes the files of this folder from the full set of released outputs (see README.md).

    python tests/golden/shrink.py GOLDEN FACTS

GOLDEN holds the full .safetensors files, FACTS the official_keys_*.json. Tensors that no test reads
are left out, and large maps are sampled; values and dtypes stay as they are.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent


def fullmodel_tiny(name: str, value: Tensor) -> Tensor | None:
    """The first image alone; maps at every second to eighth row and column."""
    if name in {"param.random_text", "A.gt_semantic_seg", "A.point_coords"}:
        return None
    if name.startswith("param.") or name == "texts" or name == "A.text_raw":
        return value
    steps = {"A.feat0_b0": 4, "A.feat1": 2, "A.seg_logit": 4}
    step = steps.get(name, 2 if name.startswith("A.mask") else 1)
    return value[:1] if value.dim() < 4 else value[:1, :, ::step, ::step]


def pretrained_load(name: str, value: Tensor) -> Tensor | None:
    """DINOv2 with 8 channels and EVA02 with 16; resampling treats each channel alone."""
    if "text" in name or "rope" in name:
        return value
    width = 8 if "dino" in name else 16
    return value[:width] if "patch_embed" in name else value[..., :width]


def decoder(name: str, value: Tensor) -> Tensor | None:
    """Masks and scores at every second row and column."""
    sampled = name.removeprefix("b.").rstrip("0123456789") in {"mask", "score"}
    return value[..., ::2, ::2] if sampled and name.startswith("b.") else value


def losses(name: str, value: Tensor) -> Tensor | None:
    unread = {"gt_labels0", "gt_labels1", "point_targets", "target_labels"}
    return None if name in unread or name.endswith("acc_seg") else value


def whole(name: str, value: Tensor) -> Tensor | None:
    return value


FILES = {f.__name__: f for f in (fullmodel_tiny, pretrained_load, decoder, losses)}
FILES |= dict.fromkeys(("mtenhancer", "mvfuser", "selective_scan"), whole)


def main(golden: Path, facts: Path) -> None:
    for name, keep in FILES.items():
        tensors = load_file(golden / f"{name}.safetensors")
        kept = {k: t for k, v in tensors.items() if (t := keep(k, v)) is not None}
        save_file({k: t.contiguous() for k, t in kept.items()}, HERE / f"{name}.safetensors")
    for path in sorted(facts.glob("official_keys_*.json")):
        facts_of = json.loads(path.read_text("utf-8"))
        read = {k: facts_of[k] for k in ("state_dict", "trainable_keys", "texts")}
        packed = gzip.compress(json.dumps(read).encode(), mtime=0)
        (HERE / f"{path.name}.gz").write_bytes(packed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
