"""Image files: found below a folder, and decoded within bounds of memory and time, whatever they say of themselves."""

import io
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageFile, TiffImagePlugin
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ecanet.untrusted import shown

#: Formats that are read, whatever a file's name: those of torchvision's ``IMG_EXTENSIONS``.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
#: The most pixels of an image: 8192 x 8192.
MAX_PIXELS = 2**26
#: The most pixels of a WebP image: 5792 x 5792. Its decoder keeps several copies.
MAX_WEBP_PIXELS = 2**25
#: The most pixels where PIL's decoder is written in Python: run-length encoded BMP, PPM of text or an odd range.
MAX_SLOW_PIXELS = 2**23
#: How many times the shorter side an image's longer side may be. A resize to the shorter side multiplies by its square.
MAX_RATIO = 64
#: The most bytes of an image file are so many a pixel, and a mebibyte.
BYTES_PER_PIXEL = 4
#: The most reads that decode a file; a header may be made of millions of parts of a few bytes.
MAX_READS = 2**19
#: The most numbers in an entry of a TIFF's directory: as many tiles of 16 x 16 pixels are in the largest image.
MAX_TIFF_NUMBERS = 2**18
#: The most scans of a progressive JPEG, each a pass over all its pixels; encoders make some ten.
MAX_SCANS = 100

_PIXELS_AT_A_TIME = 2**20


def image_files(folder: str | Path) -> Iterator[str]:
    """Image files below a folder, by suffix; names that start with a dot are left out.

    Links to folders are followed, but every folder is gone through once, and none that holds ``folder``.

    Raises:
        OSError: a folder cannot be listed; names it.
    """
    seen = {_identity(path) for path in Path(folder).resolve().parents}
    todo = [os.fspath(folder)]
    while todo:
        below = []
        for entry in _entries(todo.pop(), seen):
            if entry.name.startswith("."):
                continue
            # A link in a circle is no folder for isdir, an error for is_dir.
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                below.append(entry.path)
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                yield entry.path
        todo += sorted(below, reverse=True)


def _entries(folder: str, seen: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """What is in a folder, the first time."""
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


def read_image(path: str | Path) -> Tensor:
    """Decode one image file to RGB.

    Of 16-bit pixels the upper 8 bits are kept. Transparency is dropped and EXIF orientation not applied, as in
    torchvision. Of a file with several images the first is taken.

    Args:
        path: A file of one of :data:`FORMATS`, of at most :data:`MAX_PIXELS` (:data:`MAX_WEBP_PIXELS`,
            :data:`MAX_SLOW_PIXELS`), its longer side at most :data:`MAX_RATIO` times the shorter.

    Returns:
        uint8 ``(3, H, W)``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a regular file, not an image, damaged, too large or too long, or of pixels without a known
            range, such as floating point.

    Example:
        >>> read_image("shoe.png").shape  # doctest: +SKIP
        torch.Size([3, 28, 28])
    """
    try:
        pixels = _decode(path)
    except FileNotFoundError:
        raise
    except Exception as error:  # PIL's decoders let out many kinds: OSError, SyntaxError, struct.error, IndexError ...
        raise ValueError(
            f"cannot read the image '{shown(path, 300)}': {what_is_wrong(error)}. Remove or replace it; "
            "image_folder(root, verify=True), on the command line --data.verify true, finds all of a folder"
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def what_is_wrong(error: BaseException) -> str:
    """What a decoder's error says, on one line."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    if isinstance(error, (OSError, ValueError)) and str(error):
        return shown(error, 300)
    return shown(f"it is damaged ({type(error).__name__}: {error})", 300)


def _decode(path: str | Path) -> np.ndarray:
    """RGB uint8 ``(H, W, 3)``."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
        raise ValueError("it is a folder, pipe, socket or device, not a file")
    if not status.st_size:  # as have the files of /proc, some of which are pipes
        raise ValueError("it is empty")
    _check_bytes(status.st_size, MAX_PIXELS)
    with _Counted(io.FileIO(path)) as file, _opened(file) as image:
        if any(tile[0] in Image.DECODERS for tile in image.tile):
            _check_size(*image.size, MAX_SLOW_PIXELS)
            file.left = MAX_SLOW_PIXELS  # it reads byte by byte
        _check_size(*image.size)
        _check_tile(image)
        if image.info.get("progressive"):
            _check_scans(file)
        return _rgb_pixels(image)


class _Counted(io.BufferedReader):
    """A file that may be read from so many times."""

    left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise ValueError("it has more parts than its image needs: save it again")
        return super().read(size)


def _opened(file: IO[bytes]) -> ImageFile.ImageFile:
    """As ``Image.open``, without its warning about large images: their size is judged here."""
    Image.init()
    head = file.read(32)
    file.seek(0)
    if head[:4] == b"RIFF":  # PIL reserves memory for the image when it opens it
        _check_size(*_webp_size(head), MAX_WEBP_PIXELS)
        _check_bytes(os.fstat(file.fileno()).st_size, MAX_WEBP_PIXELS)
    elif head[:4] in _TIFFS:  # PIL makes Python's numbers of all that a directory holds
        _check_directory(file, *_TIFFS[head[:4]])
        file.seek(0)
    for name in FORMATS:
        make, accept = Image.OPEN[name]
        if len(head) > 2 and (accept is None or accept(head[:16]) is True):
            return make(file, "")
    raise ValueError(f"it is not an image of {', '.join(FORMATS)}")


def _webp_size(head: bytes) -> tuple[int, int]:
    """Width and height that a WebP file's first chunk says."""
    # https://developers.google.com/speed/webp/docs/riff_container, RFC 6386 9.1
    kind = head[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF


def _check_bytes(size: int, most_pixels: int) -> None:
    if size > (most := BYTES_PER_PIXEL * most_pixels + 2**20):
        raise ValueError(f"it has {size:,} bytes, more than {most:,}: make it smaller")


def _check_size(width: int, height: int, most: int = MAX_PIXELS) -> None:
    if min(width, height) < 1:
        raise ValueError(f"its header says {width} x {height} pixels")
    if width * height > most:
        raise ValueError(f"it has {width:,} x {height:,} pixels, more than {most:,}: make it smaller")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"it has {width:,} x {height:,} pixels, one side more than {MAX_RATIO} times the other: cut it into pieces"
        )


#: How a TIFF begins, and the formats of its directory's place and length, of an entry, and of the entry's first fields.
_TIFFS = {
    start: (order, *sizes)
    for order, starts in (("<", (b"II*\0", b"II+\0")), (">", (b"MM\0*", b"MM\0+")))
    for start, sizes in zip(starts, (("4xI", "H", "HHI4x"), ("8xQ", "Q", "HHQ8x")), strict=True)
}
_TIFF_BYTES = (1, 2, 6, 7)  # types of entries that stay bytes


def _check_directory(file: IO[bytes], order: str, place: str, length: str, entry: str) -> None:
    """Count the numbers in each entry of a TIFF's first directory."""

    def unpack(layout: str) -> tuple[int, ...]:
        return struct.unpack(order + layout, file.read(struct.calcsize(order + layout)))

    file.seek(0)
    file.seek(unpack(place)[0])
    (entries,) = unpack(length)
    if entries > MAX_TIFF_NUMBERS:
        raise ValueError(f"its directory says that it has {entries:,} entries")
    for _ in range(entries):
        tag, kind, count = unpack(entry)
        if kind not in _TIFF_BYTES and count > MAX_TIFF_NUMBERS:
            raise ValueError(f"its tag {tag} says that it has {count:,} numbers: save it again")


def _check_tile(image: Image.Image) -> None:
    """A TIFF's tile may be larger than its image, and is decoded whole."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(TiffImagePlugin.TILEWIDTH, 1), tags.get(TiffImagePlugin.TILELENGTH, 1)
    if width * height > MAX_PIXELS:
        raise ValueError(f"its tiles have {width:,} x {height:,} pixels, more than {MAX_PIXELS:,}: save it again")


def _check_scans(file: IO[bytes]) -> None:
    """Count a progressive JPEG's scans; a few bytes make one, and each costs a pass over the image."""
    file.seek(0)
    data, place, scans = file.read(), 0, 0
    # Markers other than RST; all but SOI and EOI begin a segment with its length. Between the segments of a scan, 0xFF
    # is followed by zero or RST alone.
    marker = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
    while (found := marker.search(data, place)) and found[0] != b"\xff\xd9":
        place = found.end()
        if found[0] != b"\xff\xd8":
            place += int.from_bytes(data[place : place + 2], "big")
        scans += found[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise ValueError(f"it is a progressive JPEG of more than {MAX_SCANS} scans: save it again")


def _rgb_pixels(image: Image.Image) -> np.ndarray:
    """RGB uint8 ``(H, W, 3)``."""
    if image.mode == "F":
        raise ValueError("its pixels are floating point, of unknown range; save it with 8 bits a channel")
    image.load()
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, _PIXELS_AT_A_TIME // image.width)
    for top in range(0, image.height, rows):  # PIL's conversions make several copies
        bottom = min(top + rows, image.height)
        rgb[top:bottom] = _rgb_part(image.crop((0, top, image.width, bottom)))
    return rgb


def _rgb_part(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        # PIL's own conversion would clip at 255 instead of scaling.
        wide = np.asarray(image)  # (H, W)
        if wide.min() < 0 or wide.max() > 0xFFFF:
            raise ValueError("its pixels exceed 16 bits; save it with 8 bits a channel")
        return (wide >> 8).astype(np.uint8)[..., None]
    if image.mode == "P":
        # Straight to RGB, PIL warns about palettes with transparency.
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))
