"""request.py as a user runs it: every frame once and in order, and one clear line for each problem."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from demo.node import PROJECT, Node, free_ports
from tests.support.fake_server import FakeServer
from tests.support.frames import CATS, frames_of, jpeg
from tests.support.nodes import post, predictions_asked
from tests.support.scripts import outputs, run, started, summary, wait_until

MODEL = ["--model", "efficientnet-lite0"]


def test_torchserve_batches_single_frames(node: Node, long_clip: Path) -> None:
    """As fast as possible: tests/integration/test_recipes.py streams the sample clip in real time."""
    asked = predictions_asked(node)
    done = run("request.py", *MODEL, "--url", node.url, "--input", long_clip, "--fps", "max", cwd=node.folder)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: predictions_asked(node) - asked == 1 + 100)  # a test image first
    found = outputs(done.stdout)
    assert [output.number for output in found] == [20, 40, 60, 80, 100]
    for output in found:
        assert output.batch_size == 4
        assert output.fps > 0
        assert len(output.answers) == 4
        assert all(next(iter(answer)) in CATS for answer in output.answers)
    row = summary(done.stderr)[str(long_clip)]
    assert (row["captured"], row["answered"], row["dropped"]) == ("100", "100", "0")
    assert float(row["FPS"]) > 0
    assert 0 < int(row["p50 ms"]) <= int(row["p95 ms"]) <= int(row["p99 ms"]) <= int(row["max ms"])
    assert 1 < float(row["batch"]) <= 4


def test_client_batches_frames_as_json(node: Node, long_clip: Path) -> None:
    asked = predictions_asked(node)
    command = [*MODEL, "--url", node.url, "--input", str(long_clip), "--fps", "max"]
    done = run("request.py", *command, "--client-batching", "--batch-size", "3", cwd=node.folder)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: predictions_asked(node) - asked == 1 + 34)  # a test image, 33 batches of 3, and one of 1
    found = outputs(done.stdout)
    assert [output.number for output in found] == [20, 40, 60, 80, 100]
    assert [len(output.answers[0]) for output in found] == [3] * 5
    for output in found:
        (batch,) = output.answers
        assert all(next(iter(answer)) in CATS for answer in batch)


def test_every_prediction_belongs_to_its_frame(node: Node, short_clip: Path) -> None:
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
def test_responses_that_overtake_each_other_are_printed_in_frame_order(
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
    lines: list[str] = [line for line in done.stderr.splitlines() if "is not responding" not in line]
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


def test_missing_certificates(tmp_path: Path) -> None:
    address = f"https://127.0.0.1:{free_ports(1)[0]}"
    environment = {"REQUESTS_CA_BUNDLE": str(tmp_path / "missing.pem")}
    error = error_of("--url", address, cwd=tmp_path, code=4, environment=environment)
    assert f"can't use {address}: Could not find a suitable TLS CA certificate bundle" in error


def test_missing_token(node: Node, tmp_path: Path) -> None:
    error = error_of(*MODEL, "--url", node.url, cwd=tmp_path, code=4)
    assert "requires a token" in error
    assert "--token-file FILE" in error
    assert "TORCHSERVE_TOKEN" in error


def test_wrong_token(node: Node, tmp_path: Path) -> None:
    environment = {"TORCHSERVE_TOKEN": "wrong-token"}
    error = error_of(*MODEL, "--url", node.url, cwd=tmp_path, code=4, environment=environment)
    assert "rejects the token from TORCHSERVE_TOKEN" in error
    assert "wrong-token" not in error


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such address for itself")
@pytest.mark.parametrize("fake", ["good"], indirect=True)
@pytest.mark.parametrize(
    ("host", "token", "is_reported"), [("0.0.0.0", "t", True), ("0.0.0.0", "", False), ("127.0.0.1", "t", False)]
)
def test_unencrypted_token_is_reported(
    fake: FakeServer, short_clip: Path, tmp_path: Path, host: str, token: str, is_reported: bool
) -> None:
    command = ["request.py", "--url", f"http://{host}:{fake.server_port}", "--input", str(short_clip), "--quiet"]
    done = run(*command, cwd=tmp_path, environment={"TORCHSERVE_TOKEN": token})
    assert done.returncode == 0, done.stderr
    assert ("the token goes to" in done.stderr) == is_reported


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
def test_malformed_token(tmp_path: Path, token: str) -> None:
    error = error_of(cwd=tmp_path, code=4, environment={"TORCHSERVE_TOKEN": token})
    assert "TORCHSERVE_TOKEN holds no token" in error
    assert token not in error


@pytest.mark.parametrize(
    ("content", "message"), [(None, "can't read the token file"), ("{}", "no key file"), ("not JSON", "no key file")]
)
def test_bad_token_file(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "keys.json").write_text(content)
    assert message in error_of("--token-file", "keys.json", cwd=tmp_path, code=4)


def test_token_file_from_elsewhere(node: Node, short_clip: Path, tmp_path: Path) -> None:
    """The flag takes precedence over the variable."""
    key_file = node.folder / "key_file.json"
    environment = {"TORCHSERVE_TOKEN": "wrong-token"}
    command = ["request.py", *MODEL, "--url", node.url, "--input", str(short_clip), "--token-file", str(key_file)]
    done = run(*command, cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr


def test_model_that_is_not_loaded(node: Node) -> None:
    error = error_of("--model", "resnet-50", "--url", node.url, cwd=node.folder, code=4)
    assert "has no model resnet-50" in error
    assert "--models resnet-50=resnet-50.mar" in error


def test_wrong_usage_is_exit_code_2(tmp_path: Path) -> None:
    """For other wrong usage see tests/unit/test_options.py."""
    done = run("request.py", "--batch-size", "0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a whole number from 1" in done.stderr.splitlines()[-1]


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


@pytest.mark.parametrize("fake", ["good"], indirect=True)
def test_reader_of_the_output_that_leaves_ends_the_run_quietly(fake: FakeServer, tmp_path: Path) -> None:
    command = [sys.executable, str(PROJECT / "request.py"), "--url", fake.url, "--log-every", "1"]
    with started(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 1
        assert "Traceback" not in process.stderr.read()


def test_edge_device_needs_no_torch() -> None:
    code = "import sys, request; print({'torch', 'torchvision', 'ts', 'handler'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
