"""Sources of pictures."""

from ecanet.train.data.csv_file import Columns, csv_images
from ecanet.train.data.folders import FolderImages, image_folder
from ecanet.train.data.hub_tables import TableImages, hub_images
from ecanet.train.data.pictures import read_image
from ecanet.train.data.sources import TensorImages, embedded, fashion_mnist, read_idx
from ecanet.train.data.splits import Split, Splits
from ecanet.train.data.verify import verify_images

__all__ = [
    "Columns",
    "FolderImages",
    "Split",
    "Splits",
    "TableImages",
    "TensorImages",
    "csv_images",
    "embedded",
    "fashion_mnist",
    "hub_images",
    "image_folder",
    "read_idx",
    "read_image",
    "verify_images",
]
