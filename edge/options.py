"""The command line of request.py: `request.py --help`."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from edge.frames import DropPolicy
from edge.sources import redact

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample_video.mp4"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
# H.264, which browsers play, where OpenCV has an encoder for it. The others need none of the system.
VIDEO_CODECS = {".mp4": ("avc1", "mp4v"), ".mkv": ("avc1", "mp4v"), ".avi": ("MJPG",)}
# TorchServe always finds a whole batch in its queue while its workers are busy with others; with twice as many in
# flight, frames only wait longer (benchmarks/README.md).
BATCHES_IN_FLIGHT = 4
DEFAULT_MODEL = "resnet-18"


@dataclass(frozen=True)
class Options:
    """The flags. max_age_s and fps may be math.inf; static_percent is 0.0 if it is off."""

    client_batching: bool
    batch_size: int
    input: list[str]
    loop: bool
    fps: float | None
    drop: DropPolicy | None
    max_age_s: float
    static_percent: float
    resize: int | None
    jpeg_quality: int
    require_cameras: bool
    stall_timeout_s: float
    url: str
    model: list[str]
    token_file: Path | None
    management_url: str | None
    server_wait_s: float
    max_in_flight: int | None
    check: bool
    log_every: int
    quiet: bool
    jsonl: str | None
    save_video: Path | None
    http: tuple[str, int] | None

    @property
    def video_paths(self) -> list[Path]:
        """The annotated video of each camera: FILE, or with several cameras FILE-1, FILE-2, ..."""
        path, cameras = self.save_video, len(self.input)
        if path is None or cameras == 1:
            return [path] if path else []
        return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, cameras + 1)]


def parse_args(argv: list[str] | None = None) -> Options:
    """Return the options. Wrong usage ends the program with exit code 2."""
    parser = new_parser()
    arguments: list[str] = []
    for value in sys.argv[1:] if argv is None else argv:
        # argparse takes a file name that begins with - for a flag.
        if arguments and arguments[-1] == "--input" and re.match("-[^-]", value):
            arguments[-1] = f"--input={value}"
        else:
            arguments.append(value)
    return complete(parser, parser.parse_args(arguments))


def new_parser() -> argparse.ArgumentParser:
    """Return the table of flags."""
    parser = argparse.ArgumentParser(
        description="Stream cameras to TorchServe and print its predictions.",
        allow_abbrev=False,
        epilog="exit codes: 0 no frame failed; 1 a frame or an output failed; 2 wrong usage, or an output can't be "
        "opened; 3 a source can't be read; 4 the server can't be used; 130 interrupted",
    )
    add = parser.add_argument
    add("--client-batching", action="store_true", help="send JSON batches of N frames (default: one frame a request)")
    text = "frames in a JSON batch, and predictions shown at once; TorchServe's own batch size is in config.properties"
    add("--batch_size", "--batch-size", type=WHOLE, default=4, metavar="N", help=f"{text} (default: %(default)s)")

    add = parser.add_argument_group("cameras").add_argument
    text = "video file, device (0 or /dev/video0) or URL (rtsp, http, https); once for each camera"
    add("--input", action="append", type=source, metavar="SOURCE", help=f"{text} (default: the clip in data/)")
    add("--loop", action="store_true", help="repeat files forever")
    text = "frames a second: files play at this rate, live sources are sampled down to it; max: files play as fast as"
    add("--fps", type=rate, metavar="N", help=f"{text} the server responds (default: the source's own rate)")
    text = "which of its waiting frames a camera drops that is faster than the server; none: the camera waits"
    add("--drop", choices=["oldest", "newest", "none"], help=f"{text} (default: oldest of live sources, none of files)")
    text = "do not send frames that are older than this (default: no limit)"
    add("--max-age", dest="max_age_s", type=milliseconds, default=math.inf, metavar="MS", help=text)
    text = "do not send frames of which less than PERCENT %% changed since the last one that was sent, but"
    text += " at least one in 10 s (default: off; without a value %(const)g)"
    dest = "static_percent"
    add("--skip-static", nargs="?", const=0.5, type=PERCENT, default=0.0, dest=dest, metavar="PERCENT", help=text)
    add("--resize", type=WHOLE, metavar="N", help="shrink frames to a short edge of N pixels before they are sent")
    add("--jpeg-quality", type=QUALITY, default=95, metavar="N", help="1 to 100 (default: %(default)s)")
    text = "end at once if a live source can't be opened at the start (default: retry until it can)"
    add("--require-cameras", action="store_true", help=text)
    text = "a network stream without a frame for so long is opened again; a camera of few frames a second gets 3 of its"
    text += " intervals (default: %(default)g)"
    add("--stall-timeout", dest="stall_timeout_s", type=STALL, default=5.0, metavar="SECONDS", help=text)

    add = parser.add_argument_group("server").add_argument
    text = "TorchServe's inference address (default: %(default)s)"
    add("--url", type=http_url, default="http://127.0.0.1:8080", help=text)
    text = "the name of a model in TorchServe; once for each model that gets the frames"
    add("--model", action="append", metavar="NAME", help=f"{text} (default: {DEFAULT_MODEL})")
    text = "TorchServe's key file (default: the token in the variable TORCHSERVE_TOKEN, else ./key_file.json)"
    add("--token-file", type=Path, metavar="FILE", help=text)
    text = "TorchServe's management address, on the host of --url, to renew an expired token with the API key"
    text += " of the key file (default: port 8081 if --url is on this machine)"
    add("--management-url", type=http_url, metavar="URL", help=text)
    text = "how long the start, and each frame of a file, waits for a server that does not respond"
    text += "; the first prediction of a model may take 30 more (default: %(default)g)"
    add("--server-wait", dest="server_wait_s", type=SECONDS, default=30.0, metavar="SECONDS", help=text)
    text = f"requests in flight for each model (default: {BATCHES_IN_FLIGHT} JSON batches or clips; of single frames"
    text += f" {BATCHES_IN_FLIGHT} times --batch_size or TorchServe's batch size, whichever is smaller)"
    add("--max-in-flight", type=WHOLE, metavar="N", help=text)
    add("--check", action="store_true", help="test cameras, server and models, print what works, and stream nothing")

    add = parser.add_argument_group("outputs").add_argument
    text = "print predictions every N frames, at least --batch-size (default: %(default)s)"
    add("--log-every", type=WHOLE, default=20, metavar="N", help=text)
    add("--quiet", action="store_true", help="do not print predictions")
    text = "append a JSON object for each frame; - is standard output, which then has no predictions"
    add("--jsonl", metavar="FILE", help=text)
    text = "write the frames with their predictions drawn on, as .mp4, .mkv or .avi; several cameras: FILE-1, FILE-2"
    add("--save-video", type=video, metavar="FILE", help=text)
    text = "serve a web page with the cameras and the stats, and metrics for Prometheus; it has no password"
    add("--http", type=listener, metavar="[ADDRESS:]PORT", help=f"{text} (default address: 127.0.0.1)")
    add("--metrics-port", type=listener, dest="http", help=argparse.SUPPRESS)  # its name until 2026
    return parser


def complete(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Options:
    """Return the options with the defaults that depend on other flags; check the flags that exclude each other."""
    args.input = args.input or [str(SAMPLE)]
    args.model = args.model or [DEFAULT_MODEL]
    if len(set(args.model)) < len(args.model):
        parser.error("argument --model: expected different names")
    # The API key is sent only to the machine that gets the token as well.
    host = urlsplit(args.url).hostname
    if args.management_url is None and host in LOOPBACK:
        args.management_url = "http://127.0.0.1:8081"
    elif args.management_url and urlsplit(args.management_url).hostname != host:
        parser.error(f"argument --management-url: expected an address on the host of --url, {host}")
    options = Options(**vars(args))
    used = [Path(name).resolve() for name in options.input if "://" not in name]
    written = [Path(options.jsonl)] if options.jsonl not in (None, "-") else []
    for path in written + options.video_paths:
        if path.resolve() in used:
            parser.error(f"{path} is an input or another output too")
        used.append(path.resolve())
    return options


def number(expected: str, least: float, most: float, convert: Callable[[str], float] = float) -> Callable[[str], Any]:
    """Return a converter of a flag's value, which must be from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


PERCENT = number("a percentage from 0.01 to 100", 0.01, 100)
WHOLE = number("a whole number from 1", 1, sys.maxsize, int)
QUALITY = number("1 to 100", 1, 100, int)
SECONDS = number("seconds", 0, sys.float_info.max)
STALL = number("seconds from 0.1 to 3600", 0.1, 3600)


def milliseconds(text: str) -> float:
    return float(number("milliseconds from 1", 1, sys.float_info.max)(text)) / 1000


def rate(text: str) -> float:
    return math.inf if text == "max" else float(number("frames a second from 0.001, or max", 0.001, 1e9)(text))


def source(text: str) -> str:
    scheme, separator, _ = text.partition("://")
    is_unknown = separator and scheme not in ("rtsp", "rtsps", "http", "https")
    is_no_text = not text.isprintable() and (separator or text.startswith("/dev/"))  # OpenCV would crash.
    if not text or is_unknown or is_no_text:
        expected = "a file, a device, or an address that begins with rtsp://, http:// or https://"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {redact(text)!r}")
    return text


def http_url(text: str) -> str:
    try:
        url = urlsplit(text)
        requests.Request("POST", text).prepare()
        is_valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and url.username is None
    except (requests.RequestException, ValueError):
        is_valid = False
    if not is_valid:
        raise argparse.ArgumentTypeError("expected http://host:port or https://host:port, without user or password")
    return text.rstrip("/")


def video(text: str) -> Path:
    if Path(text).suffix.lower() not in VIDEO_CODECS:
        raise argparse.ArgumentTypeError(f"expected a name that ends in {', '.join(VIDEO_CODECS)}, got {text!r}")
    return Path(text)


def listener(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"expected a port or ADDRESS:PORT, got {text!r}")
    return host.strip("[]") or "127.0.0.1", int(port)
