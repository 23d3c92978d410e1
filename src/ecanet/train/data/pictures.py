"""Finds image files below a folder, and decodes them within limits of memory and time, whatever they contain."""

import io
import os
import re
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ecanet.untrusted import shown

#: Suffixes of image files: torchvision's, .gif, and two more of JPEG.
SUFFIXES = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe")
#: Suffixes of picture formats that are not read, as phones, cameras and browsers write them.
OTHER_SUFFIXES = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
)
#: Formats that are read, whatever the name of the file: those of :data:`SUFFIXES`.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
#: The most pixels of an image: 8192 x 8192.
MAX_PIXELS = 2**26
#: The most pixels of a WebP image: 5792 x 5792. The decoder of WebP keeps several copies.
MAX_WEBP_PIXELS = 2**25
#: The most pixels if PIL's decoder is written in Python: run-length encoded BMP, PPM as text or with an odd range.
MAX_SLOW_PIXELS = 2**23
#: The largest ratio of an image's sides, longer to shorter: enlarged by its shorter side, a long image grows too large.
MAX_RATIO = 64
#: An image file may have this many bytes for each of the most pixels, and a mebibyte.
BYTES_PER_PIXEL = 4
#: The most reads for decoding a file: a header may consist of millions of parts of a few bytes.
MAX_READS = 2**19
#: The most numbers in an entry of a TIFF's directory: the number of tiles of 16 x 16 pixels in the largest image.
MAX_TIFF_NUMBERS = 2**18
#: The most scans of a progressive JPEG: each is a pass over all pixels, and encoders make about ten.
MAX_SCANS = 100

_PIXELS_AT_A_TIME = 2**20

#: The transposition that makes a picture upright, by EXIF orientation; 1 is upright already.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def image_files(folder: str | Path, left_out: Counter[str] | None = None) -> Iterator[str]:
    """Image files below a folder, by suffix; names that start with a dot are left out.

    Links to folders are followed, but each folder is searched only once, and never one that contains ``folder``.

    Args:
        folder: The folder.
        left_out: Counts the files of :data:`OTHER_SUFFIXES` by their suffix.

    Raises:
        OSError: a folder cannot be listed; the message names it.
    """
    seen = {_identity(path) for path in Path(folder).resolve().parents}
    unread = [os.fspath(folder)]
    while unread:
        below = []
        for entry in _entries(unread.pop(), seen):
            if entry.name.startswith("."):
                continue
            # For a circular link isdir returns False, and is_dir raises an error.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                below.append(entry.path)
            elif entry.name.lower().endswith(SUFFIXES):
                yield entry.path
            elif left_out is not None and (suffix := os.path.splitext(entry.name)[1].lower()) in OTHER_SUFFIXES:
                left_out[suffix] += 1
        unread += sorted(below, reverse=True)


def _entries(folder: str, seen: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """The entries of a folder at its first visit; none later."""
    try:
        if (identity := _identity(folder)) in seen:
            return []
        seen.add(identity)
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise OSError(error.errno, f"cannot list the folder '{shown(folder, 300)}': {error.strerror}") from error


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def read_image(source: str | Path | bytes, name: str | None = None) -> Tensor:
    """Decode one picture to RGB. All pictures in training, validation and prediction are read by this function.

    - The EXIF orientation is applied, so that a phone's photograph is upright.
    - Transparent pixels are shown on white.
    - 16-bit pixels are divided by 256.
    - Of an animation, and of a file with several pages, the first picture is read.

    Args:
        source: A file, or the bytes of one, in one of :data:`FORMATS`, of at most :data:`MAX_PIXELS`
            (:data:`MAX_WEBP_PIXELS`, :data:`MAX_SLOW_PIXELS`), its longer side at most :data:`MAX_RATIO` times the
            shorter.
        name: Name of the picture in errors; by default the file's path.

    Returns:
        uint8 ``(3, H, W)``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a regular file or not an image, it is damaged, too large or too long, or its pixels have
            no known range, such as floating point.

    Example:
        >>> read_image("shoe.png").shape  # doctest: +SKIP
        torch.Size([3, 28, 28])
    """
    try:
        pixels = _decode(io.BytesIO(source), len(source)) if isinstance(source, bytes) else _decode_file(source)
    except FileNotFoundError:
        raise
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error, IndexError ...
        which = name or ("of these bytes" if isinstance(source, bytes) else f"'{shown(source, 300)}'")
        raise ValueError(
            f"cannot read the image {which}: {what_is_wrong(error)}. Remove or replace it; "
            "ecanet.train.data.verify_images, on the command line --data.verify true, lists all such images"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def what_is_wrong(error: BaseException) -> str:
    """A decoder's error in one line."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, (OSError, ValueError)) and str(error):
        return shown(getattr(error, "strerror", None) or error, 300)  # strerror has no path, str(error) may
    return shown(f"it is damaged ({type(error).__name__}: {error})", 300)


def _decode_file(path: str | Path) -> np.ndarray:
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # opening a pipe waits for its writer
        raise ValueError("it is a folder, pipe, socket or device, not a file")
    # Files of /proc have size 0, and some act like pipes.
    return _decode(io.FileIO(path), status.st_size) if status.st_size else _decode(io.BytesIO(), 0)


def _decode(raw: io.FileIO | io.BytesIO, size: int) -> np.ndarray:
    """RGB uint8 ``(H, W, 3)`` from a file of ``size`` bytes."""
    with _ReadLimited(raw) as file:
        if not size:
            raise ValueError("it is empty")
        _check_bytes(size, MAX_PIXELS)
        with _open_image(file, size) as image:
            if any(tile[0] in Image.DECODERS for tile in image.tile):
                _check_size(*image.size, MAX_SLOW_PIXELS)
                file.left = MAX_SLOW_PIXELS  # this decoder reads byte by byte
            _check_size(*image.size)
            _check_tile(image)
            if image.info.get("progressive"):
                _check_scans(file)
            return _rgb_pixels(image)


class _ReadLimited(io.BufferedReader):
    """A file that allows a limited number of reads."""

    left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ValueError("it has more parts than its image needs: save it again")
        return super().read(size)


def _open_image(file: IO[bytes], size: int) -> ImageFile.ImageFile:
    """Like ``Image.open``, but without its warning about large images: sizes are checked here."""
    Image.init()
    head = file.read(32)
    file.seek(0)
    if head[:4] == b"RIFF":  # PIL reserves memory for the image when it opens it
        _check_size(*_webp_size(head), MAX_WEBP_PIXELS)
        _check_bytes(size, MAX_WEBP_PIXELS)
    elif head[:4] == b"GIF8":  # PIL warns about a frame that is larger than the screen
        _check_size(*_gif_size(file, head))
        file.seek(0)
    elif head[:4] in _TIFFS:  # PIL turns all values of a directory into Python's numbers
        file.seek(0)
        _check_directory(file)
        file.seek(0)
    for name in FORMATS:
        make, accept = Image.OPEN[name]
        if len(head) > 2 and (accept is None or accept(head[:16]) is True):
            return make(file, "")
    raise ValueError(f"it is not an image of {', '.join(FORMATS)}")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height from the first chunk of a WebP file."""
    # https://developers.google.com/speed/webp/docs/riff_container, RFC 6386 9.1
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _gif_size(file: IO[bytes], head: bytes) -> tuple[int, int]:
    """Width and height of the smallest area that holds both the screen and the first frame of a GIF."""
    # https://www.w3.org/Graphics/GIF/spec-gif89a.txt
    width, height, flags = struct.unpack("<HHB", head[6:11])
    file.seek(13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
    while (kind := file.read(1)) == b"!":  # an extension: its label, and blocks up to an empty one
        file.read(1)
        while length := file.read(1) or b"\0":
            if length == b"\0" or len(file.read(length[0])) < length[0]:
                break
    if kind != b",":
        raise ValueError("it is a GIF without a picture")
    left, top, wide, high = struct.unpack("<4H", file.read(8))
    return max(width, left + wide), max(height, top + high)


def _check_bytes(size: int, max_pixels: int) -> None:
    if size > (max_bytes := BYTES_PER_PIXEL * max_pixels + 2**20):
        raise ValueError(f"it has {size:,} bytes, more than {max_bytes:,}: make it smaller")


def _check_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    if min(width, height) < 1:
        raise ValueError(f"its header says {width} x {height} pixels")
    if width * height > max_pixels:
        raise ValueError(f"it has {width:,} x {height:,} pixels, more than {max_pixels:,}: make it smaller")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"it has {width:,} x {height:,} pixels, one side more than {MAX_RATIO} times the other: cut it into pieces"
        )


#: For each start of a TIFF: byte order, and the layouts of the directory's offset, of its length and of an entry.
_TIFFS = {
    start: (order, *sizes)
    for order, starts in (("<", (b"II*\0", b"II+\0")), (">", (b"MM\0*", b"MM\0+")))
    for start, sizes in zip(starts, (("4xI", "H", "HHIH2x"), ("8xQ", "Q", "HHQH6x")), strict=True)
}
_TIFF_BYTES = (1, 2, 6, 7)  # types of entries that PIL keeps as bytes
_TIFF_SHORT = 3


def _directory(file: IO[bytes]) -> Iterator[tuple[int, int, int, int]]:
    """Tag, type, count and value (read as a 16-bit number) of each entry in a TIFF's first directory."""
    start = file.tell()
    order, place, length, entry = _TIFFS[file.read(4)]

    def unpack(layout: str) -> tuple[int, ...]:
        return struct.unpack(order + layout, file.read(struct.calcsize(order + layout)))

    file.seek(start)
    file.seek(start + unpack(place)[0])
    (entries,) = unpack(length)
    if entries > MAX_TIFF_NUMBERS:
        raise ValueError(f"its directory says that it has {entries:,} entries")
    for _ in range(entries):
        tag, kind, count, value = unpack(entry)
        yield tag, kind, count, value


def _check_directory(file: IO[bytes]) -> None:
    """Check how many numbers each entry of a TIFF's first directory has."""
    for tag, kind, count, _ in _directory(file):
        if kind not in _TIFF_BYTES and count > MAX_TIFF_NUMBERS:
            raise ValueError(f"its tag {tag} says that it has {count:,} numbers: save it again")


def _orientation(exif: object) -> int:
    """The orientation in EXIF data, 1 to 8; 1 if there is none or it cannot be read.

    PIL's own reader would convert every entry to Python numbers, and an untrusted file may have millions of them.
    """
    if not isinstance(exif, bytes):
        return 1
    try:
        for tag, kind, count, value in _directory(io.BytesIO(exif.removeprefix(b"Exif\0\0"))):
            if (tag, kind, count) == (ExifTags.Base.Orientation, _TIFF_SHORT, 1):
                return value if value in _TRANSPOSITIONS else 1
    except (KeyError, struct.error, ValueError, OverflowError):  # damaged EXIF data leaves the picture as it is
        pass
    return 1


def _check_tile(image: Image.Image) -> None:
    """Check the tile size of a TIFF: a tile may be larger than the image and is always decoded completely."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(TiffImagePlugin.TILEWIDTH, 1), tags.get(TiffImagePlugin.TILELENGTH, 1)
    if width * height > MAX_PIXELS:
        raise ValueError(f"its tiles have {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}: save it again")


def _check_scans(file: IO[bytes]) -> None:
    """Check the number of scans of a progressive JPEG: each may have few bytes, but costs a pass over the image."""
    file.seek(0)
    data, place, scans = file.read(), 0, 0
    # Find all markers except RST. All but SOI and EOI start a segment, which begins with its length. In the data of a
    # scan, only zero or RST can follow 0xFF.
    marker = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
    while (match := marker.search(data, place)) and match[0] != b"\xff\xd9":
        place = match.end()
        if match[0] != b"\xff\xd8":
            place += int.from_bytes(data[place : place + 2], "big")
        scans += match[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise ValueError(f"it is a progressive JPEG of more than {MAX_SCANS} scans: save it again")


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    """RGB uint8 ``(H, W, 3)``."""
    if image.mode == "F":
        raise ValueError("its pixels are floating point, of unknown range; save it with 8 bits a channel")
    image.load()
    transposition = _TRANSPOSITIONS.get(_orientation(image.info.get("exif")))
    upright: Image.Image = image
    if transposition is not None and image.format != "TIFF":  # PIL itself makes TIFFs upright
        upright = image.transpose(transposition)
        upright.info = image.info
    rgb = np.empty((upright.height, upright.width, 3), np.uint8)
    rows = max(1, _PIXELS_AT_A_TIME // upright.width)
    for top in range(0, upright.height, rows):  # in parts, as PIL's conversions make several copies
        bottom = min(top + rows, upright.height)
        rgb[top:bottom] = _rows_as_rgb(upright.crop((0, top, upright.width, bottom)))
    return rgb


def _rows_as_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        # PIL's own conversion would clip at 255 instead of scaling.
        wide = np.asarray(image)  # (H, W)
        if wide.min() < 0 or wide.max() > 0xFFFF:
            raise ValueError("its pixels exceed 16 bits; save it with 8 bits a channel")
        grey = (wide >> 8).astype(np.uint8)
        grey[wide == image.info.get("transparency", -1)] = 255
        return grey[..., None]
    if not image.has_transparency_data:
        return np.asarray(image.convert("RGB"))
    if image.mode == "La":  # PIL can convert it only to LA
        image = image.convert("LA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
