"""Decodes the images that clients send. They are not trusted: what one image may cost is bounded."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

# The formats that are decoded. Pillow knows more, one of which starts a program (EPS), and no camera sends them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_PIXELS = 7680 * 4320  # Of an image, as many as 8K video has. A small file can state a lot.
MAX_ASPECT_RATIO = 32  # Long edge to short edge. An image of 1 x 65,000 is small until it is resized.
# How often an image may have what is slow to decode. Each scan of a JPEG goes over the whole image (a progressive one
# has about 10), its EXIF blocks are joined one by one, and the texts and profiles of a PNG can grow a thousandfold.
JPEG_PARTS = {b"\xff\xda": ("scans", 32), b"\xff\xe1": ("EXIF blocks", 512)}
# No camera codes frames arithmetically or without loss, and a few bytes of such a frame can cost seconds.
JPEG_PARTS |= {bytes([255, 192 + kind]): ("frames of a rare coding", 0) for kind in (3, 5, 6, 7, 9, 10, 11, 13, 14, 15)}
MAX_PARTS = 10_000  # of any kind: Pillow takes seconds for the million that a request can hold
PNG_PARTS = {b"iTXt": ("texts", 4), b"zTXt": ("compressed texts", 4), b"iCCP": ("colour profiles", 4)}
# The markers that have a length in libjpeg and in Pillow. Behind others nothing is skipped: it could hide scans.
JPEG_SEGMENT, JPEG_END = re.compile(rb"\xff[\xc0-\xc7\xc9-\xcf\xd9-\xef\xfe]"), b"\xff\xd9"


def decode_body(body: Any) -> bytes | bytearray:
    """Return the file of an image that was sent as it is, or as base64 text. Raises ValueError if it is neither."""
    if isinstance(body, (bytes, bytearray)):
        return body
    if not isinstance(body, str):
        raise ValueError(f'not a base64 string: {type(body).__name__}, expected {{"0": "<base64 of an image>"}}')
    with suppress(ValueError):
        return base64.b64decode(body, validate=True)
    try:  # It may be a data URL, have line breaks or the URL-safe alphabet, or lack its padding.
        text = re.sub(r"(?i)^\s*data:[^,]*,|[\r\n\t]", "", body).rstrip("=")
        return base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
    except ValueError as error:
        raise ValueError(f"not a base64 string: {error}") from error


def parts(file: bytes | bytearray) -> Iterator[bytes]:
    """Yield the markers of a JPEG's segments, or the types of a PNG's chunks, up to the end of the image."""
    place, part = 8, b""
    while file.startswith(b"\x89PNG") and place < len(file) and part != b"IEND":
        part = bytes(file[place + 4 : place + 8])
        yield part
        place += 12 + int.from_bytes(file[place : place + 4], "big")
    place = 2
    while file.startswith(b"\xff\xd8") and (found := JPEG_SEGMENT.search(file, place)) and found[0] != JPEG_END:
        yield bytes(found[0])
        place = found.end() + int.from_bytes(file[found.end() : found.end() + 2], "big")


def open_image(file: bytes | bytearray) -> Image.Image:
    """Return the image in a file, not decoded yet. Raises ValueError if it is none, or costs too much to decode."""
    counts = Counter(islice(parts(file), MAX_PARTS + 1))
    counts[b""] = sum(counts.values())
    for part, (name, limit) in {**JPEG_PARTS, **PNG_PARTS, b"": ("parts", MAX_PARTS)}.items():
        if counts[part] > limit:
            raise ValueError(f"too many {name}: {counts[part]}, expected at most {limit}")
    if file.startswith(b"\xff\xd8") and not counts[b"\xff\xda"]:  # Pillow reads on behind its end, and libjpeg fails.
        raise ValueError("broken image: no scan")
    try:
        image = Image.open(io.BytesIO(file), formats=FORMATS)
    except Exception as error:  # Pillow's decoders raise any exception on broken data.
        unknown = f"not an image: none of {', '.join(FORMATS)} in these {len(file)} bytes"
        raise ValueError(unknown if isinstance(error, UnidentifiedImageError) else f"broken image: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"too many pixels: {width} x {height}, expected at most {MAX_PIXELS:,} in all")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"too narrow: {width} x {height} pixels, expected at most {MAX_ASPECT_RATIO} to 1")
    if image.format == "BMP" and image.info["compression"] in (1, 2):  # run-length encoding: Pillow takes seconds
        raise ValueError("compressed BMP: expected a plain one")
    return image


def to_rgb(image: Image.Image, min_edge: int) -> Image.Image:
    """Decode an image; return it as RGB, upright as its EXIF says. Raises any exception if the data is broken.

    min_edge: if the short edge has at least twice as many pixels, a JPEG is decoded at 1/2, 1/4 or 1/8 of its size.
    """
    if min_edge and (factor := min(image.size) // min_edge) > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    if image.mode.startswith("I;16"):  # Pillow's own conversion cuts 16 bits off at 255 where it should scale them.
        image = image.point(lambda value: value / 256).convert("L")
    image.load()
    with suppress(Exception):  # Broken EXIF says nothing about the pixels.
        image.getexif()  # The image keeps it; with the original in `info`, Pillow would write all of it anew.
    image.info.clear()
    return ImageOps.exif_transpose(image).convert("RGB")
