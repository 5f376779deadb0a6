"""Draws the predictions of models on a frame: labels, boxes and skeletons."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from edge.frames import Frame, Result

MAX_LABELS = 3  # of a single model; several models have one line each
MAX_AGE_S = 1.0  # An older prediction is drawn with its age.
MAX_SHORT_EDGE, JPEG_QUALITY = 720, 80  # of an image for the web page
MAX_PIXELS = 30_000  # OpenCV draws up to here: a prediction may be anywhere.
WHITE, BLACK, GREEN, YELLOW, RED = (255, 255, 255), (0, 0, 0), (0, 220, 0), (0, 230, 255), (0, 0, 255)

SIDES = ("left", "right")
JOINTS = ("shoulder hip", "shoulder elbow", "elbow wrist", "hip knee", "knee ankle", "eye ear")
SKELETON = [("left_shoulder", "right_shoulder"), ("left_hip", "right_hip")]
SKELETON += [("nose", f"{side}_eye") for side in SIDES]
SKELETON += [(f"{side}_{joint}", f"{side}_{other}") for side in SIDES for joint, other in map(str.split, JOINTS)]


def annotate(frame: Frame, latest: Mapping[str, Result]) -> Any:
    """Return the image of a frame, with the latest result of each model drawn on it: (height, width, 3) uint8 BGR.

    A result may be that of an earlier frame. The frame must have its JPEG.
    """
    image: Any = cv2.imdecode(np.frombuffer(frame.jpeg, np.uint8), cv2.IMREAD_COLOR)
    lines: list[str] = []
    for model, result in latest.items():
        # A file that is repeated begins anew: then only the time of reading has gone on.
        age_s = max(frame.time_s - result.frame.time_s, frame.captured_at - result.frame.captured_at)
        age = f" ({age_s:.1f} s ago)" if age_s > MAX_AGE_S else ""
        labels = [f"{label}{age}" for label in labels_of(result)]
        lines += [f"{model}: {labels[0]}"] if len(latest) > 1 else labels
        if isinstance(result.predictions, list):
            draw_persons(image, result.predictions)
    draw_lines(image, lines)
    return image


def draw_jpeg(frame: Frame, latest: Mapping[str, Result]) -> bytes:
    """Return the annotated image as a JPEG, with a short edge of at most MAX_SHORT_EDGE pixels."""
    image = annotate(frame, latest)
    scale = MAX_SHORT_EDGE / min(image.shape[:2])
    if scale < 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def labels_of(result: Result) -> list[str]:
    """Return the most probable labels of a result, the number of persons, or the error."""
    if result.predictions is None:
        return [f"{result.outcome}: {result.error}"]
    if isinstance(result.predictions, list):
        count = len(result.predictions)
        return [f"{count} person{'' if count == 1 else 's'}"]
    best = sorted(result.predictions.items(), key=lambda item: item[1], reverse=True)[:MAX_LABELS]
    return [f"{label} {probability:.2f}" for label, probability in best]


def draw_lines(image: Any, lines: Sequence[str]) -> None:
    """Draw lines of text into the upper left corner, white on black; a line that is too long gets a smaller font."""
    scale = min(image.shape[:2]) / 480
    for number, line in enumerate(lines):
        line = line.encode(errors="replace").decode()  # OpenCV crashes on half a surrogate pair.
        left, top, gap = round(8 * scale), round((8 + 32 * number) * scale), round(4 * scale)
        (width, _), _ = cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, 0.8 * scale, 1)
        font_scale = 0.8 * scale * min(1.0, (image.shape[1] - 2 * left - 2 * gap) / max(width, 1))
        (width, height), below = cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, font_scale, 1)
        corner = (left + width + 2 * gap, top + height + below + 2 * gap)
        cv2.rectangle(image, (left, top), corner, BLACK, cv2.FILLED)
        origin = (left + gap, top + gap + height)
        cv2.putText(image, line, origin, cv2.FONT_HERSHEY_SIMPLEX, font_scale, WHITE, 1, cv2.LINE_AA)


def draw_persons(image: Any, persons: Sequence[Mapping[str, Any]]) -> None:
    """Draw the box, the score and the skeleton of each person."""
    scale = min(image.shape[:2]) / 480
    thick = max(1, round(2 * scale))
    for person in persons:
        left, top, right, bottom = map(pixel, person["box"])
        cv2.rectangle(image, (left, top), (right, bottom), GREEN, thick)
        origin = (left + thick, bottom - 2 * thick)
        text = f"{person['score']:.2f}"
        cv2.putText(image, text, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.6 * scale, GREEN, 1, cv2.LINE_AA)
        # The score of a keypoint is not a probability. Below 0 the keypoint is hidden, or a guess.
        points = {name: (pixel(x), pixel(y)) for name, (x, y, score) in person["keypoints"].items() if score > 0}
        for name, other in SKELETON:
            if name in points and other in points:
                cv2.line(image, points[name], points[other], YELLOW, thick, cv2.LINE_AA)
        for point in points.values():
            cv2.circle(image, point, 2 * thick, RED, cv2.FILLED, cv2.LINE_AA)


def pixel(value: float) -> int:
    return round(min(max(value, -MAX_PIXELS), MAX_PIXELS))
