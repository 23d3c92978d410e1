"""Tables and picture of fine-tuning: ``python -m benchmarks.finetune.report FILE.json [--plot FILE.png]``."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.finetune.tables import report
from benchmarks.report import save_picture, show_again, show_without_picture, writer_of


def show(document: results.Document, plot: Path | None) -> None:
    """Print the tables, and draw the picture if a file is named."""
    if writer_of(document) == "benchmarks.finetune.photographs":
        from benchmarks.finetune import photographs

        show_without_picture(photographs.report(document), plot)
        return
    print(report(document))
    if plot:
        from benchmarks.finetune.picture import draw

        save_picture(draw(document), plot)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of a result file again, and draw its picture."""
    show_again(argv, show, "benchmarks.finetune.report", "finetune-mobilenet_v2.json --plot docs/images/finetune.png")


if __name__ == "__main__":
    main()
