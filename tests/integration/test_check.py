"""request.py --check: a line for each thing that works, or fails."""

import re
from pathlib import Path

import pytest

from demo.node import Node, free_ports
from tests.support.fake_server import FakeServer
from tests.support.frames import CATS, CLIP, frames_of, jpeg
from tests.support.scripts import run

MODEL = ["--model", "efficientnet-lite0"]


def test_check_reports_each_thing_that_works_or_fails(node: Node, tmp_path: Path) -> None:
    command = ["request.py", *MODEL, "--url", node.url, "--check"]
    done = run(*command, cwd=node.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    camera, server, model, latency, batching, limit = done.stdout.splitlines()
    size = len(jpeg(frames_of(CLIP)[0]))
    assert camera == f"ok    camera {CLIP}: states 25 frames/s, {size:,} bytes per frame"
    assert server == f"ok    server {node.url}: reachable, accepts the token, has the model efficientnet-lite0"
    found = re.fullmatch(r"ok    model efficientnet-lite0: image-classification: (\S+) 0\.\d\d", model)
    assert found
    assert found[1] in CATS
    assert re.fullmatch(r"ok    latency: \d+ ms for a single frame \(median of 5\)", latency)
    pattern = r"requests of 1 frame, 16 in flight, \d+\.\d FPS; mean batch (\d\.\d), largest (\d)"
    batch = re.fullmatch(rf"ok    batching: 32 {pattern}", batching)
    assert batch
    assert 1 < float(batch[1]) <= 4
    assert batch[2] == "4"
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


@pytest.mark.parametrize("fake", ["at most 20000"], indirect=True)
def test_check_fails_if_the_server_accepts_no_such_frame(fake: FakeServer, tmp_path: Path) -> None:
    done = run("request.py", "--check", "--url", fake.url, cwd=tmp_path)
    assert done.returncode == 4
    last = done.stdout.splitlines()[-1]
    assert last.startswith("FAIL  server: no prediction: 413 the request is larger than the server accepts: ")
