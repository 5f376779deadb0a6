"""The command lines: what is refused, and that every flag is in the README."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

import create_mar_file
from demo.node import PROJECT
from edge import options
from tests.support.frames import CLIP


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the last line that wrong usage of request.py prints; all of it is free of passwords."""
    with pytest.raises(SystemExit) as exit_:
        options.parse_args(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "hunter2" not in printed.err
    return printed.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "expected a whole number from 1"),
        (["--server-wait", "-1"], "expected seconds, got '-1'"),
        (["--log-every", "x"], "expected a whole number from 1"),
        (["--url", "127.0.0.1:8080"], "expected http://host:port"),
        (["--url", "http://user:password@127.0.0.1:8080"], "without user or password"),
        (["--url", "http://127.0.0.1:99999"], "expected http://host:port"),
        (["--management-url", "http://10.0.0.1:8081"], "expected an address on the host of --url, 127.0.0.1"),
        (["--fps", "abc"], "expected frames a second from 0.001, or max, got 'abc'"),
        (["--max-age", "0"], "expected milliseconds from 1, got '0'"),
        (["--jpeg-quality", "101"], "expected 1 to 100"),
        (["--drop", "some"], "invalid choice: 'some'"),
        (["--input", "rstp://admin:hunter2@cam/live"], "got 'rstp://cam/live'"),
        (["--input", ""], "expected a file, a device, or an address"),
        (["--save-video", "out.gif"], "expected a name that ends in .mp4, .mkv, .avi"),
        (["--save-video", "a.mkv", "--jsonl", "./a.mkv"], "a.mkv is an input or another output too"),
        (["--input", "1", "--input", "2", "--save-video", "a.mkv", "--jsonl", "a-2.mkv"], "another output too"),
        (["--metrics-port", "70000"], "expected a port or ADDRESS:PORT, got '70000'"),
        (["--metrics-port", "127.0.0.1"], "expected a port or ADDRESS:PORT"),
    ],
)
def test_wrong_usage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in usage_error(flags, capsys)


@pytest.mark.parametrize("flag", ["--jsonl", "--save-video"])
def test_output_never_overwrites_an_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    monkeypatch.chdir(tmp_path)
    video = tmp_path / "mine.mp4"
    video.write_bytes(CLIP.read_bytes())
    (tmp_path / "link.mp4").symlink_to(video)
    for output in ("mine.mp4", "link.mp4"):
        error = usage_error(["--input", str(video), flag, output], capsys)
        assert "is an input or another output too" in error
    assert video.read_bytes() == CLIP.read_bytes()


@pytest.mark.parametrize(
    "parse_args", [create_mar_file.parse_args, options.parse_args], ids=["create_mar_file.py", "request.py"]
)
def test_flags_are_all_in_the_readme(
    parse_args: Callable[[list[str]], object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse_args(["--help"])
    flags = set(re.findall(r"--[a-z][a-z_-]+", capsys.readouterr().out)) - {"--help"}
    assert len(flags) >= 4
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert [flag for flag in sorted(flags) if f"`{flag}" not in readme] == []
