"""Verdicts: what was tried, what was got, what is expected, and what to change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mfuser.plugins.blame import place, root

Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check.

    got, expected, fix: of a failure; of a skipped check, got is the reason. fault: equal for
    checks that one and the same fault has failed.
    """

    check: str
    outcome: Outcome
    tried: str
    got: str = ""
    expected: str = ""
    fix: str = ""
    seconds: float = 0.0
    fault: str = ""

    def __str__(self) -> str:
        if self.outcome == "passed":
            return f"ok    {self.check}: {self.tried}"
        if self.outcome == "skipped":
            return f"--    {self.check}: not tried: {self.got}" + (
                f"; {self.fix}" if self.fix else ""
            )
        lines = [
            f"FAIL  {self.check}",
            f"        tried     {self.tried}",
            f"        got       {self.got}",
        ]
        lines += [f"        expected  {self.expected}"] if self.expected else []
        lines += [f"        fix       {self.fix}"] if self.fix else []
        return "\n".join(lines)


@dataclass
class Report:
    """All verdicts on one component."""

    kind: str
    name: str
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def failed(self) -> list[Verdict]:
        return [v for v in self.verdicts if v.outcome == "failed"]

    @property
    def faults(self) -> list[list[Verdict]]:
        """Failed checks, by fault: the first that met it, then those it stopped as well."""
        found: dict[str, list[Verdict]] = {}
        for verdict in self.failed:
            found.setdefault(verdict.fault or verdict.check, []).append(verdict)
        return list(found.values())

    @property
    def passed(self) -> bool:
        """Whether nothing failed and something was tried."""
        return not self.failed and any(v.outcome == "passed" for v in self.verdicts)

    def __str__(self) -> str:
        """A fault that stops several checks is printed once, with the list of them."""
        stopped = {verdicts[0].check: verdicts[1:] for verdicts in self.faults}
        lines = [f"{self.kind.replace('_', '-')} '{self.name}'"]
        for verdict in self.verdicts:
            if verdict.outcome == "failed" and verdict.check not in stopped:
                continue
            lines += [f"  {line}" for line in str(verdict).split("\n")]
            if others := stopped.get(verdict.check):
                lines.append(f"          stopped   {', '.join(v.check for v in others)}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "passed": self.passed,
            "checks": [asdict(v) | {"seconds": round(v.seconds, 3)} for v in self.verdicts],
        }


class Broken(Exception):
    """A requirement that is not met, found by a check."""

    def __init__(self, tried: str, got: str, expected: str, fix: str) -> None:
        super().__init__(got)
        self.tried, self.got, self.expected, self.fix = tried, got, expected, fix


class NotTried(Exception):
    """A check that does not apply here, and why."""

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(why)
        self.fix = fix


def judge(checks: Iterable[tuple[str, Callable[[], str]]], spec: type) -> list[Verdict]:
    """Run named checks, each of which returns what it tried or raises Broken or NotTried.

    Any other exception is a failure of the component that `spec` builds; the fix names the line of
    its own code.
    """
    verdicts = []
    for name, check in checks:
        start = time.perf_counter()
        try:
            verdict = Verdict(name, "passed", check())
        except NotTried as reason:
            verdict = Verdict(name, "skipped", "", str(reason), fix=reason.fix)
        except Broken as broken:
            fault = _fault(broken.__cause__, spec) or f"{broken}; {broken.fix}"
            verdict = Verdict(
                name, "failed", broken.tried, broken.got, broken.expected, broken.fix, fault=fault
            )
        except Exception as error:
            verdict = Verdict(
                name,
                "failed",
                _doc(check),
                f"{type(error).__name__}: {error}",
                "no exception",
                f"see {place(error, spec)}",
                fault=_fault(error, spec),
            )
        object.__setattr__(verdict, "seconds", time.perf_counter() - start)
        verdicts.append(verdict)
    return verdicts


def _fault(error: BaseException | None, spec: type) -> str:
    """The error at the root, and where; "" without an error."""
    if error is None:
        return ""
    first = root(error)
    return f"{type(first).__name__}: {first} ({place(first, spec)})"


def _doc(check: Callable[[], str]) -> str:
    inner = getattr(check, "func", check)
    return " ".join((inner.__doc__ or "").split()).rstrip(".")
