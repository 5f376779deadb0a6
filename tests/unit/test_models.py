"""What request.py does with what a server states of its models, and with the predictions of each task."""

import json
from typing import Any

import numpy as np
import pytest
import requests
from prometheus_client import CollectorRegistry, generate_latest

import create_mar_file
from edge.drawing import GREEN, MAX_AGE_S, RED, SKELETON, YELLOW, annotate
from edge.frames import Frame, Prediction, Result, Stream
from edge.metrics import StatsCollector
from edge.options import parse_args
from edge.outputs import Terminal, as_text
from edge.payload import fitting, pixels
from edge.responses import MAX_REQUEST_PIXELS, POSE_ESTIMATION, ModelInfo, parse_response
from edge.stats import CameraStats, summary
from tests.support.frames import jpeg
from tests.support.results import CAT, FILE, LIVE, result

NAMES = sorted({each for pair in SKELETON for each in pair})
POINTS = {name: [60.0 + 30 * number, 200.0 + 40 * (number % 3), 3.0] for number, name in enumerate(NAMES)}
PERSON: dict[str, Any] = {"score": 0.93, "box": [100.0, 150.5, 300.0, 400.0], "keypoints": POINTS}


def response(body: Any, **headers: str) -> requests.Response:
    made = requests.Response()
    made.status_code = 200
    made._content = json.dumps(body).encode()
    made.headers.update({f"X-Model-{name.replace('_', '-')}": value for name, value in headers.items()})
    return made


def test_a_server_states_what_its_model_needs() -> None:
    made = response(
        {},
        Task="activity-recognition",
        Runtime="openvino bf16",
        Batch_Size="1",
        Max_Frames="200",
        Max_Pixels="33177600",
        Clip_Frames="16",
        Frame_Rate="15.0",
    )
    info = ModelInfo.of(made)
    assert info == ModelInfo("activity-recognition", "openvino bf16", 1, 200, 33_177_600, 16, 15.0)
    assert info.interval_s == pytest.approx(1 / 15)
    assert ModelInfo.of(response({})) == ModelInfo()
    assert ModelInfo().interval_s == 0.0
    assert ModelInfo.of(response({}, Runtime="int8\x1b[2J")).runtime == ""


@pytest.mark.parametrize("value", ["", "-1", "1e9", "99999", "nan", "inf", "0", "sixteen", "1;2"])
def test_what_no_model_can_need_is_ignored(value: str) -> None:
    """A server can't have this device collect clips without a limit, or none at all."""
    headers = dict.fromkeys(("Batch_Size", "Max_Frames", "Max_Pixels", "Clip_Frames", "Frame_Rate"), value)
    info = ModelInfo.of(response({}, **headers))
    assert (info.clip_frames, info.frame_rate) == (1, 0.0)
    assert 1 <= info.batch_size <= 256
    assert 1 <= info.max_frames <= 256
    assert 3840 * 2160 <= info.max_pixels <= MAX_REQUEST_PIXELS
    assert ModelInfo.of(response({}, Clip_Frames=value, Frame_Rate="15")).clip_frames == 1
    assert ModelInfo.of(response({}, Clip_Frames="5000", Frame_Rate="15")).clip_frames == 256


@pytest.mark.parametrize("persons", [[], [PERSON], [PERSON, PERSON | {"score": 0.8}]])
def test_persons_are_a_prediction_of_pose_estimation(persons: list[dict[str, Any]]) -> None:
    frame = Frame(FILE, 1, 0.0, b"jpeg")
    (single,) = parse_response(response(persons), [frame], False, POSE_ESTIMATION)
    first, second = parse_response(response([persons, []]), [frame, frame], True, POSE_ESTIMATION)
    assert (single.outcome, single.predictions) == (first.outcome, first.predictions) == ("answered", persons)
    assert (second.outcome, second.predictions) == ("answered", [])


@pytest.mark.parametrize(
    "value",
    [
        {"cat": 0.5},
        [{"cat": 0.5}],
        [PERSON | {"box": [1, 2, 3]}],
        [PERSON | {"box": [1, 2, 3, 1e999]}],
        [PERSON | {"score": None}],
        [PERSON | {"keypoints": [[1, 2, 3]]}],
        [PERSON | {"keypoints": {"nose": [1, 2]}}],
        [PERSON | {"keypoints": {"nose": [1, "2", 3]}}],
        [PERSON, None],
        "nobody",
        None,
    ],
)
def test_what_are_no_persons_fails(value: Any) -> None:
    (found,) = parse_response(response([value]), [Frame(FILE, 1, 0.0, b"jpeg")], True, POSE_ESTIMATION)
    assert (found.outcome, found.error) == ("failed", "unexpected response: expected a list of persons")


def test_a_person_is_printed_on_one_line() -> None:
    text = as_text([[PERSON, PERSON], []])
    assert json.loads(text) == [[PERSON, PERSON], []]
    assert len(text.splitlines()) == 7
    assert json.loads(as_text([PERSON])) == [PERSON]
    values: list[Any] = [CAT, [CAT, CAT], [], [[]]]
    for value in values:
        assert as_text(value) == json.dumps(value, indent=2)


def test_terminal_names_camera_and_model_where_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--batch-size", "1", "--log-every", "1", "--model", "a", "--model", "b"]
    for more, names in (([], "a"), (["--input", "0", "--input", "1"], f"{FILE.name}, a")):
        terminal = Terminal(parse_args([*flags, *more]))
        terminal.write(result(1, model="a"))
        assert capsys.readouterr().out.startswith(f"{names}\nWith Batch Size 1, FPS at frame number 1 is ")


def test_summary_and_metrics_have_a_row_for_each_camera_and_model() -> None:
    stats = {Stream(camera, model): CameraStats() for camera in (FILE, LIVE) for model in ("a", "b")}
    for number, counts in enumerate(stats.values(), start=1):
        counts.captured = number
        counts.record(Result.failed(Frame(FILE, 1, 0.0, b""), f"cause {number}"))
    lines = summary(stats).splitlines()
    assert [line.split()[1:4] for line in lines[1:5]] == [
        ["a", "1", "0"],
        ["b", "2", "0"],
        ["a", "3", "0"],
        ["b", "4", "0"],
    ]
    assert lines[5] == f"{FILE.name}, a: 1 failed: cause 1"
    registry = CollectorRegistry()
    registry.register(StatsCollector(stats))
    page = generate_latest(registry).decode()
    for stream, counts in stats.items():
        labels = f'camera="{stream.camera.name}",model="{stream.model}"'
        assert f"camera_frames_captured_total{{{labels}}} {float(counts.captured)}" in page
        assert f'camera_frames_total{{{labels},outcome="failed"}} 1.0' in page


def drawn(latest: dict[str, tuple[Prediction, float]], shade: int = 128) -> Any:
    """Return a grey frame of 480 x 640 that was captured at 100.0 s, with predictions and the times of their frames."""
    frame = Frame(FILE, 9, 100.0, jpeg(np.full((480, 640, 3), shade, np.uint8)))
    results = {
        model: Result(Frame(FILE, 1, at, b""), "answered", predictions) for model, (predictions, at) in latest.items()
    }
    return annotate(frame, results)


def count(image: Any, colour: tuple[int, int, int]) -> int:
    return int((np.abs(image.astype(int) - colour).max(axis=2) < 40).sum())


def test_persons_are_drawn_with_box_and_skeleton() -> None:
    image = drawn({"pose": ([PERSON], 100.0)})
    assert np.abs(image[275, 100].astype(int) - GREEN).max() < 40, "the left edge of the box"
    assert np.abs(image[400, 200].astype(int) - GREEN).max() < 40, "the lower edge"
    for x, y, _ in POINTS.values():
        assert np.abs(image[round(y), round(x)].astype(int) - RED).max() < 40
    assert count(image, YELLOW) > 300
    assert count(drawn({"pose": ([], 100.0)}), GREEN) == 0


def test_a_hidden_keypoint_is_not_drawn() -> None:
    hidden = PERSON | {"keypoints": {name: [x, y, -1.0] for name, (x, y, _) in POINTS.items()}}
    image = drawn({"pose": ([hidden], 100.0)})
    assert count(image, RED) == count(image, YELLOW) == 0


@pytest.mark.parametrize("far", [1e300, -1e300, 1e6])
def test_a_prediction_outside_the_frame_does_no_harm(far: float) -> None:
    drawn({"pose": ([PERSON | {"box": [far] * 4, "keypoints": {name: [far, -far, 1.0] for name in POINTS}}], 100.0)})


def test_several_models_are_drawn_together_and_old_predictions_with_their_age() -> None:
    """The age makes the line of a model longer."""
    young, old = 100.0 - 0.9 * MAX_AGE_S, 100.0 - 3.0
    widths = []
    for at in (100.0, young, old):
        image = drawn({"a": (CAT, 100.0), "b": (CAT, at), "pose": ([PERSON], old)})
        assert count(image, YELLOW) > 300
        rows = [image[20 + 32 * line : 30 + 32 * line] for line in range(4)]
        dark = [int((row.max(axis=2) < 40).any(axis=0).sum()) for row in rows]
        assert dark[0] > 50, "a line for each model"
        assert dark[2] > 50
        assert dark[3] == 0, "and no more"
        widths.append(dark[1])
    assert widths[0] == widths[1] < widths[2] - 50


def test_a_long_line_fits_into_the_frame() -> None:
    """The space right of it is grey."""
    frame = Frame(FILE, 1, 0.0, jpeg(np.full((240, 200, 3), 128, np.uint8)))
    results = {"model": Result(frame, "answered", {"a_label_that_is_longer_than_the_frame_is_wide " * 2: 0.5})}
    image = annotate(frame, results)
    assert (image[:30] < 60).any()
    assert np.abs(image[:, -2:].astype(int) - 128).max() < 10


@pytest.mark.parametrize(("height", "width", "divided_by"), [(2160, 3840, 1), (3000, 4000, 2), (1080, 1920, 1)])
def test_a_clip_of_dark_frames_fits_into_the_pixels_of_a_request(height: int, width: int, divided_by: int) -> None:
    """The server limits pixels too, and a dark frame has few bytes."""
    clip = [jpeg(np.zeros((height, width, 3), np.uint8))] * 16
    assert pixels(clip[0]) == height * width
    (first, *_) = fitted = fitting(clip, MAX_REQUEST_PIXELS)
    assert len(fitted) == 16
    assert 16 * pixels(first) <= MAX_REQUEST_PIXELS == create_mar_file.MAX_REQUEST_PIXELS
    assert pixels(first) == pytest.approx(height * width / divided_by**2, rel=0.01)
