"""Writes the tables of docs/surgery.md: what insertion does to each architecture, and which classes are known.

python scripts/make_surgery_table.py            # takes a minute
python scripts/make_surgery_table.py --check    # exits with 1 if the file is out of date
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ecanet.surgery import ATTENTION, BLOCKS, FUSED, insert_gates_  # noqa: E402
from ecanet.surgery.find.blocks import find_blocks  # noqa: E402
from ecanet.surgery.networks import create_network, default_input_shape  # noqa: E402
from tests.surgery import architectures as known  # noqa: E402

PAGE = ROOT / "docs" / "surgery.md"
REMEDIES = {
    known.NO_BLOCK: "error: no residual block; `where='conv'`, or name modules",
    known.HAS_ATTENTION: "error: has attention there; `replace_gates_`",
    known.NO_MODULE: "error: the branch ends in no module; name one before it",
    known.CHANNELS_LAST: "error: the branch ends with channels last; name a module",
}
HEADER = """\
| architecture | `where` | pixels | blocks | gates | parameters | multiply-adds | the first gate follows |
|-|-|-|-|-|-|-|-|"""


def architecture_table(architectures: Iterable[known.Architecture] = known.ARCHITECTURES) -> str:
    """The table of what insertion does, a line for each architecture."""
    return "\n".join([HEADER, *map(row, architectures)])


def row(architecture: known.Architecture) -> str:
    """One line of it."""
    name, _, expected, where = architecture
    model = _build(name)
    shape = default_input_shape(name, model)
    blocks = len(find_blocks(model)[0])
    cells = [name, where, f"{shape[-2]} x {shape[-1]}", str(blocks)]
    if expected != known.OK:
        return _line(*cells, "0", "", "", REMEDIES[_raised(architecture, model, shape)])
    report = insert_gates_(model, where=where, input_shape=shape)
    assert report.multiply_adds is not None, f"{name} does not run on {shape}"
    hosts = list(dict.fromkeys(type(model.get_submodule(r.where)).__name__ for r in report.rows))
    place = f"`{report.rows[0].where}` ({', '.join(hosts)})"
    return _line(*cells, str(len(report.rows)), f"+{report.parameters:,}", f"+{report.multiply_adds:,}", place)


def class_tables() -> str:
    """What is known by class: blocks whose code does not show their branch, fused tails, attention."""
    lines = ["| block | its branch ends with |", "|-|-|"]
    lines += [_line(f"`{cls}`", f"`{end}`") for cls, end in BLOCKS.items()]
    lines += ["", "Blocks with a fused tail: " + _listed(FUSED) + "."]
    lines += ["", "Attention that is known as such: " + _listed(ATTENTION) + "."]
    return "\n".join(lines)


def write(page: str, name: str, text: str) -> str:
    """The page with another text between the two marks of that name."""
    start, end = f"<!-- {name}: scripts/make_surgery_table.py -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        sys.exit(f"{PAGE} lacks the marks {start.strip()} and {end.strip()}")
    return f"{before}{start}\n{text}\n\n{end}{after}"


def _build(name: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return create_network(name)
    except NotImplementedError:  # torchvision's RegNet computes its widths with tensors
        return create_network(name)


def _raised(architecture: known.Architecture, model: nn.Module, shape: tuple[int, ...]) -> str:
    try:
        insert_gates_(model, where=architecture.where, input_shape=shape)
    except ValueError as error:
        if architecture.expected in str(error):
            return architecture.expected
        raise
    sys.exit(f"{architecture.name} takes gates: change tests/surgery/architectures.py")


def _listed(classes: Iterable[str]) -> str:
    return ", ".join(f"`{cls}`" for cls in classes)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the page, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Exit with 1 if the file is out of date.")
    check = parser.parse_args().check
    old = PAGE.read_text()
    new = write(write(old, "architectures", architecture_table()), "classes", class_tables())
    if new == old:
        print(f"{PAGE} is up to date")
    elif check:
        sys.exit(f"{PAGE} is out of date: python scripts/make_surgery_table.py")
    else:
        PAGE.write_text(new)
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
