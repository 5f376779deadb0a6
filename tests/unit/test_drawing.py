"""edge/drawing.py: what is drawn for the web page. tests/unit/test_video.py has the annotated video."""

import cv2
import numpy as np
import pytest

from edge import drawing
from edge.cameras import Camera
from edge.drawing import annotate, draw_jpeg
from edge.frames import Frame, Result
from tests.support.frames import decoded, jpeg
from tests.support.results import CAT, MODEL


@pytest.mark.parametrize(("size", "expected"), [((480, 640), (480, 640)), ((1080, 1920), (720, 1280))])
def test_image_is_the_annotated_frame_at_most_720_pixels_high(size: tuple[int, int], expected: tuple[int, int]) -> None:
    image = np.full((*size, 3), (40, 120, 200), np.uint8)
    frame = Frame(Camera("0"), 1, 0.0, jpeg(image))
    latest = {MODEL: Result(frame, "answered", CAT)}
    found = decoded(draw_jpeg(frame, latest))
    assert found.shape[:2] == expected
    annotated = cv2.resize(annotate(frame, latest), expected[::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(found.astype(int) - annotated).mean() < 3
    assert found[:50, :50].min() < 20  # the label


@pytest.mark.parametrize("label", ["c\ud800t", "\x00", "<b>", "a\nb", "\u202e", "", "x" * 10_000])
def test_label_of_any_text_is_drawn(label: str) -> None:
    frame = Frame(Camera("0"), 1, 0.0, jpeg(np.full((48, 64, 3), 128, np.uint8)))
    assert draw_jpeg(frame, {MODEL: Result(frame, "answered", {label: 1.0})})[:2] == b"\xff\xd8"


def test_age_of_a_prediction_does_not_end_where_a_file_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(drawing, "draw_lines", lambda _, texts: lines.extend(texts))
    image = jpeg(np.zeros((48, 64, 3), np.uint8))
    before = Frame(Camera("clip.mp4"), 100, 50.0, image, position_s=14.0)
    for position_s in (15.5, 0.5):
        frame = Frame(before.camera, 140, 55.0, image, position_s)
        annotate(frame, {MODEL: Result(before, "answered", {"cat": 1.0})})
    assert lines == ["cat 1.00 (5.0 s ago)", "cat 1.00 (5.0 s ago)"]
