"""handler.py against broken and hostile bodies: each costs only its sender, and gets the reason in one line."""

import base64
import json
import random
import struct
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from server.images import JPEG_PARTS, MAX_PIXELS
from tests.support.archives import unpacked_archive
from tests.support.frames import Pixels, as_json, encoded, jpeg
from tests.support.fuzz_handler import Subject, near
from tests.support.hostile import (
    BAD_JSON,
    CAT,
    as_torchserve_parses,
    bad_frames,
    blank_png,
    excesses,
    many_chunks,
    many_scans,
)
from tests.support.in_process import JSON, Model
from tests.support.nodes import BATCH_HEADER


def test_broken_frame_costs_only_itself(subject: Subject) -> None:
    for name, (file, reason) in bad_frames().items():
        assert reason in subject.try_body(bytearray(file)), name
        assert subject.statuses[1] == 400, name


def test_broken_json_costs_only_itself(subject: Subject) -> None:
    for name, (text, reason) in BAD_JSON.items():
        assert reason in subject.try_body(as_torchserve_parses(text), JSON), name
        assert subject.statuses[1] == 400, name


def test_request_that_asks_for_too_much_costs_only_itself(subject: Subject) -> None:
    for name, (text, reason) in excesses().items():
        assert reason in subject.try_body(as_torchserve_parses(text)), name
        assert subject.statuses[1] == 413, name


def test_bad_frames_of_a_json_batch_cost_only_themselves(model: Model, clip: list[Pixels]) -> None:
    good = [jpeg(clip[0]), jpeg(clip[100])]
    batch = as_json(good[0], *(frame for frame, _ in bad_frames().values()), good[1])
    batch |= {"not base64": "%%%", "number": 5, "null": None, "list": ["QQ=="], "non-ascii": "ß"}
    [answers] = model.answers([batch])
    assert model.statuses() == [200]
    assert len(answers) == len(batch)
    assert model.context.get_response_headers(0)[BATCH_HEADER] == "2"
    [alone] = model.answers([as_json(*good)])
    position_of_last_good = 1 + len(bad_frames())
    assert [answers[0], answers[position_of_last_good]] == [pytest.approx(answer, abs=1e-5) for answer in alone]
    for answer, (_, reason) in zip(answers[1:], bad_frames().values(), strict=False):
        assert reason in answer["error"]
    assert all(answer["error"].startswith("not a base64 string") for answer in answers[-5:])


def test_as_many_frames_as_a_request_may_hold(subject: Subject, clip: list[Pixels]) -> None:
    model, task = subject.model, subject.model.handler.task
    count = task.max_frames
    images = [encoded(Image.fromarray(frame).resize((64, 48)), "JPEG") for frame in clip[: count + 1]]
    [answers] = model.answers([as_json(*images[:-1])])
    assert model.statuses() == [200]
    assert len(answers) == count
    for start in (0, count // 2, count - task.clip_frames):
        [alone] = model.answers([as_json(*images[start : start + task.clip_frames])])
        assert answers[start] == near(alone[0])
    assert answers[0] != near(answers[-1])
    model.answers([as_json(*images)])
    assert model.statuses() == [413]


@pytest.mark.parametrize(
    ("flags", "frames", "pixels"),
    [("", 256, 132_710_400), ("--max-frames 8", 8, 8 * 1920 * 1080), ("--max-frames 1", 1, 3840 * 2160)],
)
def test_limits_of_a_request_are_in_the_archive(tmp_path: Path, flags: str, frames: int, pixels: int) -> None:
    model = Model(unpacked_archive(tmp_path, *flags.split(), is_tiny=True))
    image = encoded(CAT.resize((8, 8)), "JPEG")
    half = blank_png(3600, min(pixels, MAX_PIXELS) // 2 // 3600)
    answers = model.answers([as_json(*[image] * frames), as_json(*[image] * (frames + 1)), half])
    assert model.statuses() == [200, 413, 200]
    assert answers[1] == f'{{"error": "too many frames: {frames + 1}, expected at most {frames} in a request"}}'
    headers = model.context.get_response_headers(1)
    assert (headers["X-Model-Max-Frames"], headers["X-Model-Max-Pixels"]) == (str(frames), str(pixels))
    if frames == 8:
        answers = model.answers([as_json(half, half), as_json(half, half, image, image), blank_png(7680, 2160)])
        assert model.statuses() == [200, 413, 200]
        assert answers[1] == f'{{"error": "too many pixels in a request: expected at most {pixels:,}"}}'


def behind(image: bytes) -> dict[str, bytes]:
    """Return images with bytes behind their end, as phones and other programs append them."""
    noise = random.Random(18).randbytes(3_000_000)
    assert noise.count(b"\xff\xda") > 32, "it looks like scans"
    return {
        "noise": image + noise,
        "scans": image + b"\xff\xda" * 100,
        "EXIF blocks": image + b"\xff\xe1\0\x08Exif\0\0" * 1000,
        "chunks": image + many_chunks(b"iTXt", 5) + many_chunks(b"iCCP", 5),
        "images": image * 40,
    }


@pytest.mark.parametrize("kind", ["JPEG", "progressive JPEG", "PNG", "BMP", "GIF", "WEBP", "JPEG with a thumbnail"])
def test_bytes_behind_an_image_do_not_count(model: Model, kind: str) -> None:
    options: dict[str, Any] = {"progressive": True} if "progressive" in kind else {}
    name = "JPEG" if "JPEG" in kind else kind
    small = encoded(CAT.resize((64, 48)), "JPEG")
    comment = b"\xff\xfe" + struct.pack(">H", len(small) + 2) + small  # with an end of its own
    image = encoded(CAT, name, **options)
    image = image[:2] + comment + image[2:] if "thumbnail" in kind else image
    [expected] = model.answers([image])
    assert model.statuses() == [200]
    for what, longer in behind(image).items():
        [answer] = model.answers([longer])
        assert (model.statuses(), answer) == ([200], pytest.approx(expected, abs=1e-6)), what


@pytest.mark.parametrize(
    "broken",
    [
        {0x128: (1, b"\2")},
        {0x11A: (2, b"72\0\0")},
        {0x213: (1, b"\1")},
        {0x10F: (5, b"\0\0\0\0")},
        dict.fromkeys(range(20000, 25000), (7, b"\x00\x00\x00\x00")),
        "Exif\0\0 is no TIFF file",
        "x",
    ],
    ids=["unit", "resolution", "position", "maker", "many", "no TIFF", "short"],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_says_nothing_about_the_pixels(model: Model, kind: str, broken: dict[int, Any] | str) -> None:
    """The image is upright as far as the orientation can be read."""
    upright = CAT.resize((96, 64))
    exif = broken.encode() if isinstance(broken, str) else tiff({0x112: (3, b"\6\0\0\0")} | broken)
    image = upright if isinstance(broken, str) else upright.transpose(Image.Transpose.ROTATE_90)
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    expected, found = model.answers([encoded(upright, kind, **options), encoded(image, kind, exif=exif, **options)])
    assert model.statuses() == [200, 200]
    assert found == pytest.approx(expected, abs=0.01 if kind == "JPEG" else 1e-5)


def tiff(tags: dict[int, tuple[int, bytes]]) -> bytes:
    """Return EXIF with these tags: their type, and four bytes of their value."""
    rows = b"".join(
        struct.pack("<HHI4s", tag, kind, 1, value.ljust(4, b"\0")) for tag, (kind, value) in sorted(tags.items())
    )
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(tags)) + rows + bytes(4)


def test_a_bitmap_of_opencv_with_four_channels_is_a_frame(model: Model) -> None:
    pixels = np.asarray(CAT.resize((224, 224)))
    four = np.dstack([pixels[..., ::-1], np.full(pixels.shape[:2], 255, np.uint8)])
    bitmap = cv2.imencode(".bmp", four)[1].tobytes()
    assert bitmap[30] == 3, "its colours have bit fields"
    plain, found = model.answers([encoded(Image.fromarray(pixels), "BMP"), bitmap])
    assert model.statuses() == [200, 200]
    assert found == pytest.approx(plain, abs=1e-6)


def test_base64_as_other_programs_write_it(model: Model) -> None:
    image = encoded(CAT, "JPEG")
    image += bytes(3 - len(image) % 3 + 1)  # so that its base64 has padding
    text = base64.b64encode(image).decode()
    assert text.endswith("==")
    assert {"+", "/"} <= set(text)
    mime = base64.encodebytes(image).decode()
    texts = [text, mime, mime.replace("\n", "\r\n"), f"data:image/jpeg;base64,{text}", f" DATA:;base64,{mime}"]
    texts += [base64.urlsafe_b64encode(image).decode(), text.rstrip("="), base64.urlsafe_b64encode(image).decode()[:-2]]
    [answers] = model.answers([dict(enumerate(texts))])
    assert answers == [pytest.approx(answers[0], abs=1e-6)] * len(texts)
    assert len(answers[0]) == 5
    for wrong in (f"{text[:50]}*{text[50:]}", f"{text[:50]} {text[50:]}", f"data {text}", f"file:,{text}", f"ß{text}"):
        [rejected] = model.answers([{"0": wrong}])
        assert "not a base64 string: " in json.loads(rejected)["error"]


def test_jpeg_of_as_many_scans_as_it_may_have_is_a_frame(model: Model) -> None:
    _, most = JPEG_PARTS[b"\xff\xda"]
    image = many_scans(500, 0)
    scans = image.count(b"\xff\xda")
    assert 3 < scans < most / 2
    model.answers([many_scans(500, most - scans), many_scans(500, most - scans + 1)])
    assert model.statuses() == [200, 400]
