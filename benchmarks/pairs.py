"""Every timm and every open_clip architecture: which assemble, and which are refused and why.

python benchmarks/pairs.py                          assemble each (resumes where it stopped),
                                                    write the catalog and docs/backbones.md
python benchmarks/pairs.py --again                  start over
python benchmarks/pairs.py --retry                  try the refused ones again
python benchmarks/pairs.py --steps 60 --seed 0      train one step of that many random pairs
python benchmarks/pairs.py --json

An architecture counts if a model of it, a fixed partner and the default fusion assembles on the
meta device, and if stepping it (embed, every block, finish; for open_clip also the projection and
the class texts) yields the shapes that it declares. Hugging Face text towers are laid out with
the default configuration of their type, not the hub's. `mfuser list backbones --all` reads the
catalog.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from mfuser.config.pairing import PairingSpec
from mfuser.errors import MFuserError
from mfuser.interfaces import VisionLanguageBackbone
from mfuser.model.assembly import build_model, sketch, unfilled
from mfuser_plugins.backbones._text_towers import HuggingFaceTower
from mfuser_plugins.backbones.catalog import CATALOG, candidates
from mfuser_plugins.backbones.open_clip import OpenClipSpec
from mfuser_plugins.backbones.timm import TimmSpec

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "backbones.md"
SIZE = 448
"""Pixels: whole patches of 14, 16 and 32."""
PARTNERS = {"timm": "ViT-B-16", "open_clip": "vit_base_patch16_224"}
LIMIT = 600_000_000
"""Parameters of a pair that is trained; more would need more than 6 GB."""

_built: dict[str, Any] = {}


class FixedClip(OpenClipSpec, name="fixed_clip"):
    """The partner of timm's models, laid out once."""

    def build(self, image_size: tuple[int, int]) -> Any:
        return _built.setdefault("open_clip", super().build(image_size))


class FixedViT(TimmSpec, name="fixed_vit"):
    """The partner of open_clip's models, laid out once."""

    def build(self, image_size: tuple[int, int]) -> Any:
        return _built.setdefault("timm", super().build(image_size))


def pairing(library: str, name: str) -> PairingSpec:
    if library == "timm":
        vfm: Any = TimmSpec(model=name, weights="random")
        vlm: Any = FixedClip(model=PARTNERS["timm"], weights="random")
    else:
        vfm = FixedViT(model=PARTNERS["open_clip"], weights="random")
        vlm = OpenClipSpec(model=name, weights="random", options=hub_free(name))
    options: dict[str, Any] = {"fusion": "mvfuser", "enhancer": "mtenhancer"}
    return PairingSpec.model_validate(
        {"vfm": vfm, "vlm": vlm, "decoder": "text_mask2former", "image_size": SIZE, **options}
    )


TEXT_TYPES = {"roberta": "roberta", "xlm": "xlm-roberta", "google": "mt5", "facebook": "m2m_100"}


def hub_free(name: str) -> dict[str, Any]:
    """The default configuration of a Hugging Face text tower's type; its own is on the hub."""
    import open_clip
    from transformers import AutoConfig

    source = open_clip.get_model_config(name)["text_cfg"].get("hf_model_name")
    if source is None:
        return {}
    folder = Path(tempfile.mkdtemp())
    kind = TEXT_TYPES[re.split("[-/]", source)[0]]
    AutoConfig.for_model(kind).save_pretrained(folder)
    return {"text_cfg": {"hf_model_name": str(folder)}}


@torch.no_grad()
def assemble(library: str, name: str) -> dict[str, Any]:
    """The facts that `mfuser list backbones --all` shows of an architecture, or its refusal."""
    try:
        model = sketch(pairing(library, name))
        backbone: Any = model.encoder.vfm if library == "timm" else model.encoder.vlm
        with torch.device("meta"):
            step(backbone)
    except MFuserError as error:
        return {"refused": re.sub(r"^v[fl]m '\w+': ", "", str(error))}
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return {
        "width": backbone.embed_dim,
        "depth": backbone.depth,
        "patch": backbone.patch_size[0],
        "tokens": backbone.token_shape.num_tokens,
        "prefix": backbone.num_prefix_tokens,
        "parameters": sum(p.numel() for p in backbone.parameters()),
    }


def step(backbone: Any) -> None:
    """Raises AssertionError where a shape is not what the backbone declares."""
    stream = backbone.embed(torch.empty(1, 3, SIZE, SIZE))
    shape = (1, backbone.token_shape.num_tokens, backbone.embed_dim)
    tokens = stream.tokens
    assert tokens.shape == shape, f"embed gives {tuple(tokens.shape)}, not {shape}"
    for i in range(backbone.depth):
        tokens = backbone.block(i, tokens, stream.state)
        assert tokens.shape == shape, f"block {i} gives {tuple(tokens.shape)}, not {shape}"
    tokens = backbone.finish(tokens, stream.state)
    assert tokens.shape == shape, f"finish gives {tuple(tokens.shape)}, not {shape}"
    if isinstance(backbone, VisionLanguageBackbone):
        whole, dense = backbone.project(tokens, stream.state)
        patches = backbone.grid[0] * backbone.grid[1]
        assert whole.shape == (1, 1, backbone.text_dim) and dense.shape[1] == patches
        if isinstance(getattr(backbone, "text", None), HuggingFaceTower):
            # transformers reads the padding mask, which has no values here.
            return
        context = torch.empty(2, backbone.context_dim)
        text = backbone.encode_text(torch.zeros(3, 5, dtype=torch.long), context)
        assert text.shape == (3, backbone.text_dim), tuple(text.shape)


def skip_drawing() -> None:
    """Nothing has a value on the meta device, where truncated normals took most of the time."""
    import timm.layers.weight_init as timm_init
    import torch.nn.init as torch_init

    torch_init._no_grad_trunc_normal_ = timm_init._trunc_normal_ = lambda tensor, *_, **__: tensor


def survey(found: dict[str, dict[str, Any]], retry: bool) -> None:
    todo = [
        (library, name)
        for library in ("open_clip", "timm")
        for name in candidates(library)
        if name not in found[library] or (retry and "refused" in found[library][name])
    ]
    skip_drawing()
    start = time.monotonic()
    for done, (library, name) in enumerate(todo, 1):
        found[library][name] = assemble(library, name)
        if done % 10 == 0 or done == len(todo):
            save(found)
            rate = (time.monotonic() - start) / done
            print(f"{done} of {len(todo)}, {rate:.1f} s each", flush=True)


def save(found: dict[str, dict[str, Any]]) -> None:
    import open_clip
    import timm

    content = {
        "made by": "python benchmarks/pairs.py",
        "image_size": SIZE,
        "versions": {"timm": timm.__version__, "open_clip": open_clip.__version__},
        **{library: dict(sorted(found[library].items())) for library in sorted(found)},
    }
    lines = json.dumps(content, indent=1).replace("\n   ", " ").replace("\n  }", " }")
    CATALOG.write_text(lines + "\n", "utf-8")


def shallow(library: str, name: str) -> Any:
    """The spec of an architecture of real width and two blocks."""
    if library == "timm":
        return TimmSpec(model=name, weights="random", depth=2)
    import open_clip

    vision = open_clip.get_model_config(name)["vision_cfg"]
    cut = {"timm_model_kwargs": {"depth": 2}} if "timm_model_name" in vision else {"layers": 2}
    text = hub_free(name).get("text_cfg", {"layers": 2})
    options = {"vision_cfg": cut, "text_cfg": text}
    return OpenClipSpec(model=name, weights="random", options=options)


def train_step(vfm: str, vlm: str) -> dict[str, Any]:
    """One step of a pair: trained tensors, and those without a finite gradient."""
    size, classes = 128, ("road", "sky", "tree")
    spec = PairingSpec.model_validate(
        {
            "vfm": shallow("timm", vfm),
            "vlm": shallow("open_clip", vlm),
            "fusion": "mvfuser",
            "enhancer": {"name": "mtenhancer"},
            "decoder": {"name": "text_mask2former", "width": 64, "layers": 2, "pixel_layers": 1},
            "pyramid": {"width": 64},
            "prompt": {"context": 2, "slots": 5, "ids": [[1, 2, k, 9, 0] for k in (3, 4, 5)]},
            "image_size": size,
            "classes": list(classes),
        }
    )
    count = sum(p.numel() for p in sketch(spec).parameters())
    if count > LIMIT:
        return {"too large": count}
    # Only the blocks that stay are given values, unless a constructor has to read some.
    try:
        model = unfilled(spec)
        fill(model)
        with torch.no_grad():
            model(torch.rand(1, 3, size, size))
    except Exception:
        model = build_model(spec)
    model.train()
    images, labels = torch.rand(1, 3, size, size), torch.randint(len(classes), (1, size, size))
    loss: Any = sum(model(images, labels).values())  # type: ignore[union-attr]
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    bad = [n for n, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    return {"parameters": count, "trained tensors": len(trained), "loss": float(loss), "bad": bad}


def fill(model: torch.nn.Module) -> None:
    """Random values for parameters that have none: matrices and tables with standard deviation
    0.02, scales and norms one, biases zero."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            if parameter.dim() > 1:
                value.normal_(std=0.02)
            else:
                value.fill_(0.0 if "bias" in name else 1.0)
            module._parameters[name] = torch.nn.Parameter(value, parameter.requires_grad)


def steps(found: dict[str, dict[str, Any]], count: int, seed: int, path: Path) -> dict[str, Any]:
    """Random pairs, drawn from those that assemble; resumes where it stopped."""
    draw = random.Random(seed)
    good = {
        library: sorted(n for n, entry in found[library].items() if "refused" not in entry)
        for library in ("timm", "open_clip")
    }
    results: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    trained = 0
    while trained < count:
        vfm, vlm = draw.choice(good["timm"]), draw.choice(good["open_clip"])
        key = f"{vfm} + {vlm}"
        if key not in results:
            torch.manual_seed(seed)
            try:
                results[key] = train_step(vfm, vlm)
            except Exception as error:
                cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                results[key] = {"failed": cause}
            path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"{key}: {results[key]}, peak {peak:.1f} GB", flush=True)
        trained += "too large" not in results[key]
    return results


def table(found: dict[str, dict[str, Any]], trained: dict[str, Any]) -> str:
    """docs/backbones.md."""
    from mfuser_plugins.backbones.catalog import family_of

    good = {k: [n for n, e in v.items() if "refused" not in e] for k, v in found.items()}
    n, m = len(good["timm"]), len(good["open_clip"])
    lines = [
        "# Backbones",
        "",
        "Made by `python benchmarks/pairs.py`. `mfuser list backbones --all` lists the models one "
        "by one.",
        "",
        f"{n} timm and {m} open_clip architectures, {n * m:,} pairs: each of the {n + m} assembles "
        f"with a fixed partner (`{PARTNERS['timm']}`, `{PARTNERS['open_clip']}`) and the default "
        f"fusion at {SIZE}x{SIZE} on the meta device, and stepping it yields the shapes that it "
        "declares. Hugging Face text towers have the default configuration of their type, not "
        "the hub's, and are laid out but not run.",
        "",
    ]
    done = {k: v for k, v in trained.items() if "too large" not in v}
    if done:
        fine = [k for k, v in done.items() if "bad" in v and not v["bad"]]
        large = len(trained) - len(done)
        lines += [
            f"Random pairs with two blocks at full width, one training step at 128x128: "
            f"{len(fine)} of {len(done)} have a finite gradient in every trained tensor"
            + (f"; {large} more were drawn but left out as too large." if large else "."),
            "",
        ]
        lines += [f"- {k}: {v.get('failed') or v.get('bad')}" for k, v in done.items()
                  if k not in fine] + [""]  # fmt: skip
    lines += ["| library | family | architectures |", "|---|---|---|"]
    for library in ("timm", "open_clip"):
        families: dict[str, int] = {}
        for name in good[library]:
            family = family_of(library, name)
            families[family] = families.get(family, 0) + 1
        lines += [f"| {library} | {f} | {c} |" for f, c in sorted(families.items())]
    lines += ["", "## Refused", "", "| library | why | models |", "|---|---|---|"]
    for library in ("timm", "open_clip"):
        reasons: dict[str, list[str]] = {}
        for name, entry in found[library].items():
            if "refused" in entry:
                why = entry["refused"].replace(f"'{name}'", "…").replace("|", "/")
                reasons.setdefault(why, []).append(name)
        for why, names in sorted(reasons.items()):
            lines.append(f"| {library} | {why} | {', '.join(names)} |")
    lines += ["", "timm's other families (convolutional networks, and transformers whose width or "
              "grid changes from block to block) are refused by their class.", ""]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--retry", action="store_true")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kept = json.loads(CATALOG.read_text("utf-8")) if CATALOG.is_file() else {}
    found = {k: {} if options.again else kept.get(k, {}) for k in ("timm", "open_clip")}
    path = ROOT / "benchmarks" / f"pairs_steps_{options.seed}.json"
    if options.steps:
        steps(found, options.steps, options.seed, path)
    else:
        survey(found, options.retry)
    trained = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    TABLE.write_text(table(found, trained), "utf-8")
    if options.json:
        print(json.dumps({**found, "steps": trained}))


if __name__ == "__main__":
    main()
