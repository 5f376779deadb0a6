"""request.py while machines and networks fail: no frame is lost that could be answered, and it recovers by itself."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.archives import Archives
from tests.support.faults import BATCHED, FAULTS, FLAGS, SINGLE, Site, resources
from tests.support.frames import Pixels, jpeg, small, write_video
from tests.support.mjpeg_camera import mjpeg_camera
from tests.support.scripts import Run, json_lines, running, wait_until

# More than three times the recovery times on two idle cores, see tests/soak.txt.
RECOVERY_S = 30.0
UNDER_WAY = 8  # With so many answered frames of each camera and file, the stream goes on.
# Faults during which frames are answered as before.
HARMLESS = {"token renewed", "network latency"}
# How much more a request.py may hold than at its start.
GROWTH = {
    SINGLE: {"threads": 16, "descriptors": 20, "sockets": 16, "processes": 0, "megabytes": 30},
    BATCHED: {"threads": 4, "descriptors": 8, "sockets": 4, "processes": 0, "megabytes": 30},
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, archives: Archives, clip: list[Pixels]) -> Iterator[Site]:
    frames = [small(frame) for frame in clip]
    folder = tmp_path_factory.mktemp("site")
    write_video(folder / "clip.mp4", frames[:80], 5)
    with mjpeg_camera([jpeg(frame) for frame in frames], fps=3) as camera, ExitStack() as cleanup:
        # Its networks see tiny frames, so that any machine can answer all frames of the cameras.
        yield Site(folder, archives, [camera], cleanup, is_tiny=True)


class Streams:
    """Both recipes at once, each with a live camera and a file that is repeated, for as long as all faults last."""

    def __init__(self, site: Site, folder: Path, cleanup: ExitStack) -> None:
        self.camera, self.clip = site.cameras[0].url, str(site.folder / "clip.mp4")
        self.runs: dict[str, Run] = {}
        for model in (SINGLE, BATCHED):
            (folder / model).mkdir()
            command = ["--url", site.proxy.url, "--model", model, "--input", self.camera, "--input", self.clip]
            command += ["--loop", "--server-wait", "300", *FLAGS[model]]
            self.runs[model] = cleanup.enter_context(running(site.node, folder / model, *command))
        self.wait_for_answered(UNDER_WAY, since=0.0)
        self.at_start = {model: resources(run.process) for model, run in self.runs.items()}

    def wait_for_answered(self, count: int, since: float) -> None:
        """Wait until so many frames of each source are answered that were captured since then."""
        wait_until(
            lambda: all(
                len(run.answered(source, since)) >= count
                for run in self.runs.values()
                for source in (self.camera, self.clip)
            )
        )


@pytest.fixture(scope="module")
def streams(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Streams]:
    with ExitStack() as cleanup:
        yield Streams(site, tmp_path_factory.mktemp("streams"), cleanup)


@pytest.mark.parametrize("name", FAULTS)
def test_fault_passes(site: Site, streams: Streams, name: str) -> None:
    """Every frame of the file is answered, the frames of the camera after the fault; no frame fails."""
    fault, runs = FAULTS[name], streams.runs.values()
    read = {run: len(run.stderr()) for run in runs}

    def is_reported(pattern: str) -> bool:
        return all(re.search(pattern, run.stderr()[read[run] :], re.DOTALL) for run in runs)

    begin = time.time()
    with fault.begin(site):
        if fault.reported:
            wait_until(lambda: is_reported(fault.reported))
        elif name in HARMLESS:
            streams.wait_for_answered(UNDER_WAY, since=begin)
    end = time.time()
    streams.wait_for_answered(1, since=end)
    wait_until(lambda: is_reported(f"{fault.reported}.*{fault.back}"))
    for model, run in streams.runs.items():
        recovery_s = min(run.answered(streams.camera, end)) - end
        assert recovery_s < RECOVERY_S, run.stderr()
        results = run.results()
        assert {line["outcome"] for line in results if line["camera"] == streams.clip} == {"answered"}
        assert {line["outcome"] for line in results} <= {"answered", "dropped"}, run.stderr()
        if name in HARMLESS:
            outcomes = [outcome for at, outcome in captured(run, streams.camera) if begin < at < end]
            assert outcomes.count("answered") > len(outcomes) / 2
        wait_until(lambda model=model, run=run: growth(streams.at_start[model], run, GROWTH[model]) == {})  # type: ignore[misc]
        assert "Traceback" not in run.stderr()


def growth(at_start: dict[str, int], run: Run, allowed: dict[str, int]) -> dict[str, int]:
    """Return what a request.py holds more of than is allowed, and how much more than at its start."""
    now = resources(run.process)
    return {what: now[what] - at_start[what] for what in allowed if now[what] > at_start[what] + allowed[what]}


def captured(run: Run, camera: str) -> list[tuple[float, str]]:
    """Return when each frame of a camera was captured, seconds since the epoch, and its outcome."""
    lines = [line for line in run.results() if line["camera"] == camera]
    return [(datetime.fromisoformat(line["captured_at"]).timestamp(), line["outcome"]) for line in lines]


def test_after_all_faults_the_counts_add_up(streams: Streams) -> None:
    for run in streams.runs.values():
        found = run.end()
        assert list(found) == [streams.camera, streams.clip]
        assert all(row["failed"] == "0" for row in found.values()), run.stderr()
        dropped = {line["error"] for line in json_lines(run.output) if line["outcome"] == "dropped"}
        assert dropped <= {"buffer full", "the run ended"}
