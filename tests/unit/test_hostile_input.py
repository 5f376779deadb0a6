"""handler.py against broken and hostile bodies: each costs only its sender, and gets the reason in one line."""

import pytest
from PIL import Image

from server.images import JPEG_PARTS
from tests.support.frames import Pixels, as_json, encoded, jpeg
from tests.support.fuzz_handler import Subject, near
from tests.support.hostile import BAD_JSON, as_torchserve_parses, bad_frames, excesses, many_scans
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


def test_jpeg_of_as_many_scans_as_it_may_have_is_a_frame(model: Model) -> None:
    _, most = JPEG_PARTS[b"\xff\xda"]
    image = many_scans(500, 0)
    scans = image.count(b"\xff\xda")
    assert 3 < scans < most / 2
    model.answers([many_scans(500, most - scans), many_scans(500, most - scans + 1)])
    assert model.statuses() == [200, 400]
