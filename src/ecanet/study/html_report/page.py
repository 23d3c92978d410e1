"""The report's page: what each section says, and the template that it goes into.

Names, classes and reasons may come from strangers. Every text is escaped by the template, and unprintable characters,
such as those that turn the direction of writing, are shown as codes. The page forbids itself any connection and any
script but its own.
"""

import base64
import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ecanet.inspect.per_class import channels_by_class, gates_to_draw, scale_of, spread_of
from ecanet.inspect.style import DASHES, diverging, looks, on_dark
from ecanet.study.conclusions import headline, shown_number, verdict_lines
from ecanet.study.html_report.charts import cost_chart, curve_charts, difference_rows, sweep_chart
from ecanet.study.html_report.reading import LearnedGates, StudyFolder
from ecanet.study.html_report.series import cost_of_runs, curves, kernel_sweep, mean_curve, paired, split_settings
from ecanet.untrusted import shown

try:
    import jinja2
    from markupsafe import Markup, escape
except ImportError as error:
    raise ImportError(f"the report of a study needs {error.name}: pip install 'ecanet[study]'") from error

_HERE = Path(__file__).parent
#: Colour of dark paper, as in the style sheet.
DARK_PAPER = "#14171A"
#: Columns of a table, bytes of its rows and characters of any text, at most.
_MOST_COLUMNS, _MOST_BYTES, _MOST_CHARACTERS = 40, 400_000, 600
#: Bytes around the text of a cell, about.
_AROUND = 30
#: Level of a gate without a value; those with one are from 0 to 254.
_NO_IMAGES = 255
_PROFILE_NOTE = (
    "Time of a training step (forward, backward, SGD) on one thread of a CPU, the networks in turns: compare these "
    "times only with one another. Parameters and multiply-adds (for one picture) are those of the gates. A table of "
    "networks, where there is one, is what ecanet profile wrote into the folder."
)


@dataclass
class Table:
    """A table: its first column names the row.

    Attributes:
        caption: What it holds.
        head: Names of the columns.
        rows: Cells.
        texts: Columns that are texts, by number; the others are numbers.
    """

    caption: str
    head: list[str]
    rows: list[list[str]]
    texts: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Leave out what would be too much to look at, and say so."""
        rows, size = len(self.rows), 0
        for place, row in enumerate(self.rows):
            size += sum(len(cell) + _AROUND for cell in row[:_MOST_COLUMNS])
            if size > _MOST_BYTES:
                rows = place
                break
        if rows < len(self.rows) or len(self.head) > _MOST_COLUMNS:
            self.caption += f" (the first {rows:,} rows, and at most {_MOST_COLUMNS} columns)"
            self.head = self.head[:_MOST_COLUMNS]
            self.rows = [row[:_MOST_COLUMNS] for row in self.rows[:rows]]


def render(found: StudyFolder) -> str:
    """The whole report as HTML: one file that needs no other.

    Args:
        found: What is in the study's folder.
    """
    script, style = ((_HERE / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, finalize=_printable
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    about = _sections(found)
    return environment.get_template("report.html.j2").render(
        script=script, script_hash=f"sha256-{digest}", style=style, looks=_looks(found.conditions), **about
    )


def _printable(value: Any) -> Any:
    return shown(value, _MOST_CHARACTERS) if isinstance(value, str) and not isinstance(value, Markup) else value


def _looks(conditions: list[str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "colour": colour, "on_dark": on_dark(colour, DARK_PAPER), "dash": DASHES.index(dashes)}
        for name, (colour, dashes) in looks(conditions).items()
    ]


def _sections(found: StudyFolder) -> dict[str, Any]:
    """Everything that the template names."""
    study = found.study
    sections: dict[str, Any] = {
        "title": f"Study {found.folder.resolve().name}",
        "headline": headline(study.summary),
        "verdict": verdict_lines(study.summary),
        "warnings": _warnings(found),
        "summary": _summary(found),
        "needed": _needed(found),
        "metric": study.metric,
        "baseline": found.conditions[0],
        "cost": cost_chart(found),
        "cost_note": _cost_note(found),
        "differences": difference_rows(found),
        "pairs": _pairs(found),
        "curves": curve_charts(found),
        "curve_ends": _curve_ends(found),
        "sweep": sweep_chart(found),
        "sweep_table": _sweep_table(found),
        "gates": [_heats(name, learned, _ends(found)) for name, learned in found.gates.items()],
        "scale": _scale(found),
        "profile": [table for table in (_costs(found), _networks(found)) if table],
        "profile_note": _PROFILE_NOTE,
        "failed": _failed(found),
        "runs": _runs(found),
        "command": found.about.command,
        "made": _made(found),
    }
    shared, differing = split_settings(found)
    sections["shared"] = Table("Settings that all conditions share", ["setting", "value"], _items(shared), {1})
    columns = list(dict.fromkeys(key for of in differing.values() for key in of))
    rows = [[name, *(of.get(key, "-") for key in columns)] for name, of in differing.items()]
    sections["differing"] = (
        Table("In what the conditions differ", ["condition", *columns], rows, set(range(1, 1 + len(columns))))
        if columns
        else None
    )
    sections["shared"] = sections["shared"] if shared else None
    titles = {
        "cost": f"{study.metric} against cost",
        "differences": "Paired differences",
        "curves": "Training curves",
        "sweep": "Kernel sizes",
        "gates": "Learned gates",
        "profile": "What the gates cost",
        "failed": "Failed runs",
        "runs": "All runs",
    }
    there = [(name, text) for name, text in titles.items() if sections[name]]
    return sections | {"sections": [*there, ("settings", "Settings and versions")]}


def _items(of: dict[str, str]) -> list[list[str]]:
    return [[name, value] for name, value in of.items()]


def _warnings(found: StudyFolder) -> list[str]:
    lines = []
    if failed := len(found.study.failed):
        runs = "run" if failed == 1 else "runs"
        lines.append(f"{failed} {runs} failed and {'is' if failed == 1 else 'are'} not counted: see Failed runs.")
    if left := len(found.to_come):
        total = left + failed + sum(map(len, found.study.runs.values()))
        lines.append(f"The study is not finished: {left} of {total} runs are still to come.")
    return lines


def _summary(found: StudyFolder) -> Table:
    summary, rows = found.study.summary, []
    head = ["condition", "seeds", summary.metric, "spread", "difference", "95 % interval", "p", "p (Holm)", "effect"]
    for name, row in summary.conditions.items():
        margin = None if row.low is None or row.high is None else (row.high - row.low) / 2
        ends = [end for end in (row.low, row.high) if end is not None]
        rows.append(
            [
                name,
                str(row.seeds),
                *(_number(value, row.std) for value in (row.mean, row.std)),
                _number(row.difference, margin, "+"),
                " to ".join(shown_number(end, margin, "+") for end in ends) or "-",
                *("-" if value is None else f"{value:.2g}" for value in (row.p, row.p_holm, row.effect)),
            ]
        )
    return Table(f"{summary.metric} of each condition, and its difference from {summary.baseline}", head, rows)


def _needed(found: StudyFolder) -> Table | None:
    summary = found.study.summary
    rows = [
        [name, *("-" if seeds is None else f"{seeds:,}" for seeds in row.seeds_needed.values())]
        for name, row in summary.conditions.items()
        if name != summary.baseline and any(row.seeds_needed.values())
    ]
    if not rows:
        return None
    sizes = [f"difference of {size}" for size in summary.conditions[rows[0][0]].seeds_needed]
    caption = (
        "Seeds with which such a study shows a difference of this size in 80 of 100 cases, at the spread seen here"
    )
    return Table(caption, ["condition", *sizes], rows)


def _number(value: float | None, margin: float | None, sign: str = "") -> str:
    return "-" if value is None else shown_number(value, margin, sign)


def _cost_note(found: StudyFolder) -> str:
    if cost_of_runs(found).is_measured:
        return "The cost is the time of a training step, measured for all conditions in turns on one thread."
    since = "where it went on after a stop, the time since"
    return f"The cost is the time that each run took ({since}), with all other load on the machine."


def _pairs(found: StudyFolder) -> Table | None:
    pairs = {name: by_seed for name, by_seed in paired(found).items() if by_seed}
    if not pairs:
        return None
    seeds = sorted({seed for by_seed in pairs.values() for seed in by_seed})
    rows = [[str(seed), *(f"{of[seed]:+.4g}" if seed in of else "-" for of in pairs.values())] for seed in seeds]
    return Table(f"{found.study.metric} minus that of {found.conditions[0]}, by seed", ["seed", *pairs], rows)


def _curve_ends(found: StudyFolder) -> Table:
    rows = []
    for curve, by_name in curves(found).items():
        for name, runs in by_name.items():
            mean = mean_curve(list(runs.values()))
            middle = mean[(len(mean) - 1) // 2]
            rows.append([name, curve, str(len(runs)), *(f"{value:.5g}" for value in (mean[0], middle, mean[-1]))])
    head = ["condition", "curve", "runs", "first epoch", "half way", "last epoch"]
    return Table("Means of the curves", head, rows, {1})


def _sweep_table(found: StudyFolder) -> Table | None:
    sizes, summary = kernel_sweep(found), found.study.summary
    rows = [
        [
            size,
            name,
            str(len(found.study.runs[name])),
            _number(summary.conditions[name].mean, summary.conditions[name].std),
        ]
        for size, name in sizes.items()
    ]
    return Table("By kernel size", ["k", "condition", "seeds", summary.metric], rows, {1}) if rows else None


def _networks(found: StudyFolder) -> Table | None:
    """What ``ecanet profile`` measured, as it wrote it; a column that is empty is left out."""
    if len(found.profile) < 2:
        return None
    columns = [cells for cells in zip(*found.profile, strict=True) if any(cells[1:])]
    head, *rows = ([cell or "-" for cell in row] for row in zip(*columns, strict=True))
    return Table("Networks by ecanet profile", head, rows)


def _costs(found: StudyFolder) -> Table | None:
    if not found.costs:
        return None
    plain = next(iter(found.costs.values())).seconds
    rows = [
        [name, f"{c.parameters:,}", f"{c.multiply_adds:,}", f"{1000 * c.seconds:.1f}", f"x {c.seconds / plain:.2f}"]
        for name, c in found.costs.items()
    ]
    first = next(iter(found.costs))
    head = ["condition", "parameters of gates", "multiply-adds of gates", "ms a training step", f"time of {first}"]
    return Table("Cost of each condition", head, rows)


def _failed(found: StudyFolder) -> Table | None:
    rows = [
        [run.condition, str(run.seed), run.reason, run.file.name if run.file.exists() else "-"]
        for run in found.study.failed
    ]
    return Table("Runs that are not counted", ["condition", "seed", "why", "file"], rows, {2, 3}) if rows else None


def _runs(found: StudyFolder) -> Table:
    runs = [run for of in found.study.runs.values() for run in of]
    metrics = list(dict.fromkeys([found.study.metric, *(name for run in runs for name in run.metrics)]))
    rows = [
        [run.condition, str(run.seed), *(_cell(run.metrics.get(name)) for name in metrics), f"{run.seconds:.1f}"]
        for run in runs
    ]
    return Table("Every finished run", ["condition", "seed", *metrics, "seconds"], rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _made(found: StudyFolder) -> Table:
    about, runs = found.about, found.study.runs
    counts = f"{len(runs)} conditions, {sum(map(len, runs.values()))} finished runs, {len(found.study.failed)} failed"
    said = {"runs": counts, "started": about.date, "commit": about.commit, "machine": about.machine, **about.versions}
    rows = [[name, value] for name, value in said.items() if value]
    trained = {
        ", ".join(f"{name} {value}" for name, value in each.items() if isinstance(value, str))
        for of in runs.values()
        for run in of
        for each in _each_version(run.details.get("versions"))
    }
    rows += [["trained with", each] for each in sorted(trained)[:20] if each]
    return Table("How it was made", ["what", "value"], rows, {1})


def _each_version(versions: Any) -> list[dict[str, Any]]:
    return [each for each in versions if isinstance(each, dict)] if isinstance(versions, list) else []


def _scale(found: StudyFolder) -> dict[str, Any]:
    """One scale of colours for all heat maps."""
    low, high = _ends(found)
    return {"low": low, "high": high, "picture": _picture(torch.arange(_NO_IMAGES, dtype=torch.uint8)[None])}


def _ends(found: StudyFolder) -> tuple[int, int]:
    return scale_of(values for learned in found.gates.values() for values in learned.values.values())


def _heats(name: str, learned: LearnedGates, ends: tuple[int, int]) -> dict[str, Any]:
    """The heat maps of a condition, channels sorted, and their numbers."""
    drawn = gates_to_draw(learned.values, None)
    spreads = {gate: spread_of(learned.values[gate]) for gate in drawn}
    rows = []
    for gate in drawn:
        values = learned.values[gate]
        seen = values[values.isfinite()]
        numbers = [f"{number:.3f}" for number in (seen.min(), seen.mean(), seen.max())] if len(seen) else ["-"] * 3
        rows.append([gate, str(values.shape[1]), _said(spreads[gate]), *numbers])
    head = ["gate", "channels", "spread across classes", "lowest", "mean", "highest"]
    return {
        "name": name,
        "seed": learned.seed,
        "classes": learned.classes,
        "joined": Markup("\n").join(escape(_printable(each)) for each in learned.classes),
        "heats": [_heat(gate, learned.values[gate], spreads[gate], ends) for gate in drawn],
        "table": Table(f"Gates of {name}, over all classes", head, rows),
    }


def _said(spread: float | None) -> str:
    return "unknown" if spread is None else f"{spread:.3f}"


def _heat(gate: str, values: Tensor, spread: float | None, ends: tuple[int, int]) -> dict[str, Any]:
    order = channels_by_class(values)
    low, high = ends
    share = (values[:, order] - low) / (high - low)
    levels = (share.clamp(0, 1) * (_NO_IMAGES - 1)).round().nan_to_num(nan=_NO_IMAGES).to(torch.uint8)
    title = f"{gate}: {len(order)} channels, spread across classes {_said(spread)}"
    return {
        "title": title,
        "label": f"Heat map of {title}; {len(values)} classes by {len(order)} sorted channels",
        "picture": _picture(levels),
        "order": Markup(" ".join(map(str, order))),
        "cells": Markup(base64.b64encode(levels.numpy().tobytes()).decode()),
    }


def _picture(levels: Tensor) -> Markup:
    """A pixel for each cell, as an address that holds the picture; cells without a value let the paper through."""
    image = Image.frombytes("P", (levels.shape[1], levels.shape[0]), levels.numpy().tobytes())
    colours = diverging()([level / (_NO_IMAGES - 1) for level in range(_NO_IMAGES)], bytes=True)
    image.putpalette([int(part) for colour in colours for part in colour[:3]] + [255] * 3)
    content = io.BytesIO()
    image.save(content, format="PNG", transparency=_NO_IMAGES, optimize=True)
    return Markup("data:image/png;base64," + base64.b64encode(content.getvalue()).decode())
