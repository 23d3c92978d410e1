"""A profile: its rows, and how they look as Markdown, CSV and JSON."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecanet.files.atomic import write_whole
from ecanet.profile.counts import Counts
from ecanet.profile.measure import Measured
from ecanet.profile.paper import PaperRow
from ecanet.profile.turns import Ratio

_ABSENT = "-"


@dataclass(frozen=True)
class ProfileRow:
    """The results of one network.

    Attributes:
        name: Name of the network.
        image_size: Height and width of its pictures, in pixels; None if nothing was built.
        counts: Parameters and multiply-adds; None for a competitor that has only the paper's figures.
        measured: Time and memory; None with ``time=False``.
        paper: Its row in the paper's Table 3, or None.
    """

    name: str
    image_size: int | None
    counts: Counts | None
    measured: Measured | None
    paper: PaperRow | None


@dataclass(frozen=True)
class Profile:
    """The results of all networks, with the settings and the machine.

    Attributes:
        rows: One for each network, in the order given.
        settings: Batch size, rounds, threads, device and dtype; None with ``time=False``.
        machine: Processor, versions and environment variables.
    """

    rows: tuple[ProfileRow, ...]
    settings: dict[str, Any] | None
    machine: dict[str, Any]

    def __str__(self) -> str:
        """The tables, in Markdown."""
        return _markdown(self)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write ``profile.md``, ``profile.csv`` and ``profile.json``.

        Args:
            folder: Created if needed.

        Raises:
            OSError: it cannot be written.
        """
        for name, text in (("md", f"{self}\n"), ("csv", _csv(self)), ("json", _json(self))):
            write_whole(Path(folder) / f"profile.{name}", text)


def _json(profile: Profile) -> str:
    """Everything, including the seconds of every round."""
    return json.dumps(dataclasses.asdict(profile), indent=2) + "\n"


def _csv(profile: Profile) -> str:
    """A row for each network; numbers are not rounded, and cells without a number are empty."""
    text = io.StringIO(newline="")
    rows = [dict(_cells(row)) for row in profile.rows]
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _markdown(profile: Profile) -> str:
    """Tables of counts, time and memory, and a line on the machine."""
    with_paper = any(row.paper for row in profile.rows)
    parts = [_table(_counts(profile.rows, with_paper))]
    if profile.settings is not None:
        parts += [_table(_times(profile.rows, with_paper)), _table(_memory(profile.rows))]
    machine, settings = profile.machine, profile.settings
    versions = f"torch {machine['versions']['torch']}, ecanet {machine['versions'].get('ecanet', 'not installed')}"
    line = f"{machine['cpu']}, {versions}"
    if settings is not None:
        threads = f"{settings['threads']} thread{'s' * (settings['threads'] != 1)}"
        line += (
            f"; {settings['device']}, {threads}, batches of {settings['batch_size']}, {settings['rounds']} rounds in "
            f"turn, kernels {machine['kernels']}; medians with intervals of 95 %"
        )
    return "\n\n".join([*parts, line])


def _counts(rows: Sequence[ProfileRow], with_paper: bool) -> Iterator[list[str]]:
    from_paper = ["paper: parameters", "by the paper's rule", "paper: FLOPs", "paper: top-1", "top-5"]
    yield ["network", "pictures", "parameters", "in 2^20", "in gates", "multiply-adds", *from_paper * with_paper]
    for row in rows:
        counts, paper = row.counts, row.paper
        cells = [f"{row.name} (the paper's figures alone)", *[_ABSENT] * 5]
        if counts is not None:
            cells = [
                row.name,
                str(row.image_size),
                f"{counts.parameters:,}",
                f"{counts.parameters / 2**20:.2f}",
                f"{counts.gate_parameters:,}",
                f"{counts.multiply_adds:,}",
            ]
        if with_paper:
            by_rule = _ABSENT if counts is None else _as_printed(counts.paper_flops, paper.flops if paper else "G")
            printed = [_ABSENT] * 4
            if paper is not None:
                printed = [paper.parameters, paper.flops, f"{paper.top1:.2f}", f"{paper.top5:.2f}"]
            cells += [printed[0], by_rule, *printed[1:]]
        yield cells


def _as_printed(flops: int, like: str) -> str:
    """FLOPs in the paper's units: 2^30 with two decimals, or 2^20 with one."""
    return f"{flops / 2**20:.1f}M" if like.endswith("M") else f"{flops / 2**30:.2f}G"


def _times(rows: Sequence[ProfileRow], with_paper: bool) -> Iterator[list[str]]:
    head = ["network", "training, pictures/s", "inference, pictures/s", "latency of one, ms", "gates in training"]
    yield [*head, "gates at inference", *["paper: training", "paper: inference"] * with_paper]
    for row in rows:
        measured, paper = row.measured, row.paper
        cells = [row.name, *[_ABSENT] * 5]
        if measured is not None:
            latency = Ratio(*(1e3 * value for value in dataclasses.astuple(measured.latency)))
            cells = [
                row.name,
                *(_with_interval(ratio) for ratio in (measured.training, measured.inference, latency)),
                *(_percent(share) for share in (measured.share_of_training, measured.share_of_inference)),
            ]
        if with_paper:
            printed = (None, None) if paper is None else (paper.train, paper.inference)
            cells += [_ABSENT if value is None else str(value) for value in printed]
        yield cells


def _memory(rows: Sequence[ProfileRow]) -> Iterator[list[str]]:
    yield ["network", "saved for the backward, MB", "peak of a step, MB", "peak at inference, MB"]
    for row in rows:
        if (measured := row.measured) is not None:
            numbers = (measured.saved_bytes, measured.peak_of_training, measured.peak_of_inference)
            yield [row.name, *(f"{number / 1e6:.1f}" for number in numbers)]


def _with_interval(ratio: Ratio) -> str:
    return f"{ratio.value:.4g} ({ratio.low:.4g} to {ratio.high:.4g})"


def _percent(share: Ratio | None) -> str:
    if share is None:
        return _ABSENT
    return f"{100 * share.value:.1f} % ({100 * share.low:.1f} to {100 * share.high:.1f})"


def _table(lines: Iterator[list[str]]) -> str:
    head, *rows = lines
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["-"] * len(head), *rows))


def _cells(row: ProfileRow) -> Iterator[tuple[str, Any]]:
    counts, measured, paper = row.counts, row.measured, row.paper
    yield "network", row.name
    yield "image_size", row.image_size
    for name in ("parameters", "gate_parameters", "multiply_adds", "paper_flops"):
        yield name, counts and getattr(counts, name)
    for name in ("training", "inference", "latency", "share_of_training", "share_of_inference"):
        ratio = measured and getattr(measured, name)
        for end in ("value", "low", "high"):
            yield name if end == "value" else f"{name}_{end}", ratio and getattr(ratio, end)
    for name in ("saved_bytes", "peak_of_training", "peak_of_inference"):
        yield name, measured and getattr(measured, name)
    for name in ("parameters", "flops", "train", "inference", "top1", "top5"):
        yield f"paper_says_{name}", paper and getattr(paper, name)
