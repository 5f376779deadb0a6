"""edge/client.py against servers that fail: what is tried again, what is not, and that every frame gets its result."""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import requests

from deploy.node import PROJECT, Node, free_ports, torchserve
from edge.cameras import Camera, Frame
from edge.client import TorchServe
from edge.retries import ServerError
from edge.stats import Result
from tests.conftest import archive, books, jpeg, json_lines, run, wait_until
from tests.fake_server import FakeServer

CAMERA = Camera("0")
MODEL = "efficientnet-lite0"


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def session(url: str, stop: threading.Event, **options: Any) -> TorchServe:
    """Return a session with the defaults of the tests."""
    defaults: dict[str, Any] = {
        "model": "resnet-18",
        "token_file": None,
        "management_url": None,
        "as_json": False,
        "max_in_flight": 4,
        "patience_s": 5.0,
    }
    return TorchServe(url, stop=stop, **(defaults | options))


def frames(pictures: list[bytes]) -> list[Frame]:
    return [Frame(CAMERA, number, time.monotonic(), picture) for number, picture in enumerate(pictures, start=1)]


def ask(server: TorchServe, *requests: list[Frame]) -> list[Result]:
    """Send requests; return the results of all their frames, by frame number."""
    results: list[Result] = []
    for request in requests:
        server.wait_for_room()
        server.ask(request, results.append)
    server.finish()
    return sorted(results, key=lambda result: result.frame.number)


PICTURES = [b"one", b"two", b"three", b"four", b"five"]


def assert_all_answered(results: list[Result]) -> None:
    """Every frame has the answer that is its own."""
    assert [result.frame.number for result in results] == list(range(1, len(results) + 1))
    for result in results:
        assert result.outcome == "answered", result.error
        assert result.predictions == {hashlib.sha256(result.frame.jpeg).hexdigest(): 1.0}
        assert result.latency_s is not None
        assert 0 < result.latency_s < 60


@pytest.mark.parametrize(
    "fake",
    [f"first {what}" for what in ("429", "500", "502", "503", "504", "half an answer", "stalls", "closes", "resets")],
    indirect=True,
)
@pytest.mark.parametrize("as_json", [False, True], ids=["single", "json"])
def test_passing_trouble_costs_nothing(
    fake: FakeServer, as_json: bool, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.SHORTEST_TIMEOUT_S", 1.0)
    monkeypatch.setattr("edge.client.ANSWER_TIMEOUT_S", -10)
    with session(fake.url, stop, as_json=as_json) as server:
        server.wait_until_ready(5.0)
        sent = frames(PICTURES)
        requests = [sent[:3], sent[3:]] if as_json else [[frame] for frame in sent]
        assert_all_answered(ask(server, *requests))
        assert not server.health.is_away(0.0)
    assert fake.frames_asked == 2 * len(requests)


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ("html", "the answer is not JSON"),
        ("garbage", "the answer is not JSON"),
        ("deep", "the answer is not JSON"),
        ("too few", "the answer does not fit"),
        ("not predictions", "the answer does not fit"),
        ("not a number", "the answer does not fit"),
        ("huge number", "the answer does not fit"),
        ("endless number", "the answer is not JSON"),
        ("odd charset", "the answer is not JSON"),
        ("redirect", "302 Found"),
    ],
    indirect=["fake"],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["single", "json"])
def test_wrong_answers_fail_at_once(fake: FakeServer, reason: str, as_json: bool, stop: threading.Event) -> None:
    with session(fake.url, stop, as_json=as_json) as server:
        server.wait_until_ready(5.0)
        results = ask(server, frames(PICTURES[:3]) if as_json else frames(PICTURES[:1]))
    assert {result.outcome for result in results} == {"failed"}
    assert all(result.error is not None and reason in result.error for result in results)
    assert fake.frames_asked == 1, "tried again in vain"


@pytest.mark.parametrize("fake", ["503", "closes"], indirect=True)
def test_lasting_trouble_ends_with_the_patience(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("edge.retries.NOTICE_AFTER_S", 0.5)
    with session(fake.url, stop) as server:
        server.wait_until_ready(1.5)
        begin = time.monotonic()
        results = ask(server, *[[frame] for frame in frames(PICTURES[:4])])
        assert 1.5 <= time.monotonic() - begin < 20
        assert server.health.is_away(1.5)
        reason = "503 try later" if fake.behaviour == "503" else "no answer: Remote end closed connection"
        assert [(result.outcome, result.error is not None and reason in result.error) for result in results] == [
            ("failed", True)
        ] * 4
        assert 4 * 3 <= fake.frames_asked <= 4 * 20, "back-off"
        fake.behaviour = "good"
        assert_all_answered(ask(server, frames([b"six"])))
        assert not server.health.is_away(0.0)
    lost, back = [record.message for record in caplog.records if record.name.startswith("edge")]
    assert lost.startswith(f"{fake.url} gives no answers (")
    assert back.startswith(f"{fake.url} answers again after ")


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_patience_outlasts_the_attempts_of_urllib3(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.MOST_ATTEMPTS", 2)
    with session(fake.url, stop) as server:
        server.wait_until_ready(60.0)
        threading.Timer(3.0, setattr, [fake, "behaviour", "good"]).start()
        assert_all_answered(ask(server, frames(PICTURES[:1])))
    assert fake.frames_asked > 3


def test_patience_for_a_server_that_is_not_there_yet(stop: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge.client.MOST_ATTEMPTS", 2)
    with session(f"http://127.0.0.1:{free_ports(1)[0]}", stop, patience_s=3.0) as server:
        begin = time.monotonic()
        with pytest.raises(ServerError, match=r"no server at .* \(.*Connection refused"):
            server.connect()
        assert 3.0 <= time.monotonic() - begin < 30


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_while_the_server_is_away_a_single_request_asks(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.retries.NOTICE_AFTER_S", 0.2)
    with session(fake.url, stop, max_in_flight=8) as server:
        server.wait_until_ready(0.5)
        ask(server, *[[frame] for frame in frames(PICTURES)])
        begin = time.monotonic()
        ask(server, *[[frame] for frame in frames(PICTURES)])
        assert time.monotonic() - begin >= 5 * 0.5
        fake.behaviour = "good"
        assert_all_answered(ask(server, *[[frame] for frame in frames(PICTURES)]))


@pytest.mark.parametrize("fake", ["half an answer"], indirect=True)
def test_half_answers_are_not_asked_for_again_after_stop(fake: FakeServer, stop: threading.Event) -> None:
    with session(fake.url, stop) as server:
        server.wait_until_ready(60.0)
        threading.Timer(1.2, stop.set).start()
        (result,) = ask(server, frames(PICTURES[:1]))
    assert result.outcome == "failed"
    assert 2 <= fake.frames_asked <= 5


def test_nobody_leaves_before_the_last_result_is_delivered(stop: threading.Event) -> None:
    """An answer that came in the last moment is still being delivered when the grace is over."""
    server = FakeServer("good")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    delivered: list[Result] = []

    def deliver_slowly(result: Result) -> None:
        time.sleep(1.0)
        delivered.append(result)

    with pytest.MonkeyPatch.context() as patch, session(server.url, stop) as client:
        patch.setattr("edge.client.GRACE_S", 0.1)
        client.wait_until_ready(5.0)
        client.ask(frames(PICTURES[:1]), deliver_slowly)
        wait_until(lambda: server.frames_asked == 1)
        time.sleep(0.3)
        stop.set()
        client.finish()
        assert [result.outcome for result in delivered] == ["answered"]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("fake", ["503"], indirect=True)
def test_stop_ends_the_retries(fake: FakeServer, stop: threading.Event) -> None:
    with session(fake.url, stop) as server:
        server.wait_until_ready(300.0)
        threading.Timer(0.5, stop.set).start()
        begin = time.monotonic()
        (result,) = ask(server, frames(PICTURES[:1]))
        assert result.outcome == "failed"
        assert time.monotonic() - begin < 20


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_silence_is_tried_again_and_given_up(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.SHORTEST_TIMEOUT_S", 0.5)
    monkeypatch.setattr("edge.client.ANSWER_TIMEOUT_S", -10)
    with session(fake.url, stop) as server:
        server.wait_until_ready(1.0)
        (result,) = ask(server, frames(PICTURES[:1]))
    assert result.outcome == "failed"
    assert "timed out" in str(result.error)
    assert fake.frames_asked >= 2


@pytest.mark.parametrize("fake", ["trickle"], indirect=True)
def test_answer_that_trickles_is_given_up(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.SHORTEST_TIMEOUT_S", 0.5)
    monkeypatch.setattr("edge.client.ANSWER_TIMEOUT_S", -10)
    results: list[Result] = []
    with session(fake.url, stop) as server:
        server.wait_until_ready(0.5)
        for frame in frames(PICTURES[:4]):
            server.ask([frame], results.append)
        server.finish()
        assert [result.error for result in results] == ["no whole answer in time"] * 4
        fake.behaviour = "good"  # Nobody gives the lost threads back, and yet it goes on.
        assert_all_answered(ask(server, *[[frame] for frame in frames(PICTURES)]))


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_what_is_on_its_way_gets_a_few_seconds(
    fake: FakeServer, stop: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge.client.GRACE_S", 0.5)
    with session(fake.url, stop) as server:
        server.wait_until_ready(5.0)
        threading.Timer(0.2, stop.set).start()
        begin = time.monotonic()
        results = ask(server, *[[frame] for frame in frames(PICTURES[:4])])
        assert time.monotonic() - begin < 10
    assert {result.error for result in results} == {"the run ended, and 0.5 s later there was no answer"}
    assert len(results) == 4


@pytest.mark.parametrize("fake", ["slow"], indirect=True)
def test_no_more_requests_in_flight_than_asked_for(fake: FakeServer, stop: threading.Event) -> None:
    with session(fake.url, stop, max_in_flight=2) as server:
        server.wait_until_ready(5.0)
        begin = time.monotonic()
        assert_all_answered(ask(server, *[[frame] for frame in frames(PICTURES)]))
        assert time.monotonic() - begin >= 3 * 0.5


@pytest.mark.parametrize("fake", ["at most 20000"], indirect=True)
def test_batch_over_the_limit_is_split(fake: FakeServer, stop: threading.Event) -> None:
    """The limit is not known before: the first refusal teaches it."""
    pictures = [bytes([number]) * 4000 for number in range(7)]  # 5,336 bytes in base64
    with session(fake.url, stop, as_json=True) as server:
        server._body_limit = 10**9
        server.wait_until_ready(5.0)
        assert_all_answered(ask(server, frames(pictures)))
    assert sorted(len(json.loads(body)) for body in fake.bodies[1:]) == [2, 2, 3, 4, 7]


@pytest.mark.parametrize("fake", ["at most 20000"], indirect=True)
@pytest.mark.parametrize("as_json", [False, True], ids=["single", "json"])
def test_single_frame_over_the_limit_fails_with_the_reason(
    fake: FakeServer, as_json: bool, stop: threading.Event
) -> None:
    with session(fake.url, stop, as_json=as_json) as server:
        server.wait_until_ready(5.0)
        good, bad = b"small", b"x" * 30_000
        requests = [frames([good, bad])] if as_json else [[frame] for frame in frames([good, bad])]
        results = ask(server, *requests)
    assert [result.outcome for result in results] == ["answered", "failed"]
    assert str(results[1].error).startswith("413 ")
    assert "--resize" in str(results[1].error)


def test_limit_of_torchserve_is_foreseen(node: Node, stop: threading.Event, clip: list[npt.NDArray[np.uint8]]) -> None:
    """80 frames of 85 KB are 9 MB of JSON: two requests, none of them refused."""
    picture = jpeg(clip[0])
    too_large = jpeg(np.random.default_rng(3).integers(0, 255, (3000, 4000, 3), np.uint8))
    assert len(too_large) > 6_553_500
    asked = node.log().count('"POST /predictions/')
    with session(
        node.url, stop, model=MODEL, as_json=True, token_file=node.folder / "key_file.json", patience_s=60.0
    ) as server:
        server.wait_until_ready(60.0)
        results = ask(server, frames([picture] * 80), [Frame(CAMERA, 81, time.monotonic(), too_large)])
    assert [result.outcome for result in results] == ["answered"] * 80 + ["failed"]
    assert str(results[-1].error).startswith("413 one frame is over the server's limit")
    wait_until(lambda: node.log().count('"POST /predictions/') - asked == 1 + 2)


def test_bad_frames_of_a_batch_do_not_hide_the_good_ones(
    node: Node, stop: threading.Event, clip: list[npt.NDArray[np.uint8]]
) -> None:
    """A frame that TorchServe cannot read fails alone. OpenCV sends none such, so the client is asked directly."""
    sent = frames([jpeg(clip[0]), b"no image", jpeg(clip[2])])
    key_file = node.folder / "key_file.json"
    with session(node.url, stop, model=MODEL, as_json=True, token_file=key_file, patience_s=60.0) as server:
        server.wait_until_ready(60.0)
        good, bad, other = ask(server, sent)
        assert [good.outcome, bad.outcome, other.outcome] == ["answered", "failed", "answered"]
        assert str(bad.error).startswith("not an image")
        assert good.shared_by == other.shared_by == 2
    with session(node.url, stop, model=MODEL, token_file=key_file, patience_s=60.0) as server:
        server.wait_until_ready(60.0)
        (alone,) = ask(server, [sent[1]])
        assert str(alone.error).startswith("400 not an image")


@pytest.mark.parametrize(
    ("fake", "reason"),
    [("html", "answer is not JSON"), ("503", "503 try later")],
    indirect=["fake"],
)
def test_server_that_is_no_torchserve_is_told_before_the_first_frame(
    fake: FakeServer, reason: str, stop: threading.Event
) -> None:
    fake.bodies.append(b"")  # The test picture is number 1, and not spared.
    with session(fake.url, stop, patience_s=0.5) as server, pytest.raises(ServerError, match=reason):
        server.wait_until_ready(0.5)


@pytest.fixture(scope="module")
def archive_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restarted")
    archive("--model", MODEL, cwd=folder)
    return folder


def long_clip(path: Path, clip: list[npt.NDArray[np.uint8]], frames: int) -> Path:
    """Write frames of the clip as a video of 25 fps, small ones."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, (320, 240))
    for number in range(frames):
        writer.write(cv2.resize(clip[number % len(clip)], (320, 240)))
    writer.release()
    return path


def test_tokens_that_live_three_seconds(archive_folder: Path, tmp_path: Path) -> None:
    """The sample clip takes 15 s, so some five tokens, each renewed with the API key."""
    config = (PROJECT / "config.properties").read_text() + "\ntoken_expiration_min=0.05\n"
    with torchserve(archive_folder, [MODEL], config) as node:
        first = node.token()
        done = run(
            "request.py", "--model", MODEL, "--url", node.url, "--management-url", node.management_url, "--quiet",
            "--jsonl", tmp_path / "out.jsonl", cwd=archive_folder,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert node.token() != first
        renewals = node.log().count('"GET /token?type=inference')
    lines = json_lines(tmp_path / "out.jsonl")
    assert len(lines) == 375
    assert {line["outcome"] for line in lines} == {"answered"}
    assert 3 <= renewals <= 15
    assert first not in done.stderr


def rotate(node: Node) -> None:
    """Have TorchServe write a new inference token into its key file."""
    headers = {"Authorization": f"Bearer {node.token('API')}"}
    url = f"{node.management_url}/token?type=inference"
    assert requests.get(url, headers=headers, timeout=10).status_code == 200


def test_refused_token_without_a_file_ends_a_file_s_run(archive_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    done: list[Any] = []
    with torchserve(archive_folder, [MODEL]) as node:

        def stream() -> None:
            command: list[str | Path] = ["--model", MODEL, "--url", node.url, "--quiet", "--jsonl", output]
            environment = {"TORCHSERVE_TOKEN": node.token()}
            done.append(run("request.py", *command, "--server-wait", "3", cwd=tmp_path, environment=environment))

        thread = threading.Thread(target=stream)
        thread.start()
        wait_until(lambda: output.exists() and len(output.read_text().splitlines()) > 50)
        rotate(node)
        thread.join(60)
    assert done[0].returncode == 4
    assert "gives no answers (400 Token Authorization failed" in done[0].stderr
    (book,) = books(done[0].stderr).values()
    assert 0 < int(book["failed"]) <= 32


def test_copy_of_a_key_file_is_renewed_once_and_told(archive_folder: Path, tmp_path: Path) -> None:
    """Each renewal would shut out all others who have the token."""
    with torchserve(archive_folder, [MODEL]) as node:
        key_file = tmp_path / "copy.json"
        key_file.write_text((node.folder / "key_file.json").read_text())
        rotate(node)
        before = node.log().count('"GET /token?type=inference')
        done = run(
            "request.py", "--model", MODEL, "--url", node.url, "--management-url", node.management_url,
            "--token-file", key_file, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 4
        assert f"TorchServe has a new token, but {key_file} does not: is it a copy?" in done.stderr
        assert node.log().count('"GET /token?type=inference') - before == 1
        assert json.loads(key_file.read_text())["API"]["key"] not in done.stderr


def test_file_loses_nothing_when_the_server_restarts(
    archive_folder: Path, tmp_path: Path, clip: list[npt.NDArray[np.uint8]]
) -> None:
    video = long_clip(tmp_path / "clip.mp4", clip, 500)
    ports = free_ports(6)
    output = tmp_path / "out.jsonl"
    done: list[Any] = []

    def stream(url: str) -> None:
        command: list[str | Path] = ["--model", MODEL, "--url", url, "--input", video, "--quiet", "--jsonl", output]
        done.append(run("request.py", *command, "--server-wait", "200", cwd=archive_folder, timeout_s=400))

    with torchserve(archive_folder, [MODEL], ports=ports) as node:
        thread = threading.Thread(target=stream, args=[node.url])
        thread.start()
        wait_until(lambda: output.exists() and len(output.read_text().splitlines()) > 50)
    time.sleep(3)  # a while without a server, so that it is told
    with torchserve(archive_folder, [MODEL], ports=ports):
        thread.join(300)
        assert not thread.is_alive()
    lines = json_lines(output)
    assert len(lines) == 500
    assert [line for line in lines if line["outcome"] != "answered"] == []
    assert done[0].returncode == 0, done[0].stderr
    assert f"{node.url} gives no answers (" in done[0].stderr
    assert f"{node.url} answers again after " in done[0].stderr


def test_file_waits_for_a_dead_server_only_so_long(archive_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    done: list[Any] = []

    def stream(url: str) -> None:
        command: list[str | Path] = ["--model", MODEL, "--url", url, "--quiet", "--jsonl", output, "--server-wait", "4"]
        done.append(run("request.py", *command, cwd=archive_folder))

    with torchserve(archive_folder, [MODEL]) as node:
        thread = threading.Thread(target=stream, args=[node.url])
        thread.start()
        wait_until(lambda: output.exists() and len(output.read_text().splitlines()) > 50)
    thread.join(100)
    assert done[0].returncode == 4
    last = done[0].stderr.splitlines()[-1]
    assert last.startswith(f"request.py: {node.url} gave no answer for 4 s (")
    (book,) = books(done[0].stderr).values()
    lines = json_lines(output)
    assert len(lines) == int(book["captured"])
    assert int(book["failed"]) > 0
    assert {line["error"] for line in lines if line["outcome"] == "dropped"} <= {"the run ended"}
