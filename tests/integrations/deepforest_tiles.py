"""A small detection set: aerial photographs of trees from the package deepforest, cut into tiles.

Photographs and boxes (VOC XML) are read where the package was installed; its code is not imported.
"""

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image

needs_deepforest = pytest.mark.skipif(
    importlib.util.find_spec("deepforest") is None,
    reason="reads deepforest's photographs: pip install --no-deps -r tests/data-packages.txt",
)


class Photograph(NamedTuple):
    """A photograph and its boxes ``(N, 4)``: left, top, right, bottom in pixels."""

    name: str
    image: Image.Image
    boxes: np.ndarray


def photographs() -> list[Photograph]:
    """The photographs that have boxes, in the order of their names.

    Raises:
        PackageNotFoundError: deepforest is not installed.
    """
    files = {Path(f): Path(str(f.locate())) for f in importlib.metadata.files("deepforest") or ()}
    found = []
    for file in sorted(f for f in files if f.suffix == ".xml"):
        image = Image.open(files[file.with_suffix(".png")]).convert("RGB")
        corners = [
            [float(box.findtext(corner, "nan")) for corner in ("xmin", "ymin", "xmax", "ymax")]
            for box in ElementTree.parse(files[file]).getroot().iter("bndbox")
        ]
        found.append(Photograph(file.stem, image, np.array(corners)))
    return found


def cut(photograph: Photograph, size: int) -> Iterator[tuple[Image.Image, np.ndarray]]:
    """Tiles of ``size`` pixels, row by row, and their boxes in pixels of the tile.

    A rest at the right and at the bottom is left out, and so are boxes with less than half their area in a tile.
    """
    width, height = photograph.image.size
    areas = np.prod(photograph.boxes[:, 2:] - photograph.boxes[:, :2], axis=1)
    for top in range(0, height - size + 1, size):
        for left in range(0, width - size + 1, size):
            boxes = np.clip(photograph.boxes - [left, top, left, top], 0, size)
            inside = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
            yield photograph.image.crop((left, top, left + size, top + size)), boxes[inside >= areas / 2]


def write_yolo(root: Path, size: int, held_out: str, limit: int) -> Path:
    """Write a detection set of one class as Ultralytics reads it.

    Args:
        root: Where to put ``images``, ``labels`` and the description.
        size: Of a tile, in pixels.
        held_out: Name of the photograph that is for validation; all others are for training.
        limit: The most tiles from one photograph: those with the most boxes.

    Returns:
        Path of the description, a YAML file.
    """
    for photograph in photographs():
        split = "val" if photograph.name == held_out else "train"
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        tiles = sorted(cut(photograph, size), key=lambda tile: -len(tile[1]))
        for i, (image, boxes) in enumerate(tiles[:limit]):
            image.save(root / "images" / split / f"{photograph.name}_{i:03}.png")
            centres, sizes = (boxes[:, :2] + boxes[:, 2:]) / 2 / size, (boxes[:, 2:] - boxes[:, :2]) / size
            rows = [f"0 {x:.6f} {y:.6f} {w:.6f} {h:.6f}" for x, y, w, h in np.hstack([centres, sizes])]
            (root / "labels" / split / f"{photograph.name}_{i:03}.txt").write_text("\n".join(rows))
    description = {"path": str(root), "train": "images/train", "val": "images/val", "names": {0: "tree"}}
    (root / "trees.yaml").write_text(yaml.safe_dump(description))
    return root / "trees.yaml"
