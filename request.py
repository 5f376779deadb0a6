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
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Any, NoReturn

from tqdm.contrib.logging import logging_redirect_tqdm

from edge.buffer import BATCH_WAIT_S, Buffer, DropPolicy, InOrder
from edge.cameras import Camera, Frame, SourceError
from edge.check import check
from edge.client import TorchServe
from edge.metrics import metrics_page
from edge.options import parse_args
from edge.retries import ServerError
from edge.sinks import JsonLines, Progress, Sink, SinkError, Terminal, Video, Window
from edge.stats import Books, Outcome, Result, table

FRAMES_WAITING = 4  # of each camera, or a JSON batch if that is more: enough for a hiccup, little enough to stay fresh
RESULTS_WAITING = 100  # Beyond that, a slow sink slows down everything before it.
LEAD = 4  # So many times the frames in flight may a camera be ahead of its latest result.
CHECK_PATIENCE_S = 2.0  # Whoever looks wants to know how it is now.
POLL_S = 0.1
STOP_TIMEOUT_S = 10.0  # for a camera that hangs in the driver

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
    books: dict[Camera, Books], server: TorchServe, sinks: list[Sink], args: argparse.Namespace, stop: threading.Event
) -> int:
    """Run the pipeline until all files have ended or `stop` is set, and print the books.

    Returns 0, or 1 if a frame failed or a sink did. Raises SourceError if a file can't be read, ServerError if a file
    has waited for the server long enough; the books are closed and printed before.
    """
    orders = {camera: InOrder() for camera in books}
    policies: dict[Camera, DropPolicy] = {
        camera: args.drop or ("oldest" if camera.is_live else "none") for camera in books
    }
    lead = LEAD * args.max_in_flight * per_request(args)
    buffer = Buffer(max(FRAMES_WAITING, args.batch_size), policies, stop, lead, min(BATCH_WAIT_S, args.max_age / 2))
    results: queue.Queue[Result | End] = queue.Queue(RESULTS_WAITING)

    def deliver(result: Result) -> None:
        needs_picture = args.show or args.save_video
        results.put(result if needs_picture else replace(result, frame=replace(result.frame, jpeg=b"")))

    works: list[tuple[Any, ...]] = [
        (f"reader of {camera.name}", read, camera, book, buffer, deliver, stop) for camera, book in books.items()
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
            f"{server.url} gave no answer for {args.server_wait:g} s ({server.health.trouble}): see the server's logs"
        )
    for error in unforeseen + errors:
        raise error
    return 1 if len(sinks) < all_sinks or any(book.outcomes["failed"] for book in books.values()) else 0


def per_request(args: argparse.Namespace) -> int:
    """Return the number of frames in a request."""
    return int(args.batch_size) if args.client_batching else 1


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for output in (sys.stdout, sys.stderr):
        output.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # A name may have any letters.
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, force=True)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # It tells every attempt; edge.retries tells the trouble once.
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
    books = {camera: Books() for camera in cameras}
    try:
        with (
            logging_redirect_tqdm(),
            metrics_page(None if args.check else args.metrics_port, books),
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
                code = 0 if stop.is_set() else stream(books, server, open_sinks(cameras, args, stop), args, stop)
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
