"""Tables of text for a terminal."""

from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lay out rows of cells as lines with aligned columns.

    Args:
        rows: Rows of the same length.
        left: How many columns are left-aligned; the others are right-aligned.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def text_table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Likewise, with a line below the first row, which is the header."""
    header, *lines = columns(rows, left)
    return "\n".join([header, "-" * max(map(len, [header, *lines])), *lines])
