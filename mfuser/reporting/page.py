"""The report as one HTML file: no network, no server; opens from disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mfuser.files import write_text
from mfuser.reporting.draw import palette
from mfuser.reporting.report import Report

PLACE = "/*DATA*/"


def save(report: Report, folder: Path, pictures: Sequence[str] = ()) -> None:
    """report.{json,md,csv,html}; `pictures` are linked from the Markdown."""
    report.save(folder, list(pictures))
    write_text(folder / "report.html", page(report))


def page(report: Report) -> str:
    """`report` as one HTML file."""
    table = palette(report.classes)
    data: dict[str, Any] = {
        "report": report.as_json(),
        "title": report.title,
        "summary": report.summary(),
        "columns": report.columns(),
        "rows": report.rows(),
        "colors": [[int(v) for v in table[k]] for k in range(len(report.classes))],
        "pictures": {
            name: [
                {
                    "name": p.score.name,
                    "miou": p.score.miou,
                    "photo": p.photo,
                    "target": p.target,
                    "prediction": p.prediction,
                }
                for p in shown
            ]
            for name, shown in report.pictures.items()
        },
    }
    return framed("report.html").replace(PLACE, embedded(data))


def framed(name: str) -> str:
    """frame.html, which all pages share, with the title, style, body and script of page `name`."""
    folder = resources.files("mfuser").joinpath("reporting")
    html, own = (folder.joinpath(n).read_text("utf-8") for n in ("frame.html", name))
    for tag in ("title", "style", "body", "script"):
        part = own.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        html = html.replace(f"/*{tag.upper()}*/", part.strip("\n"))
    return html


def embedded(data: Any) -> str:
    """As JSON inside a script element: "</" would end it, whatever a class or a file is called."""
    return json.dumps(_finite(data)).replace("</", "<\\/")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value != value else value
