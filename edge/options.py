"""The command line of request.py: `request.py --help`."""

import argparse
import math
from pathlib import Path
from urllib.parse import urlsplit

import requests

from edge.cameras import redact
from edge.client import LOOPBACK
from edge.sinks import SinkError, video_paths

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample_video.mp4"
# Enough that TorchServe always finds a whole batch waiting while its workers are busy with others; with twice as many,
# frames only wait longer (benchmarks/README.md).
BATCHES_IN_FLIGHT = 4


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Return the options; wrong usage ends the program with exit code 2."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
        return int(text)

    def quality(text: str) -> int:
        if whole(text) > 100:
            raise argparse.ArgumentTypeError(f"expected 1 to 100, got {text!r}")
        return int(text)

    def number(text: str, expected: str, least: float = 0.0) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    def seconds(text: str) -> float:
        return number(text, "seconds")

    def milliseconds(text: str) -> float:
        return number(text, "milliseconds from 1", 1) / 1000

    def rate(text: str) -> float:
        return math.inf if text == "max" else number(text, "frames a second from 0.001, or max", 0.001)

    def source(text: str) -> str:
        scheme = text.partition("://")[0]
        if not text or (scheme != text and scheme not in ("rtsp", "rtsps", "http", "https")):
            raise argparse.ArgumentTypeError(
                f"expected a file, a device, or an address that begins with rtsp://, http:// or https://, got "
                f"{redact(text)!r}"
            )
        return text

    def http_url(text: str) -> str:
        url = urlsplit(text)
        try:
            requests.Request("POST", text).prepare()
            is_complete = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except (requests.RequestException, ValueError):
            is_complete = False
        if not is_complete or url.username is not None:
            raise argparse.ArgumentTypeError("expected http://host:port or https://host:port, without user or password")
        return text.rstrip("/")

    def listener(text: str) -> tuple[str, int]:
        host, _, port = text.rpartition(":")
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise argparse.ArgumentTypeError(f"expected a port or ADDRESS:PORT, got {text!r}")
        return host.strip("[]") or "127.0.0.1", int(port)

    parser = argparse.ArgumentParser(
        description="Stream cameras to TorchServe and tell what it sees.",
        allow_abbrev=False,
        epilog="exit codes: 0 every frame was answered, or dropped as it was asked for, 1 some failed, or an output "
        "did, 2 wrong usage, 3 a source can't be read, 4 the server can't be used, 130 interrupted",
    )
    parser.add_argument(
        "--client-batching",
        action="store_true",
        help="send JSON batches of N frames (default: each frame is a request of its own, which TorchServe batches)",
    )
    parser.add_argument(
        "--batch_size",
        "--batch-size",
        type=whole,
        default=4,
        metavar="N",
        help="frames in a JSON batch; without --client-batching only how many answers are shown, since TorchServe's "
        "own batch size is set in config.properties (default: %(default)s)",
    )

    cameras = parser.add_argument_group("cameras")
    cameras.add_argument(
        "--input",
        action="append",
        type=source,
        metavar="SOURCE",
        help="a video file, a device such as 0 or /dev/video0, or the URL of a stream (rtsp, http, https); once for "
        "each camera (default: the clip in data/)",
    )
    cameras.add_argument("--loop", action="store_true", help="repeat files for ever")
    cameras.add_argument(
        "--fps",
        type=rate,
        metavar="N",
        help="frames a second: a file plays at this rate, a live source is sampled down to it; max: a file goes as "
        "fast as the server answers (default: the source's own rate)",
    )
    cameras.add_argument(
        "--drop",
        choices=["oldest", "newest", "none"],
        help="what to drop of a camera that is faster than the server: the oldest or the newest of the frames that "
        "wait, or none, then the camera waits (default: oldest of live sources, none of files)",
    )
    cameras.add_argument(
        "--max-age",
        type=milliseconds,
        default=math.inf,
        metavar="MS",
        help="do not send frames that are older than this when their turn comes (default: no limit)",
    )
    cameras.add_argument(
        "--resize", type=whole, metavar="N", help="shrink frames to a short edge of N pixels before they are sent"
    )
    cameras.add_argument(
        "--jpeg-quality", type=quality, default=95, metavar="N", help="1 to 100 (default: %(default)s)"
    )
    cameras.add_argument(
        "--require-cameras",
        action="store_true",
        help="end at once if a live source can't be opened at the start (default: try until it can)",
    )

    server = parser.add_argument_group("server")
    server.add_argument(
        "--url",
        type=http_url,
        default="http://127.0.0.1:8080",
        help="TorchServe's inference address (default: %(default)s)",
    )
    server.add_argument("--model", default="resnet-18", help="the model's name in TorchServe (default: %(default)s)")
    server.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="TorchServe's key file (default: the token in the variable TORCHSERVE_TOKEN, else ./key_file.json)",
    )
    server.add_argument(
        "--management-url",
        type=http_url,
        metavar="URL",
        help="TorchServe's management address, on the host of --url, where an expired token is renewed with the API "
        "key of the key file (default: http://127.0.0.1:8081 if --url is on this machine, else none)",
    )
    server.add_argument(
        "--server-wait",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long to wait for a server that is not up, and how long a file waits for one that went away "
        "(default: %(default)g)",
    )
    server.add_argument(
        "--max-in-flight",
        type=whole,
        metavar="N",
        help=f"most requests without an answer yet (default: {BATCHES_IN_FLIGHT} JSON batches, or "
        f"{BATCHES_IN_FLIGHT} times --batch-size single frames)",
    )
    server.add_argument(
        "--check", action="store_true", help="look at cameras and server, tell what works, and stream nothing"
    )

    outputs = parser.add_argument_group("outputs")
    outputs.add_argument(
        "--log-every",
        type=whole,
        default=20,
        metavar="N",
        help="frames from one output to the next, at least --batch-size (default: %(default)s)",
    )
    outputs.add_argument("--quiet", action="store_true", help="do not print answers")
    outputs.add_argument(
        "--jsonl",
        metavar="FILE",
        help="write a JSON object for each frame; - is standard output, and no answers are printed then",
    )
    outputs.add_argument(
        "--save-video",
        type=Path,
        metavar="FILE",
        help="write the frames with their labels drawn on, as .mp4, .mkv or .avi; several cameras: FILE-1, FILE-2",
    )
    outputs.add_argument(
        "--metrics-port",
        type=listener,
        metavar="[ADDRESS:]N",
        help="serve the books to Prometheus at port N, of 127.0.0.1 unless an address is given",
    )
    outputs.add_argument("--show", action="store_true", help="show the frames with their labels in a window; q quits")

    args = parser.parse_args(argv)
    args.input = args.input or [str(SAMPLE)]
    if args.max_in_flight is None:
        # The same number of frames on their way in both ways of batching.
        args.max_in_flight = BATCHES_IN_FLIGHT if args.client_batching else BATCHES_IN_FLIGHT * args.batch_size
    # The API key goes nowhere but to the machine that has the token too.
    host = urlsplit(args.url).hostname
    if args.management_url is None and host in LOOPBACK:
        args.management_url = "http://127.0.0.1:8081"
    elif args.management_url and urlsplit(args.management_url).hostname != host:
        parser.error(f"argument --management-url: expected an address on the host of --url, {host}")
    # An output must not be another one, nor what is read.
    written = [Path(args.jsonl)] if args.jsonl not in (None, "-") else []
    try:
        written += video_paths(args.save_video, len(args.input)) if args.save_video else []
    except SinkError as error:
        parser.error(str(error))
    taken = [Path(name).resolve() for name in args.input if "://" not in name]
    for path in written:
        if path.resolve() in taken:
            parser.error(f"{path} is an input or another output too")
        taken.append(path.resolve())
    return args
