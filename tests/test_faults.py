"""request.py while machines and networks fail: nothing that could be answered is lost, and it recovers by itself."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from deploy.node import PROJECT, Node
from tests.conftest import frames_of, jpeg, wait_until
from tests.faults import BATCHED, FAULTS, FLAGS, SINGLE, Site, answered, resources
from tests.mjpeg_camera import mjpeg_camera
from tests.scripts import MODEL, Run, books, is_isolation_possible, json_lines, outputs, running

FRAMES = 80
RECOVERY_S = 10.0
IN_FLIGHT = {SINGLE: 16, BATCHED: 4}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, weights: Path, clip: list[npt.NDArray[np.uint8]]) -> Iterator[Site]:
    small = [np.asarray(cv2.resize(frame, (320, 240)), np.uint8) for frame in clip]
    folder = tmp_path_factory.mktemp("site")
    writer = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5, (320, 240))
    for frame in small[:FRAMES]:
        writer.write(frame)
    writer.release()
    with mjpeg_camera([jpeg(frame) for frame in small], fps=3) as camera, ExitStack() as cleanup:
        yield Site(folder, weights, [camera], cleanup)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_passes(site: Site, tmp_path: Path, name: str) -> None:
    """Both recipes at once, each with a live camera and a file, while the fault comes and goes."""
    fault = FAULTS[name]
    camera, clip = site.cameras[0].url, str(site.folder / "clip.mp4")
    with ExitStack() as cleanup:
        requests_: dict[str, Run] = {}
        for model in (SINGLE, BATCHED):
            (tmp_path / model).mkdir()
            command = ["--url", site.proxy.url, "--model", model, "--input", camera, "--input", clip, *FLAGS[model]]
            started = running(site.node, tmp_path / model, *command, "--server-wait", "120")
            requests_[model] = cleanup.enter_context(started)
        runs = requests_.values()
        wait_until(lambda: all(len(answered(run, clip)) > 10 and answered(run, camera) for run in runs))
        before = {model: resources(request.process) for model, request in requests_.items()}
        with fault.begin(site):
            time.sleep(fault.seconds)
        end = time.time()
        wait_until(lambda: all(answered(run, camera, end) for run in runs))
        recovery = {model: answered(request, camera, end)[0] - end for model, request in requests_.items()}
        wait_until(
            lambda: all([line["camera"] for line in json_lines(run.output)].count(clip) == FRAMES for run in runs)
        )
        for model, request in requests_.items():
            after = resources(request.process)
            for what, most in (
                ("threads", IN_FLIGHT[model]),
                ("descriptors", IN_FLIGHT[model] + 4),
                ("sockets", IN_FLIGHT[model]),
                ("processes", 0),
                ("megabytes", 20),
            ):
                assert after[what] <= before[model][what] + most, (model, what, before[model], after)
            found = request.end()
            assert int(found[clip]["answered"]) == FRAMES, request.stderr()
            assert all(book["failed"] == "0" for book in found.values()), request.stderr()
            if fault.is_harmless:
                assert int(found[camera]["dropped"]) < int(found[camera]["captured"]) / 10, request.stderr()
            if fault.told is not None:
                assert re.search(fault.told, request.stderr()), request.stderr()
            assert "Traceback" not in request.stderr()
    assert max(recovery.values()) < RECOVERY_S


@pytest.mark.parametrize("flags", FLAGS.values(), ids=["single", "json"])
def test_clock_that_is_set_back(node: Node, tmp_path: Path, flags: list[str]) -> None:
    libraries = list(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not libraries:
        pytest.skip("needs Debian's package faketime")
    (tmp_path / "clock").write_text("+0")
    environment = {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME_TIMESTAMP_FILE": str(tmp_path / "clock"),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    with running(node, tmp_path, *flags, environment=environment) as request:
        wait_until(lambda: request.lines() > 100)
        (tmp_path / "clock").write_text("-3600")
        assert request.process.wait(timeout=60) == 0
    lines = json_lines(request.output)
    assert len(lines) == 375
    assert {line["outcome"] for line in lines} == {"answered"}
    times = [datetime.fromisoformat(line["captured_at"]).timestamp() for line in lines]
    assert -3600 < times[-1] - times[0] < -3500, "the clock was not set back"
    assert all(0 < line["latency_ms"] < 10_000 for line in lines)
    (book,) = books(request.stderr()).values()
    assert 5 < float(book["FPS"]) < 26


@pytest.mark.skipif(not is_isolation_possible(), reason="needs Linux namespaces: unshare")
@pytest.mark.parametrize(("model", "suffix"), [(SINGLE, ".mp4"), (BATCHED, ".avi")], ids=["single", "json"])
def test_disk_that_becomes_full(node: Node, tmp_path: Path, model: str, suffix: str) -> None:
    """Under --jsonl and under --save-video: each ends by itself, with what was written, and the stream goes on."""
    for name in ("small", "large", "copies"):
        (tmp_path / name).mkdir()
    flags = " ".join(["--url", node.url, "--model", MODEL, "--fps", "max", *FLAGS[model]])
    command = f'"{sys.executable}" "{PROJECT}/request.py" {flags} --token-file "{node.folder}/key_file.json"'
    script = f"""
        mount -t tmpfs -o size=40k tmpfs small && mount -t tmpfs -o size=10900k tmpfs large || exit 9
        {command} --jsonl small/out.jsonl --save-video large/out{suffix}
        code=$?
        cp small/out.jsonl large/out{suffix} copies
        exit $code
    """
    in_mounts = ["unshare", "--mount", "--map-root-user", "bash", "-c", script]
    done = subprocess.run(in_mounts, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    for file in ("small/out.jsonl", f"large/out{suffix}"):
        assert f"{file} fails, going on without it: OSError: [Errno 28] No space left on device" in done.stderr
    (book,) = books(done.stderr).values()
    assert (book["answered"], book["failed"], book["dropped"]) == ("375", "0", "0")
    assert outputs(done.stdout)[-1].number == 375
    assert 20 < len(json_lines(tmp_path / "copies" / "out.jsonl")) < 375
    assert 20 < len(frames_of(tmp_path / "copies" / f"out{suffix}")) < 375
