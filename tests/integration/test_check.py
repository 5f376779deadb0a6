"""request.py --check: what works, and what does not."""

import re
from pathlib import Path

import pytest

from demo.node import Node, free_ports
from tests.support.fake_server import FakeServer
from tests.support.frames import CATS, CLIP, frames_of, jpeg
from tests.support.scripts import run

MODEL = ["--model", "efficientnet-lite0"]


def test_check_tells_what_works(node: Node, tmp_path: Path) -> None:
    command = ["request.py", *MODEL, "--url", node.url, "--check"]
    done = run(*command, cwd=node.folder)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", word] for word in ("camera", "server", "model:", "latency:", "batching:", "largest")
    ]
    assert any(f"model: answers, {cat} 0." in lines[2] for cat in CATS)
    shared = re.search(r"a forward pass was shared by (\d\.\d) frames \(mean\), (\d) \(most\)$", lines[4])
    assert shared
    assert 1 < float(shared[1]) <= 4
    assert shared[2] == "4"
    body = re.fullmatch(r"ok    largest body: 6,553,500 bytes, a JSON batch of (\d+) such frames", lines[5])
    assert body
    picture = len(jpeg(frames_of(CLIP)[0]))
    assert int(body[1]) == 6_553_500 // (picture * 4 / 3 + 12)

    absent = run(*command, "--input", "63", cwd=node.folder)
    assert absent.returncode == 3
    assert absent.stdout.startswith("FAIL  camera: no camera 63")
    assert len(absent.stdout.splitlines()) == 6

    no_token = run(*command, cwd=tmp_path)
    assert no_token.returncode == 4
    assert no_token.stdout.splitlines()[-1].startswith(f"FAIL  server: {node.url} wants a token")

    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    no_server = run("request.py", "--check", "--url", nowhere, "--server-wait", "0", cwd=tmp_path)
    assert no_server.returncode == 4
    assert "FAIL  server: no server at" in no_server.stdout


@pytest.mark.parametrize("fake", ["at most 300000"], indirect=True)
def test_check_finds_a_lower_limit(fake: FakeServer, tmp_path: Path) -> None:
    done = run("request.py", "--check", "--url", fake.url, cwd=tmp_path)
    found = re.search(r"largest body: ([\d,]+) bytes", done.stdout)
    assert found, done.stdout
    assert 297_000 <= int(found[1].replace(",", "")) <= 300_000
