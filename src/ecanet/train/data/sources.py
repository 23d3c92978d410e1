"""Reads Fashion-MNIST, and the part of it that comes with this package."""

import gzip
import lzma
import math
import zlib
from importlib.resources import files
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from ecanet.train.data.splits import Splits

#: Where Debian's package dataset-fashion-mnist puts the four files.
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")

#: Class names of Fashion-MNIST in label order.
FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

EMBEDDED_FILE = "fashion_mnist_10k.idx.xz"

#: Largest number of values in an idx array, one byte each; EMNIST's largest file has 547,178,688.
MAX_IDX_VALUES = 640 * 2**20

_FASHION_FILES = tuple(
    f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)
_UINT8 = 0x08  # the third byte of an idx file
_MAX_IDX_DIMENSIONS = 8
_CHUNK = 2**20  # bytes
_FETCH_AGAIN = "replace it with a complete copy"


class TensorImages(Dataset[tuple[Tensor, int]]):
    """Images and labels in memory.

    Args:
        images: uint8 ``(N, C, H, W)``.
        labels: int64 ``(N,)``.

    Raises:
        TypeError: the dtype of images or labels is wrong.
        ValueError: the rank of images is wrong, or there is not one label for each image.

    Example:
        >>> image, label = TensorImages(torch.zeros(5, 1, 28, 28, dtype=torch.uint8), torch.arange(5))[3]
        >>> image.shape, label
        (torch.Size([1, 28, 28]), 3)
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        for name, tensor, dtype in (("images", images, torch.uint8), ("labels", labels, torch.int64)):
            if tensor.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}: convert with {name}.to({dtype})")
        if images.dim() != 4:
            raise ValueError(f"images must be (N, C, H, W), got shape {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be (N,) with N={images.shape[0]}, one for each image, got shape {tuple(labels.shape)}"
            )
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        """Number of images."""
        return self.images.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image ``(C, H, W)``, a view, and its label."""
        return self.images[index], self.label(index)

    def label(self, index: int) -> int:
        """The label of one image."""
        return int(self.labels[index])


def read_idx(path: str | Path) -> Tensor:
    """Read one idx file of unsigned bytes, gzip-compressed or plain: the format of MNIST and similar data sets.

    Args:
        path: The file; its contents tell whether it is compressed.

    Returns:
        uint8, with the shape in the file's header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged or not an idx file, its values are not unsigned bytes, or it has more than
            :data:`MAX_IDX_VALUES` values.

    Source:
        The format: http://yann.lecun.com/exdb/mnist. Bytes 0, 0, type, number of dimensions; each dimension as a
        big-endian 32-bit integer; the values.

    Example:
        >>> read_idx("train-images-idx3-ubyte.gz").shape  # doctest: +SKIP
        torch.Size([60000, 28, 28])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no idx file {str(path)!r}: check the path")
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if compressed else path.open("rb") as contents:
            values = _read_array(contents, path)
            rest = len(contents.read(_CHUNK))  # this also checks the checksum of a compressed file
    except (OSError, EOFError, zlib.error) as error:
        what = "is not a valid gzip file" if compressed else "cannot be read"
        raise ValueError(f"{str(path)!r} {what} ({error}): {_FETCH_AGAIN}") from error
    if rest:
        raise ValueError(
            f"{str(path)!r} has {'at least ' * (rest == _CHUNK)}{rest} bytes more than the {tuple(values.shape)} "
            f"values that its header says: {_FETCH_AGAIN}"
        )
    return values


def _read_array(file: BufferedIOBase, path: Path) -> Tensor:
    """The next idx array of a file; nothing after it is read or decompressed."""
    header = file.read(4)  # 0, 0, type, number of dimensions
    if len(header) == 4 and (header[:2] != b"\0\0" or header[3] == 0):
        raise ValueError(f"{str(path)!r} is not an idx file, it starts with {header!r}: {_FETCH_AGAIN}")
    if len(header) == 4 and header[2] != _UINT8:
        raise ValueError(
            f"{str(path)!r} has values of idx type 0x{header[2]:02x}: only 0x08, unsigned bytes, can be read"
        )
    if len(header) == 4 and header[3] > _MAX_IDX_DIMENSIONS:
        raise ValueError(
            f"{str(path)!r} has {header[3]} dimensions: only arrays of up to {_MAX_IDX_DIMENSIONS} can be read"
        )
    sizes = file.read(4 * header[3]) if len(header) == 4 else b""
    if len(header) < 4 or len(sizes) < 4 * header[3]:
        raise ValueError(f"{str(path)!r} is truncated within its header: {_FETCH_AGAIN}")
    shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))
    if math.prod(max(size, 1) for size in shape) > MAX_IDX_VALUES:
        raise ValueError(
            f"{str(path)!r} has {shape} values according to its header: only up to {MAX_IDX_VALUES:,} can be read"
        )
    values = np.empty(shape, np.uint8)
    filled = _read_into(values.reshape(-1), file)
    if filled < values.size:
        raise ValueError(
            f"{str(path)!r} is truncated: its header says {shape} values, but it has {filled}: {_FETCH_AGAIN}"
        )
    return torch.from_numpy(values)


def _read_into(values: np.ndarray, file: BufferedIOBase) -> int:
    """Read values in chunks until all are filled or the file ends; return how many were read."""
    filled = 0
    while filled < len(values) and (chunk := file.read(min(_CHUNK, len(values) - filled))):
        values[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    return filled


def fashion_mnist(root: str | Path | None = None, download: bool = False) -> Splits:
    """Fashion-MNIST from its four original files: 60,000 training and 10,000 test pictures, 28 x 28, 10 classes.

    Args:
        root: Folder of the files, compressed or plain, or of torchvision's ``FashionMNIST/raw``. By default the folder
            of Debian's package dataset-fashion-mnist.
        download: Let torchvision download missing files into ``root``.

    Returns:
        Images ``(1, 28, 28)``; ``val`` is the test set.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not match the others, or ``download`` is given without ``root``.

    Source:
        Xiao et al., Fashion-MNIST, 2017, arXiv:1708.07747.

    Example:
        >>> len(fashion_mnist("data", download=True).train)  # doctest: +SKIP
        60000
    """
    if download and root is None:
        raise ValueError("download=True needs a folder to download into: give root=")
    base = DEBIAN_FOLDER if root is None else Path(root)
    try:
        paths = _fashion_files(base)
    except FileNotFoundError:
        if not download:
            raise
        datasets.FashionMNIST(base, download=True)
        paths = _fashion_files(base)
    return Splits(_fashion_split(*paths[:2]), _fashion_split(*paths[2:]), FASHION_CLASSES)


def _fashion_files(base: Path) -> list[Path]:
    """The four files, from ``base`` or from the folder below it that torchvision uses."""
    folders = (base, base / "FashionMNIST" / "raw")
    missing: list[str] = []
    for folder in folders:
        # After torchvision's download both exist; the plain one needs no decompression.
        found = {
            name: path
            for name in _FASHION_FILES
            for path in (folder / f"{name}.gz", folder / name)  # the last wins
            if path.is_file()
        }
        if len(found) == len(_FASHION_FILES):
            return [found[name] for name in _FASHION_FILES]
        lacking = [name for name in _FASHION_FILES if name not in found]
        if not missing or len(lacking) < len(missing):
            missing = lacking
    raise FileNotFoundError(
        f"Fashion-MNIST: no {', '.join(missing)} (nor with .gz) in {' or '.join(repr(str(f)) for f in folders)}. "
        "Give root=, the folder that has them; or apt-get install dataset-fashion-mnist; or root= and download=True"
    )


def _fashion_split(images_path: Path, labels_path: Path) -> TensorImages:
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.shape[1:] != (28, 28) or not len(images):
        raise ValueError(
            f"{str(images_path)!r} must have images (N, 28, 28), got {tuple(images.shape)}: replace it with "
            "Fashion-MNIST's"
        )
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{str(labels_path)!r} must have one label for each of the {len(images)} images in {str(images_path)!r}, "
            f"got {tuple(labels.shape)}: take both from the same place"
        )
    if labels.max() > 9:
        raise ValueError(
            f"{str(labels_path)!r} must have labels 0 to 9, got {int(labels.max())}: replace it with Fashion-MNIST's"
        )
    return TensorImages(images.unsqueeze(1), labels.long())


def embedded() -> Splits:
    """The part of Fashion-MNIST in this package: 8,000 training and 2,000 test pictures, stratified.

    It has the first 800 pictures of each class of the training set and the first 200 of each class of the test set, in
    the original order. ``scripts/make_embedded_data.py`` made the file. Its MIT licence is in ``FASHION_MNIST_LICENSE``
    in the same folder.

    Returns:
        Images ``(1, 28, 28)``; ``val`` is from the test set.

    Example:
        >>> splits = embedded()
        >>> len(splits.train), len(splits.val), splits.classes[splits.train[0][1]]
        (8000, 2000, 'Ankle boot')
    """
    with files("ecanet.train.data").joinpath(EMBEDDED_FILE).open("rb") as file, lzma.open(file) as contents:
        try:
            arrays = [_read_array(contents, Path(EMBEDDED_FILE)) for _ in _FASHION_FILES]
        except (OSError, EOFError, lzma.LZMAError) as error:
            raise ValueError(f"{EMBEDDED_FILE!r} of this package is damaged ({error}): install ecanet again") from error
    train, val = (TensorImages(arrays[i].unsqueeze(1), arrays[i + 1].long()) for i in (0, 2))
    return Splits(train, val, FASHION_CLASSES)
