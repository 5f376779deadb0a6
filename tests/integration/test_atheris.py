"""handler.py in a process of its own, against thousands of bodies by atheris, which looks for new paths in the code."""

import subprocess
import sys
from pathlib import Path

import pytest

from demo.node import PROJECT
from tests.support.archives import unpacked_archive


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or sys.version_info < (3, 11), reason="atheris has no wheel for it")
def test_atheris_finds_no_body_that_hurts(tmp_path: Path) -> None:
    (tmp_path / "archive").mkdir()
    folder = unpacked_archive(tmp_path / "archive")
    command = [sys.executable, "-m", "tests.support.fuzz_handler", str(folder)]
    command += ["-runs=5000", "-max_len=4096", "-seed=5", "-rss_limit_mb=4000", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=450)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 5000 runs" in done.stderr
