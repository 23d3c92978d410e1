"""What every data source gives, and what it says about files that are wrong."""

import gzip
import lzma
import re
import runpy
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision import datasets

from ecanet.train.data import Splits, TensorImages, sources
from ecanet.train.data.sources import (
    DEBIAN_FOLDER,
    EMBEDDED_FILE,
    FASHION_CLASSES,
    embedded,
    fashion_mnist,
    read_idx,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_embedded_data.py"
EMBEDDED = Path(sources.__file__).with_name(EMBEDDED_FILE)

needs_original_files = pytest.mark.skipif(
    not DEBIAN_FOLDER.is_dir(), reason=f"no {DEBIAN_FOLDER}: apt-get install dataset-fashion-mnist"
)

TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


@pytest.fixture(scope="module")
def original() -> Splits:
    """Fashion-MNIST from Debian's files."""
    return fashion_mnist()


def idx(values: np.ndarray) -> bytes:
    """An idx file of unsigned bytes."""
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()


def write_fashion(folder: Path, *, gz: bool = True, train: int = 20, test: int = 10) -> Path:
    """The four files with random images and labels 0, 1, ..., 9, 0, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("t10k", test)):
        images = np.random.randint(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            data = idx(values)
            (folder / f"{name}{'.gz' * gz}").write_bytes(gzip.compress(data) if gz else data)
    return folder


def names(path: Path) -> str:
    """A pattern for ``pytest.raises(match=...)``: the message names this path."""
    return re.escape(str(path))


class TestTensorImages:
    def test_gives_image_and_int(self):
        images = torch.randint(0, 256, (3, 1, 4, 5), dtype=torch.uint8)
        dataset = TensorImages(images, torch.tensor([7, 8, 9]))
        image, label = dataset[1]
        assert len(dataset) == 3
        assert torch.equal(image, images[1])
        assert label == 8
        assert type(label) is int

    def test_batches_with_a_loader(self):
        dataset = TensorImages(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5))
        images, labels = next(iter(DataLoader(dataset, batch_size=4)))
        assert images.shape == (4, 1, 2, 2)
        assert images.dtype == torch.uint8
        assert labels.tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize(
        ("images", "labels", "error", "message"),
        [
            (torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), TypeError, "images must be torch.uint8"),
            (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2), TypeError, "labels must be torch.int64"),
            (
                torch.zeros(2, 4, 4, dtype=torch.uint8),
                torch.zeros(2, dtype=torch.int64),
                ValueError,
                r"images must be \(N, C, H, W\), got shape \(2, 4, 4\)",
            ),
            (
                torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
                torch.zeros(3, dtype=torch.int64),
                ValueError,
                r"labels must be \(N,\) with N=2, one for each image, got shape \(3,\)",
            ),
        ],
        ids=["float images", "float labels", "no channel dimension", "another number of labels"],
    )
    def test_refuses(self, images, labels, error, message):
        with pytest.raises(error, match=message):
            TensorImages(images, labels)


class TestReadIdx:
    @pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4), (0,), (0, 28, 28)], ids=str)
    @pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["gzip", "plain"])
    def test_round_trip(self, tmp_path, shape, compress):
        values = np.random.randint(0, 256, shape, np.uint8)
        path = tmp_path / "some-file"
        path.write_bytes(compress(idx(values)))
        read = read_idx(path)
        assert read.dtype == torch.uint8
        assert torch.equal(read, torch.from_numpy(values))

    def test_memory_is_writable(self, tmp_path):
        path = tmp_path / "some-file"
        path.write_bytes(idx(np.zeros(3, np.uint8)))
        assert read_idx(path).add_(1).tolist() == [1, 1, 1]

    GOOD = idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "is truncated within its header"),
            (GOOD[:3], "is truncated within its header"),
            (GOOD[:10], "is truncated within its header"),
            (GOOD[:-1], r"is truncated: its header says \(2, 3, 4\) values, but it has 23"),
            (GOOD + b"\0\0", r"has 2 bytes more than the \(2, 3, 4\) values"),
            (b"\x89PNG\r\n\x1a\n", "is not an idx file, it starts with b'.x89PNG'"),
            (b"\0\0\x08\0", "is not an idx file"),
            (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "has values of idx type 0x0d: only 0x08, unsigned bytes"),
            (gzip.compress(GOOD)[:-12], "is not a valid gzip file"),
            (gzip.compress(GOOD)[:-8] + b"\0" * 8, "is not a valid gzip file .CRC check failed"),
            (gzip.compress(GOOD)[:10] + b"\xff" * 20, "is not a valid gzip file"),
            (gzip.compress(GOOD[:-1]), "is truncated: its header says"),
        ],
        ids=[
            "empty",
            "cut in the magic number",
            "cut in the shape",
            "cut in the values",
            "too long",
            "another format",
            "no dimensions",
            "float32",
            "gzip cut",
            "gzip with a wrong checksum",
            "gzip with wrong contents",
            "cut before compression",
        ],
    )
    def test_damaged_file_is_named(self, tmp_path, data, message):
        path = tmp_path / "some-file.gz"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"'{names(path)}' {message}"):
            read_idx(path)

    def test_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=names(tmp_path / "nothing")):
            read_idx(tmp_path / "nothing")


class TestFashionMNIST:
    @pytest.mark.parametrize("gz", [True, False], ids=["gzip", "plain"])
    @pytest.mark.parametrize("below", ["", "FashionMNIST/raw"], ids=["root", "torchvision's layout"])
    def test_reads_the_four_files(self, tmp_path, gz, below):
        folder = write_fashion(tmp_path / below, gz=gz)
        splits = fashion_mnist(tmp_path)
        assert (len(splits.train), len(splits.val)) == (20, 10)
        assert splits.classes == FASHION_CLASSES
        image, label = splits.train[13]
        assert label == 3
        assert torch.equal(image, read_idx(folder / f"{TRAIN_IMAGES}{'.gz' * gz}")[13:14])  # (1, 28, 28)

    def test_plain_file_goes_before_its_compressed_form(self, tmp_path):
        write_fashion(tmp_path, gz=True)
        write_fashion(tmp_path, gz=False, train=30)
        assert len(fashion_mnist(tmp_path).train) == 30

    def test_debian_folder_is_the_default(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "DEBIAN_FOLDER", write_fashion(tmp_path))
        assert len(fashion_mnist().train) == 20

    @pytest.mark.parametrize("missing", [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS])
    def test_missing_file_place_and_remedies_are_named(self, tmp_path, missing):
        (write_fashion(tmp_path) / f"{missing}.gz").unlink()
        with pytest.raises(FileNotFoundError, match=rf"no {missing} \(nor with .gz\) in '{names(tmp_path)}'") as caught:
            fashion_mnist(tmp_path)
        for remedy in ("root=", "apt-get install dataset-fashion-mnist", "download=True"):
            assert remedy in str(caught.value)

    def test_missing_default_folder_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources, "DEBIAN_FOLDER", tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=f"{TEST_LABELS} .* in '{names(tmp_path / 'nowhere')}'"):
            fashion_mnist()

    def test_download_is_torchvisions(self, tmp_path, monkeypatch):
        def download(root, download):
            assert download
            write_fashion(Path(root) / "FashionMNIST" / "raw", gz=False)

        monkeypatch.setattr(datasets, "FashionMNIST", download)
        assert len(fashion_mnist(tmp_path, download=True).train) == 20

    def test_downloads_nothing_when_all_is_there(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets, "FashionMNIST", None)
        assert len(fashion_mnist(write_fashion(tmp_path), download=True).train) == 20

    def test_download_needs_root(self):
        with pytest.raises(ValueError, match="download=True needs a folder to download into: give root="):
            fashion_mnist(download=True)

    @pytest.mark.parametrize(
        ("name", "values", "message"),
        [
            (TEST_LABELS, np.zeros(9, np.uint8), "one label for each of the 10 images"),
            (TRAIN_LABELS, np.zeros((20, 1), np.uint8), "one label for each of the 20 images"),
            (TRAIN_LABELS, np.full(20, 10, np.uint8), "labels 0 to 9, got 10"),
            (TRAIN_IMAGES, np.zeros((20, 32, 32), np.uint8), r"images \(N, 28, 28\), got \(20, 32, 32\)"),
            (TRAIN_IMAGES, np.zeros(20, np.uint8), r"images \(N, 28, 28\), got \(20,\)"),
            (TEST_IMAGES, np.zeros((0, 28, 28), np.uint8), r"images \(N, 28, 28\), got \(0, 28, 28\)"),
        ],
        ids=["a label too few", "labels of two dimensions", "label 10", "32 x 32", "labels as images", "no images"],
    )
    def test_file_that_does_not_fit_is_named(self, tmp_path, name, values, message):
        path = write_fashion(tmp_path, gz=False) / name
        path.write_bytes(idx(values))
        with pytest.raises(ValueError, match=f"'{names(path)}' must have {message}"):
            fashion_mnist(tmp_path)

    @needs_original_files
    def test_original_files(self, original):
        assert original.train.images.shape == (60000, 1, 28, 28)
        assert original.val.images.shape == (10000, 1, 28, 28)
        assert original.train.labels.bincount().tolist() == [6000] * 10
        assert original.val.labels.bincount().tolist() == [1000] * 10


class TestEmbedded:
    def test_is_stratified(self):
        splits = embedded()
        assert splits.train.images.shape == (8000, 1, 28, 28)
        assert splits.val.images.shape == (2000, 1, 28, 28)
        assert splits.train.labels.bincount().tolist() == [800] * 10
        assert splits.val.labels.bincount().tolist() == [200] * 10
        assert splits.classes == FASHION_CLASSES

    def test_is_small_and_licensed(self):
        assert EMBEDDED.stat().st_size < 4_500_000
        licence = EMBEDDED.with_name("FASHION_MNIST_LICENSE").read_text()
        assert EMBEDDED_FILE in licence
        assert "MIT License" in licence
        assert "Copyright (c) 2017 Zalando SE" in licence

    @needs_original_files
    def test_equals_the_first_of_each_class_of_the_original(self, original):
        splits = embedded()
        for kept, whole, count in ((splits.train, original.train, 800), (splits.val, original.val, 200)):
            seen = [0] * 10
            chosen = []
            for index, label in enumerate(whole.labels.tolist()):
                seen[label] += 1
                if seen[label] <= count:
                    chosen.append(index)
            assert torch.equal(kept.labels, whole.labels[chosen])
            assert torch.equal(kept.images, whole.images[chosen])

    @needs_original_files
    def test_script_reproduces_the_file(self, tmp_path, capsys):
        out = tmp_path / "made.xz"
        runpy.run_path(str(SCRIPT))["main"](["--root", str(DEBIAN_FOLDER), "--out", str(out)])
        assert f"{out}: {out.stat().st_size} bytes" in capsys.readouterr().out
        made, kept = out.read_bytes(), EMBEDDED.read_bytes()
        assert lzma.decompress(made) == lzma.decompress(kept)
        if made != kept:
            pytest.skip("the same contents, but this liblzma compresses them to other bytes than the one that made it")

    def test_script_says_what_is_missing(self, tmp_path):
        with pytest.raises(SystemExit, match=f"no {TRAIN_IMAGES}.*{names(tmp_path)}"):
            runpy.run_path(str(SCRIPT))["main"](["--root", str(tmp_path), "--out", str(tmp_path / "out")])

    def test_script_refuses_too_few_pictures(self, tmp_path):
        write_fashion(tmp_path)
        with pytest.raises(SystemExit, match="class 'T-shirt/top' has 2 pictures, 800 are needed"):
            runpy.run_path(str(SCRIPT))["main"](["--root", str(tmp_path), "--out", str(tmp_path / "out")])
