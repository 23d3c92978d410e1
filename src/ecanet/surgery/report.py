"""What surgery did, as a table."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from ecanet.networks.copies import twin_of
from ecanet.networks.cost import counting, parameters
from ecanet.networks.running import example_tensor, running_without_data
from ecanet.nn import Gate
from ecanet.text_table import text_table
from ecanet.untrusted import counted


class Row(NamedTuple):
    """One gate, or one tail.

    Attributes:
        name: Its name in the network.
        gate: The gate's class; empty for a tail without a gate.
        where: Name of the module whose output the gate scales.
        channels: Number of channels, or None if it is not known.
        kernel_size: k, or None for a gate without it.
        parameters: Parameters added; negative if they were taken out.
        multiply_adds: Multiply-adds added for one sample, or None if the size of the map is not known.
    """

    name: str
    gate: str
    where: str
    channels: int | None = None
    kernel_size: int | None = None
    parameters: int = 0
    multiply_adds: int | None = None


@dataclass(frozen=True)
class Report:
    """What one call did to a network; prints as a table.

    Attributes:
        done: What was done, for the last line: ``"inserted"``, ``"replaced"``, ``"removed"`` or ``"fused"``.
        rows: One for each gate or tail.
        notes: Remarks: what was left out and why, what was already there.
        replaced: Modules that are no longer part of the network, by name.
    """

    done: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    replaced: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Parameters added to the network."""
        return sum(row.parameters for row in self.rows)

    @property
    def multiply_adds(self) -> int | None:
        """Multiply-adds added for one sample, or None if they are not known for a row."""
        known = [row.multiply_adds for row in self.rows if row.multiply_adds is not None]
        return sum(known) if len(known) == len(self.rows) else None

    def __str__(self) -> str:
        """The table, the notes, and a last line with the sums."""
        columns: list[tuple[str, Callable[[Row], object]]] = [
            ("name", lambda row: row.name),
            ("gate", lambda row: row.gate),
            ("where", lambda row: row.where),
            ("channels", lambda row: row.channels),
            ("k", lambda row: row.kernel_size),
            ("params", lambda row: f"{row.parameters:+,}" if row.parameters else "0"),
            ("MAdds", lambda row: None if row.multiply_adds is None else f"{row.multiply_adds:+,}"),
        ]
        shown = [(header, get) for header, get in columns if any(get(row) not in (None, "", "0") for row in self.rows)]
        table = [[header for header, _ in shown]]
        table += [["-" if (value := get(row)) in (None, "") else str(value) for _, get in shown] for row in self.rows]
        left = sum(header in ("name", "gate", "where") for header, _ in shown)
        lines = text_table(table, left).splitlines() if self.rows else []
        lines += list(self.notes)
        madds = self.multiply_adds
        cost = f": {self.parameters:+,} parameters" + (
            "" if madds is None else f", {madds:+,} multiply-adds per sample"
        )
        what = "tail" if self.done == "fused" else "gate"
        count = f"{counted(len(self.rows), what)} {self.done}"
        return "\n".join([*lines, count + (cost if self.rows and self.done != "fused" else "")])


def gate_row(name: str, gate: nn.Module, where: str, channels: int | None, spatial: Sequence[int] | None) -> Row:
    """The row of a gate, or of other attention.

    Args:
        name: Its name in the network.
        gate: The gate.
        where: The name of the module before it.
        channels: Number of channels C.
        spatial: Size of the map, or None if it is not known.
    """
    size = getattr(gate, "kernel_size", None)
    return Row(
        name,
        type(gate).__name__,
        where,
        channels,
        size if isinstance(size, int) else None,
        parameters(gate),
        _multiply_adds(gate, channels, spatial),
    )


def _multiply_adds(attention: nn.Module, channels: int | None, spatial: Sequence[int] | None) -> int | None:
    """As :func:`ecanet.inspect.multiply_adds` counts; for other attention, its layers and C S for the scaling."""
    if channels is None or spatial is None:
        return None
    like = example_tensor(attention)
    try:
        twin = twin_of(attention)
        with counting(twin) as counter, counter, running_without_data(twin):
            twin(torch.zeros((1, channels, *spatial), dtype=like.dtype, device=like.device))
    except Exception:  # a module of another library may need data, or cannot be copied
        return None
    scaling = 0 if isinstance(attention, Gate) else channels * math.prod(spatial)
    return scaling + counter.get_total_flops() // 2
