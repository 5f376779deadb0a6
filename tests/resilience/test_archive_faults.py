"""create_mar_file.py, killed, interrupted, twice at once, and on a full disk: there is never half an archive."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import create_mar_file
from demo.node import PROJECT
from tests.support.programs import ISOLATED, needs
from tests.support.scripts import run, started

pytestmark = pytest.mark.usefixtures("own_directory")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("moment", ["", "*.pth", "scratch/*"], ids=["at the start", "weights", "archiver"])
def test_killed_half_way_it_leaves_the_old_archive(tmp_path: Path, weights: Path, moment: str) -> None:
    """As soon as there is some file in the folder that it builds in."""
    archive = tmp_path / "model_store" / "resnet-18.mar"
    archive.parent.mkdir()
    archive.write_bytes(b"the archive of yesterday")
    command: list[str | Path] = [sys.executable, PROJECT / "create_mar_file.py", "--weights", weights]
    for _ in range(10):
        with started(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True) as process:
            while process.poll() is None and not list(archive.parent.glob(f".create_mar_file-*/{moment}")):
                time.sleep(0.001)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)
        if archive.read_bytes() == b"the archive of yesterday":
            break
        assert zipfile.ZipFile(archive).testzip() is None, "it was faster, and has finished"
        archive.write_bytes(b"the archive of yesterday")
    assert process.returncode == -signal.SIGKILL
    assert archive.read_bytes() == b"the archive of yesterday"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_leaves_nothing_else(
    tmp_path: Path,
    weights: Path,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the moment in which torch-model-archiver would begin."""
    archive = tmp_path / "model_store" / "resnet-18.mar"
    archive.parent.mkdir()
    archive.write_bytes(b"the archive of yesterday")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: signal.raise_signal(number))
    assert create_mar_file.main(["--weights", str(weights)]) == 130
    assert capsys.readouterr().err == "create_mar_file.py: interrupted\n"
    assert list(archive.parent.iterdir()) == [archive]
    assert archive.read_bytes() == b"the archive of yesterday"


def test_two_at_once_do_not_meet(tmp_path: Path, weights: Path) -> None:
    state = torch.load(weights)
    torch.save(state | {"fc.bias": state["fc.bias"] + 1}, tmp_path / "others.pth")
    both = [weights, tmp_path / "others.pth"]
    with ThreadPoolExecutor(2) as threads:
        done = list(threads.map(lambda path: run("create_mar_file.py", "--weights", path, cwd=tmp_path), both))
    assert [each.returncode for each in done] == [0, 0]
    assert [path.name for path in (tmp_path / "model_store").iterdir()] == ["resnet-18.mar"]
    with zipfile.ZipFile(tmp_path / "model_store" / "resnet-18.mar") as mar:
        assert mar.testzip() is None
        with mar.open("resnet-18.pth") as file:
            bias = torch.load(file, weights_only=True)["fc.bias"]
    assert any(torch.equal(bias, torch.load(path)["fc.bias"]) for path in both)


@needs("unshare")
@pytest.mark.parametrize(
    ("options", "reason"),
    [("size=30m", "No space left on device"), ("size=70m", "No space left on device"), ("ro", "Read-only file system")],
)
def test_disk_that_takes_no_archive_is_one_line(tmp_path: Path, weights: Path, options: str, reason: str) -> None:
    """Full when the weights are written, full when the archive is, and read-only."""
    (tmp_path / "model_store").mkdir()
    script = f"""
        mount -t tmpfs -o size=70m tmpfs model_store && echo yesterday > model_store/resnet-18.mar || exit 9
        mount -o remount,{options} model_store || exit 9
        "{sys.executable}" "{PROJECT}/create_mar_file.py" --weights "{weights}"
        code=$?
        ls -A model_store
        cat model_store/resnet-18.mar
        exit $code
    """
    done = subprocess.run([*ISOLATED, "bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert done.stdout == "resnet-18.mar\nyesterday\n"
    assert reason in done.stderr
    assert done.stderr.startswith("create_mar_file.py: ")
    assert len(done.stderr.splitlines()) == 1
