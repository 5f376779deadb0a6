"""request.py --check: a line for each thing that works, or fails."""

import re
import threading
from pathlib import Path

import pytest

from demo.node import PROJECT, Node, free_ports, torchserve
from edge.check import check
from edge.options import parse_args
from edge.timing import Timing
from tests.support.archives import Archives
from tests.support.fake_server import FakeServer
from tests.support.frames import CATS, CLIP, frames_of, jpeg
from tests.support.nodes import workers
from tests.support.scripts import run, wait_until

MODEL = ["--model", "efficientnet-lite0"]


def test_check_reports_each_thing_that_works_or_fails(node: Node, tmp_path: Path) -> None:
    command = ["request.py", *MODEL, "--url", node.url, "--check"]
    done = run(*command, cwd=node.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    camera, server, model, latency, batching, limit = done.stdout.splitlines()
    size = len(jpeg(frames_of(CLIP)[0]))
    assert camera == f"ok    camera {CLIP}: states 25 frames/s, {size:,} bytes per frame"
    assert server == f"ok    server {node.url}: reachable, accepts the token, has the model efficientnet-lite0"
    found = re.fullmatch(r"ok    model efficientnet-lite0: image-classification, pytorch fp32: (\S+) 0\.\d\d", model)
    assert found
    assert found[1] in CATS
    assert re.fullmatch(r"ok    latency: \d+ ms for a single frame \(median of 5\)", latency)
    pattern = r"requests of 1 frame, 16 in flight, \d+\.\d FPS; mean batch (\d\.\d), largest (\d)"
    batch = re.fullmatch(rf"ok    batching: (\d+) {pattern}", batching)
    assert batch
    assert int(batch[1]) >= 32
    assert 1 < float(batch[2]) <= 4
    assert batch[3] == "4"
    fitting = int(6_553_500 / (size * 4 / 3 + 12))
    assert limit == f"ok    request limit: 6,553,500 bytes, a JSON batch of {fitting} such frames"

    absent = run(*command, "--input", "63", cwd=node.folder)
    assert absent.returncode == 3
    assert absent.stdout.startswith("FAIL  camera: no camera 63")
    assert len(absent.stdout.splitlines()) == 6

    no_token = run(*command, cwd=tmp_path)
    assert no_token.returncode == 4
    assert no_token.stdout.splitlines()[-1].startswith(f"FAIL  server: {node.url} requires a token")

    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    no_server = run("request.py", "--check", "--url", nowhere, "--server-wait", "0", cwd=tmp_path)
    assert no_server.returncode == 4
    assert "FAIL  server: no server at" in no_server.stdout


def test_worker_that_cannot_start(
    archives: Archives,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop: threading.Event,
) -> None:
    """Its files are gone. TorchServe has the model and accepts requests for it, and /ping says Healthy."""
    archives.store(tmp_path, archives.build("resnet-18", is_tiny=True))
    monkeypatch.setenv("TS_CONFIG_FILE", "/of/another/server")  # It has precedence over --ts-config.
    config = (PROJECT / "config.properties").read_text() + "\ndefault_workers_per_model=1\n"
    with torchserve(tmp_path, ["resnet-18"], config) as node:
        (file,) = Path(node.process.environ()["TEMP"]).glob("models/*/server/tasks.py")
        file.write_text("raise RuntimeError('no such task')\n")
        (worker,) = workers(node, "resnet-18").values()
        worker.kill()
        wait_until(lambda: "RuntimeError: no such task" in (tmp_path / "logs" / "model_log.log").read_text())
        options = parse_args(["--url", node.url, "--token-file", str(tmp_path / "key_file.json"), "--check"])
        timing = Timing(response_s=2.0, response_per_frame_s=0.0, min_response_s=2.0, first_response_s=2.0, check_s=0.1)
        assert check([], options, stop, timing) == 4
        works, fails = capsys.readouterr().out.splitlines()[-2:]
        assert works.startswith("ok    server")
        assert fails.startswith("FAIL  server: ")
        assert fails.endswith("if the workers of the model can't start, TorchServe's logs/model_log.log has the cause")


@pytest.mark.parametrize("fake", ["good"], indirect=True)
@pytest.mark.parametrize("behaviour", ["503", "resets", "some fail"])
def test_check_ends_if_the_server_fails_while_it_is_measured(
    fake: FakeServer, behaviour: str, capsys: pytest.CaptureFixture[str], stop: threading.Event
) -> None:
    """A fast server gets hundreds of requests: they are not all tried in vain."""

    def fail() -> None:
        wait_until(lambda: fake.frames_asked > 50)
        fake.behaviour = behaviour

    thread = threading.Thread(target=fail)
    thread.start()
    assert check([], parse_args(["--url", fake.url, "--check"]), stop, Timing(check_s=0.2)) == 4
    thread.join()
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL  server: no prediction: ")
    assert fake.frames_asked < 1000


@pytest.mark.parametrize("fake", ["at most 20000"], indirect=True)
def test_check_fails_if_the_server_accepts_no_such_frame(fake: FakeServer, tmp_path: Path) -> None:
    done = run("request.py", "--check", "--url", fake.url, cwd=tmp_path)
    assert done.returncode == 4
    last = done.stdout.splitlines()[-1]
    assert last.startswith("FAIL  server: no prediction: 413 the request is larger than the server accepts: ")
