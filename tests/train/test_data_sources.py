"""What every data source gives, and what it says about files that are wrong."""

import gzip
import lzma
import re
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torchvision import datasets

from ecanet.train.data import sources
from ecanet.train.data.sources import (
    DEBIAN_FOLDER,
    EMBEDDED_FILE,
    FASHION_CLASSES,
    Splits,
    TensorImages,
    embedded,
    fashion_mnist,
    image_folder,
    read_idx,
    read_image,
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


def write_image(path: Path, color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_folder(root: Path) -> Path:
    """Two classes with two training images and one validation image each."""
    for name, value in (("cat", 0), ("dog", 100)):
        write_image(root / "train" / name / "a.png", (value, 0, 0))
        write_image(root / "train" / name / "b.png", (value, 1, 0))
        write_image(root / "val" / name / "c.png", (value, 2, 0))
    return root


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
            (GOOD[:-1], r"is truncated, its header says \(2, 3, 4\) values but 23 are there"),
            (GOOD + b"\0\0", r"has 2 bytes more than the \(2, 3, 4\) values"),
            (b"\x89PNG\r\n\x1a\n", "is not an idx file, it starts with b'.x89PNG'"),
            (b"\0\0\x08\0", "is not an idx file"),
            (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "has values of idx type 0x0d: only 0x08, unsigned bytes"),
            (gzip.compress(GOOD)[:-12], "is not a valid gzip file"),
            (gzip.compress(GOOD)[:-8] + b"\0" * 8, "is not a valid gzip file .CRC check failed"),
            (gzip.compress(GOOD)[:10] + b"\xff" * 20, "is not a valid gzip file"),
            (gzip.compress(GOOD[:-1]), "is truncated, its header says"),
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


GRADIENT = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10  # (H, W)


def palette_image(transparency: bytes | int | None = None) -> Image.Image:
    """GRADIENT as a palette image whose entry i is the grey i."""
    image = Image.fromarray(GRADIENT).convert("P", palette=Image.Palette.ADAPTIVE)
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def with_info(image: Image.Image, **info: object) -> Image.Image:
    image.info.update(info)
    return image


def half_transparent() -> Image.Image:
    image = Image.fromarray(GRADIENT).convert("RGBA")
    image.putalpha(128)
    return image


#: Ways to store GRADIENT without loss.
GREY_FILES = {
    "greyscale": (lambda: Image.fromarray(GRADIENT), "x.png"),
    "greyscale with a transparent value": (lambda: with_info(Image.fromarray(GRADIENT), transparency=10), "x.png"),
    "greyscale and alpha": (lambda: Image.fromarray(GRADIENT).convert("LA"), "x.png"),
    "16-bit greyscale PNG": (lambda: Image.fromarray(GRADIENT.astype(np.uint16) * 257), "x.png"),
    "16-bit greyscale TIFF": (lambda: Image.fromarray(GRADIENT.astype(np.uint16) * 257), "x.tiff"),
    "16-bit greyscale PGM": (lambda: Image.fromarray(GRADIENT.astype(np.int32) * 257), "x.pgm"),
    "palette": (palette_image, "x.png"),
    "palette with a transparent entry": (lambda: palette_image(3), "x.png"),
    "palette with transparencies": (lambda: palette_image(bytes(range(24))), "x.png"),
    "RGB": (lambda: Image.fromarray(GRADIENT).convert("RGB"), "x.bmp"),
    "RGB with a transparent colour": (
        lambda: with_info(Image.fromarray(GRADIENT).convert("RGB"), transparency=(10, 10, 10)),
        "x.png",
    ),
    "RGBA": (half_transparent, "x.png"),
    "lossless WebP": (lambda: Image.fromarray(GRADIENT).convert("RGB"), "x.webp"),
}


class TestReadImage:
    @pytest.mark.parametrize("kind", GREY_FILES)
    def test_every_mode_becomes_rgb(self, tmp_path, kind):
        make, name = GREY_FILES[kind]
        image = make()
        options = {"lossless": True} if name.endswith("webp") else {}
        if "transparency" in image.info:
            options["transparency"] = image.info["transparency"]
        image.save(tmp_path / name, **options)
        read = read_image(tmp_path / name)
        assert read.dtype == torch.uint8
        assert torch.equal(read, torch.from_numpy(GRADIENT).expand(3, -1, -1))

    def test_channels_are_red_green_blue(self, tmp_path):
        assert read_image(write_image(tmp_path / "x.png", (1, 2, 3)))[:, 0, 0].tolist() == [1, 2, 3]

    def test_one_bit(self, tmp_path):
        Image.fromarray(GRADIENT > 100).save(tmp_path / "x.png")
        assert torch.equal(read_image(tmp_path / "x.png")[1], torch.from_numpy((GRADIENT > 100) * np.uint8(255)))

    @pytest.mark.parametrize("mode", ["CMYK", "RGB", "L"])
    def test_jpeg(self, tmp_path, mode):
        Image.new("RGB", (16, 16), (120, 120, 120)).convert(mode).save(tmp_path / "x.jpg")
        read = read_image(tmp_path / "x.jpg")
        assert read.shape == (3, 16, 16)
        assert (read.int() - 120).abs().max() <= 2  # JPEG is lossy

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (np.ones((4, 6), np.float32), "floating point"),
            (np.full((4, 6), 70000, np.int32), "exceed 16 bits"),
            (np.full((4, 6), -1, np.int32), "exceed 16 bits"),
        ],
        ids=["float", "above 16 bits", "negative"],
    )
    def test_pixels_of_unknown_range_are_refused(self, tmp_path, values, message):
        path = tmp_path / "x.tiff"
        Image.fromarray(values).save(path)
        with pytest.raises(ValueError, match=f"'{names(path)}': its pixels .*{message}"):
            read_image(path)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tiff", "ppm"])
    def test_truncated_image_is_named(self, tmp_path, suffix):
        path = tmp_path / f"x.{suffix}"
        Image.fromarray(np.random.randint(0, 256, (32, 32, 3), np.uint8)).save(path)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=f"cannot read the image '{names(path)}'.*Remove or replace it.*verify"):
            read_image(path)

    @pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\xff" * 40])
    def test_file_that_is_no_image_is_named(self, tmp_path, data):
        path = tmp_path / "x.png"
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"cannot read the image '{names(path)}'"):
            read_image(path)

    def test_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=names(tmp_path / "x.png")):
            read_image(tmp_path / "x.png")


class TestImageFolder:
    def test_sorted_classes_and_files(self, tmp_path):
        splits = image_folder(write_folder(tmp_path))
        assert splits.classes == ("cat", "dog")
        assert [splits.train[i][0][:2, 0, 0].tolist() for i in range(len(splits.train))] == [
            [0, 0],
            [0, 1],
            [100, 0],
            [100, 1],
        ]
        assert [splits.train[i][1] for i in range(len(splits.train))] == [0, 0, 1, 1]
        assert [splits.val[i][1] for i in range(len(splits.val))] == [0, 1]
        assert splits.val[1][0].shape == (3, 4, 6)

    def test_root_as_a_string_and_batches(self, tmp_path):
        train = image_folder(str(write_folder(tmp_path))).train
        images, labels = default_collate([train[0], train[3]])
        assert images.shape == (2, 3, 4, 6)
        assert labels.tolist() == [0, 1]

    def test_takes_images_at_any_depth_by_suffix_in_any_case(self, tmp_path):
        cat = write_folder(tmp_path) / "train" / "cat"
        write_image(cat / "deep" / "deeper" / "D.JPEG")
        write_image(cat / "E.Png")
        (cat / "notes.txt").write_text("no image")
        assert [Path(path).name for path, label in image_folder(tmp_path).train.samples if label == 0] == [
            "E.Png",
            "a.png",
            "b.png",
            "D.JPEG",
        ]

    def test_skips_hidden_files_and_folders(self, tmp_path):
        train = write_folder(tmp_path) / "train"
        (train / "cat" / "._a.png").write_bytes(b"what macOS leaves behind")
        write_image(train / "cat" / ".thumbnails" / "a.png")
        write_image(train / ".ipynb_checkpoints" / "a.png")
        splits = image_folder(tmp_path, verify=True)
        assert splits.classes == ("cat", "dog")
        assert len(splits.train) == 4

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_missing_split_is_named(self, tmp_path, split):
        (write_folder(tmp_path) / split).rename(tmp_path / "elsewhere")
        with pytest.raises(FileNotFoundError, match=f"no folder '{names(tmp_path / split)}': root must be"):
            image_folder(tmp_path)

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_split_without_class_folders_is_named(self, tmp_path, split):
        folder = write_folder(tmp_path) / split
        folder.rename(tmp_path / "elsewhere")
        write_image(folder / "a.png")
        with pytest.raises(ValueError, match=f"'{names(folder)}' has no class folders: put its images in"):
            image_folder(tmp_path)

    @pytest.mark.parametrize("split", ["train", "val"])
    def test_class_without_images_is_named(self, tmp_path, split):
        folder = write_folder(tmp_path) / split / "dog"
        for file in folder.iterdir():
            file.rename(file.with_suffix(".txt"))
        with pytest.raises(ValueError, match=f"no images in the class folder '{names(folder)}': add some.*or remove"):
            image_folder(tmp_path)

    def test_class_missing_in_val_is_named(self, tmp_path):
        val = write_folder(tmp_path) / "val"
        (val / "cat").rename(tmp_path / "elsewhere")
        with pytest.raises(ValueError, match=f"'{names(val)}' lacks classes of .*: 'cat'. Add folders"):
            image_folder(tmp_path)

    def test_class_missing_in_train_is_named(self, tmp_path):
        val = write_folder(tmp_path) / "val"
        write_image(val / "bird" / "a.png")
        with pytest.raises(ValueError, match=f"'{names(val)}' has classes that .* lacks: 'bird'. Remove them"):
            image_folder(tmp_path)

    def test_damaged_image_is_named_when_it_is_asked_for(self, tmp_path):
        bad = write_folder(tmp_path) / "train" / "cat" / "b.png"
        bad.write_bytes(bad.read_bytes()[:40])
        train = image_folder(tmp_path).train
        assert train[0][1] == 0
        with pytest.raises(ValueError, match=f"cannot read the image '{names(bad)}'"):
            train[1]


class TestVerify:
    def test_passes_good_folders_with_a_progress_bar(self, tmp_path, capsys):
        assert len(image_folder(write_folder(tmp_path), verify=True).train) == 4
        assert "verifying images: 100%" in capsys.readouterr().err

    def test_lists_every_damaged_image_of_both_splits(self, tmp_path):
        root = write_folder(tmp_path)
        bad = [root / "train" / "cat" / "b.png", root / "train" / "dog" / "a.png", root / "val" / "dog" / "c.png"]
        bad[0].write_bytes(b"")
        bad[1].write_bytes(bad[1].read_bytes()[:40])
        bad[2].unlink()
        bad[2].symlink_to("nowhere.png")
        with pytest.raises(ValueError, match="3 of 6 images cannot be read, remove or replace them") as caught:
            image_folder(root, verify=True)
        listed = str(caught.value).splitlines()[1:]
        assert [line.split("'")[1] for line in listed] == [str(path) for path in bad]

    def test_lists_the_first_20_and_a_count(self, tmp_path):
        cat = write_folder(tmp_path) / "train" / "cat"
        for i in range(25):
            (cat / f"bad{i:02}.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match="25 of 31 images") as caught:
            image_folder(tmp_path, verify=True)
        listed = str(caught.value).splitlines()[1:]
        assert len(listed) == 21
        assert "bad19.jpg" in listed[19]
        assert listed[20].strip() == "and 5 more"

    def test_without_tqdm_says_how_to_get_it(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        with pytest.raises(ModuleNotFoundError, match=r"verify=True needs tqdm: pip install 'ecanet\[train\]'"):
            image_folder(write_folder(tmp_path), verify=True)
