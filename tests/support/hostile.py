"""Bodies that are broken, or made to harm a server of images."""

import json
import struct
import zlib
from functools import cache
from typing import Any

import skimage.data
from PIL import Image

from tests.support.frames import as_json, encoded

CAT = Image.fromarray(skimage.data.chelsea())


def many_scans(size: int, scans: int) -> bytes:
    """Return a progressive JPEG with so many additional scans of its image; 60 bytes each."""
    image = encoded(Image.new("L", (size, size)), "JPEG", progressive=True)
    last = image[image.rindex(b"\xff\xda") : -2]
    return image[:-2] + scans * last + image[-2:]


def hidden_scans(scans: int) -> bytes:
    """Return a JPEG with scans behind a marker that has a length for some readers, and none for libjpeg."""
    image = encoded(Image.new("L", (500, 500)), "JPEG", progressive=True)
    place = image.rindex(b"\xff\xda")
    head = image[place : place + 10]
    restart = b"\xff\xdd\0\4\0\1"  # after each block, so that libjpeg looks for the next marker behind an odd one
    return image[:place] + restart + head + b"\xff\x02\xff\xff" + scans * head + bytes(3) + image[-2:]


def rare_coding(kind: int) -> bytes:
    """Return a JPEG that states another coding than baseline or progressive: a few bytes of it could cost seconds."""
    image = encoded(CAT, "JPEG")
    assert image.count(b"\xff\xc0\0\x11") == 1
    return image.replace(b"\xff\xc0\0\x11", bytes([0xFF, 0xC0 + kind]) + b"\0\x11")


def hidden_exif(marker: bytes, blocks: int) -> bytes:
    """Return a JPEG with EXIF blocks behind a marker that ends it for some readers, or has a length, not for Pillow."""
    image = encoded(CAT, "JPEG")
    block = b"\xff\xe1\0\x09Exif\0\0x"
    return image[:2] + marker + bytes(2) + blocks * block + image[2:]


def many_chunks(kind: bytes, count: int) -> bytes:
    """Return a PNG with so many chunks of a kind, each of which unpacks to a megabyte; about a kilobyte each."""
    content = {b"iTXt": b"\0\1\0\0\0", b"zTXt": b"\0\0", b"iCCP": b"\0\0"}[kind]
    image = encoded(CAT, "PNG")
    chunks = b""
    for number in range(count):
        text = zlib.compress("\U0001f600".encode() + bytes(2**20 - 16), 9)
        chunks += png_chunk(kind, b"%d" % number + content + text)
    return image[:33] + chunks + image[33:]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG: its length, kind and content, and their checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def blank_png(width: int, height: int) -> bytes:
    """Return a black PNG of a bit a pixel, without ever holding its pixels in memory."""
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", packed), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def run_length_bmp(size: int) -> bytes:
    """Return a compressed BMP of so many pixels a side, four bytes a row, which Pillow decodes byte by byte."""
    rows = b"\1\0\0\0" * size + b"\0\1"
    palette = bytes(1024)
    header = struct.pack("<IiiHHIIiiII", 40, size, size, 1, 8, 1, len(rows), 0, 0, 256, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + header + palette + rows


@cache
def bad_frames() -> dict[str, tuple[bytes, str]]:
    """Return files that are refused, and the reasons.

    Among them the half of a JPEG that its sender did not finish, an image of 900 megapixels in 110 KB, and one of 36
    megapixels that takes Pillow minutes.
    """
    return {
        "empty": (b"", "not an image: none of JPEG, PNG, WEBP, BMP, GIF in these 0 bytes"),
        "text": (b"this is no image", "not an image"),
        "zeros": (bytes(100_000), "not an image"),
        "truncated": (encoded(CAT, "JPEG")[:9000], "broken image: image file is truncated"),
        "chunk": (  # ends early; Pillow raises no OSError then, but a SyntaxError.
            encoded(CAT, "PNG")[:33] + struct.pack(">I", 1000) + encoded(CAT, "PNG")[37:],
            "broken image: broken PNG file",
        ),
        "header only": (encoded(CAT, "PNG")[:40], "not an image"),
        "sliver": (blank_png(1, 65_000), "too narrow: 1 x 65000 pixels, expected at most 32 to 1"),
        "giant": (blank_png(10_000, 10_000), "too many pixels: 10000 x 10000, expected"),
        "bomb": (blank_png(30_000, 30_000), "900000000 pixels"),
        "scans": (many_scans(5_700, 20_000), "too many scans: "),
        "EXIF blocks": (
            encoded(CAT, "JPEG")[:2] + b"\xff\xe1\0\x08Exif\0\0" * 5_000 + encoded(CAT, "JPEG")[2:],
            "too many EXIF blocks: 5000, expected at most 512",
        ),
        "hidden scans": (hidden_scans(6000), "too many scans: "),
        "EXIF behind the end": (hidden_exif(b"\xff\xd9", 20_000), "broken image: no scan"),
        "EXIF behind a start": (hidden_exif(b"\xff\xd8", 20_000), "too many EXIF blocks: "),
        "EXIF behind a marker": (hidden_exif(b"\xff\xf0", 20_000), "too many EXIF blocks: "),
        "segments": (b"\xff\xd8" + b"\xff\xe2\0\2" * 20_000 + encoded(CAT, "JPEG")[2:], "too many parts: 10001"),
        "arithmetic coding": (rare_coding(9), "too many frames of a rare coding: 1, expected at most 0"),
        "progressive arithmetic coding": (rare_coding(10), "too many frames of a rare coding: 1"),
        "lossless coding": (rare_coding(3), "too many frames of a rare coding: 1"),
        "chunks": (
            encoded(CAT, "PNG")[:33] + png_chunk(b"prIv", b"") * 20_000 + encoded(CAT, "PNG")[33:],
            "too many parts: 10001, expected at most 10000",
        ),
        "texts": (many_chunks(b"iTXt", 60), "too many texts: 60, expected at most 4"),
        "compressed texts": (many_chunks(b"zTXt", 60), "too many compressed texts: 60, expected at most 4"),
        "profiles": (many_chunks(b"iCCP", 300), "too many colour profiles: 300, expected at most 4"),
        "slow bitmap": (run_length_bmp(5740), "compressed BMP: expected a plain one"),
        "program": (encoded(CAT.resize((40, 30)), "EPS"), "not an image"),
        "unusual": (encoded(CAT, "TIFF"), "not an image"),
    }


NO_BATCH = "no frames: expected an image, a form with one file, or application/json: "
NO_TYPE = "JSON without its content type: expected the header Content-Type: application/json"
BAD_JSON = {
    "list": ("[1, 2]", NO_BATCH),
    "number": ("17", NO_BATCH),
    "null": ("null", NO_BATCH),
    "string": ('"text"', NO_BATCH),
    "no frames": ("{}", NO_BATCH),
    "long list": (json.dumps([1] * 1_000_000), NO_BATCH),
    "broken": ('{"0": ', "not JSON: Expecting value: line 1 column 7 (char 6)"),
    "nothing": ("", "not JSON: Expecting value: line 1 column 1 (char 0)"),
    "single quotes": ("{'0': 'QQ=='}", "not JSON: Expecting property name enclosed in double quotes"),
    "byte order mark": ('\ufeff{"0": "QQ=="}', "not an image: none of JPEG, PNG, WEBP, BMP, GIF in these 1 bytes"),
    "deep": ("[" * 1_000_000, "not JSON: maximum recursion depth exceeded"),
    "deep object": ('{"0":' * 100_000 + "1" + "}" * 100_000, "not JSON: maximum recursion depth exceeded"),
    "long number": ('{"0": ' + "1" * 1_000_000 + "}", "not JSON: Exceeds the limit"),
    "numbers": ('{"0": 5, "1": NaN}', "none of 2 frames can be read; the first: not a base64 string: int, expected"),
    "nested": ('{"0": {"1": "QQ=="}}', "not a base64 string: dict, expected"),
    "KServe": ('{"instances": [{"b64": "QQ=="}]}', 'list, expected {"0": "<base64 of an image>"}'),
    "pixels": ('{"data": [[[0, 0, 0]]]}', 'list, expected {"0": "<base64 of an image>"}'),
    "no base64": ('{"0": "%%%"}', "not a base64 string"),
    "no ASCII": ('{"0": "\\u00df\\ud800"}', "not a base64 string"),
    "huge string": (json.dumps({"0": "A" * 6_000_000}), "not an image"),
    "no image": ('{"0": "QQ=="}', "not an image: none of JPEG, PNG, WEBP, BMP, GIF in these 1 bytes"),
}


@cache
def excesses() -> dict[str, tuple[str, str]]:
    """Return JSON batches that ask for too much, and the reasons."""
    return {
        "thousands of frames": (
            json.dumps(as_json(*[encoded(CAT.resize((8, 8)), "JPEG")] * 5000)),
            "too many frames: 5000",
        ),
        "thousands of nothings": (json.dumps({str(i): 0 for i in range(500_000)}), "too many frames: 500000, expected"),
        "giants": (
            json.dumps(as_json(*[blank_png(5_700, 5_700)] * 5)),
            "too many pixels in a request: expected at most 132,710,400",
        ),
    }


def as_torchserve_parses(text: str) -> Any:
    """Return what a handler gets for a body that calls itself JSON: what it says, or the bytes if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return bytearray(text.encode())
