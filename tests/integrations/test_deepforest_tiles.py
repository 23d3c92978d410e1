"""The detection set that the tests of YOLO train on."""

import numpy as np
import yaml
from PIL import Image

from tests.integrations.deepforest_tiles import Photograph, cut, needs_deepforest, photographs, write_yolo


@needs_deepforest
def test_four_photographs_with_951_boxes():
    found = {p.name: p for p in photographs()}
    counts = {name: len(p.boxes) for name, p in found.items()}
    assert list(counts.values()) == [574, 279, 61, 37]
    assert sum(counts.values()) == 951
    for photograph in found.values():
        assert np.isfinite(photograph.boxes).all()
        assert (photograph.boxes[:, 2:] > photograph.boxes[:, :2]).all()
        assert (photograph.boxes <= np.tile(photograph.image.size, 2)).all()


def test_tiles_cut_boxes_and_keep_those_that_are_half_inside():
    boxes = np.array([[1.0, 2, 5, 6], [6, 0, 14, 4], [9, 9, 13, 13], [7, 0, 13, 4], [20, 0, 25, 5]])
    image = Image.fromarray(np.arange(20 * 25, dtype=np.uint16).reshape(20, 25).astype(np.uint8))
    tiles = list(cut(Photograph("drawn", image, boxes), size=10))
    assert len(tiles) == 4  # the last 5 columns are left out, and the last box with them
    assert tiles[0][1].tolist() == [[1, 2, 5, 6], [6, 0, 10, 4], [7, 0, 10, 4]]
    assert tiles[1][1].tolist() == [[0, 0, 4, 4], [0, 0, 3, 4]]
    assert tiles[3][1].tolist() == [[0, 0, 3, 3]]
    np.testing.assert_array_equal(np.array(tiles[3][0]), np.array(image)[10:20, 10:20])


@needs_deepforest
def test_a_whole_photograph_is_held_out(tmp_path):
    description = yaml.safe_load(write_yolo(tmp_path, 200, held_out="OSBS_029", limit=3).read_text())
    assert description["names"] == {0: "tree"}
    images = {split: sorted(p.stem for p in (tmp_path / description[split]).iterdir()) for split in ("train", "val")}
    assert len(images["val"]) == 3
    assert all(name.startswith("OSBS_029") for name in images["val"])
    assert len(images["train"]) == 9
    assert not any(name.startswith("OSBS_029") for name in images["train"])
    for split, names in images.items():
        for name in names:
            rows = np.loadtxt(tmp_path / "labels" / split / f"{name}.txt", ndmin=2)
            assert rows.shape[1:] == (5,)
            assert (rows[:, 0] == 0).all()
            centres, sizes = rows[:, 1:3], rows[:, 3:]
            assert (centres - sizes / 2 > -1e-6).all()
            assert (centres + sizes / 2 < 1 + 1e-6).all()
