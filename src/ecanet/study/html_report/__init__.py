"""One HTML file that shows what a study found, with pictures and a table next to it."""

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

    The report is one file that opens without internet: the verdict, the metric against its cost, the paired
    differences, training curves, a sweep of kernel sizes, the gates of each class, what they cost, failed runs, and how
    the study was made. Parts for which a study has no data are left out. A study writes its report when it ends; this
    function writes it again for a folder of an earlier version, for a study that was stopped, or for another metric.
    If polars is installed, it also writes ``results.parquet`` with a row for each run.

    Args:
        folder: Folder of a study that :func:`ecanet.study.run`, ``compare``, ``ecanet study`` or ``ecanet demo`` made.
        metric: What to compare; by default what the study compared.

    Returns:
        Path of the report.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no study, no run has the metric, or a file in it is damaged. If the file of a run is
            damaged, the report lists it instead.
    """
    folder = Path(folder)
    contents = read_folder(folder, metric)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the font may lack a name's script
        for name, figure in draw(contents):
            picture = io.BytesIO()
            figure.savefig(picture, format="png")
            write_whole(folder / FIGURES / name, picture.getvalue())
    if importlib.util.find_spec("polars") is not None:
        write_whole(folder / "results.parquet", _parquet(contents))
    write_whole(folder / REPORT, render(contents))
    return folder / REPORT


def _parquet(contents: StudyFolder) -> bytes:
    """A row for each finished run: condition, seed, metrics, seconds."""
    import polars

    runs = [run for of_condition in contents.study.runs.values() for run in of_condition]
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
    """Escape what UTF-8 cannot encode: a text of JSON may hold single surrogates."""
    return text.encode(errors="backslashreplace").decode()
