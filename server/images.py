"""Decodes the images that clients send. They are not trusted: what one image may cost is bounded."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

# The formats that are decoded. Pillow knows more, one of which starts a program (EPS), and no camera sends them.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
# Of an image, as many as 8K video has. A small file can state a lot.
MAX_PIXELS = 7680 * 4320
# Long edge to short edge. An image of 1 x 65,000 is small until it is resized.
MAX_ASPECT_RATIO = 32
# How often a file may contain what is slow to decode, by the bytes the file begins with. Each scan of a JPEG goes over
# the whole image (a progressive one has about 10), its EXIF blocks are joined one by one, and the texts and profiles of
# a PNG can grow a thousandfold.
MAX_PARTS = {
    b"\xff\xd8": {"scans": (b"\xff\xda", 32), "EXIF blocks": (b"Exif\0\0", 32)},
    b"\x89PNG": {"texts": (b"iTXt", 4), "compressed texts": (b"zTXt", 4), "colour profiles": (b"iCCP", 4)},
}
# Of Pillow. The C library keeps blocks of its default size, 16 MB: after large images a worker is 0.5 GB larger.
PILLOW_BLOCK_BYTES = 64 * 2**20


def decode_body(body: Any) -> bytes | bytearray:
    """Return the file of an image that was sent as it is, or as base64 text. Raises ValueError if it is neither."""
    if isinstance(body, (bytes, bytearray)):
        return body
    try:
        return base64.b64decode(body, validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a base64 string: {error}") from error


def open_image(file: bytes | bytearray) -> Image.Image:
    """Return the image in a file. Its pixels are not decoded yet.

    Raises ValueError if the data is not an image, or is too large, too narrow or too slow to decode.
    """
    for start, parts in MAX_PARTS.items():
        for name, (part, limit) in parts.items():
            if file.startswith(start) and (count := file.count(part)) > limit:
                raise ValueError(f"too many {name}: {count}, expected at most {limit}")
    try:
        image = Image.open(io.BytesIO(file), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(f"not an image: none of {', '.join(FORMATS)} in these {len(file)} bytes") from error
    except Exception as error:  # Pillow's decoders raise any exception on broken data.
        raise ValueError(f"broken image: {error}") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"too many pixels: {width} x {height}, expected at most {MAX_PIXELS:,} in all")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"too narrow: {width} x {height} pixels, expected at most {MAX_ASPECT_RATIO} to 1")
    if image.format == "BMP" and image.info["compression"]:
        raise ValueError("compressed BMP: expected a plain one")  # Pillow takes seconds for it.
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image of any mode; return it as RGB, upright as its EXIF orientation says.

    Raises any exception of Pillow's decoders if the data is broken.
    """
    if image.mode.startswith("I;16"):
        # Pillow's own conversion cuts 16 bits off at 255 where it should scale them.
        image = image.point(lambda value: value / 256).convert("L")
    return ImageOps.exif_transpose(image).convert("RGB")
