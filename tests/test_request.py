"""request.py as a user runs it: every frame once and in order, and one clear line for all that goes wrong."""

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.node import PROJECT, Node, free_ports
from tests.conftest import CATS, CLIP, frames_of, jpeg, post, wait_until
from tests.fake_server import FakeServer
from tests.scripts import books, outputs, run

MODEL = ["--model", "efficientnet-lite0"]


def predictions_asked(node: Node) -> int:
    """Return how many requests for predictions a node has answered."""
    return node.log().count('"POST /predictions/')


def test_torchserve_batches_the_sample_clip(node: Node) -> None:
    asked = predictions_asked(node)
    done = run("request.py", *MODEL, "--url", node.url, cwd=node.folder)
    assert done.returncode == 0, done.stderr
    assert predictions_asked(node) - asked == 1 + 375  # a test picture first
    found = outputs(done.stdout)
    assert [output.number for output in found] == [*range(20, 361, 20), 375]
    for output in found:
        assert output.batch_size == 4
        assert len(output.answers) == 4
        assert all(next(iter(answer)) in CATS for answer in output.answers)
    # 375 frames at 25 a second: the first at once, the last after 14.96 s.
    book = books(done.stderr)[str(CLIP)]
    assert (book["captured"], book["answered"], book["dropped"]) == ("375", "375", "0")
    assert 10 < float(book["FPS"]) <= 25.1
    assert all(0 < output.fps < 375 / 10 for output in found)
    assert 0 < int(book["p50 ms"]) <= int(book["p95 ms"]) <= int(book["p99 ms"]) <= int(book["max ms"]) < 15_000
    assert 1 <= float(book["frames/pass"]) <= 4


def test_client_batches_the_sample_clip(batch_node: Node) -> None:
    assert batch_node.describe("efficientnet-lite0")["batchSize"] == 1
    asked = predictions_asked(batch_node)
    done = run("request.py", *MODEL, "--url", batch_node.url, "--client-batching", cwd=batch_node.folder)
    assert done.returncode == 0, done.stderr
    assert predictions_asked(batch_node) - asked == 1 + 94  # a test picture, 93 batches of 4, and one of 3
    found = outputs(done.stdout)
    assert [output.number for output in found] == [*range(20, 361, 20), 375]
    assert [len(output.answers[0]) for output in found] == [4] * 19
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
    assert len(set(fake.bodies)) == len(fake.bodies) == 1 + (8 if "--client-batching" in flags else 22)
    assert fake.tokens == {"Bearer of-the-environment"}


def error_of(*arguments: str | Path, cwd: Path, code: int, environment: dict[str, str] | None = None) -> str:
    """Run request.py, which must fail with this exit code and one line; return the line."""
    done = run("request.py", *arguments, cwd=cwd, environment=environment)
    lines: list[str] = [line for line in done.stderr.splitlines() if "gives no answers" not in line]
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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such address for itself")
@pytest.mark.parametrize("fake", ["good"], indirect=True)
@pytest.mark.parametrize(
    ("host", "token", "is_told"), [("0.0.0.0", "t", True), ("0.0.0.0", "", False), ("127.0.0.1", "t", False)]
)
def test_token_in_plain_text_is_told(
    fake: FakeServer, short_clip: Path, tmp_path: Path, host: str, token: str, is_told: bool
) -> None:
    command = ["request.py", "--url", f"http://{host}:{fake.server_port}", "--input", str(short_clip), "--quiet"]
    done = run(*command, cwd=tmp_path, environment={"TORCHSERVE_TOKEN": token})
    assert done.returncode == 0, done.stderr
    assert ("the token goes to" in done.stderr) == is_told


@pytest.mark.parametrize("fake", ["first 401"], indirect=True)
@pytest.mark.parametrize("flags", [[], ["--client-batching"]], ids=["single", "json"])
def test_token_that_a_proxy_gets_to_know_later(
    fake: FakeServer, short_clip: Path, tmp_path: Path, flags: list[str]
) -> None:
    command = ["request.py", "--url", fake.url, "--input", str(short_clip), "--quiet", *flags]
    done = run(*command, cwd=tmp_path, environment={"TORCHSERVE_TOKEN": "new"})
    assert done.returncode == 0, done.stderr
    assert fake.tokens == {"Bearer new"}


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
    assert "no camera 63" in error_of("--input", "63", "--require-cameras", cwd=tmp_path, code=3)


def test_absent_file(tmp_path: Path) -> None:
    assert "no such file: gone.mp4" in error_of("--input", "gone.mp4", cwd=tmp_path, code=3)
    assert "hunter2" not in error_of("--input", "admin:hunter2@10.0.0.7/live", cwd=tmp_path, code=3)


def test_folder_and_device_that_are_no_cameras(tmp_path: Path) -> None:
    assert "is a folder" in error_of("--input", ".", cwd=tmp_path, code=3)
    assert "no camera /dev/null" in error_of("--input", "/dev/null", "--require-cameras", cwd=tmp_path, code=3)


def test_file_that_is_no_video(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_text("this is no video")
    assert "clip.mp4 is no video that OpenCV can read" in error_of("--input", "clip.mp4", cwd=tmp_path, code=3)


def test_unreachable_stream_keeps_its_password(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}/live"
    error = error_of("--input", f"http://admin:hunter2@{address}", "--require-cameras", cwd=tmp_path, code=3)
    assert f"can't open http://{address}" in error
    assert "hunter2" not in error
    assert "admin" not in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "expected a whole number from 1"),
        (["--server-wait", "-1"], "expected seconds, got '-1'"),
        (["--log-every", "x"], "expected a whole number from 1"),
        (["--url", "127.0.0.1:8080"], "expected http://host:port"),
        (["--url", "http://user:password@127.0.0.1:8080"], "without user or password"),
        (["--url", "http://127.0.0.1:99999"], "expected http://host:port"),
        (["--management-url", "http://10.0.0.1:8081"], "expected an address on the host of --url, 127.0.0.1"),
        (["--fps", "abc"], "expected frames a second from 0.001, or max, got 'abc'"),
        (["--max-age", "0"], "expected milliseconds from 1, got '0'"),
        (["--jpeg-quality", "101"], "expected 1 to 100"),
        (["--drop", "some"], "invalid choice: 'some'"),
        (["--input", "rstp://admin:hunter2@cam/live"], "got 'rstp://cam/live'"),
        (["--input", ""], "expected a file, a device, or an address"),
        (["--save-video", "out.gif"], "expected a name that ends in .mp4, .mkv, .avi"),
        (["--save-video", "a.mkv", "--jsonl", "./a.mkv"], "a.mkv is an input or another output too"),
        (["--input", "1", "--input", "2", "--save-video", "a.mkv", "--jsonl", "a-2.mkv"], "another output too"),
        (["--metrics-port", "70000"], "expected a port or ADDRESS:PORT, got '70000'"),
        (["--metrics-port", "127.0.0.1"], "expected a port or ADDRESS:PORT"),
    ],
)
def test_wrong_usage(tmp_path: Path, flags: list[str], message: str) -> None:
    done = run("request.py", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("flag", ["--jsonl", "--save-video"])
def test_output_never_overwrites_an_input(short_clip: Path, tmp_path: Path, flag: str) -> None:
    video = tmp_path / "mine.mp4"
    video.write_bytes(short_clip.read_bytes())
    (tmp_path / "link.mp4").symlink_to(video)
    for output in ("mine.mp4", "link.mp4"):
        done = run("request.py", "--input", video, flag, output, cwd=tmp_path)
        assert done.returncode == 2
        assert "is an input or another output too" in done.stderr
    assert video.read_bytes() == short_clip.read_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_finishes_what_is_on_its_way(node: Node, tmp_path: Path, number: signal.Signals) -> None:
    asked = predictions_asked(node)
    command = [sys.executable, str(PROJECT / "request.py"), *MODEL, "--url", node.url, "--log-every", "10"]
    printed = tmp_path / "stdout"
    with (
        printed.open("w") as stdout,
        subprocess.Popen(command, cwd=node.folder, stdout=stdout, stderr=subprocess.PIPE, text=True) as process,
    ):
        wait_until(lambda: "frame number 10 " in printed.read_text())
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    last = outputs(printed.read_text())[-1].number
    assert 10 <= last < 375
    book = books(errors)[str(CLIP)]
    # A frame that was read but not yet sent is dropped.
    assert (int(book["answered"]) + int(book["dropped"]), book["failed"]) == (last, "0")
    assert predictions_asked(node) - asked == 1 + int(book["answered"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("fake", ["silent"], indirect=True)
def test_second_interrupt_does_not_wait_for_answers(fake: FakeServer, tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "request.py"), "--url", f"http://127.0.0.1:{fake.server_port}"]
    with subprocess.Popen(command, cwd=tmp_path) as process:
        wait_until(lambda: fake.frames_asked > 0)
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
        assert "gives no answers (Connection refused)" in process.stderr.readline().replace("[Errno 111] ", "")
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
