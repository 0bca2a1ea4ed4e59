"""The study that needs no data: the cost of each adapter by itself, and how its time grows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mfuser.config.registry import Registry
from mfuser.config.study import AdapterStudySpec
from mfuser.engine.console import Console
from mfuser.errors import MFuserError, RegistryError
from mfuser.files import write_json
from mfuser.reporting import adapter_cost
from mfuser.reporting.adapter_cost import AdapterCost, Growth
from mfuser.reporting.tables import Table, csv_text, document
from mfuser.specs import FusionSpec, Options, TokenShape
from mfuser.study import paper
from mfuser.study.grid import value_label
from mfuser.study.runs import Inputs, Job

FILE = "measured.json"
COLUMNS = (
    *("adapter", "batch", "tokens", "params", "flops", "scan_flops"),
    *("forward_s", "forward_p20_s", "forward_p80_s", "backward_s", "peak_bytes", "us_per_token"),
)


class Measured(Options):
    """The file of one adapter."""

    machine: dict[str, Any]
    cost: AdapterCost
    growth: Growth | None


def adapters(registry: Registry, name: str, study: AdapterStudySpec) -> dict[str, FusionSpec]:
    """Label -> spec, each validated and laid out. Raises RegistryError naming those refused."""
    place = f"{registry.place('study', name, 'adapters')} adapters"
    found: dict[str, FusionSpec] = {}
    shape = TokenShape(study.width, study.grid, study.prefix)
    for value in study.adapters:
        label = value_label("adapters", value)
        table = (
            value if isinstance(value, str) else {k: v for k, v in value.items() if k != "label"}
        )
        spec = registry.component("fusion", table, f"{place}, {label}")
        if label in found:
            raise RegistryError(f"{place}: two adapters are called '{label}'; give one a label")
        assert isinstance(spec, FusionSpec)
        try:
            adapter_cost.layout(spec, shape, label, study.encoders)
        except MFuserError as error:
            raise RegistryError(f"{place}, {label}: {error}") from error
        if study.paper is not None:
            paper.row(study.paper, label)
        found[label] = spec
    return found


def jobs(
    specs: dict[str, FusionSpec], study: AdapterStudySpec, out: Path, inputs: Inputs
) -> list[Job]:
    made = []
    for label, spec in specs.items():
        folder = out / slug(label)
        request = inputs.request(
            "adapter",
            label=label,
            adapter=spec.model_dump(mode="json"),
            study=study.model_dump(mode="json"),
        )
        made.append(Job(label, folder, (folder / FILE,), request, Measured.model_validate_json))
    return made


def identities(specs: dict[str, FusionSpec], study: AdapterStudySpec) -> dict[str, dict[str, Any]]:
    # Results from before more than two could be joined name no number.
    known = {"encoders"} if study.encoders == 2 else set()
    sizes = study.model_dump(mode="json", exclude={"adapters", "paper", "kind"} | known)
    return {slug(n): {"adapter": s.model_dump(mode="json"), **sizes} for n, s in specs.items()}


def slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", label).strip("-.") or "adapter"


def work(job: dict[str, Any], registry: Registry) -> None:
    """Measure one adapter, in a process of its own."""
    study = AdapterStudySpec.model_validate(job["study"])
    spec = registry.component("fusion", job["adapter"], "the study's adapter")
    assert isinstance(spec, FusionSpec)
    device = job["device"] or adapter_cost.default_device()
    machine = adapter_cost.machine(device)
    console, label = Console(), str(job["label"])
    sizes: dict[str, Any] = {
        **{"width": study.width, "encoders": study.encoders, "batch": study.batch},
        "device": device,
    }
    cost = adapter_cost.adapter_cost(spec, label, grid=study.grid, prefix=study.prefix, **sizes)
    growth = None
    if study.curve:
        with console.task(label, len(study.curve)) as task:
            growth = adapter_cost.growth(
                spec,
                label,
                tokens=study.curve,
                limit=study.limit,
                on_point=lambda p: task.advance(note=f"{p.tokens:,} tokens"),
                **sizes,
            )
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    measured = Measured(machine=machine, cost=cost, growth=growth)
    write_json(folder / FILE, measured.model_dump(mode="json"))


class AdapterResults(Options):
    """paper: parameters (M) and GFLOPs of table 3, by adapter, where sizes and options are its."""

    study: str
    width: int
    batch: int
    costs: list[AdapterCost]
    growth: list[Growth]
    machines: list[dict[str, Any]]
    paper: dict[str, dict[str, float]]
    troubles: dict[str, str]

    def tables(self) -> list[Table]:
        """Costs at one length, and time over length where it was measured."""
        return [self._costs(), *self._growth()]

    def summary(self) -> list[str]:
        lines = [f"{g.adapter}: {g.stopped}." for g in self.growth if g.stopped]
        lines += [f"{label}: {message}" for label, message in self.troubles.items()]
        lines.append(
            "GFLOPs of the whole batch: 2 per multiply-add of projections, convolutions and "
            "attention products, 1 per activation; operators outside PyTorch (the scan) have a "
            "column of their own. Times are medians; peak memory is that of a training pass."
        )
        if self.paper:
            lines.append(f"Paper: {paper.source()}, table 3.")
        for facts in self.machines:
            lines.append("Measured on " + ", ".join(f"{k} {v}" for k, v in facts.items()) + ".")
        if len(self.machines) > 1:
            lines.append("These are different machines: times are not comparable across them.")
        return lines

    def markdown(self, pictures: Sequence[str] = ()) -> str:
        return document(f"Study {self.study}", [*self.tables(), *self.summary()], pictures)

    def csv(self) -> str:
        """A line per adapter and length; times in seconds per pass."""
        return csv_text(
            COLUMNS,
            (
                [
                    *(p.adapter, p.batch, p.tokens, p.params, p.flops, p.scan_flops),
                    *(p.forward.p50, p.forward.p20, p.forward.p80),
                    *(p.backward.p50 if p.backward else None, p.peak_bytes),
                    1e6 * p.seconds_a_token,
                ]
                for p in [*self.costs, *(point for g in self.growth for point in g.points)]
            ),
        )

    def _costs(self) -> Table:
        published = bool(self.paper)
        heads = ["adapter", "params M", "GFLOPs", "scan GFLOPs", "forward s", "backward s"]
        heads.append("peak MB")
        if published:
            heads[2:2], heads[4:4] = ["paper"], ["paper"]
        lines = []
        for c in self.costs:
            line = [c.adapter, f"{c.params / 1e6:.2f}", _giga(c.flops), _giga(c.scan_flops)]
            line += [f"{c.forward.p50:.3f}", f"{c.backward.p50:.3f}" if c.backward else ""]
            line.append("" if c.peak_bytes is None else f"{c.peak_bytes / 1e6:.0f}")
            if published:
                row = self.paper.get(c.adapter, {})
                line[2:2] = [_paper(row.get("params_m"))]
                line[4:4] = [_paper(row.get("gflops"))]
            lines.append(line)
        tokens = f"{self.costs[0].tokens:,} tokens" if self.costs else ""
        title = f"One adapter: width {self.width}, batch {self.batch}, {tokens}"
        return Table(heads, lines, title=title)

    def _growth(self) -> list[Table]:
        lengths = sorted({p.tokens for g in self.growth for p in g.points})
        if not lengths:
            return []
        lines = []
        for g in self.growth:
            at = {p.tokens: p for p in g.points}
            line = [f"{1e6 * at[n].seconds_a_token:.1f}" if n in at else "" for n in lengths]
            last = "" if g.exponent is None else f"{g.exponent:.2f}"
            lines.append([g.adapter, *line, last])
        heads = ["adapter", *(f"{n:,}" for n in lengths), "time ~ length^"]
        return [Table(heads, lines, title="Forward µs per token, by tokens of all encoders")]


def collect(
    registry: Registry,
    name: str,
    study: AdapterStudySpec,
    specs: dict[str, FusionSpec],
    made: Sequence[Job],
) -> AdapterResults:
    found: dict[str, Measured] = {}
    troubles: dict[str, str] = {}
    for job in made:
        status, message = job.state()
        if status == "finished":
            text = job.done[0].read_text("utf-8")
            found[job.label] = Measured.model_validate_json(text)
        elif message:
            troubles[job.label] = f"{status}: {message}"
    machines: list[dict[str, Any]] = []
    for measured in found.values():
        facts = {k: v for k, v in measured.machine.items() if k not in ("date", "load before")}
        if facts not in machines:
            machines.append(facts)
    published = {}
    for label in found:
        wanted = paper.adapter_row(study, label, specs[label], registry)
        if wanted is not None:
            published[label] = wanted
    return AdapterResults(
        study=name,
        width=study.width,
        batch=study.batch,
        costs=[m.cost for m in found.values()],
        growth=[m.growth for m in found.values() if m.growth is not None],
        machines=machines,
        paper=published,
        troubles=troubles,
    )


def _giga(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"


def _paper(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
