"""The command lines: wrong usage, the types and defaults of the flags, and that docs/options.md has all of them."""

import math
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

import create_mar_file
from docs.make_options import PAGE, options_page
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
        (["--server-wait", "inf"], "expected seconds, got 'inf'"),
        (["--log-every", "x"], "expected a whole number from 1"),
        (["--url", "127.0.0.1:8080"], "expected http://host:port"),
        (["--url", "http://user:password@127.0.0.1:8080"], "without user or password"),
        (["--url", "http://127.0.0.1:99999"], "expected http://host:port"),
        (["--management-url", "http://10.0.0.1:8081"], "expected an address on the host of --url, 127.0.0.1"),
        (["--fps", "0"], "expected frames a second from 0.001, or max, got '0'"),
        (["--fps", "abc"], "expected frames a second from 0.001, or max, got 'abc'"),
        (["--max-age", "0"], "expected milliseconds from 1, got '0'"),
        (["--max-age", "nan"], "expected milliseconds from 1, got 'nan'"),
        (["--jpeg-quality", "101"], "expected 1 to 100"),
        (["--skip-static", "0"], "expected a percentage from 0.01 to 100, got '0'"),
        (["--drop", "some"], "invalid choice: 'some'"),
        (["--input", "rstp://admin:hunter2@cam/live"], "got 'rstp://cam/live'"),
        (["--input", ""], "expected a file, a device, or an address"),
        (
            ["--save-video", "out.gif"],
            "argument --save-video: expected a name that ends in .mp4, .mkv, .avi, got 'out.gif'",
        ),
        (["--save-video", "mp4"], "argument --save-video: expected a name that ends in"),
        (["--save-video", "a.mkv", "--jsonl", "./a.mkv"], "a.mkv is an input or another output too"),
        (["--input", "1", "--input", "2", "--save-video", "a.mkv", "--jsonl", "a-2.mkv"], "another output too"),
        (["--http", "70000"], "expected a port or ADDRESS:PORT, got '70000'"),
        (["--http", "127.0.0.1"], "expected a port or ADDRESS:PORT"),
        (["--input", "rtsp://h/\udcff"], r"begins with rtsp://, http:// or https://, got 'rtsp://h/\udcff'"),
        (["--input", "/dev/vid\udcff"], r"expected a file, a device, or an address"),
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


def test_defaults() -> None:
    assert options.parse_args([]) == options.Options(
        client_batching=False,
        batch_size=4,
        input=[str(CLIP)],
        loop=False,
        fps=None,
        drop=None,
        max_age_s=math.inf,
        static_percent=0.0,
        resize=None,
        jpeg_quality=95,
        require_cameras=False,
        stall_timeout_s=5.0,
        url="http://127.0.0.1:8080",
        model=["resnet-18"],
        token_file=None,
        management_url="http://127.0.0.1:8081",
        server_wait_s=30.0,
        max_in_flight=None,
        check=False,
        log_every=20,
        quiet=False,
        jsonl=None,
        save_video=None,
        http=None,
    )


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--max-age", "300"], "max_age_s", 0.3),
        (["--fps", "5"], "fps", 5.0),
        (["--fps", "max"], "fps", math.inf),
        (["--server-wait", "0"], "server_wait_s", 0.0),
        (["--batch_size", "10"], "batch_size", 10),
        (["--batch-size", "10"], "batch_size", 10),
        (["--input", "0", "--input", "rtsp://cam/live"], "input", ["0", "rtsp://cam/live"]),
        (["--drop", "newest"], "drop", "newest"),
        (["--skip-static"], "static_percent", 0.5),
        (["--skip-static", "2"], "static_percent", 2.0),
        (["--skip-static", "--quiet"], "static_percent", 0.5),
        (["--resize", "256"], "resize", 256),
        (["--jpeg-quality", "80"], "jpeg_quality", 80),
        (["--url", "https://server/"], "url", "https://server"),
        (["--token-file", "keys/key_file.json"], "token_file", Path("keys/key_file.json")),
        (["--save-video", "out.MP4"], "save_video", Path("out.MP4")),
        (["--jsonl", "-"], "jsonl", "-"),
        (["--http", "9000"], "http", ("127.0.0.1", 9000)),
        (["--http", "0.0.0.0:9000"], "http", ("0.0.0.0", 9000)),
        (["--http", "[::1]:9000"], "http", ("::1", 9000)),
        (["--metrics-port", "9000"], "http", ("127.0.0.1", 9000)),  # its name until 2026
        (["--max-in-flight", "2"], "max_in_flight", 2),
        (["--model", "a", "--model", "b"], "model", ["a", "b"]),
        # The API key is sent only to the host that gets the token as well.
        (["--url", "http://localhost:8080"], "management_url", "http://127.0.0.1:8081"),
        (["--url", "http://10.0.0.1:8080"], "management_url", None),
        (["--url", "http://a:1", "--management-url", "https://a:2"], "management_url", "https://a:2"),
        (["--jsonl", "-"], "video_paths", []),
        (["--save-video", "a/out.mp4"], "video_paths", [Path("a/out.mp4")]),
        (
            ["--save-video", "a/out.v2.mp4", "--input", "0", "--input", "1"],
            "video_paths",
            [Path("a/out.v2-1.mp4"), Path("a/out.v2-2.mp4")],
        ),
    ],
)
def test_values_of_flags(flags: list[str], name: str, value: Any) -> None:
    found = getattr(options.parse_args(flags), name)
    assert found == value
    assert type(found) is type(value)


def test_input_may_begin_with_a_hyphen(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", "-x.mp4", "--loop", "--input=-y.mp4", "--input", "z.mp4"]
    assert options.parse_args(arguments).input == ["-x.mp4", "-y.mp4", "z.mp4"]
    assert "expected one argument" in usage_error(["--input", "--loop"], capsys)


def test_options_cannot_be_changed() -> None:
    parsed = options.parse_args([])
    for field in fields(parsed):
        with pytest.raises(FrozenInstanceError):
            setattr(parsed, field.name, None)


def test_the_page_of_options_is_that_of_the_parsers() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == options_page(), "run `make options`"
    for parser in (create_mar_file.new_parser(), options.new_parser()):
        flags = re.findall(r"--[a-z][a-z_-]+", parser.format_help())
        assert len(flags) >= 6
        assert [flag for flag in flags if flag != "--help" and f"`{flag}" not in page] == []
    for flag in ("--client-batching", "--force", "--quiet", "--jsonl FILE", "--skip-static [PERCENT]"):
        assert f"| `{flag}` |" in page
