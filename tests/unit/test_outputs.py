"""edge/outputs.py: what is printed and written, and what happens when that fails."""

import errno
import json
import logging
import os
import signal
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from edge.cameras import Camera
from edge.errors import OutputError
from edge.frames import Frame, Result
from edge.options import parse_args
from edge.outputs import JsonLines, Output, Outputs, Terminal
from tests.support.frames import CLIP
from tests.support.results import CAT, FILE, LIVE, MODEL, dropped, result
from tests.support.scripts import outputs


class Recorder(Output):
    """Remembers the calls; the n-th call of a method fails if there is an error for it, and so do those after it."""

    def __init__(self, name: str, error: Exception | None = None, fails_at: tuple[str, int] = ("write", 1)) -> None:
        self.name = name
        self.calls: list[str] = []
        self.written: list[Result] = []
        self._error, self._fails_at = error, fails_at

    def write(self, result: Result) -> None:
        self.written.append(result)
        self._call("write")

    def poll(self) -> None:
        self._call("poll")

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str) -> None:
        self.calls.append(method)
        if self._error and method == self._fails_at[0] and self.calls.count(method) >= self._fails_at[1]:
            raise self._error


RESULTS = [result(number) for number in range(1, 4)]
CALLS = ["write", "poll", "write", "poll", "write", "poll", "close"]


def write_all(all_outputs: Outputs) -> None:
    for each in RESULTS:
        all_outputs.write(each)
        all_outputs.poll()
    all_outputs.close()


@pytest.mark.parametrize(
    ("fails_at", "calls"),
    [
        (("write", 1), [*CALLS[:1], "close"]),
        (("write", 2), [*CALLS[:3], "close"]),
        (("poll", 1), [*CALLS[:2], "close"]),
        (("close", 1), [*CALLS, "close"]),
    ],
)
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "OSError: [Errno 28] No space left on device"),
        (RuntimeError("a bug"), "RuntimeError: a bug"),
        (RuntimeError("two\n  lines"), "RuntimeError: two lines"),
    ],
)
def test_an_output_that_fails_is_removed_and_reported_once_and_the_others_get_everything(
    caplog: pytest.LogCaptureFixture, fails_at: tuple[str, int], calls: list[str], error: Exception, message: str
) -> None:
    first, failing, last = Recorder("first"), Recorder("out.jsonl", error, fails_at), Recorder("last")
    stop = threading.Event()
    all_outputs = Outputs([first, failing, last], stop)
    assert not all_outputs.has_failed
    with caplog.at_level(logging.INFO):
        write_all(all_outputs)
    assert all_outputs.has_failed
    assert caplog.messages == [f"out.jsonl fails, going on without it: {message}"]
    assert failing.calls == calls
    for other in (first, last):
        assert other.calls == CALLS
        assert other.written == RESULTS
    assert not stop.is_set()


def test_two_outputs_that_fail_at_once_are_both_reported(caplog: pytest.LogCaptureFixture) -> None:
    first, second, last = Recorder("first", OSError("x")), Recorder("second", OSError("y")), Recorder("last")
    write_all(Outputs([first, second, last], threading.Event()))
    assert caplog.messages == [
        "first fails, going on without it: OSError: x",
        "second fails, going on without it: OSError: y",
    ]
    assert first.calls == second.calls == ["write", "close"]
    assert last.written == RESULTS


@pytest.mark.parametrize("method", ["write", "poll", "close"])
def test_a_reader_that_has_left_ends_the_run_silently(caplog: pytest.LogCaptureFixture, method: str) -> None:
    """As with `request.py | head`."""
    stop = threading.Event()
    pipe, other = Recorder("standard output", BrokenPipeError(), (method, 1)), Recorder("other")
    all_outputs = Outputs([pipe, other], stop)
    with caplog.at_level(logging.DEBUG):
        write_all(all_outputs)
    assert stop.is_set()
    assert all_outputs.has_failed
    assert caplog.messages == []
    assert pipe.calls == [*CALLS[: CALLS.index(method) + 1], "close"]
    assert other.calls == CALLS


def test_outputs_that_do_not_fail_have_not_failed(caplog: pytest.LogCaptureFixture) -> None:
    all_outputs = Outputs([Recorder("first"), Recorder("second")], threading.Event())
    write_all(all_outputs)
    assert not all_outputs.has_failed
    assert caplog.messages == []
    write_all(Outputs([], threading.Event()))


STEADY = [100 + 0.1 * number for number in range(1, 21)]  # the first frame is captured at 100.0 s
SLOWER = [100 + 0.1 * number for number in range(1, 101)] + [110.0 + number for number in range(1, 21)]


@pytest.mark.parametrize(
    ("answered_at", "failed", "expected"),
    [
        (STEADY, set(), [10.0, 10.0]),
        (STEADY, set(range(2, 21, 2)), [5.0, 5.0]),  # Failed frames take their time, and do not count.
        (SLOWER, set(), [10.0] * 10 + [1.0, 1.0]),  # Only the last 10 s count.
    ],
    ids=["steady", "half of them failed", "slower"],
)
def test_fps_is_answered_frames_over_time(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answered_at: list[float],
    failed: set[int],
    expected: list[float],
) -> None:
    terminal = Terminal(parse_args(["--log-every", "10"]))
    for number, now in enumerate(answered_at, start=1):
        monkeypatch.setattr("time.monotonic", lambda now=now: now)
        frame = Frame(FILE, number, now - 0.1, b"", order=number)
        terminal.write(Result.failed(frame, "x") if number in failed else Result(frame, "answered", CAT))
    terminal.close()
    assert [output.fps for output in outputs(capsys.readouterr().out)] == pytest.approx(expected, abs=0.051)


def test_terminal_prints_the_last_predictions_once(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(parse_args(["--client-batching", "--batch-size", "3", "--log-every", "1"]))
    for number in range(1, 6):
        frame = Frame(FILE, number, 0.0, b"", None, MODEL, number)
        terminal.write(dropped(number) if number == 2 else Result(frame, "answered", {"x": number}))
    terminal.write(dropped(6))
    terminal.close()
    terminal.close()
    printed = outputs(capsys.readouterr().out)
    assert [(output.number, output.answers) for output in printed] == [
        (3, [[{"x": 1}, {"x": 3}]]),
        (6, [[{"x": 4}, {"x": 5}]]),
    ]


def test_terminal_prints_the_name_of_the_camera(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(parse_args(["--batch-size", "1", "--log-every", "2", "--input", "a.mp4", "--input", "b.mp4"]))
    for number in (1, 2):
        terminal.write(result(number, FILE))
        terminal.write(result(number, LIVE))
    printed = capsys.readouterr().out
    assert printed.startswith(f"{CLIP}\nWith Batch Size 1, FPS at frame number 2 is ")
    assert "\nrtsp://cam/live?channel=1\nWith Batch Size 1, " in printed
    assert "hunter2" not in printed


def test_json_lines(tmp_path: Path) -> None:
    output = JsonLines(str(tmp_path / "out.jsonl"))
    now = datetime.now(timezone.utc)
    output.write(result(1, LIVE, at=time.monotonic() - 100))
    output.write(dropped(2, FILE, at=time.monotonic()))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    output.close()
    assert (now - datetime.fromisoformat(lines[0].pop("captured_at"))).total_seconds() == pytest.approx(100, abs=5)
    assert abs((now - datetime.fromisoformat(lines[1].pop("captured_at"))).total_seconds()) < 5
    assert lines == [
        {
            "camera": "rtsp://cam/live?channel=1",
            "model": "resnet-18",
            "frame": 1,
            "position_s": None,
            "latency_ms": 100.0,
            "outcome": "answered",
            "predictions": CAT,
            "error": None,
        },
        {
            "camera": str(CLIP),
            "model": "resnet-18",
            "frame": 2,
            "position_s": 0.04,
            "latency_ms": None,
            "outcome": "dropped",
            "predictions": None,
            "error": "buffer full",
        },
    ]


def test_json_lines_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    output = JsonLines("-")
    for number in (1, 2):
        output.write(result(number))
    output.close()
    print("standard output is still open")
    *lines, last = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["frame"] for line in lines] == [1, 2]
    assert last == "standard output is still open"


def test_json_lines_are_complete_at_any_time(tmp_path: Path) -> None:
    """The run may end without close()."""
    output = JsonLines(str(tmp_path / "out.jsonl"))
    for number in range(1, 4):
        output.write(result(number))
        text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
        assert text.endswith("\n")
        assert [json.loads(line)["frame"] for line in text.splitlines()] == list(range(1, number + 1))
    output.close()


def test_json_lines_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"can't write .*out.jsonl: No such file or directory"):
        JsonLines(str(tmp_path / "no" / "out.jsonl"))


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["frame"] for line in path.read_text().splitlines()]


def test_json_lines_are_appended_to_those_of_an_earlier_run(tmp_path: Path) -> None:
    for number in (1, 2):
        output = JsonLines(str(tmp_path / "out.jsonl"))
        output.write(result(number))
        output.close()
    assert numbers(tmp_path / "out.jsonl") == [1, 2]


def test_json_lines_begin_a_new_line_after_half_a_line(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text('{"frame": 1}\n{"fra')
    output = JsonLines(str(tmp_path / "out.jsonl"))
    output.write(result(2))
    output.close()
    whole, half, last = (tmp_path / "out.jsonl").read_text().splitlines()
    assert (whole, half, json.loads(last)["frame"]) == ('{"frame": 1}', '{"fra', 2)


def test_json_lines_continue_at_the_start_of_a_file_that_was_truncated(tmp_path: Path) -> None:
    """As logrotate does with copytruncate."""
    output = JsonLines(str(tmp_path / "out.jsonl"))
    output.write(result(1))
    os.truncate(tmp_path / "out.jsonl", 0)
    output.write(result(2))
    output.close()
    assert numbers(tmp_path / "out.jsonl") == [2]


@pytest.mark.skipif(sys.platform == "win32", reason="locks are of POSIX")
def test_file_that_another_run_is_writing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = JsonLines(str(path))
    first.write(result(1))
    with pytest.raises(OutputError, match=r"out.jsonl: another run is writing it, expected a file of its own"):
        JsonLines(str(path))
    first.write(result(2))
    first.close()
    assert numbers(path) == [1, 2]
    JsonLines(str(path)).close()


@pytest.mark.skipif(sys.platform == "win32", reason="limits are of POSIX")
def test_json_lines_that_do_not_fit_leave_whole_lines(tmp_path: Path) -> None:
    import resource  # Windows has none.

    output = JsonLines(str(tmp_path / "out.jsonl"))
    output.write(result(1))
    size = (tmp_path / "out.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left on device"):
            output.write(result(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert numbers(tmp_path / "out.jsonl") == [1]
    output.write(result(3))
    output.close()
    assert numbers(tmp_path / "out.jsonl") == [1, 3]


def test_only_outputs_that_need_images_get_them() -> None:
    class Images(Recorder):
        def needs_images(self, camera: Camera) -> bool:
            return camera is FILE

    without, needy = (
        Outputs([Recorder("a")], threading.Event()),
        Outputs([Recorder("a"), Images("b")], threading.Event()),
    )
    for camera, has_image in ((FILE, True), (LIVE, False)):
        assert bool(needy.trim(result(1, camera)).frame.jpeg) == has_image
        assert without.trim(result(1, camera)).frame.jpeg == b""
