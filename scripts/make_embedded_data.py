"""Make the package's embedded data set: the first 800 and 200 pictures of each class of Fashion-MNIST's two sets.

The file is four idx arrays one after the other (training images and labels, test images and labels), compressed
together by xz. No chance is involved: the same four files give the same contents, and with the same liblzma the same
bytes.
"""

import argparse
import lzma
import struct
from pathlib import Path

import torch
from torch import Tensor

from ecanet.train.data.sources import DEBIAN_FOLDER, EMBEDDED_FILE, FASHION_CLASSES, TensorImages, fashion_mnist

TRAIN_PER_CLASS, TEST_PER_CLASS = 800, 200
OUT = Path(__file__).parents[1] / "src" / "ecanet" / "train" / "data" / EMBEDDED_FILE

# Measured: deltas to the left, upper or PNG's Paeth neighbour make the file 1 to 10 % larger than raw pixels, and
# preset 9 with "extreme" takes twice the time of this match finder for the same size.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "mf": lzma.MF_HC4, "depth": 4}]


def contents(root: Path) -> bytes:
    """What the file holds, before compression."""
    splits = fashion_mnist(root)
    arrays = []
    for split, count in ((splits.train, TRAIN_PER_CLASS), (splits.val, TEST_PER_CLASS)):
        assert isinstance(split, TensorImages)
        chosen = first_of_each_class(split.labels, count)
        arrays += [split.images[chosen].squeeze(1), split.labels[chosen].to(torch.uint8)]
    return b"".join(map(to_idx, arrays))


def first_of_each_class(labels: Tensor, count: int) -> Tensor:
    """Indices of the first ``count`` of each class, in order."""
    chosen = [(labels == label).nonzero().squeeze(1)[:count] for label in range(len(FASHION_CLASSES))]
    for name, indices in zip(FASHION_CLASSES, chosen, strict=True):
        if len(indices) < count:
            raise SystemExit(f"class {name!r} has {len(indices)} pictures, {count} are needed: use the original files")
    return torch.cat(chosen).sort().values


def to_idx(values: Tensor) -> bytes:
    """An idx array of unsigned bytes."""
    return struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape) + values.numpy().tobytes()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python scripts/make_embedded_data.py --root ~/fashion-mnist --out /tmp/embedded.idx.xz",
    )
    parser.add_argument(
        "--root", type=Path, default=DEBIAN_FOLDER, help="folder of the four original files (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUT, help="file to write (default: the one in the package)")
    options = parser.parse_args(arguments)
    try:
        data = contents(options.root)
    except (FileNotFoundError, ValueError) as error:
        raise SystemExit(str(error)) from error
    options.out.write_bytes(lzma.compress(data, filters=FILTERS))
    print(f"{options.out}: {options.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
