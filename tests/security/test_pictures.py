"""Image and idx files from strangers: bounded in memory and time, refused by name; honest ones are read."""

import contextlib
import json
import os
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile_pictures import HOSTILE, NO_FILES, gzipped_zeros, idx, photograph
from PIL import Image

from ecanet.train.data import pictures, read_idx, read_image
from tests import fresh

#: Reads every file of a list with 1 GiB more address space than the libraries take, and writes what came of each.
READ = """
import json, resource, sys, time, warnings
from pathlib import Path
from ecanet.train import DataConfig
from ecanet.train.data import read_idx, read_image
from ecanet.train.data.loading import test_transform
from PIL import Image
Image.init()
resized = test_transform(DataConfig("image_folder", root=Path("/")))
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
answers = open(sys.argv[2], "w")
for line in open(sys.argv[1]):
    path, begun = line.rstrip("\\n"), time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            said = str(list(read_idx(path).shape if ".idx" in path else resized(read_image(path)).shape))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    leaked = [str(warning.message) for warning in caught]
    print(json.dumps([path, said, time.perf_counter() - begun, leaked]), file=answers, flush=True)
"""

GIB = 2**30
MNIST_SHAPE = idx(60_000, 28, 28)
#: Idx files: content, and what the refusal says.
HOSTILE_IDX: dict[str, tuple[Callable[[], bytes], str]] = {
    "2^32 x 2^32 values": (lambda: idx(2**32 - 1, 2**32 - 1), "only up to 671,088,640"),
    "700 million values": (lambda: idx(700_000_000), "only up to 671,088,640"),
    "0 x 2^32 x 2^32 x 2^32 values": (lambda: idx(0, *[2**32 - 1] * 3), "only up to 671,088,640"),
    "255 dimensions": (lambda: idx(*[1] * 255, data=b"\1"), "255 dimensions"),
    "255 dimensions of none": (lambda: idx(dimensions=255), "255 dimensions"),
    "more values than are there": (lambda: idx(600_000_000, data=b"\1"), "truncated: its header says"),
    "values of 8 bytes": (lambda: idx(8, kind=0x0E, data=bytes(64)), "idx type 0x0e"),
    "text instead of values": (lambda: b"not an idx file", "not an idx file, it starts with b'not '"),
    "gzip of 2^32 values": (lambda: gzipped_zeros(idx(2**32 - 1), 0), "only up to 671,088,640"),
    "gzip of 1.5 GiB behind one value": (lambda: gzipped_zeros(idx(1), GIB * 3 // 2), "at least 1048576 bytes more"),
    "gzip of 1.5 GiB of nothing": (lambda: gzipped_zeros(b"", GIB * 3 // 2), "not an idx file"),
    "gzip in gzip": (lambda: gzipped_zeros(gzipped_zeros(MNIST_SHAPE, 2**24), 0), "not an idx file"),
    "gzip signature alone": (lambda: b"\x1f\x8b", "not a valid gzip file"),
}


def turned(orientation: int) -> Image.Exif:
    """EXIF data with an orientation."""
    exif = Image.Exif()
    exif[274] = orientation
    return exif


#: Honest pictures at the bounds, made where there is no limit.
LARGE: dict[str, Callable[[Path], None]] = {
    "JPEG of 50 megapixels": lambda path: photograph(8660, 5773).save(path, "JPEG"),
    "PNG of 67 megapixels": lambda path: Image.new("P", (8192, 8192), 3).save(path, "PNG", compress_level=1),
    "16-bit TIFF of 67 megapixels": lambda path: Image.new("I;16", (8192, 8192), 300).save(path, "TIFF"),
    "WebP of 33 megapixels": lambda path: Image.new("RGBA", (5792, 5792)).save(path, "WEBP", lossless=True, quality=0),
    "upside down JPEG of 67 megapixels": lambda path: photograph(8192, 8192).save(path, "JPEG", exif=turned(5)),
    "panorama of 64 to 1": lambda path: photograph(12_800, 200).save(path, "JPEG"),
}


@pytest.fixture(scope="module")
def what_came_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str, float, list[str]]]:
    """Every file, read by one child process: its path, what was said, in how many seconds, with what warnings."""
    folder = tmp_path_factory.mktemp("hostile")
    files: dict[str, Path] = {}
    for name, (content, _) in HOSTILE.items():
        files[name] = folder / f"{len(files)}" / "x.png"
        files[name].parent.mkdir()
        files[name].write_bytes(content())
    for name, (data, _) in HOSTILE_IDX.items():
        files[name] = folder / f"{len(files)}.idx"
        files[name].write_bytes(data())
    for name, save in LARGE.items():
        files[name] = folder / f"{len(files)}.png"
        save(files[name])
    for name, (make, _) in NO_FILES.items():  # last: one that is waited for holds up the rest
        files[name] = folder / f"{len(files)}" / "x.png"
        files[name].parent.mkdir()
        make(files[name])
    (folder / "paths").write_text("".join(f"{path}\n" for path in files.values()))
    with contextlib.suppress(subprocess.TimeoutExpired):
        fresh.run(READ, folder / "paths", folder / "answers", timeout=120)
    answers = (folder / "answers").read_text().splitlines()
    said = {path: (Path(path), *rest) for path, *rest in map(json.loads, answers)}
    return {name: said[str(path)] for name, path in files.items() if str(path) in said}


@pytest.mark.parametrize("name", [*HOSTILE, *NO_FILES])
def test_hostile_picture_is_named_or_read_within_a_gibibyte_and_ten_seconds(what_came_of: Any, name: str) -> None:
    path, said, seconds, _ = what_came_of[name]
    message = (HOSTILE | NO_FILES)[name][1]
    assert seconds < 10
    if message is None:
        assert said == "[3, 224, 224]"
    else:
        assert said.startswith(f"ValueError: cannot read the image '{path}': ")
        assert message in said
        assert "memory for it" not in said
        assert "\n" not in said
        assert said.isprintable()


@pytest.mark.parametrize("name", HOSTILE_IDX)
def test_hostile_idx_file_is_named_within_a_gibibyte_and_ten_seconds(what_came_of: Any, name: str) -> None:
    path, said, seconds, _ = what_came_of[name]
    assert seconds < 10
    assert said.startswith(f"ValueError: '{path}' ")
    assert HOSTILE_IDX[name][1] in said


@pytest.mark.parametrize("name", LARGE)
def test_large_honest_picture_is_read(what_came_of: Any, name: str) -> None:
    _, said, seconds, leaked = what_came_of[name]
    assert said == "[3, 224, 224]"
    assert seconds < 10
    assert not leaked


def test_no_warning_leaks_about_the_size(what_came_of: Any) -> None:
    for name, (_, _, _, leaked) in what_came_of.items():
        assert not [warning for warning in leaked if "bomb" in warning], name


def test_formats_are_those_of_the_suffixes() -> None:
    known = Image.registered_extensions()
    assert set(pictures.FORMATS) == {known[suffix] for suffix in pictures.SUFFIXES}


@pytest.mark.parametrize("size", [(1, 64), (64, 1), (1, 1), (3, 150), (8, 512)], ids=str)
def test_long_pictures_within_the_bound_are_read(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").shape == (3, size[1], size[0])


def test_a_picture_read_in_parts_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 256, (37, 23, 3), dtype=np.uint8)
    Image.fromarray(values).quantize(50).save(tmp_path / "palette.png", transparency=3)
    Image.fromarray(values).save(tmp_path / "x.png")
    whole = read_image(tmp_path / "palette.png")
    monkeypatch.setattr(pictures, "_PIXELS_AT_A_TIME", 100)
    assert np.array_equal(read_image(tmp_path / "x.png").permute(1, 2, 0).numpy(), values)
    assert read_image(tmp_path / "palette.png").equal(whole)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[2Jb.png", r"a\x1b[2Jb.png"),
        ("a\nb.png", r"a\nb.png"),
        ("a\r\x07b.png", r"a\r\x07b.png"),
        (os.fsdecode(b"a\xff.png"), r"a\udcff.png"),
        ("a\u202egnp.png", r"a\u202egnp.png"),
        ("grüße 北京.png", "grüße 北京.png"),
    ],
    ids=["escape codes", "new line", "bell", "not UTF-8", "right to left", "other scripts"],
)
def test_names_are_printed_clean(tmp_path: Path, name: str, shown: str) -> None:
    (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot read the image") as caught:
        read_image(tmp_path / name)
    assert f"{tmp_path}/{shown}'" in str(caught.value)
    assert str(caught.value).isprintable()


def test_long_names_are_cut(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * 10)
    deep.mkdir(parents=True)
    (deep / "the-file.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"\.\.\..*the-file\.png") as caught:
        read_image(deep / "the-file.png")
    assert len(str(caught.value)) < 600


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_unreadable_file_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    (tmp_path / "x.png").chmod(0)
    with pytest.raises(ValueError, match=r"x\.png.*Permission denied"):
        read_image(tmp_path / "x.png")


def test_pictures_are_opened_without_touching_the_warning_filters(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    before = list(warnings.filters)
    read_image(tmp_path / "x.png")
    assert list(warnings.filters) == before


def test_idx_arrays_up_to_the_bound_are_read(tmp_path: Path) -> None:
    (tmp_path / "many.gz").write_bytes(gzipped_zeros(idx(64, 256, 256), 2**22))
    assert read_idx(tmp_path / "many.gz").shape == (64, 256, 256)
