"""One HTML file that says what a study found, with its pictures and its table beside it."""

import importlib.util
import io
import warnings
from pathlib import Path
from typing import Any

from ecanet.files.atomic import write_whole
from ecanet.study.html_report.page import render
from ecanet.study.html_report.pictures import draw
from ecanet.study.html_report.reading import StudyFolder, read_folder

__all__ = ["write_report"]

#: The report, and the folder of its pictures.
REPORT, FIGURES = "report.html", "figures"


def write_report(folder: str | Path, metric: str | None = None) -> Path:
    """Write ``report.html`` and ``figures/*.png`` into a study's folder, from what is in it.

    The report is one file that opens without a network: the verdict, the metric against its cost, the paired
    differences, training curves, a sweep of kernel sizes, the gates of each class, what they cost, failed runs, and how
    the study was made. What a study has no data for is left out. A study writes its report itself when it ends; this
    writes it again, for a folder by an earlier version, a study that was stopped, or another metric. Where polars is
    installed, ``results.parquet`` has a row for each run, too.

    Args:
        folder: Folder of a study, by :func:`ecanet.study.run`, ``compare``, ``ecanet study`` or ``ecanet demo``.
        metric: What to compare; by default what the study compared.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it holds no study, no run has the metric, or a file in it is damaged. A run's file that is damaged
            is named in the report.
    """
    folder = Path(folder)
    found = read_folder(folder, metric)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in a writing that the font has not
        for name, figure in draw(found):
            picture = io.BytesIO()
            figure.savefig(picture, format="png")
            write_whole(folder / FIGURES / name, picture.getvalue())
    if importlib.util.find_spec("polars") is not None:
        write_whole(folder / "results.parquet", _parquet(found))
    write_whole(folder / REPORT, render(found))
    return folder / REPORT


def _parquet(found: StudyFolder) -> bytes:
    """A row for each finished run: condition, seed, metrics, seconds."""
    import polars

    runs = [run for of in found.study.runs.values() for run in of]
    columns: dict[str, list[Any]] = {
        "condition": [_utf8(run.condition) for run in runs],
        "seed": [run.seed for run in runs],
        "seconds": [float(run.seconds) for run in runs],
    }
    for metric in dict.fromkeys(name for run in runs for name in run.metrics if name not in columns):
        values = [run.metrics.get(metric) for run in runs]
        columns[_utf8(metric)] = [None if value is None else float(value) for value in values]
    content = io.BytesIO()
    polars.DataFrame(columns).write_parquet(content)
    return content.getvalue()


def _utf8(text: str) -> str:
    """A text of JSON, which may hold halves of characters."""
    return text.encode(errors="backslashreplace").decode()
