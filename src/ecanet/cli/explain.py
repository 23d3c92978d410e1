"""``ecanet explain``: a picture of an image's classes and of the gates that it gets."""

import io
import sys
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from ecanet.cli.options import add_build, add_data, check_out, data_named
from ecanet.files.atomic import write_whole
from ecanet.inspect.explanation import plot_explanation
from ecanet.inspect.style import new_figure
from ecanet.train.checkpoint import TrainedNetwork, load_trained
from ecanet.train.data.loading import ImageData
from ecanet.train.evaluate import data_of_run, pictures_for
from ecanet.train.explain import explain_prediction
from ecanet.untrusted import shown

_FORMATS = ("png", "pdf", "svg")


def add(parser: ArgumentParser) -> Callable[[Namespace], None]:
    """Add the options to a parser, and return the function that runs the verb."""
    parser.add_argument("run", type=Path, help="A run's folder (its best.ckpt), or a checkpoint.")
    parser.add_argument("image", type=Path, help="An image file.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("explained.png"),
        help=f"File of the picture; its ending is one of {', '.join(_FORMATS)}.",
    )
    parser.add_argument("--top", type=int, default=5, help="Number of classes to draw.")
    add_data(parser)
    add_build(parser)

    def run(args: Namespace) -> None:
        ending = args.out.suffix[1:].lower()
        if ending not in _FORMATS:
            raise ValueError(f"--out must end in one of {', '.join(_FORMATS)}, got {shown(args.out.name)!r}")
        check_out(args.out)
        new_figure(1)  # fail now if matplotlib is missing
        trained = load_trained(args.run, args.model.build)
        result = explain_prediction(trained, args.image, _pictures(args, trained), args.top)
        name = args.image.name
        figure = plot_explanation(
            result.image, name, result.classes, result.probabilities, result.gates, result.means, result.images
        )
        picture = io.BytesIO()
        figure.savefig(picture, format=ending)
        write_whole(args.out, picture.getvalue())
        print(f"{shown(args.image, 300)}: {shown(result.classes[0])} {100 * result.probabilities[0]:.1f} %")
        print(f"wrote {args.out}")

    return run


def _pictures(args: Namespace, trained: TrainedNetwork) -> ImageData | None:
    """The pictures that the options name, or else the run's own; if these are missing, print a note."""
    named = data_named(args, trained)
    if named is not None:
        return pictures_for(trained, named)
    try:
        return pictures_for(trained, data_of_run(args.run, trained))
    except (OSError, ValueError) as error:
        print(f"no means of the class are drawn: {' '.join(str(error).split())}", file=sys.stderr)
        return None
