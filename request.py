"""Stream cameras to TorchServe and tell what it sees: the program of an edge device.

Each camera has a reader thread, which reads frames with OpenCV and encodes them as JPEG. One sender thread takes them
from the cameras in turn and posts them to TorchServe without waiting for answers: each frame as a request of its own,
which TorchServe gathers into batches, or, with --client-batching, n frames as one JSON batch. The main thread puts the
results of each camera into frame order and gives them to the sinks.

    cameras -> reader threads -> buffer -> sender thread -> requests in flight -> main thread -> sinks

Every frame that was captured gets one result: answered, failed, dropped or expired. Answers go to standard output, all
else to standard error. Exit codes: 0 every frame was answered, or dropped as it was asked for, 1 some failed, or an
output did, 2 wrong usage, 3 a source can't be read, 4 the server can't be used, 130 interrupted.
"""

import argparse
import logging
import math
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import methodcaller
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import requests
from tqdm.contrib.logging import logging_redirect_tqdm

from edge.buffer import BATCH_WAIT_S, Buffer, DropPolicy, InOrder
from edge.cameras import Camera, Frame, SourceError, redact
from edge.check import check
from edge.client import ServerError, TorchServe
from edge.sinks import JsonLines, Progress, Sink, SinkError, Terminal, Video, Window, video_paths
from edge.stats import Books, Outcome, Result, table

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "data" / "sample_video.mp4"
# Enough that TorchServe always finds a whole batch waiting while its workers are busy with others.
BATCHES_IN_FLIGHT = 4
FRAMES_WAITING = 4  # of each camera, or a JSON batch if that is more: enough for a hiccup, little enough to stay fresh
RESULTS_WAITING = 100  # Beyond that, a slow sink slows down everything before it.
LEAD = 4  # So many times the frames in flight may a camera be ahead of its latest result.
CHECK_PATIENCE_S = 2.0  # Whoever looks wants to know how it is now.
POLL_S = 0.1
STOP_TIMEOUT_S = 10.0  # for a camera that hangs in the driver
LOOPBACK = {"127.0.0.1", "localhost", "::1"}

log = logging.getLogger("edge")

Deliver = Callable[[Result], None]


@dataclass(frozen=True)
class End:
    """The last that comes from a thread, with what ended it."""

    error: BaseException | None


def read(camera: Camera, book: Books, buffer: Buffer, deliver: Deliver, stop: threading.Event) -> None:
    """A reader thread: put a camera's frames into the buffer, and report those that had to go."""
    try:
        for frame in camera.frames(stop):
            book.captured += 1
            if dropped := buffer.put(frame):
                deliver(unsent(dropped, "dropped", "the run ended" if stop.is_set() else "buffer full"))
    finally:
        buffer.close(camera)


def send(
    buffer: Buffer, server: TorchServe, per_request: int, max_age_s: float, deliver: Deliver, stop: threading.Event
) -> None:
    """The sender thread: post the frames, `per_request` at a time, unless they have become too old."""
    try:
        while True:
            # Room first: while frames wait for it in the buffer, the stalest can still be dropped.
            server.wait_for_room()
            frames = buffer.take(per_request)
            if not frames:
                break
            oldest, is_ending, fresh = time.monotonic() - max_age_s, stop.is_set(), []
            for frame in frames:
                if is_ending:
                    deliver(unsent(frame, "dropped", "the run ended"))
                elif frame.captured_at < oldest:
                    deliver(unsent(frame, "expired", f"older than {1000 * max_age_s:g} ms"))
                else:
                    fresh.append(frame)
            if fresh:
                server.ask(fresh, deliver)
    finally:
        server.finish()


def unsent(frame: Frame, outcome: Outcome, error: str) -> Result:
    """Return the result of a frame that was not sent, without its picture: there may be many of them."""
    return Result(replace(frame, jpeg=b""), outcome, error=error)


def run(results: "queue.Queue[Result | End]", work: Callable[..., None], *arguments: object) -> None:
    """What every thread does: its work, and then say that it has ended, and how."""
    error = None
    try:
        work(*arguments)
    except BaseException as caught:  # noqa: BLE001 - stream() raises it.
        error = caught
    results.put(End(error))


def tell(sinks: list[Sink], action: Callable[[Sink], None], stop: threading.Event) -> None:
    """Do something with every sink; one that can't be written is left out from then on."""
    for sink in list(sinks):
        try:
            action(sink)
        except BrokenPipeError:  # Whoever read our output has left, as `| head` does.
            sinks.remove(sink)
            stop.set()
        except Exception as error:  # noqa: BLE001 - One output must not end the others.
            sinks.remove(sink)
            log.error("%s fails, going on without it: %s: %s", sink.name, type(error).__name__, error)


def stream(
    cameras: Sequence[Camera], server: TorchServe, sinks: list[Sink], args: argparse.Namespace, stop: threading.Event
) -> int:
    """Run the pipeline until all files have ended or `stop` is set, and print the books.

    Returns 0, or 1 if a frame failed or a sink did. Raises SourceError if a file can't be read, ServerError if a file
    has waited for the server long enough; the books are closed and printed before.
    """
    books = {camera: Books() for camera in cameras}
    orders = {camera: InOrder() for camera in cameras}
    policies: dict[Camera, DropPolicy] = {
        camera: args.drop or ("oldest" if camera.is_live else "none") for camera in cameras
    }
    lead = LEAD * args.max_in_flight * per_request(args)
    buffer = Buffer(max(FRAMES_WAITING, args.batch_size), policies, stop, lead, min(BATCH_WAIT_S, args.max_age / 2))
    results: queue.Queue[Result | End] = queue.Queue(RESULTS_WAITING)

    def deliver(result: Result) -> None:
        needs_picture = args.show or args.save_video
        results.put(result if needs_picture else replace(result, frame=replace(result.frame, jpeg=b"")))

    works: list[tuple[Any, ...]] = [
        (f"reader of {camera.name}", read, camera, books[camera], buffer, deliver, stop) for camera in cameras
    ]
    works.append(("sender", send, buffer, server, per_request(args), args.max_age, deliver, stop))
    # Daemons, for a camera may hang in its driver for ever.
    threads = [threading.Thread(target=run, args=(results, *work), name=name, daemon=True) for name, *work in works]
    all_sinks, errors, gave_up, running, silence_s = len(sinks), [], False, len(threads), 0.0
    for thread in threads:
        thread.start()
    try:
        while running and silence_s < STOP_TIMEOUT_S:
            try:
                item = results.get(timeout=POLL_S)
            except queue.Empty:
                item = None
            silence_s = silence_s + POLL_S if item is None and stop.is_set() else 0.0
            tell(sinks, methodcaller("idle"), stop)
            if isinstance(item, End):
                running -= 1
                if isinstance(item.error, SourceError):
                    log.error("%s", item.error)  # The others go on.
                elif item.error:
                    stop.set()
                errors += [item.error] if item.error else []
            elif item:
                for result in orders[item.frame.camera].add(item):
                    camera, number = result.frame.camera, result.frame.number
                    if books[camera].add(result) and result.outcome == "failed":
                        log.warning("%s: frame %d failed: %s", camera.name, number, result.error)
                    if result.outcome != "dropped":
                        buffer.delivered(camera)
                    tell(sinks, methodcaller("show", result), stop)
                if (
                    item.outcome == "failed"
                    and not item.frame.camera.is_live
                    and server.health.is_away(args.server_wait)
                ):
                    gave_up = True
                    stop.set()
    finally:
        stop.set()
        for thread in threads:
            thread.join(POLL_S)
            if thread.is_alive():
                log.warning("the %s hangs and is left behind", thread.name)
        tell(sinks, methodcaller("close"), stop)
        print(table(books), file=sys.stderr)

    unforeseen = [error for error in errors if not isinstance(error, SourceError)]
    if gave_up and not unforeseen:
        raise ServerError(
            f"{server.url} gave no answer for {args.server_wait:g} s ({server.health.trouble}): see TorchServe's logs/"
        )
    for error in unforeseen + errors:
        raise error
    return 1 if len(sinks) < all_sinks or any(book.outcomes["failed"] for book in books.values()) else 0


def per_request(args: argparse.Namespace) -> int:
    """Return the number of frames in a request."""
    return int(args.batch_size) if args.client_batching else 1


def parse_args(argv: list[str] | None) -> argparse.Namespace:
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


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # A name may have any letters.
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, force=True)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # It tells every attempt; edge.client tells the trouble once.
    stop = threading.Event()
    was_interrupted = False
    # Windows has no SIGHUP; nohup has it ignored.
    signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    signals = [number for number in signals if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN]

    def interrupt(*_: object) -> None:
        """Stop reading and finish what is on its way; a second signal ends the program at once."""
        nonlocal was_interrupted
        was_interrupted = True
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        # In a thread: the one that was interrupted may just hold the event's lock.
        threading.Thread(target=stop.set).start()

    for number in signals:
        signal.signal(number, interrupt)
    cameras = [Camera(name, args.fps, args.loop, args.resize, args.jpeg_quality) for name in args.input]
    if len({camera.name for camera in cameras}) < len(cameras):
        log.warning("two cameras have the same name: their results can't be told apart")
    try:
        with (
            logging_redirect_tqdm(),
            TorchServe(
                args.url,
                args.model,
                args.token_file,
                args.management_url,
                args.client_batching,
                args.max_in_flight,
                min(args.server_wait, CHECK_PATIENCE_S) if args.check else args.server_wait,
                stop,
            ) as server,
        ):
            if args.check:
                code = check(cameras, server, per_request(args), args.max_in_flight)
            else:
                for camera in cameras:
                    if args.require_cameras or not camera.is_live:
                        camera.check()
                server.wait_until_ready(min(args.server_wait, args.max_age))
                code = 0 if stop.is_set() else stream(cameras, server, open_sinks(cameras, args, stop), args, stop)
    except SinkError as error:
        print(f"request.py: {error}", file=sys.stderr)
        code = 2
    except SourceError as error:
        print(f"request.py: {error}", file=sys.stderr)
        code = 3
    except ServerError as error:
        print(f"request.py: {error}", file=sys.stderr)
        code = 4
    return 130 if was_interrupted else code


def open_sinks(cameras: list[Camera], args: argparse.Namespace, stop: threading.Event) -> list[Sink]:
    """Return the sinks that were asked for. Raises SinkError if one can't be used."""
    sinks: list[Sink] = []
    if args.jsonl is not None:
        sinks.append(JsonLines(args.jsonl))
    if args.save_video:
        sinks.append(Video(args.save_video, cameras))
    if args.show:
        sinks.append(Window(stop))
    if not args.quiet and args.jsonl != "-":
        sinks.append(Terminal(args.batch_size, args.client_batching, args.log_every, show_names=len(cameras) > 1))
    if sys.stderr.isatty() and not args.loop and not any(camera.is_live for camera in cameras):
        sinks.append(Progress(cameras))
    return sinks


def leave(code: int) -> NoReturn:
    """End the program at once: a thread that waits for a dead camera or server would hold up sys.exit()."""
    for output in (sys.stdout, sys.stderr):
        try:
            output.flush()
        except OSError:
            code = code or 1  # Nobody reads it any more.
    os._exit(code)


if __name__ == "__main__":
    try:
        exit_code = main()
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        exit_code = 1
    leave(exit_code)
