"""What all tests share: archives and frames, tests of one server on one worker, and one line for what is missing."""

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.archives import Archives
from tests.support.fake_server import FakeServer, fake_server
from tests.support.frames import CLIP, Pixels, frames_of, small, write_video

# Tests count the requests that a server got.
os.environ["TS_ACCESS_LOG"] = "info"

# A test that uses one of these servers runs in the process of pytest-xdist that has it, after the others that use it:
# it is started once, and none of them sees another one's requests.
SERVERS = ("node", "gathering_node", "tasks_node", "cluster", "site", "short_tokens", "browser")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for server in SERVERS:
            if server in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(server))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a line for each program that is missing, and for each other reason for which tests were skipped."""
    skipped = Counter[str]()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        skipped.update(reason.removeprefix("Skipped: ").splitlines())
    for reason, count in sorted(skipped.items()):
        terminalreporter.write_line(f"skipped {count} test{'s' if count > 1 else ''}: {reason}", yellow=True)


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Archives, each of which is built once, whatever the number of pytest-xdist's processes."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "archives"
    folder.mkdir(exist_ok=True)
    return Archives(folder)


@pytest.fixture(scope="session")
def weights(archives: Archives) -> Path:
    """A state dict of ResNet-18, random, in a file."""
    return archives.weights()


@pytest.fixture(scope="session")
def clip() -> list[Pixels]:
    """The frames of the sample clip, 480 x 640."""
    return frames_of(CLIP)


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory: pytest.TempPathFactory, clip: list[Pixels]) -> Path:
    """22 frames at 100 fps: not a multiple of the batch size, and over soon."""
    return write_video(tmp_path_factory.mktemp("clip") / "short clip.mp4", clip[: 22 * 15 : 15], 100)


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory: pytest.TempPathFactory, clip: list[Pixels]) -> Path:
    """100 small frames at 25 fps, for what happens in the middle of a file."""
    frames = [small(frame) for frame in clip[:300:3]]
    return write_video(tmp_path_factory.mktemp("clip") / "long clip.mp4", frames, 25)


@pytest.fixture
def fake(request: pytest.FixtureRequest) -> Iterator[FakeServer]:
    with fake_server(request.param) as server:
        yield server


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    """An event that is set when the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For create_mar_file.main() in this process: a directory of its own, and the handlers of signals as before."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
