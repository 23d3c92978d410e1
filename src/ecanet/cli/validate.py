"""``ecanet validate``: the accuracy of a trained network, class by class."""

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from ecanet.cli.options import add_accelerator, add_build, add_data, check_out, data_named, write_out
from ecanet.files.atomic import write_whole
from ecanet.inspect.confusion import plot_confusion
from ecanet.inspect.style import new_figure
from ecanet.train.checkpoint import TrainedNetwork, load_trained
from ecanet.train.evaluate import Validation, validate
from ecanet.untrusted import shown

#: Largest number of lines that are printed, the worst class first, and of classes in a confusion matrix.
_MAX_LINES, _MAX_CLASSES = 20, 4000
#: Longest name of a class, in characters.
_MAX_NAME = 30


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument("run", type=Path, help="A run's folder (its best.ckpt), or a checkpoint.")
    add_data(parser)
    parser.add_argument(
        "--confusion", type=Path, default=None, help="Folder for the confusion matrix: confusion.csv, confusion.png."
    )
    parser.add_argument("--out", type=Path, default=None, help="Write all numbers into this JSON file, too.")
    add_accelerator(parser)
    add_build(parser)

    def run(args: Namespace) -> None:
        check_out(args.out)
        trained = load_trained(args.run, args.model.build)
        if args.confusion is not None:
            _check_confusion(args.confusion, trained)
        result = validate(args.run, data_named(args, trained), args.accelerator, args.model.build)
        try:
            for name, value in result.metrics.items():
                print(f"{name}: {value:.4f}" if name == "val/loss" else f"{name}: {value:.2f} %")
            print("\n".join(["", *_table(result)]))
        finally:  # even if the reader of the pipe, such as head, has closed it
            written = _write(result, args.out, args.confusion)
        for files in written:
            print(f"wrote {files}")

    return run


def _write(result: Validation, out: Path | None, confusion: Path | None) -> list[str]:
    """Write the files that the options ask for, and return their names for printing."""
    written = []
    if out is not None:
        write_out(out, json.dumps(_as_json(result), indent=2, allow_nan=False) + "\n")
        written.append(str(out))
    if confusion is not None:
        _write_confusion(confusion, result)
        written.append(f"{confusion / 'confusion.csv'} and {confusion / 'confusion.png'}")
    return written


def _table(result: Validation) -> list[str]:
    """A line for each class, the worst first, with the class that it is most often taken for."""
    accuracy, images = result.of_each_class(), result.images()
    ranked = [index for index in accuracy.argsort(stable=True).tolist() if images[index]]
    is_multi_label = result.labels.dim() == 2
    columns = "   AP %   images" if is_multi_label else "top-1 %   images  most often taken for"
    lines = [f"{'class':{_MAX_NAME}}   {columns}"]
    for index in ranked if len(ranked) <= _MAX_LINES else ranked[: _MAX_LINES - 1]:
        taken_for = "" if is_multi_label else _taken_for(result, index)
        name = shown(result.classes[index], _MAX_NAME)
        lines.append(f"{name:{_MAX_NAME}} {accuracy[index]:9.2f} {images[index]:8,}{taken_for}")
    if len(lines) <= len(ranked):
        left = ranked[len(lines) - 1 :]
        low, high = accuracy[left[0]], accuracy[left[-1]]
        lines.append(f"and {len(left):,} more classes, {low:.2f} to {high:.2f} %: --out FILE.json has all")
    if len(ranked) < len(result.classes):
        lines.append(f"without images: {len(result.classes) - len(ranked):,} classes")
    return lines


def _taken_for(result: Validation, index: int) -> str:
    missed = result.predicted[(result.labels == index) & (result.predicted != index)].bincount()
    if not len(missed):
        return ""
    share = 100 * int(missed.max()) / int((result.labels == index).sum())
    return f"  {shown(result.classes[int(missed.argmax())], _MAX_NAME)} ({share:.1f} %)"


def _as_json(result: Validation) -> dict[str, Any]:
    rows = zip(result.classes, result.images().tolist(), result.of_each_class().tolist(), strict=True)
    metric = "average_precision" if result.labels.dim() == 2 else "top1"
    return {
        "metrics": {name: _number(value) for name, value in result.metrics.items()},
        "classes": [{"class": name, "images": images, metric: _number(value)} for name, images, value in rows],
    }


def _number(value: float) -> float | None:
    """A number for JSON, which has no NaN: None instead."""
    return value if math.isfinite(value) else None


def _check_confusion(folder: Path, trained: TrainedNetwork) -> None:
    classes = len(trained.classes)
    if trained.multi_label:
        raise ValueError("--confusion is for one label per image, and this network was trained with several")
    if classes > _MAX_CLASSES:
        raise ValueError(
            f"--confusion: a matrix of {classes:,} classes has {classes**2:,} cells, and it is written for up to "
            f"{_MAX_CLASSES:,} classes; --out FILE.json has the accuracy of each class"
        )
    new_figure(1)  # fail now if matplotlib is missing
    if folder.suffix in (".png", ".csv"):
        raise ValueError(f"--confusion must be a folder, for confusion.png and confusion.csv, got {str(folder)!r}")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--confusion must be a folder, and {folder} is a file")


def _write_confusion(folder: Path, result: Validation) -> None:
    counts = result.confusion()
    table = io.StringIO(newline="")
    picture = io.BytesIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["class", *result.classes])
    writer.writerows([name, *row] for name, row in zip(result.classes, counts.tolist(), strict=True))
    plot_confusion(counts, result.classes).savefig(picture, format="png")
    write_whole(folder / "confusion.csv", table.getvalue().encode(errors="surrogateescape"))
    write_whole(folder / "confusion.png", picture.getvalue())
