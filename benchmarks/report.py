"""Tables and picture of a result file: ``python -m benchmarks.report FILE.json [--plot FILE.png]``."""

import argparse
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import results
from benchmarks.tables import report
from ecanet.files.atomic import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The module that shows a result file, by the command that wrote the file.
SHOWN_BY = {
    "benchmarks.cpu": "benchmarks.report",
    "benchmarks.gpu": "benchmarks.report",
    "benchmarks.traffic": "benchmarks.report",
    "benchmarks.finetune": "benchmarks.finetune.report",
    "benchmarks.finetune.photographs": "benchmarks.finetune.report",
}


def show(document: results.Document, plot: Path | None) -> None:
    """Print the tables, and draw the picture if a file is named and there is something to draw."""
    if writer_of(document) == "benchmarks.traffic":
        from benchmarks import traffic

        show_without_picture(traffic.report(document), plot)
        return
    print(report(document))
    if plot:
        from benchmarks.gates import draw_gates, measured_gates
        from benchmarks.picture import draw

        cases = document["cases"]
        has_only_gates = measured_gates(cases) and all(key.startswith("gates/") for key in cases)
        try:
            figure = (draw_gates if has_only_gates else draw)(document)
        except ValueError as error:
            print(f"no picture {plot}: {error}")
        else:
            save_picture(figure, plot)


def save_picture(figure: "Figure", file: Path) -> None:
    """Write a picture whole, in the format that the file's name ends in."""
    content = io.BytesIO()
    figure.savefig(content, format=file.suffix[1:] or "png")
    write_whole(file, content.getvalue())


def show_without_picture(table: str, plot: Path | None) -> None:
    """Print a table; if a picture is asked for, say that there is none."""
    print(table)
    if plot:
        print(f"no picture {plot}: these numbers have none")


def writer_of(document: results.Document) -> str:
    """The module that wrote a result file, by its command; empty if the file does not name one."""
    writer = re.search(r"python -m (\S+)", document.get("command", ""))
    return writer[1] if writer else ""


def check_shown_by(module: str, document: results.Document, file: Path) -> None:
    """Raise unless a module shows the result files of the command that wrote a file.

    Raises:
        ValueError: it does not; the message names the writer, what the module shows, and the right module.
    """
    name = writer_of(document) or "a command that it does not name"
    viewer = SHOWN_BY.get(name)
    if viewer == module:
        return
    writers = " and ".join(writer for writer, shower in SHOWN_BY.items() if shower == module)
    remedy = f"; python -m {viewer} {file} shows this one" if viewer else ""
    raise ValueError(f"{file} was written by {name}: {module} shows files of {writers}{remedy}")


def show_again(
    argv: Sequence[str] | None, show: Callable[[results.Document, Path | None], None], module: str, example: str
) -> None:
    """Run a command that shows a result file without measuring.

    Args:
        argv: Its arguments.
        show: Prints the tables of a document, and draws its picture into a file.
        module: The module that is run.
        example: A result file and options, for the help.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description="Tables and picture of a result file, without measuring. "
        f"Example: python -m {module} benchmarks/results/{example}",
    )
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args(argv)
    try:
        document = results.read(args.file)
        check_shown_by(module, document, args.file)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    show(document, args.plot)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of a result file again, and draw its picture."""
    show_again(argv, show, "benchmarks.report", "cpu-1-threads.json --plot cost.png")


if __name__ == "__main__":
    main()
