"""Sources of pictures."""

from ecanet.train.data.pictures import read_image
from ecanet.train.data.sources import (
    FolderImages,
    Splits,
    TensorImages,
    embedded,
    fashion_mnist,
    image_folder,
    read_idx,
)

__all__ = [
    "FolderImages",
    "Splits",
    "TensorImages",
    "embedded",
    "fashion_mnist",
    "image_folder",
    "read_idx",
    "read_image",
]
