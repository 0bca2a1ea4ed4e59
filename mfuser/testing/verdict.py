"""Verdicts: what was tried, what came, what is expected, and what to change."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check. came, expected, fix: of a failure; of a skipped check, why."""

    check: str
    outcome: Outcome
    tried: str
    came: str = ""
    expected: str = ""
    fix: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.outcome == "passed":
            return f"ok    {self.check}: {self.tried}"
        if self.outcome == "skipped":
            return f"--    {self.check}: not tried: {self.came}" + (
                f"; {self.fix}" if self.fix else ""
            )
        lines = [
            f"FAIL  {self.check}",
            f"        tried     {self.tried}",
            f"        came      {self.came}",
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
    def passed(self) -> bool:
        """Whether nothing failed and something was tried."""
        return not self.failed and any(v.outcome == "passed" for v in self.verdicts)

    def __str__(self) -> str:
        head = f"{self.kind.replace('_', '-')} '{self.name}'"
        return "\n".join(
            [head, *(f"  {line}" for v in self.verdicts for line in str(v).split("\n"))]
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "passed": self.passed,
            "checks": [asdict(v) | {"seconds": round(v.seconds, 3)} for v in self.verdicts],
        }


class Broken(Exception):
    """A promise that is not kept, found by a check."""

    def __init__(self, tried: str, came: str, expected: str, fix: str) -> None:
        super().__init__(came)
        self.tried, self.came, self.expected, self.fix = tried, came, expected, fix


class NotTried(Exception):
    """A check that does not apply here, and why."""

    def __init__(self, why: str, fix: str = "") -> None:
        super().__init__(why)
        self.fix = fix


def judge(checks: Iterable[tuple[str, Callable[[], str]]]) -> list[Verdict]:
    """Run named checks, each of which returns what it tried or raises Broken or NotTried.

    Any other exception is a failure of the component and names the line that raised it.
    """
    verdicts = []
    for name, check in checks:
        start = time.perf_counter()
        try:
            verdict = Verdict(name, "passed", check())
        except NotTried as reason:
            verdict = Verdict(name, "skipped", "", str(reason), fix=reason.fix)
        except Broken as broken:
            verdict = Verdict(
                name, "failed", broken.tried, broken.came, broken.expected, broken.fix
            )
        except Exception as error:
            verdict = Verdict(
                name,
                "failed",
                _doc(check),
                f"{type(error).__name__}: {error}",
                "no exception",
                f"see {_place(error)}",
            )
        object.__setattr__(verdict, "seconds", time.perf_counter() - start)
        verdicts.append(verdict)
    return verdicts


def _doc(check: Callable[[], str]) -> str:
    inner = getattr(check, "func", check)
    return " ".join((inner.__doc__ or "").split()).rstrip(".")


def _place(error: BaseException) -> str:
    """The innermost line outside this package, torch and pydantic: the author's own."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if not any(
            part in f.filename
            for part in ("/torch/", "/pydantic", "/mfuser/testing/", "/mfuser/plugins/contracts.py")
        )
    ]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"
