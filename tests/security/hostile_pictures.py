"""Makers of files that are called pictures, and of honest ones, by name."""

import gzip
import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A PNG chunk; ``length`` lies about it."""
    says = len(data) if length is None else length
    return struct.pack(">I", says) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: bytes, data: bytes = b"", bits: int = 8, colour: int = 2) -> bytes:
    """A PNG that says it has this size, with ``extra`` chunks before its ``data``."""
    header = chunk(b"IHDR", struct.pack(">2I5B", width, height, bits, colour, 0, 0, 0))
    return PNG + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND")


def one_bit_png(width: int, height: int) -> bytes:
    """A sound PNG of black pixels, a bit each: 13,300 x 13,300 of them take 22 kB."""
    return png(width, height, data=bytes(height * (1 + (width + 7) // 8)), bits=1, colour=0)


def zeros(size: int) -> bytes:
    """So many zeros, deflated."""
    press, block = zlib.compressobj(9), bytes(2**20)
    return b"".join(press.compress(block) for _ in range(size // 2**20)) + press.flush()


def tiff(width: int, height: int, *, order: str = "<", data: bytes = b"", **tags: tuple[int, int, int]) -> bytes:
    """A TIFF of grey bytes; ``tags`` are ``t<number>=(type, count, value)``, replacing or added."""
    entries = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    entries |= {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, max(1, len(data)))}
    entries |= {int(name[1:]): entry for name, entry in tags.items()}
    directory = struct.pack(f"{order}H", len(entries))
    for tag, (kind, count, value) in sorted(entries.items()):
        directory += struct.pack(f"{order}HHI", tag, kind, count)
        small = kind == 3 and count == 1
        directory += struct.pack(f"{order}HH" if small else f"{order}I", *((value, 0) if small else (value,)))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + directory + struct.pack(f"{order}I", 0)


def webp(kind: bytes, body: bytes) -> bytes:
    """A WebP file of one chunk."""
    inner = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(inner)) + inner


def webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP file that says it has this size, with no image."""
    return webp(b"VP8X", bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"))


def bmp(width: int, height: int, *, bits: int = 24, compression: int = 0, data: bytes = b"", colours: int = 0) -> bytes:
    """A BMP that says it has this size."""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, colours, 0)
    palette = bytes(4 * (256 if bits == 8 else 0))
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + palette + data


def gif(screen: tuple[int, int], frame: tuple[int, int, int, int], extensions: bytes = b"") -> bytes:
    """A GIF of one frame (left, top, width, height) with next to no data, on a screen of this size."""
    picture = b"," + struct.pack("<4H", *frame) + b"\0" + b"\x08\x02\x00\x01\0"
    return b"GIF89a" + struct.pack("<2H", *screen) + b"\x80\0\0" + bytes(6) + extensions + picture + b";"


def exif(entries: int, content: bytes) -> bytes:
    """EXIF data whose directory says that it has so many entries."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", entries) + content


def jpeg(**options: object) -> bytes:
    """A sound JPEG of 64 x 64 pixels."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (120, 90, 60)).save(file, "JPEG", **options)
    return file.getvalue()


def jpeg_that_says(width: int, height: int) -> bytes:
    """A JPEG of 64 x 64 pixels whose header says another size."""
    data = bytearray(jpeg())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def jpeg_of_scans(count: int, side: int = 8000) -> bytes:
    """A progressive grey JPEG that goes over all its pixels ``count`` times, in some 100 bytes each."""
    quantiser = b"\xff\xdb" + struct.pack(">HB", 67, 0) + bytes([1]) * 64
    frame = b"\xff\xc2" + struct.pack(">HBHHB3B", 11, 8, side, side, 1, 1, 0x11, 0)
    # Codes of one bit: a DC difference of zero, then an AC run of 2**14 + 14 more bits of empty blocks.
    tables = b"".join(
        b"\xff\xc4" + struct.pack(">HB", 20, kind) + bytes([1]) + bytes(15) + bytes([value])
        for kind, value in ((0x00, 0), (0x10, 0xE0))
    )
    blocks = (-(-side // 8)) ** 2
    dc = b"\xff\xda" + struct.pack(">HB2B3B", 8, 1, 1, 0x00, 0, 0, 1) + bytes(-(-blocks // 8))
    runs = -(-blocks // 2**14)
    ac = b"\xff\xda" + struct.pack(">HB2B3B", 8, 1, 1, 0x00, 1, 63, 1) + bytes(-(-15 * runs // 8))
    refine = b"\xff\xda" + struct.pack(">HB2B3B", 8, 1, 1, 0x00, 1, 63, 0x10) + bytes(-(-15 * runs // 8))
    return b"\xff\xd8" + quantiser + frame + tables + dc + ac + refine * (count - 2) + b"\xff\xd9"


def saved(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    """A sound file of another format."""
    file = io.BytesIO()
    (image or Image.new("RGB", (32, 32), (1, 2, 3))).save(file, kind, **options)
    return file.getvalue()


def frames(kind: str, count: int) -> bytes:
    """An animation."""
    images = [Image.new("L", (4, 4), i % 256).convert("RGB") for i in range(count)]
    return saved(kind, images[0], save_all=True, append_images=images[1:])


def psd(width: int, height: int) -> bytes:
    """A Photoshop header that says it has this size."""
    return b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, height, width, 8, 3) + bytes(12)


def idx(*shape: int, data: bytes = b"", kind: int = 8, dimensions: int | None = None) -> bytes:
    """An idx file that says it has this shape."""
    says = len(shape) if dimensions is None else dimensions
    return struct.pack(f">4B{len(shape)}I", 0, 0, kind, says, *shape) + data


def gzipped_zeros(head: bytes, size: int) -> bytes:
    """``head`` and so many zeros behind it, compressed by gzip to a thousandth."""
    block = min(size, 2**26)
    return gzip.compress(head) + gzip.compress(bytes(block)) * (size // max(block, 1))


BOMB = zeros(2**28)  # 256 kB that inflate to 256 MiB

#: What a file named .png may hold. Content, and what the refusal says; None where the image in it may be read.
HOSTILE: dict[str, tuple[Callable[[], bytes], str | None]] = {
    "empty": (lambda: b"", "empty"),
    "one byte": (lambda: b"P", "not an image"),
    "text": (lambda: b"not an image\n" * 100, "not an image"),
    "text of escape codes": (lambda: b"\x1b[2J\x1b]0;owned\x07" * 100, "not an image"),
    "html": (lambda: b"<!DOCTYPE html><html></html>", "not an image"),
    "random bytes": (lambda: np.random.default_rng(0).bytes(5000), "not an image"),
    "PNG signature alone": (lambda: PNG, ""),
    "PNG of 1 x 60,000": (lambda: one_bit_png(1, 60_000), "one side more than 64 times"),
    "PNG of 60,000 x 1": (lambda: one_bit_png(60_000, 1), "one side more than 64 times"),
    "PNG of 65 x 1": (lambda: one_bit_png(65, 1), "one side more than 64 times"),
    "PNG of 8 x 600": (lambda: one_bit_png(8, 600), "one side more than 64 times"),
    "PNG of 13,300 x 13,300": (lambda: one_bit_png(13_300, 13_300), "13,300 x 13,300 pixels, more than 67,108,864"),
    "PNG of 8193 x 8193": (lambda: one_bit_png(8193, 8193), "more than 67,108,864"),
    "PNG in PIL's warning range": (lambda: png(10_000, 10_000), "more than 67,108,864"),
    "PNG of 2^31 x 2^31": (lambda: png(2**31 - 1, 2**31 - 1), "more than 67,108,864"),
    "PNG of 0 x 0": (lambda: png(0, 0), ""),
    "PNG of 8192 x 8192 without pixels": (lambda: png(8192, 8192), "truncated"),
    "PNG with pixels for 256 MiB": (lambda: PNG + png(8, 8)[8:33] + chunk(b"IDAT", BOMB), None),
    "PNG with a chunk longer than the file": (lambda: PNG + chunk(b"IHDR", bytes(13), length=2**31 - 1), ""),
    "PNG with a zTXt bomb": (lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + BOMB)), "too large"),
    "PNG with an iTXt bomb": (lambda: png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)), "too large"),
    "PNG with an iCCP bomb": (lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + BOMB)), "too large"),
    "PNG with 200 text bombs": (
        lambda: png(8, 8, *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**6), 9))] * 200),
        "Too much memory",
    ),
    "PNG with a wrong checksum": (lambda: png(8, 8)[:29] + b"\0\0\0\0" + png(8, 8)[33:], ""),
    "PNG of 100,000 chunks": (lambda: png(8, 8, chunk(b"prVt") * 100_000), ""),
    "PNG of 2 million chunks": (lambda: png(8, 8, chunk(b"prVt") * 2**21), "more parts than its image needs"),
    "PNG of 2 million chunks at its end": (
        lambda: png(8, 8, data=bytes(8 * 25))[:-12] + chunk(b"prVt") * 2**21,
        "more parts than its image needs",
    ),
    "JPEG of 16 million comments": (
        lambda: jpeg()[:2] + b"\xff\xfe\0\2" * 2**24 + jpeg()[2:],
        "more parts than its image needs",
    ),
    "JPEG that says 65,000 x 65,000": (lambda: jpeg_that_says(65_000, 65_000), "more than 67,108,864"),
    "JPEG that says 60,000 x 64": (lambda: jpeg_that_says(60_000, 64), "one side more than 64 times"),
    "JPEG that says 0 x 64": (lambda: jpeg_that_says(0, 64), ""),
    "JPEG of 2,000 scans": (lambda: jpeg_of_scans(2000), "more than 100 scans"),
    "JPEG of scans behind a hidden end": (
        lambda: jpeg_of_scans(2000).replace(b"\xff\xda", b"\xff\xfe\0\4\xff\xd9\xff\xda", 1),
        "more than 100 scans",
    ),
    "JPEG of 100 scans": (lambda: jpeg_of_scans(100), None),
    "JPEG cut": (lambda: jpeg()[:300], "Truncated"),
    "BMP of 2^31 x 2^31": (lambda: bmp(2**31 - 1, 2**31 - 1), "more than 67,108,864"),
    "BMP of 60,000 rows": (lambda: bmp(4, -60_000), "one side more than 64 times"),
    "BMP without pixels": (lambda: bmp(8000, 8000), "truncated"),
    "BMP of empty rows": (
        lambda: bmp(8192, 8192, bits=8, compression=1, data=b"\1\0\0\0" * 8190),
        "more than 8,388,608",
    ),
    "BMP of jumps": (lambda: bmp(8192, 8192, bits=8, compression=1, data=b"\0\2\0\xff" * 8192), "more than 8,388,608"),
    "BMP of empty rows, 8 megapixels": (lambda: bmp(2880, 2880, bits=8, compression=1, data=b"\1\0\0\0" * 2878), ""),
    "BMP of jumps to where it is": (
        lambda: bmp(2880, 2880, bits=8, compression=1, data=b"\0\2\0\0" * 2**22),
        "more parts than its image needs",
    ),
    "BMP of 2^32 colours": (lambda: bmp(8, 8, bits=8, colours=2**32 - 1), ""),
    "PPM of 10^9 x 10^9": (lambda: b"P6 1000000000 1000000000 255\n", "more than 67,108,864"),
    "PPM of 1 x 10^7": (lambda: b"P6 1 10000000 255\n", "one side more than 64 times"),
    "PPM of a long comment": (
        lambda: b"P6 #" + b"a" * 2**26 + b"\n8 8 255\n" + bytes(192),
        "more parts than its image needs",
    ),
    "PPM without pixels": (lambda: b"P6 8000 8000 255\n", "truncated"),
    "PPM of endless numbers": (lambda: b"P6 " + b"1" * 10_000, ""),
    "plain PPM without pixels": (lambda: b"P3 8000 8000 255\n1 1 1\n", "more than 8,388,608"),
    "plain PBM of one long number": (lambda: b"P2 8 8 255\n" + b"1" * 10**6, ""),
    "PFM": (lambda: b"Pf 8 8 -1.0\n" + bytes(256), "floating point"),
    "TIFF of 2^32 x 2^32": (lambda: tiff(2**32 - 1, 2**32 - 1), "more than 67,108,864"),
    "TIFF of 1 x 60,000": (lambda: tiff(1, 60_000), "one side more than 64 times"),
    "TIFF without pixels": (lambda: tiff(8000, 8000), ""),
    "big-endian TIFF without pixels": (lambda: tiff(8000, 8000, order=">"), ""),
    "TIFF of 2^32 strips": (
        lambda: tiff(8, 8, t273=(4, 2**32 - 1, 8)),
        "its tag 273 says that it has 4,294,967,295 numbers",
    ),
    "TIFF of 4 million strips": (
        lambda: tiff(8, 8, data=struct.pack("<I", 8) * 2**22, t273=(4, 2**22, 8), t278=(4, 1, 1)),
        "its tag 273 says that it has 4,194,304 numbers",
    ),
    "TIFF of a directory of nothing": (lambda: b"II*\0\xff\xff\xff\xff", ""),
    "BigTIFF of 2^63 entries": (
        lambda: b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**63),
        "its directory says that it has 9,223,372,036,854,775,808 entries",
    ),
    "TIFF of huge tiles": (
        lambda: tiff(8, 8, t259=(3, 1, 8), t322=(4, 1, 2**15), t323=(4, 1, 2**15), t324=(4, 1, 8), data=BOMB),
        "its tiles have 32,768 x 32,768 pixels",
    ),
    "TIFF with a deflate bomb": (lambda: tiff(8, 8, t259=(3, 1, 8), data=BOMB), None),
    "TIFF with a deflate bomb in a strip of 2^32 rows": (
        lambda: tiff(8, 8, t259=(3, 1, 8), t278=(4, 1, 2**32 - 1), data=BOMB),
        None,
    ),
    "TIFF of 65,535 samples": (lambda: tiff(8, 8, t277=(3, 1, 65_535)), ""),
    "TIFF whose directory is its own next": (lambda: tiff(8, 8)[:-4] + struct.pack("<I", 8), None),
    "TIFF of an empty directory": (lambda: b"II*\0\x08\0\0\0\0\0\0\0\0\0", ""),
    "BigTIFF that ends": (lambda: b"II+\0\x08\0\0\0" + b"\xff" * 8, ""),
    "WebP canvas of 2^24 x 2^24": (lambda: webp_canvas(2**24, 2**24), "more than 33,554,432"),
    "WebP canvas of 13,300 x 13,300": (lambda: webp_canvas(13_300, 13_300), "more than 33,554,432"),
    "WebP canvas of 1 x 16,383": (lambda: webp_canvas(1, 16_383), "one side more than 64 times"),
    "WebP canvas without an image": (lambda: webp_canvas(100, 100), ""),
    "lossless WebP of 16,384 x 16,384": (lambda: webp(b"VP8L", b"\x2f" + b"\xff" * 4), "more than 33,554,432"),
    "lossy WebP of 16,383 x 16,383": (
        lambda: webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f"),
        "more than 33,554,432",
    ),
    "WebP that is too long for its header": (lambda: b"RIFF" + b"\xff" * 4 + b"WEBPVP8X", ""),
    "WebP of 1,000 frames": (lambda: frames("WEBP", 1000), None),
    "PNG of 1,000 frames": (lambda: frames("PNG", 1000), None),
    "TIFF of 1,000 frames": (lambda: frames("TIFF", 1000), None),
    "GIF": (lambda: saved("GIF"), None),
    "GIF of 1,000 frames": (lambda: frames("GIF", 1000), None),
    "GIF without a picture": (lambda: b"GIF89a" + b"\xff" * 4 + bytes(3) + b";", "it is a GIF without a picture"),
    "GIF that says 65,535 x 65,535": (lambda: gif((65_535, 65_535), (0, 0, 4, 4)), "65,535 x 65,535 pixels, more"),
    "GIF of a frame beyond its screen": (lambda: gif((4, 4), (60_000, 60_000, 9, 9)), "60,009 x 60,009 pixels, more"),
    "GIF of no data for 67 megapixels": (lambda: gif((8192, 8192), (0, 0, 8192, 8192)), "truncated"),
    "GIF of a million comments": (lambda: gif((4, 4), (0, 0, 4, 4), b"!\xfe\0" * 10**6), "more parts than its image"),
    "GIF of an endless comment": (lambda: gif((4, 4), (0, 0, 4, 4), b"!\xfe" + b"\x01x" * 10**6), "more parts than"),
    "EXIF of entries of 4 GB": (
        lambda: jpeg(exif=exif(65_535, struct.pack("<HHII", 700, 7, 2**32 - 1, 0) * 50)),
        None,
    ),
    "PNG with EXIF of 10 million entries": (
        lambda: png(1, 1, chunk(b"eXIf", exif(65_535, bytes(12 * 10**7))[6:]), data=bytes(4)),
        None,
    ),
    "ICO": (lambda: saved("ICO"), "not an image of JPEG, PNG"),
    "ICO that says 2^32 bytes": (
        lambda: b"\0\0\1\0\1\0" + struct.pack("<4B2H2I", 0, 0, 0, 0, 1, 32, 2**32 - 1, 22),
        "not an image",
    ),
    "PSD of 300,000 x 300,000": (lambda: psd(300_000, 300_000), "not an image of JPEG, PNG"),
    "EPS, which is a program": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of JPEG"),
    "PDF": (lambda: b"%PDF-1.7\n", "not an image of JPEG, PNG"),
    "SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image of JPEG, PNG"),
    "JPEG 2000": (lambda: saved("JPEG2000"), "not an image of JPEG, PNG"),
    "zip": (lambda: b"PK\3\4" + bytes(100), "not an image of JPEG, PNG"),
    "gzip bomb": (lambda: gzip.compress(bytes(10**7)), "not an image of JPEG, PNG"),
}


def symlink_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def listening(path: Path) -> None:
    """A socket's name may have 108 characters: it is made from within its folder."""
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(before)


def sparse(path: Path) -> None:
    """A PNG with a hole of 10 GiB behind it."""
    path.write_bytes(png(8, 8))
    os.truncate(path, 10 * 2**30)


#: What may be called .png and is no file, or none to be read whole.
NO_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "pipe": (os.mkfifo, "not a file"),
    "folder": (Path.mkdir, "not a file"),
    "socket": (listening, "not a file"),
    "link to a device": (symlink_to("/dev/zero"), "not a file"),
    "link to the terminal": (symlink_to("/dev/tty"), "not a file"),
    "link to an endless file of /proc": (symlink_to("/proc/kmsg"), "empty"),
    "link to a folder": (symlink_to("/"), "not a file"),
    "link to itself": (symlink_to("x.png"), "symbolic link"),
    "hole of 10 GiB": (sparse, "bytes, more than"),
}


def photograph(width: int, height: int) -> Image.Image:
    """A smooth picture with some noise."""
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (height // 100 + 1, width // 100 + 1, 3), dtype=np.uint8)
    return Image.fromarray(tile).resize((width, height), Image.Resampling.BILINEAR)
