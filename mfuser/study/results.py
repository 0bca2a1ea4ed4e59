"""The files of a study's results: JSON, Markdown, CSV, and a picture where matplotlib is."""

from __future__ import annotations

from pathlib import Path

from mfuser.files import write_json, write_text
from mfuser.study.adapters import AdapterResults
from mfuser.study.plot import plot_growth, plot_results
from mfuser.study.report import Results

AnyResults = Results | AdapterResults


def save(results: AnyResults, out: Path) -> str | None:
    """Write results.json, .md, .csv and .png; returns why there is no plot."""
    picture = out / "results.png"
    if isinstance(results, Results):
        missing = plot_results(results, picture)
    else:
        missing = plot_growth(results, picture)
    write_json(out / "results.json", results.model_dump(mode="json"))
    write_text(out / "results.md", results.markdown([] if missing else [picture.name]))
    write_text(out / "results.csv", results.csv())
    return missing
