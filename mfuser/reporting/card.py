"""The model card of a published model: what it is, what it scored, whose weights are in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mfuser.config.pairing import PairingSpec, option_of
from mfuser.reporting.report import Report
from mfuser.reporting.tables import Table, document
from mfuser.specs import BackboneSpec
from mfuser.version import __version__

UNSTATED = "not stated"


@dataclass(frozen=True)
class Facts:
    """The content of a card. complete: all weights are inside, the encoders' too. license: of the
    trained weights, as whoever publishes them states it. repo: where it is to be found."""

    name: str
    spec: PairingSpec
    step: int
    steps: int | None
    complete: bool
    bytes: int
    report: Report | None = None
    license: str | None = None
    repo: str | None = None


def card(facts: Facts) -> str:
    """The text of README.md, its front matter first."""
    from huggingface_hub import ModelCard

    return str(ModelCard(f"---\n{_front(facts)}\n---\n\n{_body(facts)}"))


def _front(facts: Facts) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=name,
            dataset_name=name,
            metric_type=kind,
            metric_name=title,
            metric_value=round(100 * value, 2),
        )
        for name, domain in (facts.report.domains if facts.report else {}).items()
        for kind, title, value in (
            ("mean_iou", "mIoU (%)", domain.miou),
            ("accuracy", "pixel accuracy (%)", domain.accuracy),
        )
        if value == value
    ]
    license: dict[str, Any] = {"license": facts.license}
    if facts.license is None:
        license = {"license": "other", "license_name": UNSTATED.replace(" ", "-")}
    data = ModelCardData(
        library_name="mfuser",
        pipeline_tag="image-segmentation",
        tags=["mfuser", "semantic-segmentation", "domain-generalization", *_models(facts.spec)],
        metrics=["mean_iou"] if results else None,
        model_name=facts.name,
        eval_results=results or None,
        **license,
    )
    return str(data.to_yaml())


def _models(spec: PairingSpec) -> list[str]:
    """Tags for the encoders' models."""
    return [_model(backbone) for backbone in spec.encoders().values()]


def _model(spec: BackboneSpec) -> str:
    return str(getattr(spec, "model", None) or spec.name)


def _body(facts: Facts) -> str:
    spec = facts.spec
    trained = f"{facts.step:,} steps"
    if facts.steps is not None and facts.steps != facts.step:
        trained += f" of {facts.steps:,}, unfinished"
    about = (
        f"Semantic segmentation of {len(spec.classes)} classes, trained for {trained} with mfuser "
        f"{__version__} (method: Zhang & Tan, *Mamba as a Bridge*, CVPR 2025): "
        f"{', '.join(spec.classes)}."
    )
    parts: list[str | Table] = [about, *_use(facts), *_parts(facts), *_figures(facts)]
    return document(facts.name, [*parts, *_licenses(facts)])


def _use(facts: Facts) -> list[str]:
    where = facts.repo or "FOLDER"
    moved = local_files(facts.spec) if not facts.complete else {}
    given = ", ".join(f'"{key}=PATH"' for key in moved)
    settings = f", settings=[{given}]" if given else ""
    said = "".join(f"  # {key}: {path}" for key, path in moved.items())
    example = [
        "```python",
        "import mfuser",
        "",
        f'model = mfuser.from_pretrained("{where}"{settings}){said}',
        "scores = model.segment(images)  # uint8 (B, 3, H, W), RGB -> (B, classes, H, W)",
        "masks = scores.argmax(1)        # indices into model.classes",
        "```",
    ]
    if facts.repo:
        sets = "".join(f" --set {key}=PATH" for key in moved)
        example += [
            "",
            "```sh",
            f"mfuser pull {facts.repo} model",
            f"mfuser predict model photos/{sets}",
            "```",
        ]
    return ["## Use", "\n".join(example)]


def local_files(spec: PairingSpec) -> dict[str, str]:
    """Encoders whose weights are a file of whoever trained them: key -> that file."""
    given = {f"{option_of(role)}.weights": s.weights for role, s in spec.encoders().items()}
    return {key: w for key, w in given.items() if w and ("/" in w or "\\" in w or _is_file(w))}


def _is_file(weights: str) -> bool:
    return weights.partition("#")[0].lower().endswith((".safetensors", ".pth", ".pt", ".bin"))


def _parts(facts: Facts) -> list[str | Table]:
    spec = facts.spec
    rows = [
        (role, s.name, _model(s), s.weights or "default", "frozen" if s.freeze else "trained")
        for role, s in spec.encoders().items()
    ]
    others: Mapping[str, Any] = {
        "fusion": spec.fusion,
        "tuning": spec.tuning,
        "enhancer": spec.enhancer,
        "decoder": spec.decoder,
    }
    joined = "; ".join(f"{role} `{s.name}`" for role, s in others.items() if s is not None)
    height, width = spec.image_size
    inside = (
        "All weights are inside, the encoders' too."
        if facts.complete
        else "Inside are the weights that training changed. Frozen encoders are not: they are "
        "loaded from where the table says, and compared with those of the training."
    )
    heads = ("", "component", "model", "weights", "")
    return [
        Table(heads, rows, title="Model", left=5),
        f"{joined}; window {height}x{width}. `config.json` holds every option. {inside} "
        f"`model.safetensors` has {facts.bytes / 1e6:.1f} MB; nothing in these files is code.",
    ]


def _figures(facts: Facts) -> list[str | Table]:
    report = facts.report
    if report is None:
        return ["## Figures", "It was published without an evaluation."]
    from dataclasses import replace

    return [replace(report.table(), title="Figures, IoU in %"), *report.summary()]


def _licenses(facts: Facts) -> list[str | Table]:
    rows = [
        (
            f"{role}: {_model(s)}",
            "inside" if facts.complete or not s.freeze else "by reference",
            s.license() or "not known",
        )
        for role, s in facts.spec.encoders().items()
    ]
    rows.append(("all else: trained by the publisher", "inside", facts.license or UNSTATED))
    return [Table(("weights", "", "license"), rows, title="Licenses", left=3)]
