"""Which inference a trained model is tested with: the recipe's, or what a command asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mfuser.config.registry import Registry
from mfuser.config.tables import merge, parse_settings
from mfuser.errors import MFuserError
from mfuser.inference import Inference
from mfuser.model.sliding_window import Sliding, default_stride
from mfuser.model.window_batch import WindowBatch
from mfuser.plugins.contracts import built
from mfuser.specs import InferenceSpec, Size

KEY = "inference"


@dataclass(frozen=True)
class Asked:
    """How a model is asked. spec: None: the sliding window with `stride`, whichever plugins are
    installed. stride: None: two thirds of the window. window_batch: of that window."""

    spec: InferenceSpec | None = None
    stride: Size | None = None
    window_batch: WindowBatch = "auto"

    def build(self) -> Inference:
        """Raises MFuserError where the component refuses its options."""
        spec = self.spec
        if spec is None:
            return Sliding(self.stride, self.window_batch)
        return built(spec, Inference, spec.build)

    def record(self, window: Size) -> dict[str, Any]:
        """The component's name and all options, for a report."""
        if self.spec is None:
            stride = self.stride or default_stride(window)
            return {
                "name": "sliding",
                "stride": list(stride),
                "window_batch": self.window_batch,
            }
        return self.spec.resolved(window).model_dump(mode="json")


def split(settings: Sequence[str], key: str = KEY) -> tuple[list[str], list[str]]:
    """--set options of the inference ("inference.scales=[1.0]"), and those of the pairing."""
    own = [s for s in settings if s.partition("=")[0].strip().partition(".")[0] == key]
    return own, [s for s in settings if s not in own]


def asked(
    registry: Registry,
    recipe: InferenceSpec | None,
    recipe_stride: Size | None,
    *,
    name: str | None = None,
    settings: Sequence[str] = (),
    stride: Size | None = None,
    window_batch: WindowBatch | None = None,
) -> Asked:
    """The recipe's inference, changed by what a command was given.

    name: --inference; another component, at its defaults. settings: the --set options that
    `split` found to be its own. stride, window_batch: --stride, --window-batch.

    Raises MFuserError for a name or an option that is not known, and for a stride or a window_batch
    where there is none to set.
    """
    spec = recipe
    if name is not None or settings:
        begun: Any = {"name": name or "sliding"}
        if name is None and recipe is not None:
            begun = recipe.model_dump(mode="json")
        elif name is None and recipe_stride is not None:
            begun["stride"] = list(recipe_stride)
        table = merge({KEY: begun}, parse_settings(settings))[KEY]
        found = registry.component(KEY, table, "--set inference" if settings else "--inference")
        assert isinstance(found, InferenceSpec)
        spec = found
    if spec is not None:
        given = {"stride": stride, "window_batch": window_batch}
        for option, value in given.items():
            spec = spec if value is None else _windowed(spec, option, value)
    return Asked(spec, stride or recipe_stride, window_batch or "auto")


def _windowed(spec: InferenceSpec, option: str, value: Any) -> InferenceSpec:
    """The sliding window `spec` with an option of it changed."""
    fields = type(spec).model_fields
    if option not in fields:
        wrapped = [
            f"--set inference.{field}.{option}=…"
            for field in fields
            if isinstance(inner := getattr(spec, field), InferenceSpec)
            and option in type(inner).model_fields
        ]
        raise MFuserError(
            f"--{option.replace('_', '-')} is of a sliding window, and inference "
            f"'{spec.component()}' has none of its own; {' or '.join([*wrapped, 'leave it out'])}"
        )
    return spec.model_copy(update={option: value})


def of_record(
    registry: Registry,
    run: Any,
    place: str,
    *,
    name: str | None = None,
    settings: Sequence[str] = (),
    stride: Size | None = None,
    window_batch: WindowBatch | None = None,
) -> Asked:
    """The inference in the written record of a run, without reading the rest of it, changed as
    `asked` does.

    Raises MFuserError as `asked` does, or naming `place` and the component that is missing.
    """
    written = run.get("recipe") if isinstance(run, Mapping) else None
    recipe: Mapping[str, Any] = written if isinstance(written, Mapping) else {}
    spec, written_stride = None, recipe.get("stride")
    if recipe.get(KEY) is not None:
        found = registry.component(KEY, recipe[KEY], f"{place}: the inference of its recipe")
        assert isinstance(found, InferenceSpec)
        spec = found
    return asked(
        registry,
        spec,
        None if written_stride is None else (written_stride[0], written_stride[1]),
        name=name,
        settings=settings,
        stride=stride,
        window_batch=window_batch,
    )
