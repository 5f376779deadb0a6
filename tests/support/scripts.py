"""The project's scripts, run as a user runs them, and what they print and write."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

from demo.node import PROJECT, Node

MODEL = "efficientnet-lite0"
OUTCOMES = ("answered", "failed", "dropped", "expired", "unchanged")
CLIP_MODEL = "r3d-18"  # It gets 15 frames a second of those that are read.


def wait_until(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    """Wait for a condition. The timeout only keeps a test from hanging; it says nothing about the machine's speed."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not so within {timeout_s:g} s"
        time.sleep(0.05)


def run(
    script: str, *arguments: str | Path, cwd: Path, environment: dict[str, str] | None = None, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run one of the project's scripts in a directory, as a user would, whatever it returns."""
    return subprocess.run(
        [sys.executable, str(PROJECT / script), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@dataclass(frozen=True)
class Output:
    """One output of request.py: the line with the rate, and the predictions below it."""

    batch_size: int
    number: int
    fps: float
    answers: list[Any]


def outputs(stdout: str) -> list[Output]:
    """Parse all that request.py printed on standard output. Fails for anything that the README does not describe."""
    found = []
    decoder = json.JSONDecoder()
    while stdout:
        line = re.match(r"With Batch Size (\d+), FPS at frame number (\d+) is (\d+\.\d)\n", stdout)
        assert line, f"not an output of request.py: {stdout[:200]!r}"
        stdout = stdout[line.end() :]
        answers = []
        while stdout and not stdout.startswith("With"):
            answer, end = decoder.raw_decode(stdout)
            assert stdout[:end] == json.dumps(answer, indent=2)
            answers.append(answer)
            stdout = stdout[end:].removeprefix("\n")
        found.append(Output(int(line[1]), int(line[2]), float(line[3]), answers))
    return found


def summary(stderr: str) -> dict[str, dict[str, str]]:
    """Return the summary that request.py printed at its end: camera -> column -> cell; check that its counts add up.

    With several models the keys are "camera, model".
    """
    lines = stderr.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("camera "))
    columns = re.split(r" {2,}", lines[start])
    rows = []
    for line in lines[start + 1 :]:
        cells = re.split(r" {2,}", line)
        if len(cells) != len(columns):
            break
        row = dict(zip(columns, cells, strict=True))
        assert int(row["captured"]) == sum(int(row[name]) for name in OUTCOMES)
        rows.append(row)
    has_models = len({row["model"] for row in rows}) > 1
    return {f"{row['camera']}, {row['model']}" if has_models else row["camera"]: row for row in rows}


def json_lines(path: Path, has_gaps: bool = False) -> list[dict[str, Any]]:
    """Return what --jsonl wrote, and check that the frames of each camera and model are there once and in order."""
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]  # The last line may just be being written.
    lines = [json.loads(line, parse_constant=pytest.fail) for line in whole.splitlines()]
    numbers: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        assert list(line) == [
            "camera",
            "model",
            "frame",
            "captured_at",
            "position_s",
            "latency_ms",
            "outcome",
            "predictions",
            "error",
        ]
        assert (line["outcome"] == "answered") == (line["predictions"] is not None)
        assert (line["outcome"] in ("answered", "unchanged")) == (line["error"] is None)
        assert (line["outcome"] == "answered") == (line["latency_ms"] is not None)
        assert datetime.fromisoformat(line["captured_at"]).utcoffset() == timedelta(0)
        numbers.setdefault((line["camera"], line["model"]), []).append(line["frame"])
    for (_, model), found in numbers.items():
        assert found == sorted(set(found)) if has_gaps or model == CLIP_MODEL else list(range(1, len(found) + 1))
    return lines


class Run:
    """A request.py that runs, with its outputs in files."""

    def __init__(self, process: psutil.Popen, folder: Path) -> None:
        self.process = process
        self.output = folder / "out.jsonl"
        self._errors = folder / "errors"
        self._results: list[dict[str, Any]] = []
        self._position = 0  # in the output: everything before it has been read

    def results(self) -> list[dict[str, Any]]:
        """Return all lines of the output so far. Each call reads only the new ones."""
        if self.output.exists():
            with self.output.open("rb") as file:
                file.seek(self._position)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._results += map(json.loads, whole.split(b"\n"))
                self._position += len(whole) + 1
        return self._results

    def answered(self, camera: str, since: float = 0.0) -> list[float]:
        """Return when the frames of a camera were answered that were captured since then, seconds since the epoch."""
        found = []
        for line in self.results():
            if line["camera"] == camera and line["outcome"] == "answered":
                captured = datetime.fromisoformat(line["captured_at"]).timestamp()
                if captured >= since:
                    found.append(captured + line["latency_ms"] / 1000)
        return found

    def lines(self) -> int:
        return len(self.results())

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; it must come true before the process ends."""
        wait_until(lambda: condition() or self.process.poll() is not None)
        assert condition(), self.stderr()

    def stderr(self) -> str:
        return self._errors.read_text()

    def end(self, number: signal.Signals = signal.SIGINT) -> dict[str, dict[str, str]]:
        """Interrupt it; return its summary, whose counts must be those of its JSON lines."""
        self.process.send_signal(number)
        assert self.process.wait(timeout=120) == 130, self.stderr()
        found = summary(self.stderr())
        assert self.output.read_bytes()[-1:] in (b"", b"\n")
        lines = [(line["camera"], line["model"], line["outcome"]) for line in json_lines(self.output)]
        for row in found.values():
            for outcome in OUTCOMES:
                assert lines.count((row["camera"], row["model"], outcome)) == int(row[outcome])
        return found


class Server(Protocol):
    """A server that request.py streams to."""

    @property
    def url(self) -> str: ...


@contextmanager
def running(
    node: Server, folder: Path, *arguments: str | Path, environment: dict[str, str] | None = None
) -> Iterator[Run]:
    """Run request.py until the block ends. The arguments given override the default ones."""
    command = [sys.executable, str(PROJECT / "request.py"), "--url", node.url, "--quiet"]
    command += ["--jsonl", str(folder / "out.jsonl")]
    if isinstance(node, Node):
        command += ["--token-file", str(node.folder / "key_file.json")]
        command += [] if "--model" in arguments else ["--model", MODEL]
    command += map(str, arguments)
    with (folder / "errors").open("w") as errors:
        variables = os.environ | (environment or {})
        process = psutil.Popen(command, cwd=folder, env=variables, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            yield Run(process, folder)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


@contextmanager
def started(command: Sequence[str | Path], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """Run a command with text as its output; it is killed if it outlives the block."""
    with subprocess.Popen(command, text=True, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def longest_gap(lines: list[dict[str, Any]], camera: str) -> float:
    """Return the longest time in seconds between the captures of two answered frames."""
    times = [
        datetime.fromisoformat(line["captured_at"])
        for line in lines
        if line["camera"] == camera and line["outcome"] == "answered"
    ]
    return max((after - before).total_seconds() for before, after in itertools.pairwise(times))
