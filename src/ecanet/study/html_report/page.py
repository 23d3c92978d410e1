"""The report's page: the content of each section, and how it is put into the template.

The names of conditions and classes, and the reasons of failures, are untrusted. The template escapes every text, and
unprintable characters, such as those that reverse the direction of text, are shown as codes. The page's content
security policy forbids connections and any script but its own.
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
from ecanet.untrusted import counted, shown

try:
    import jinja2
    from markupsafe import Markup, escape
except ImportError as error:
    raise ImportError(f"the report of a study needs {error.name}: pip install 'ecanet[study]'") from error

_HERE = Path(__file__).parent
#: Background colour in dark mode, as in the style sheet.
DARK_PAPER = "#14171A"
#: Largest numbers of columns in a table, of bytes in its rows, and of characters in a text.
_MAX_COLUMNS, _MAX_BYTES, _MAX_CHARACTERS = 40, 400_000, 600
#: Approximate bytes of HTML around the text of a cell.
_CELL_OVERHEAD = 30
#: Level of a gate without a value; gates with a value have levels from 0 to 254.
_NO_IMAGES = 255
_PROFILE_NOTE = (
    "The time is that of a training step (forward, backward, SGD) on one thread of a CPU, with the networks taking "
    "turns: compare these times only with one another. Parameters and multiply-adds (for one picture) are those of the "
    "gates. A table of networks, if there is one, was written into the folder by ecanet profile."
)


@dataclass
class Table:
    """A table: its first column names the row.

    Attributes:
        caption: Caption.
        head: Names of the columns.
        rows: Cells of each row.
        texts: Indices of the columns that hold texts; the others hold numbers.
    """

    caption: str
    head: list[str]
    rows: list[list[str]]
    texts: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Cut a table that is too large to read, and say so in the caption."""
        kept, size = len(self.rows), 0
        for index, row in enumerate(self.rows):
            size += sum(len(cell) + _CELL_OVERHEAD for cell in row[:_MAX_COLUMNS])
            if size > _MAX_BYTES:
                kept = index
                break
        if kept < len(self.rows) or len(self.head) > _MAX_COLUMNS:
            self.caption += f" (the first {kept:,} rows, and at most {_MAX_COLUMNS} columns)"
            self.head = self.head[:_MAX_COLUMNS]
            self.rows = [row[:_MAX_COLUMNS] for row in self.rows[:kept]]


def render(contents: StudyFolder) -> str:
    """The whole report as HTML: one file that needs no other.

    Args:
        contents: What is in the study's folder.
    """
    script, style = ((_HERE / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined, finalize=_printable
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sections = _sections(contents)
    return environment.get_template("report.html.j2").render(
        script=script, script_hash=f"sha256-{digest}", style=style, looks=_looks(contents.conditions), **sections
    )


def _printable(value: Any) -> Any:
    return shown(value, _MAX_CHARACTERS) if isinstance(value, str) and not isinstance(value, Markup) else value


def _looks(conditions: list[str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "colour": colour, "on_dark": on_dark(colour, DARK_PAPER), "dash": DASHES.index(dashes)}
        for name, (colour, dashes) in looks(conditions).items()
    ]


def _sections(contents: StudyFolder) -> dict[str, Any]:
    """The variables of the template."""
    study = contents.study
    sections: dict[str, Any] = {
        "title": f"Study {contents.folder.resolve().name}",
        "headline": headline(study.summary),
        "verdict": verdict_lines(study.summary),
        "warnings": _warnings(contents),
        "summary": _summary(contents),
        "needed": _needed(contents),
        "metric": study.metric,
        "baseline": contents.conditions[0],
        "cost": cost_chart(contents),
        "cost_note": _cost_note(contents),
        "differences": difference_rows(contents),
        "pairs": _pairs(contents),
        "curves": curve_charts(contents),
        "curve_ends": _curve_ends(contents),
        "sweep": sweep_chart(contents),
        "sweep_table": _sweep_table(contents),
        "gates": [_heats(name, learned, _ends(contents)) for name, learned in contents.gates.items()],
        "scale": _scale(contents),
        "profile": [table for table in (_costs(contents), _networks(contents)) if table],
        "profile_note": _PROFILE_NOTE,
        "failed": _failed(contents),
        "runs": _runs(contents),
        "command": contents.about.command,
        "made": _made(contents),
    }
    shared, differing = split_settings(contents)
    sections["shared"] = Table("Settings that all conditions share", ["setting", "value"], _items(shared), {1})
    columns = list(dict.fromkeys(key for settings in differing.values() for key in settings))
    rows = [[name, *(settings.get(key, "-") for key in columns)] for name, settings in differing.items()]
    sections["differing"] = (
        Table("Settings in which the conditions differ", ["condition", *columns], rows, set(range(1, 1 + len(columns))))
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
    present = [(name, text) for name, text in titles.items() if sections[name]]
    return sections | {"sections": [*present, ("settings", "Settings and versions")]}


def _items(settings: dict[str, str]) -> list[list[str]]:
    return [[name, value] for name, value in settings.items()]


def _warnings(contents: StudyFolder) -> list[str]:
    lines = []
    if failed := len(contents.study.failed):
        verb = "is" if failed == 1 else "are"
        lines.append(f"{counted(failed, 'run')} failed and {verb} not counted: see Failed runs.")
    if left := len(contents.to_come):
        verb, total = "is" if left == 1 else "are", left + failed + sum(map(len, contents.study.runs.values()))
        lines.append(f"The study is not finished: {left} of {counted(total, 'run')} {verb} still to come.")
    return lines


def _summary(contents: StudyFolder) -> Table:
    summary, rows = contents.study.summary, []
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


def _needed(contents: StudyFolder) -> Table | None:
    summary = contents.study.summary
    rows = [
        [name, *("-" if seeds is None else f"{seeds:,}" for seeds in row.seeds_needed.values())]
        for name, row in summary.conditions.items()
        if name != summary.baseline and any(row.seeds_needed.values())
    ]
    if not rows:
        return None
    sizes = [f"difference of {size}" for size in summary.conditions[rows[0][0]].seeds_needed]
    caption = "How many seeds show a difference of this size in 80 of 100 such studies, at the spread of this study"
    return Table(caption, ["condition", *sizes], rows)


def _number(value: float | None, margin: float | None, sign: str = "") -> str:
    return "-" if value is None else shown_number(value, margin, sign)


def _cost_note(contents: StudyFolder) -> str:
    if cost_of_runs(contents).is_measured:
        return "The cost is the time of a training step, measured for all conditions in turns on one thread."
    since = "if it was stopped and went on, the time since then"
    return f"The cost is the time that each run took ({since}); other load on the machine affects it."


def _pairs(contents: StudyFolder) -> Table | None:
    pairs = {name: by_seed for name, by_seed in paired(contents).items() if by_seed}
    if not pairs:
        return None
    seeds = sorted({seed for by_seed in pairs.values() for seed in by_seed})
    cells = {seed: [f"{run[seed]:+.4g}" if seed in run else "-" for run in pairs.values()] for seed in seeds}
    rows = [[str(seed), *of_seed] for seed, of_seed in cells.items()]
    return Table(f"{contents.study.metric} minus that of {contents.conditions[0]}, by seed", ["seed", *pairs], rows)


def _curve_ends(contents: StudyFolder) -> Table:
    rows = []
    for curve, by_name in curves(contents).items():
        for name, runs in by_name.items():
            mean = mean_curve(list(runs.values()))
            middle = mean[(len(mean) - 1) // 2]
            rows.append([name, curve, str(len(runs)), *(f"{value:.5g}" for value in (mean[0], middle, mean[-1]))])
    head = ["condition", "curve", "runs", "first epoch", "half way", "last epoch"]
    return Table("Means of the curves", head, rows, {1})


def _sweep_table(contents: StudyFolder) -> Table | None:
    sizes, summary = kernel_sweep(contents), contents.study.summary
    rows = [
        [
            size,
            name,
            str(len(contents.study.runs[name])),
            _number(summary.conditions[name].mean, summary.conditions[name].std),
        ]
        for size, name in sizes.items()
    ]
    return Table("By kernel size", ["k", "condition", "seeds", summary.metric], rows, {1}) if rows else None


def _networks(contents: StudyFolder) -> Table | None:
    """The table that ``ecanet profile`` wrote, without empty columns."""
    if len(contents.profile) < 2:
        return None
    columns = [cells for cells in zip(*contents.profile, strict=True) if any(cells[1:])]
    head, *rows = ([cell or "-" for cell in row] for row in zip(*columns, strict=True))
    return Table("Networks by ecanet profile", head, rows)


def _costs(contents: StudyFolder) -> Table | None:
    if not contents.costs:
        return None
    first, first_cost = next(iter(contents.costs.items()))
    plain = first_cost.seconds
    rows = [
        [name, f"{c.parameters:,}", f"{c.multiply_adds:,}", f"{1000 * c.seconds:.1f}", f"x {c.seconds / plain:.2f}"]
        for name, c in contents.costs.items()
    ]
    head = ["condition", "parameters of gates", "multiply-adds of gates", "ms a training step", f"time of {first}"]
    return Table("Cost of each condition", head, rows)


def _failed(contents: StudyFolder) -> Table | None:
    rows = [
        [run.condition, str(run.seed), run.reason, run.file.name if run.file.exists() else "-"]
        for run in contents.study.failed
    ]
    return Table("Runs that are not counted", ["condition", "seed", "why", "file"], rows, {2, 3}) if rows else None


def _runs(contents: StudyFolder) -> Table:
    runs = [run for of_condition in contents.study.runs.values() for run in of_condition]
    metrics = list(dict.fromkeys([contents.study.metric, *(name for run in runs for name in run.metrics)]))
    rows = [
        [run.condition, str(run.seed), *(_cell(run.metrics.get(name)) for name in metrics), f"{run.seconds:.1f}"]
        for run in runs
    ]
    return Table("Every finished run", ["condition", "seed", *metrics, "seconds"], rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _made(contents: StudyFolder) -> Table:
    about, runs = contents.about, contents.study.runs
    finished = counted(sum(map(len, runs.values())), "finished run")
    counts = f"{counted(len(runs), 'condition')}, {finished}, {len(contents.study.failed)} failed"
    facts = {"runs": counts, "started": about.date, "commit": about.commit, "machine": about.machine, **about.versions}
    rows = [[name, value] for name, value in facts.items() if value]
    trained_with = {
        ", ".join(f"{name} {value}" for name, value in versions.items() if isinstance(value, str))
        for of_condition in runs.values()
        for run in of_condition
        for versions in _dicts_in(run.details.get("versions"))
    }
    rows += [["trained with", versions] for versions in sorted(trained_with)[:20] if versions]
    return Table("How it was made", ["what", "value"], rows, {1})


def _dicts_in(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _scale(contents: StudyFolder) -> dict[str, Any]:
    """The colour scale that all heat maps share."""
    low, high = _ends(contents)
    return {"low": low, "high": high, "picture": _picture(torch.arange(_NO_IMAGES, dtype=torch.uint8)[None])}


def _ends(contents: StudyFolder) -> tuple[int, int]:
    return scale_of(values for learned in contents.gates.values() for values in learned.values.values())


def _heats(name: str, learned: LearnedGates, ends: tuple[int, int]) -> dict[str, Any]:
    """The heat maps of a condition, with sorted channels, and a table of their numbers."""
    drawn = gates_to_draw(learned.values, None)
    spreads = {gate: spread_of(learned.values[gate]) for gate in drawn}
    rows = []
    for gate in drawn:
        values = learned.values[gate]
        finite = values[values.isfinite()]
        numbers = [f"{x:.3f}" for x in (finite.min(), finite.mean(), finite.max())] if len(finite) else ["-"] * 3
        rows.append([gate, str(values.shape[1]), _spread_text(spreads[gate]), *numbers])
    head = ["gate", "channels", "spread across classes", "lowest", "mean", "highest"]
    return {
        "name": name,
        "seed": learned.seed,
        "classes": learned.classes,
        "joined": Markup("\n").join(escape(_printable(name)) for name in learned.classes),
        "heats": [_heat(gate, learned.values[gate], spreads[gate], ends) for gate in drawn],
        "table": Table(f"Gates of {name}, over all classes", head, rows),
    }


def _spread_text(spread: float | None) -> str:
    return "unknown" if spread is None else f"{spread:.3f}"


def _heat(gate: str, values: Tensor, spread: float | None, ends: tuple[int, int]) -> dict[str, Any]:
    order = channels_by_class(values)
    low, high = ends
    share = (values[:, order] - low) / (high - low)
    levels = (share.clamp(0, 1) * (_NO_IMAGES - 1)).round().nan_to_num(nan=_NO_IMAGES).to(torch.uint8)
    title = f"{gate}: {len(order)} channels, spread across classes {_spread_text(spread)}"
    return {
        "title": title,
        "label": f"Heat map of {title}; {len(values)} classes by {len(order)} sorted channels",
        "picture": _picture(levels),
        "order": Markup(" ".join(map(str, order))),
        "cells": Markup(base64.b64encode(levels.numpy().tobytes()).decode()),
    }


def _picture(levels: Tensor) -> Markup:
    """A PNG with a pixel for each cell, as a data URL; cells without a value are transparent."""
    image = Image.frombytes("P", (levels.shape[1], levels.shape[0]), levels.numpy().tobytes())
    colours = diverging()([level / (_NO_IMAGES - 1) for level in range(_NO_IMAGES)], bytes=True)
    image.putpalette([int(part) for colour in colours for part in colour[:3]] + [255] * 3)
    content = io.BytesIO()
    image.save(content, format="PNG", transparency=_NO_IMAGES, optimize=True)
    return Markup("data:image/png;base64," + base64.b64encode(content.getvalue()).decode())
