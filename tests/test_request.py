"""request.py as a user runs it: every frame once and in order, and one clear line for all that goes wrong."""

import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

import request as request_py
from deploy.node import PROJECT, Node, free_ports, torchserve
from edge.cameras import Frame
from edge.client import Failure, TorchServe, read_answers
from tests.conftest import CATS, archive, frames_of, jpeg, outputs, post, run
from tests.fake_server import FakeServer
from tests.test_cameras import Capture

MODEL = ["--model", "efficientnet-lite0"]


@pytest.fixture(scope="session")
def batch_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A TorchServe with an archive for client batching."""
    folder = tmp_path_factory.mktemp("batch_node")
    archive(*MODEL, "--client-batching", cwd=folder)
    with torchserve(folder, ["efficientnet-lite0"]) as running:
        yield running


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory: pytest.TempPathFactory, clip: list[npt.NDArray[np.uint8]]) -> Path:
    """22 frames at 100 fps: not a multiple of the batch size, and over soon."""
    path = tmp_path_factory.mktemp("clip") / "short clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 100, (640, 480))
    for frame in clip[: 22 * 15 : 15]:
        writer.write(frame)
    writer.release()
    return path


def predictions_asked(node: Node) -> int:
    """Return how many requests for predictions a node has answered."""
    return node.log().count('"POST /predictions/')


def test_torchserve_batches_the_sample_clip(node: Node) -> None:
    asked = predictions_asked(node)
    done = run("request.py", *MODEL, "--url", node.url, cwd=node.folder)
    assert done.returncode == 0, done.stderr
    assert predictions_asked(node) - asked == 375
    found = outputs(done.stdout)
    assert [output.number for output in found] == [*range(20, 361, 20), 375]
    for output in found:
        assert output.batch_size == 4
        assert len(output.answers) == 4
        assert all(next(iter(answer)) in CATS for answer in output.answers)
    # 375 frames at 25 a second: the first at once, the last after 14.96 s.
    summary = done.stderr.splitlines()
    assert len(summary) == 1
    assert summary[0].startswith("frames: 375 answered, 0 failed, in 1")
    assert 10 < float(summary[0].split()[-2]) <= 375 / 14.96
    assert all(0 < output.fps < 375 / 10 for output in found)


def test_client_batches_the_sample_clip(batch_node: Node) -> None:
    assert batch_node.describe("efficientnet-lite0")["batchSize"] == 1
    asked = predictions_asked(batch_node)
    done = run("request.py", *MODEL, "--url", batch_node.url, "--client-batching", cwd=batch_node.folder)
    assert done.returncode == 0, done.stderr
    assert predictions_asked(batch_node) - asked == 94  # 93 batches of 4, and one of 3
    found = outputs(done.stdout)
    assert [output.number for output in found] == [*range(20, 361, 20), 375]
    assert [len(output.answers[0]) for output in found] == [4] * 18 + [3]
    for output in found:
        (batch,) = output.answers
        assert all(next(iter(answer)) in CATS for answer in batch)


def test_every_answer_belongs_to_its_frame(node: Node, short_clip: Path) -> None:
    expected = [post(node, MODEL[1], jpeg(frame)).json() for frame in frames_of(short_clip)]
    assert len({json.dumps(answer) for answer in expected}) == 22
    command = ["request.py", *MODEL, "--url", node.url, "--input", str(short_clip), "--log-every", "1"]

    single = outputs(run(*command, "--batch_size", "1", cwd=node.folder).stdout)
    assert [output.number for output in single] == list(range(1, 23))
    assert [output.answers[0] for output in single] == [pytest.approx(answer, abs=1e-5) for answer in expected]

    batches = outputs(run(*command, "--client-batching", "--batch-size", "5", cwd=node.folder).stdout)
    assert [output.number for output in batches] == [5, 10, 15, 20, 22]
    assert [len(output.answers[0]) for output in batches] == [5, 5, 5, 5, 2]
    answers = [answer for output in batches for answer in output.answers[0]]
    assert answers == [pytest.approx(answer, abs=1e-5) for answer in expected]


STEADY = [100 + 0.1 * number for number in range(1, 21)]  # the first frame is captured at 100.0 s
SLOWER = [100 + 0.1 * number for number in range(1, 101)] + [110.0 + number for number in range(1, 21)]


@pytest.mark.parametrize(
    ("answered_at", "failed", "expected"),
    [
        (STEADY, set(), [10.0, 10.0]),
        (STEADY, set(range(2, 21, 2)), [4 / 0.9, 9 / 1.9]),  # Failed frames take their time, and do not count.
        ([107.0, *[7 + when for when in STEADY]], set(), [10.0, 10.0]),  # The first answer took 7 s: a worker loaded.
        (SLOWER, set(), [10.0] * 10 + [1.0, 1.0]),  # Only the last 10 s count.
    ],
    ids=["steady", "half of them failed", "the first one late", "slower"],
)
def test_fps_is_answered_frames_over_time(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answered_at: list[float],
    failed: set[int],
    expected: list[float],
) -> None:
    terminal = request_py.Terminal(batch_size=4, as_json=False, log_every=10)
    for number, now in enumerate(answered_at, start=1):
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        answer = Failure("no answer") if number in failed else {"cat": 1.0}
        terminal.show([Frame(number, 100.0 if number == 1 else now - 0.1, b"")], [answer])
    assert [output.fps for output in outputs(capsys.readouterr().out)] == pytest.approx(expected, abs=0.051)


def test_fps_of_a_single_answer_counts_from_its_capture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = request_py.Terminal(batch_size=4, as_json=True, log_every=10)
    monkeypatch.setattr("time.monotonic", lambda: 100.5)
    terminal.show([Frame(1, 100.0, b""), Frame(2, 100.1, b"")], [{"cat": 1.0}, {"dog": 1.0}])
    terminal.flush()
    (output,) = outputs(capsys.readouterr().out)
    assert (output.number, output.fps, output.answers) == (2, 4.0, [[{"cat": 1.0}, {"dog": 1.0}]])


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    server = FakeServer(request.param)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("fake", ["out of order"], indirect=True)
@pytest.mark.parametrize("flags", [["--batch-size", "1"], ["--batch-size", "3", "--client-batching"]], ids=str)
def test_answers_that_overtake_each_other_are_shown_in_frame_order(
    fake: FakeServer, flags: list[str], short_clip: Path, tmp_path: Path
) -> None:
    expected = [hashlib.sha256(jpeg(frame)).hexdigest() for frame in frames_of(short_clip)]
    address = f"http://127.0.0.1:{fake.server_port}/"
    environment = {"TORCHSERVE_TOKEN": "of-the-environment"}
    command = ["request.py", "--url", address, "--input", str(short_clip), "--log-every", "1", *flags]
    done = run(*command, cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr
    shown = [answer for output in outputs(done.stdout) for answer in output.answers]
    if "--client-batching" in flags:
        shown = [answer for batch in shown for answer in batch]
    assert [next(iter(answer)) for answer in shown] == expected
    assert len(set(fake.bodies)) == len(fake.bodies) == (8 if "--client-batching" in flags else 22)
    assert fake.asked_before_first_answer == 1, "the first request goes ahead alone"
    assert fake.tokens == {"Bearer of-the-environment"}


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ("html", "the answer is not JSON"),
        ("too few", "the answer does not fit"),
        ("not predictions", "the answer does not fit"),
        ("backpressure", "503 has no worker"),
        ("redirect", "302"),
        ("reset", "no answer: "),
    ],
    indirect=["fake"],
)
@pytest.mark.parametrize("flags", [[], ["--client-batching"]], ids=str)
def test_frames_without_a_prediction_are_counted_as_failed(
    fake: FakeServer, reason: str, flags: list[str], short_clip: Path, tmp_path: Path
) -> None:
    address = f"http://127.0.0.1:{fake.server_port}"
    done = run("request.py", "--url", address, "--input", short_clip, *flags, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "frames: 0 answered, 22 failed" in done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("fake", ["some fail"], indirect=True)
@pytest.mark.parametrize(("flags", "failed"), [([], 7), (["--client-batching", "--batch-size", "2"], 6)], ids=str)
def test_one_failed_frame_is_enough_for_exit_code_1(
    fake: FakeServer, flags: list[str], failed: int, short_clip: Path, tmp_path: Path
) -> None:
    address = f"http://127.0.0.1:{fake.server_port}"
    done = run("request.py", "--url", address, "--input", short_clip, "--log-every", "1", *flags, cwd=tmp_path)
    assert done.returncode == 1
    assert f"frames: {22 - failed} answered, {failed} failed" in done.stderr
    assert f"{failed} failed: 503 has no worker" in done.stderr
    assert len(outputs(done.stdout)) == len(fake.bodies) - len(fake.bodies) // 3


@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_server_that_never_answers_ends_the_run(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("edge.client.ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest keeps its own Ctrl-C
    before = threading.active_count()
    assert request_py.main(["--url", f"http://127.0.0.1:{fake.server_port}", "--batch-size", "1"]) == 4
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("pipeline")] == []
    printed = capsys.readouterr()
    failed = len(fake.bodies)
    assert 0 < failed < 20
    assert f"frames: 0 answered, {failed} failed" in printed.err
    assert "no answer within 1 s" in printed.err
    assert printed.err.splitlines()[-1].startswith(f"request.py: http://127.0.0.1:{fake.server_port} stopped answering")
    assert printed.out == ""
    fake.closing.set()
    wait_until(lambda: threading.active_count() <= before)


@pytest.mark.parametrize("fake", ["out of order"], indirect=True)
@pytest.mark.parametrize("flags", [[], ["--client-batching", "--batch-size", "2"]], ids=str)
def test_camera_that_stops_ends_the_run_after_its_last_frame(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    monkeypatch.setattr("cv2.VideoCapture", Capture)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert request_py.main(["--input", "7", "--url", f"http://127.0.0.1:{fake.server_port}", *flags]) == 3
    printed = capsys.readouterr()
    assert "frames: 3 answered, 0 failed" in printed.err
    assert printed.err.splitlines()[-1] == "request.py: 7 delivers no frames any more"
    assert outputs(printed.out)[-1].number == 3


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_bad_frames_of_a_batch_do_not_hide_the_good_ones(node: Node, clip: list[npt.NDArray[np.uint8]]) -> None:
    """A frame that TorchServe cannot read fails alone. OpenCV sends none such, so the client is asked directly."""
    frames = [Frame(number, 0.0, jpeg(clip[number])) for number in range(3)]
    frames[1] = Frame(1, 0.0, b"no image")
    with TorchServe(node.url, MODEL[1], node.folder / "key_file.json", max_in_flight=1) as server:
        server.wait_until_ready(0.0, threading.Event())
        good, bad, other = read_answers(server.ask(frames, as_json=True), 3, as_json=True)
        assert not isinstance(good, Failure)
        assert not isinstance(other, Failure)
        assert isinstance(bad, Failure)
        assert bad.startswith("not an image")
        (alone,) = read_answers(server.ask(frames[1:2], as_json=False), 1, as_json=False)
        assert isinstance(alone, Failure)
        assert alone.startswith("400 not an image")


def error_of(*arguments: str | Path, cwd: Path, code: int, environment: dict[str, str] | None = None) -> str:
    """Run request.py, which must fail with this exit code and one line; return the line."""
    done = run("request.py", *arguments, cwd=cwd, environment=environment)
    lines: list[str] = [line for line in done.stderr.splitlines() if not line.startswith("waiting up to")]
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("request.py: ")
    return lines[0]


def test_missing_server(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    error = error_of("--url", address, "--server-wait", "1", cwd=tmp_path, code=4)
    assert f"no server at {address}" in error
    assert "Connection refused" in error


def test_missing_token(node: Node, tmp_path: Path) -> None:
    error = error_of(*MODEL, "--url", node.url, cwd=tmp_path, code=4)
    assert "wants a token" in error
    assert "--token-file FILE" in error
    assert "TORCHSERVE_TOKEN" in error


def test_wrong_token(node: Node, tmp_path: Path) -> None:
    environment = {"TORCHSERVE_TOKEN": "wrong-token"}
    error = error_of(*MODEL, "--url", node.url, cwd=tmp_path, code=4, environment=environment)
    assert "refuses the token from TORCHSERVE_TOKEN" in error
    assert "wrong-token" not in error


@pytest.mark.parametrize("token", ["two words", "two\nlines", "ß"])
def test_token_that_is_none(tmp_path: Path, token: str) -> None:
    error = error_of(cwd=tmp_path, code=4, environment={"TORCHSERVE_TOKEN": token})
    assert "what is in TORCHSERVE_TOKEN is no token" in error
    assert token not in error


@pytest.mark.parametrize(
    ("content", "message"), [(None, "can't read the token file"), ("{}", "no key file"), ("not JSON", "no key file")]
)
def test_bad_token_file(node: Node, tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "keys.json").write_text(content)
    assert message in error_of("--url", node.url, "--token-file", "keys.json", cwd=tmp_path, code=4)


def test_token_file_from_elsewhere(node: Node, short_clip: Path, tmp_path: Path) -> None:
    """The flag counts for more than the variable."""
    key_file = node.folder / "key_file.json"
    environment = {"TORCHSERVE_TOKEN": "wrong-token"}
    command = ["request.py", *MODEL, "--url", node.url, "--input", str(short_clip), "--token-file", str(key_file)]
    done = run(*command, cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr


def test_model_that_is_not_loaded(node: Node) -> None:
    error = error_of("--model", "resnet-50", "--url", node.url, cwd=node.folder, code=4)
    assert "has no model resnet-50" in error
    assert "--models resnet-50=resnet-50.mar" in error


def test_absent_camera(tmp_path: Path) -> None:
    assert "no camera 63" in error_of("--input", "63", cwd=tmp_path, code=3)


def test_absent_file(tmp_path: Path) -> None:
    assert "no such file: gone.mp4" in error_of("--input", "gone.mp4", cwd=tmp_path, code=3)


def test_folder_and_device_that_are_no_cameras(tmp_path: Path) -> None:
    assert "is a folder" in error_of("--input", ".", cwd=tmp_path, code=3)
    assert "no camera /dev/null" in error_of("--input", "/dev/null", cwd=tmp_path, code=3)


def test_file_that_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("this is no video")
    assert "clip.mp4 is no video that OpenCV can read" in error_of("--input", "clip.mp4", cwd=tmp_path, code=3)


def test_unreachable_stream_keeps_its_password(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}/live"
    error = error_of("--input", f"http://admin:hunter2@{address}", cwd=tmp_path, code=3)
    assert f"can't open http://{address}" in error
    assert "hunter2" not in error
    assert "admin" not in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "expected a whole number from 1"),
        (["--server-wait", "-1"], "invalid seconds value"),
        (["--log-every", "x"], "expected a whole number from 1"),
        (["--url", "127.0.0.1:8080"], "expected http://host:port"),
        (["--url", "http://user:password@127.0.0.1:8080"], "without user or password"),
    ],
)
def test_wrong_usage(tmp_path: Path, flags: list[str], message: str) -> None:
    done = run("request.py", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_finishes_what_is_on_its_way(node: Node, number: signal.Signals) -> None:
    asked = predictions_asked(node)
    command = [sys.executable, str(PROJECT / "request.py"), *MODEL, "--url", node.url, "--log-every", "10"]
    with subprocess.Popen(
        command, cwd=node.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        first = process.stdout.readline()
        assert "frame number 10" in first
        process.send_signal(number)
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    last = outputs(first + rest)[-1].number
    assert last < 375
    assert f"frames: {last} answered, 0 failed" in errors
    assert predictions_asked(node) - asked == last


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_second_interrupt_does_not_wait_for_answers(fake: FakeServer, tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "request.py"), "--url", f"http://127.0.0.1:{fake.server_port}"]
    with subprocess.Popen(command, cwd=tmp_path) as process:
        wait_until(lambda: bool(fake.bodies))
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)  # It waits for the answer to the frame that is on its way.
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_interrupted_while_waiting_for_a_server(tmp_path: Path) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    command = [sys.executable, str(PROJECT / "request.py"), "--url", address]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert "waiting up to 30 s" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


def test_reader_of_the_output_that_leaves_ends_the_run_quietly(node: Node) -> None:
    command = [sys.executable, str(PROJECT / "request.py"), *MODEL, "--url", node.url, "--log-every", "1"]
    with subprocess.Popen(
        command, cwd=node.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert "Traceback" not in process.stderr.read()


def test_edge_device_needs_no_torch() -> None:
    code = "import sys, request; print({'torch', 'torchvision', 'ts', 'handler'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
