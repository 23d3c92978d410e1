"""``ecanet explain``: one picture of what a network sees in an image."""

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
    """Add the options to a parser; what is returned runs the verb."""
    parser.add_argument("run", type=Path, help="A run's folder (its best.ckpt), or a checkpoint.")
    parser.add_argument("image", type=Path, help="An image file.")
    parser.add_argument(
        "--out", type=Path, default=Path("explained.png"), help=f"The picture: {', '.join(_FORMATS)} by its ending."
    )
    parser.add_argument("--top", type=int, default=5, help="Number of classes to draw.")
    add_data(parser)
    add_build(parser)

    def run(args: Namespace) -> None:
        ending = args.out.suffix[1:].lower()
        if ending not in _FORMATS:
            raise ValueError(f"--out must end in one of {', '.join(_FORMATS)}, got {shown(args.out.name)!r}")
        check_out(args.out)
        new_figure(1)  # matplotlib is there
        trained = load_trained(args.run, args.model.build)
        found = explain_prediction(trained, args.image, _pictures(args, trained), args.top)
        figure = plot_explanation(
            found.image, args.image.name, found.classes, found.probabilities, found.gates, found.means, found.images
        )
        picture = io.BytesIO()
        figure.savefig(picture, format=ending)
        write_whole(args.out, picture.getvalue())
        print(f"{shown(args.image, 300)}: {shown(found.classes[0])} {100 * found.probabilities[0]:.1f} %")
        print(f"wrote {args.out}")

    return run


def _pictures(args: Namespace, trained: TrainedNetwork) -> ImageData | None:
    """The pictures that the options name; without options the run's own, or a note where these are not there."""
    named = data_named(args, trained)
    if named is not None:
        return pictures_for(trained, named)
    try:
        return pictures_for(trained, data_of_run(args.run, trained))
    except (FileNotFoundError, ValueError) as error:
        print(f"no means of the class are drawn: {' '.join(str(error).split())}", file=sys.stderr)
        return None
