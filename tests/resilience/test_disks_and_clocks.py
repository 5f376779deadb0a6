"""request.py when the clock is set back, and when the disk is full."""

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from demo.node import PROJECT
from tests.support.fake_server import FakeServer
from tests.support.frames import frames_of
from tests.support.programs import needs
from tests.support.scripts import json_lines, outputs, running, summary


@needs("faketime")
@pytest.mark.parametrize("fake", ["good"], indirect=True)
@pytest.mark.parametrize("flags", [[], ["--client-batching"]], ids=["single", "json"])
def test_clock_that_is_set_back(fake: FakeServer, long_clip: Path, tmp_path: Path, flags: list[str]) -> None:
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    (tmp_path / "clock").write_text("+0")
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(tmp_path / "clock"),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    with running(fake, tmp_path, "--input", str(long_clip), *flags, environment=environment) as request:
        request.wait_until(lambda: request.lines() > 20)
        (tmp_path / "clock").write_text("-3600")
        assert request.process.wait(timeout=120) == 0
    lines = json_lines(request.output)
    assert len(lines) == 100
    assert {line["outcome"] for line in lines} == {"answered"}
    times = [datetime.fromisoformat(line["captured_at"]).timestamp() for line in lines]
    assert times[-1] - times[0] < -3000, "the clock was not set back"
    assert all(0 < line["latency_ms"] < 3_000_000 for line in lines)
    (row,) = summary(request.stderr()).values()
    assert 0.1 < float(row["FPS"]) < 25.5, "a file of 25 fps"


@needs("unshare")
@pytest.mark.parametrize("fake", ["good"], indirect=True)
@pytest.mark.parametrize(("flags", "suffix"), [("", ".mp4"), ("--client-batching", ".avi")], ids=["single", "json"])
def test_disk_that_becomes_full(fake: FakeServer, tmp_path: Path, flags: str, suffix: str) -> None:
    """Of --jsonl and of --save-video: each output ends by itself, with what was written, and the stream goes on."""
    for name in ("small", "large", "copies"):
        (tmp_path / name).mkdir()
    command = f'"{sys.executable}" "{PROJECT}/request.py" --url {fake.url} --fps max {flags}'
    script = f"""
        mount -t tmpfs -o size=40k tmpfs small && mount -t tmpfs -o size=10900k tmpfs large || exit 9
        {command} --jsonl small/out.jsonl --save-video large/out{suffix}
        code=$?
        cp small/out.jsonl large/out{suffix} copies
        exit $code
    """
    in_mounts = ["unshare", "--mount", "--map-root-user", "bash", "-c", script]
    done = subprocess.run(in_mounts, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    for file in ("small/out.jsonl", f"large/out{suffix}"):
        assert f"{file} fails, going on without it: OSError: [Errno 28] No space left on device" in done.stderr
    (row,) = summary(done.stderr).values()
    assert (row["answered"], row["failed"], row["dropped"]) == ("375", "0", "0")
    assert outputs(done.stdout)[-1].number == 375
    assert 20 < len(json_lines(tmp_path / "copies" / "out.jsonl")) < 375
    assert 20 < len(frames_of(tmp_path / "copies" / f"out{suffix}")) < 375
