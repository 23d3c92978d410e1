"""Options that several verbs have, and functions that use their values."""

from pathlib import Path
from typing import Literal, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from ecanet.files.atomic import write_whole
from ecanet.train.checkpoint import TrainedNetwork
from ecanet.train.config import DataConfig
from ecanet.train.evaluate import data_of
from ecanet.untrusted import shown

CONFIG_HELP = (
    "A recipe: YAML with the blocks model, data, optim, trainer. Later options on the command line override it."
)


def add_accelerator(parser: ArgumentParser) -> None:
    """Add ``--accelerator``."""
    names = Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"]
    parser.add_argument("--accelerator", type=names, default="auto", help="Where the network runs.")


def add_build(parser: ArgumentParser) -> None:
    """Add ``--model.build``, as ``args.model.build``."""
    what = "module:function of your own that built the network, as given to fit; a checkpoint never calls a function."
    parser.add_argument("--model.build", type=str | None, default=None, help=what)


def add_data(parser: ArgumentParser) -> None:
    """Add the options that name other pictures than those of the run."""
    parser.add_argument("--root", type=Path, default=None, help="Folder of the data, if not the run's own.")
    parser.add_argument("--val_root", type=Path, default=None, help="Use all pictures of this folder or table instead.")
    source = get_type_hints(DataConfig)["source"]
    parser.add_argument("--source", type=source | None, default=None, help="Kind of the data, if not the run's own.")


def data_named(args: Namespace, trained: TrainedNetwork) -> DataConfig | None:
    """The pictures that the options of :func:`add_data` name, or None for the run's own."""
    changes = {name: value for name in ("root", "val_root", "source") if (value := getattr(args, name)) is not None}
    return data_of(trained, **changes) if changes else None


def check_out(path: Path | None) -> None:
    """Raise IsADirectoryError, before any work is done, if ``--out`` is a folder."""
    if path is not None and path.is_dir():
        raise IsADirectoryError(f"--out must be a file, and {shown(path, 300)} is a folder")


def write_out(path: Path, content: str) -> None:
    """Write a text into the file that an option names; it may be a link to a file, a pipe or a device."""
    data = content.encode(errors="surrogateescape")
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_bytes(data)
    else:
        write_whole(path.resolve(), data)
