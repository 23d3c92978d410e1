"""What a picture becomes: three channels of 8 bits, upright, on white, the first of several."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ecanet.train.data import read_image

GRADIENT = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10  # (H, W)
WHITE = 255


def names(path: Path) -> str:
    """A pattern for ``pytest.raises(match=...)``: the message names this path."""
    return re.escape(str(path))


def palette_image() -> Image.Image:
    """GRADIENT as a palette image whose entry i is the grey 10 i."""
    return Image.fromarray(GRADIENT).convert("P", palette=Image.Palette.ADAPTIVE)


def with_alpha(mode: str) -> Image.Image:
    """GRADIENT, as transparent as it is bright: alpha is 255 - GRADIENT."""
    image = Image.fromarray(GRADIENT).convert(mode)
    image.putalpha(Image.fromarray(255 - GRADIENT))
    return image


def wide(kind: type = np.uint16) -> Image.Image:
    """GRADIENT in 16 bits."""
    return Image.fromarray(GRADIENT.astype(kind) * 257)


def entry_of(image: Image.Image, grey: int) -> int:
    """The index of a grey in an image's palette."""
    return int(np.asarray(image)[grey == GRADIENT][0])


def transparencies(image: Image.Image) -> bytes:
    """For each entry of the palette the alpha that :func:`with_alpha` has."""
    alphas = bytearray(256)
    for index, grey in zip(np.asarray(image).flat, GRADIENT.flat, strict=True):
        alphas[index] = 255 - int(grey)
    return bytes(alphas)


ONE_WHITE = np.where(GRADIENT == 30, WHITE, GRADIENT)
#: alpha v + (1 - alpha) 255
ON_WHITE = GRADIENT + GRADIENT / 255 * (255 - GRADIENT.astype(float))
P = palette_image()
#: Ways to store GRADIENT without loss: the image, the file's name, options of its writer, what is to be seen.
LOSSLESS: dict[str, tuple[Image.Image, str, dict[str, object], np.ndarray]] = {
    "greyscale": (Image.fromarray(GRADIENT), "x.png", {}, GRADIENT),
    "greyscale with a transparent value": (Image.fromarray(GRADIENT), "x.png", {"transparency": 30}, ONE_WHITE),
    "greyscale and alpha": (with_alpha("L"), "x.png", {}, ON_WHITE),
    "greyscale and alpha, TIFF": (with_alpha("L"), "x.tiff", {}, ON_WHITE),
    "16-bit greyscale PNG": (wide(), "x.png", {}, GRADIENT),
    "16-bit with a transparent value": (wide(), "x.png", {"transparency": 30 * 257}, ONE_WHITE),
    "16-bit greyscale TIFF": (wide(), "x.tiff", {}, GRADIENT),
    "16-bit greyscale PGM": (wide(np.int32), "x.pgm", {}, GRADIENT),
    "palette": (P, "x.png", {}, GRADIENT),
    "palette with a transparent entry": (P, "x.png", {"transparency": entry_of(P, 30)}, ONE_WHITE),
    "palette with transparencies": (P, "x.png", {"transparency": transparencies(P)}, ON_WHITE),
    "palette and alpha, WebP": (with_alpha("RGB"), "x.webp", {"lossless": True, "exact": True}, ON_WHITE),
    "RGB": (Image.fromarray(GRADIENT).convert("RGB"), "x.bmp", {}, GRADIENT),
    "RGB with a transparent colour": (
        Image.fromarray(GRADIENT).convert("RGB"),
        "x.png",
        {"transparency": (30, 30, 30)},
        ONE_WHITE,
    ),
    "RGBA": (with_alpha("RGB"), "x.png", {}, ON_WHITE),
    "RGBA, TIFF with compression": (with_alpha("RGB"), "x.tiff", {"compression": "tiff_lzw"}, ON_WHITE),
    "lossless WebP": (Image.fromarray(GRADIENT).convert("RGB"), "x.webp", {"lossless": True}, GRADIENT),
    "GIF": (Image.fromarray(GRADIENT), "x.gif", {}, GRADIENT),
    "GIF with a transparent entry": (P, "x.gif", {"transparency": entry_of(P, 30)}, ONE_WHITE),
    "CMYK TIFF": (Image.fromarray(GRADIENT).convert("RGB").convert("CMYK"), "x.tiff", {}, GRADIENT),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_every_mode_becomes_rgb_on_white(tmp_path: Path, kind: str) -> None:
    image, name, options, seen = LOSSLESS[kind]
    image.save(tmp_path / name, **options)
    read = read_image(tmp_path / name)
    assert read.dtype == torch.uint8
    assert read.shape == (3, 4, 6)
    difference = (read.double() - torch.from_numpy(seen.astype(float))).abs().max()
    assert difference <= (0.51 if seen is ON_WHITE else 0)  # 8 bits round
    assert torch.equal(read_image((tmp_path / name).read_bytes()), read)


def test_hidden_colours_of_transparent_pixels_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (6, 4), (200, 10, 30, 0)).save(tmp_path / "x.png")
    assert (read_image(tmp_path / "x.png") == WHITE).all()


def test_channels_are_red_green_blue(tmp_path: Path) -> None:
    Image.new("RGB", (6, 4), (1, 2, 3)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png")[:, 0, 0].tolist() == [1, 2, 3]


def test_one_bit(tmp_path: Path) -> None:
    Image.fromarray(GRADIENT > 100).save(tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png")[1], torch.from_numpy((GRADIENT > 100) * np.uint8(255)))


@pytest.mark.parametrize("mode", ["CMYK", "RGB", "L"])
def test_jpeg(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (16, 16), (120, 120, 120)).convert(mode).save(tmp_path / "x.jpg")
    read = read_image(tmp_path / "x.jpg")
    assert read.shape == (3, 16, 16)
    assert (read.int() - 120).abs().max() <= 2  # JPEG is lossy


#: A picture of 4 x 3 blocks, each of its own grey, as it is to be seen: (H, W).
UPRIGHT = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
#: How a camera stores it under each EXIF orientation. https://www.cipa.jp, CIPA DC-008, 4.6.5.1, tag 274
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda seen: seen,
    2: np.fliplr,
    3: lambda seen: np.rot90(seen, 2),
    4: np.flipud,
    5: np.transpose,
    6: np.rot90,
    7: lambda seen: np.rot90(seen, 2).T,
    8: lambda seen: np.rot90(seen, -1),
}


def exif(orientation: int, order: str = "<") -> bytes:
    data = Image.Exif()
    data.endian = order
    data[274], data[271] = orientation, "a camera"
    return data.tobytes()


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("name", ["x.png", "x.webp", "x.jpg"])
def test_a_camera_s_picture_stands_upright(tmp_path: Path, name: str, orientation: int, order: str) -> None:
    stored = np.kron(STORED[orientation](UPRIGHT), np.ones((8, 8), np.uint8))
    lossless = {"lossless": True} if name == "x.webp" else {}
    Image.fromarray(stored).convert("RGB").save(tmp_path / name, exif=exif(orientation, order), quality=95, **lossless)
    read = read_image(tmp_path / name)
    assert read.shape == (3, 24, 32)
    assert (read[0, 4::8, 4::8].int() - torch.from_numpy(UPRIGHT).int()).abs().max() <= 3 * (name == "x.jpg")


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("orientation", STORED)
def test_a_tiff_is_turned_once(tmp_path: Path, orientation: int, compression: str | None) -> None:
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](UPRIGHT)))
    image.save(tmp_path / "x.tiff", tiffinfo={274: orientation}, compression=compression)
    assert torch.equal(read_image(tmp_path / "x.tiff")[0], torch.from_numpy(UPRIGHT))


def test_a_turned_picture_keeps_its_transparency_and_its_16_bits(tmp_path: Path) -> None:
    stored = np.ascontiguousarray(STORED[6](UPRIGHT))
    Image.fromarray(stored.astype(np.uint16) * 257).save(tmp_path / "x.png", exif=exif(6), transparency=20 * 257)
    seen = np.where(UPRIGHT == 20, WHITE, UPRIGHT)
    assert torch.equal(read_image(tmp_path / "x.png")[2], torch.from_numpy(seen))


DAMAGED_EXIF = {
    "empty": b"",
    "no directory": b"Exif\0\0",
    "another format": b"Exif\0\0not a TIFF",
    "cut in the directory": exif(6)[:18],
    "a directory at the end of all": b"Exif\0\0II*\0\xff\xff\xff\xff",
    "a directory at 2^64 - 1": b"Exif\0\0II+\0\x08\0\0\0" + b"\xff" * 8,
    "orientation 0": exif(0),
    "orientation 9": exif(9),
    "an orientation of another type": exif(6).replace(b"\x12\x01\x03\0", b"\x12\x01\x04\0"),
    "a thousand orientations": exif(6).replace(b"\x03\0\x01\0\0\0", b"\x03\0\xe8\x03\0\0"),
}


@pytest.mark.parametrize("kind", DAMAGED_EXIF)
def test_a_picture_with_damaged_exif_stays_as_it_is_stored(tmp_path: Path, kind: str) -> None:
    Image.fromarray(UPRIGHT).save(tmp_path / "x.png", exif=DAMAGED_EXIF[kind])
    assert torch.equal(read_image(tmp_path / "x.png")[0], torch.from_numpy(UPRIGHT))


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png", "x.tiff", "x.jpg"])
def test_the_first_of_several_pictures_is_taken(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (16, 16), (grey, grey, grey)) for grey in (60, 120, 240)]
    options = {"format": "MPO"} if name == "x.jpg" else {"lossless": True} if name == "x.webp" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / name) as file:
        assert file.n_frames == 3
    assert (read_image(tmp_path / name).int() - 60).abs().max() <= 2 * (name == "x.jpg")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((4, 6), np.float32), "floating point"),
        (np.full((4, 6), 70000, np.int32), "exceed 16 bits"),
        (np.full((4, 6), -1, np.int32), "exceed 16 bits"),
    ],
    ids=["float", "above 16 bits", "negative"],
)
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    path = tmp_path / "x.tiff"
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match=f"'{names(path)}': its pixels .*{message}"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tiff", "ppm", "gif"])
def test_truncated_image_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(np.random.randint(0, 256, (32, 32, 3), np.uint8)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"cannot read the image '{names(path)}'.*Remove or replace it.*verify"):
        read_image(path)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\xff" * 40])
def test_file_that_is_no_image_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"cannot read the image '{names(path)}'"):
        read_image(path)
    with pytest.raises(ValueError, match="cannot read the image in row 3: "):
        read_image(data, "in row 3")


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=names(tmp_path / "x.png")):
        read_image(tmp_path / "x.png")


def test_bytes_have_the_limits_of_files() -> None:
    file = io.BytesIO()
    Image.new("1", (1, 65)).save(file, "PNG")
    with pytest.raises(ValueError, match="one side more than 64 times the other"):
        read_image(file.getvalue())
