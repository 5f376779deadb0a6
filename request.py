"""Stream a video to TorchServe and print what it sees: the program of an edge device.

A reader thread reads frames with OpenCV and encodes them as JPEG. A sender thread posts them to TorchServe without
waiting for answers: each frame as a request of its own, which TorchServe gathers into batches, or, with
--client-batching, n frames as one JSON batch. The main thread takes the answers in frame order and prints them.

    camera -> reader thread -> buffer -> sender thread -> requests in flight -> main thread -> terminal

Predictions go to standard output, all else to standard error. Exit codes: 0 every frame was answered, 1 some were
not, 2 wrong usage, 3 the source can't be read, 4 the server can't be used, 130 interrupted.
"""

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import requests

from edge.buffer import WAKE_UP_S, Buffer
from edge.cameras import Camera, Frame, SourceError
from edge.client import Failure, NoAnswer, Prediction, ServerError, TorchServe, read_answers

HERE = Path(__file__).resolve().parent
SAMPLE = HERE / "data" / "sample_video.mp4"
# Enough that TorchServe always finds a whole batch waiting while its workers are busy with others.
BATCHES_IN_FLIGHT = 4
RATE_WINDOW_S = 10.0

# The frames of a request, and its answer to come.
Request = tuple[list[Frame], "Future[requests.Response]"]


def read(camera: Camera, buffer: Buffer[Frame], ahead: int, answering: threading.Event, stop: threading.Event) -> None:
    """The reader thread: put the camera's frames into the buffer.

    The first `ahead` frames, those of one request, go ahead alone. Until the server is `answering`, its workers may
    still be loading the model, and whatever is read meanwhile would only grow old.
    """
    try:
        for frame in camera.frames(stop):
            if not buffer.put(frame):
                break
            while frame.number == ahead and not stop.is_set() and not answering.wait(WAKE_UP_S):
                pass
    finally:
        buffer.close()


def send(buffer: Buffer[Frame], server: TorchServe, batch_size: int, as_json: bool, in_flight: Buffer[Request]) -> None:
    """The sender thread: post `batch_size` frames at a time; the last batch may be smaller."""
    frames = iter(buffer)
    try:
        while batch := list(islice(frames, batch_size)):
            if not in_flight.put((batch, server.ask(batch, as_json))):
                break
    finally:
        buffer.close()
        in_flight.close()


class Terminal:
    """Prints, every `log_every` frames, the rate of answers and the last of them.

    The rate is answered frames over time, of the last RATE_WINDOW_S seconds. The clock starts with the first answer,
    which is late when a worker had to load the model for it; if there is no other, it starts with that frame's capture.
    """

    def __init__(self, batch_size: int, as_json: bool, log_every: int) -> None:
        self._batch_size = batch_size
        self._as_json = as_json
        self._log_every = log_every
        self._number = 0
        self._start = 0.0
        self._first_rate = 0.0
        self._answered: deque[tuple[float, int]] = deque()  # when, how many frames; without the first answer
        self._last: deque[Prediction | dict[str, str]] = deque(maxlen=batch_size)
        self._is_news = False

    def show(self, frames: Sequence[Frame], answers: Sequence[Prediction | Failure]) -> None:
        """Take the answers to the next frames, in frame order."""
        now = time.monotonic()
        predictions = [answer for answer in answers if not isinstance(answer, Failure)]
        if self._number == 0:
            self._start, self._first_rate = now, len(predictions) / (now - frames[0].captured_at)
        else:
            self._answered.append((now, len(predictions)))
        is_due = frames[-1].number // self._log_every > self._number // self._log_every
        self._number = frames[-1].number
        if predictions:
            self._is_news = True
            if self._as_json:
                self._last.clear()  # One list, as it was answered.
                self._last.extend({"error": str(a)} if isinstance(a, Failure) else a for a in answers)
            else:
                self._last.extend(predictions)
        if is_due:
            self.flush()

    def flush(self) -> None:
        """Print what was answered last, if it was not printed yet."""
        if not self._is_news:
            return
        self._is_news = False
        fps = self._first_rate
        if self._answered:
            now = self._answered[-1][0]
            while self._answered[0][0] <= now - RATE_WINDOW_S:
                self._answered.popleft()
            fps = sum(count for _, count in self._answered) / min(RATE_WINDOW_S, now - self._start)
        print(f"With Batch Size {self._batch_size}, FPS at frame number {self._number} is {fps:.1f}")
        for block in [list(self._last)] if self._as_json else self._last:
            print(json.dumps(block, indent=2))
        sys.stdout.flush()


def stream(camera: Camera, server: TorchServe, args: argparse.Namespace, stop: threading.Event) -> int:
    """Run the pipeline until the camera ends or `stop` is set; return 0 if every frame was answered, else 1.

    Raises SourceError if the camera fails, ServerError if the server does not answer any more.
    """
    per_request = args.batch_size if args.client_batching else 1
    buffer: Buffer[Frame] = Buffer(BATCHES_IN_FLIGHT * args.batch_size)
    in_flight: Buffer[Request] = Buffer(server.max_in_flight)
    terminal = Terminal(args.batch_size, args.client_batching, args.log_every)
    answering = threading.Event()
    answered, failures, gave_up = 0, Counter[str](), False
    start, first_s = time.monotonic(), 0.0

    with ThreadPoolExecutor(2, thread_name_prefix="pipeline") as threads:
        reader = threads.submit(read, camera, buffer, per_request, answering, stop)
        sender = threads.submit(send, buffer, server, per_request, args.client_batching, in_flight)
        try:
            for frames, future in in_flight:
                answers = read_answers(future, len(frames), args.client_batching)
                if not answering.is_set():
                    answering.set()
                    first_s = time.monotonic() - frames[0].captured_at
                for frame, answer in zip(frames, answers, strict=True):
                    if isinstance(answer, Failure):
                        if answer not in failures:
                            print(f"frame {frame.number} failed: {answer}", file=sys.stderr)
                        failures[answer] += 1
                    else:
                        answered += 1
                terminal.show(frames, answers)
                if any(isinstance(answer, NoAnswer) for answer in answers):
                    gave_up = True
                    stop.set()  # More frames would only wait behind these.
            terminal.flush()
        finally:
            stop.set()
            in_flight.close()
    seconds = time.monotonic() - start

    failed = failures.total()
    print(
        f"frames: {answered} answered, {failed} failed, in {seconds:.1f} s, the first after {first_s:.1f} s: "
        f"{answered / seconds:.1f} FPS",
        file=sys.stderr,
    )
    for reason, count in failures.most_common():
        print(f"{count} failed: {reason}", file=sys.stderr)
    for thread in (reader, sender):
        thread.result()  # Raises what ended the thread.
    if gave_up:
        raise ServerError(f"{server.url} stopped answering: are the model's workers up? See TorchServe's logs/")
    return 1 if failed else 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
        return int(text)

    def seconds(text: str) -> float:
        number = float(text)
        if not 0 <= number < math.inf:
            raise ValueError
        return number

    def http_url(text: str) -> str:
        url = urlsplit(text)
        if url.scheme not in ("http", "https") or not url.hostname or url.username is not None:
            raise argparse.ArgumentTypeError("expected http://host:port or https://host:port, without user or password")
        return text

    parser = argparse.ArgumentParser(
        description="Stream a video to TorchServe and print what it sees.",
        epilog="exit codes: 0 every frame was answered, 1 some were not, 2 wrong usage, 3 the source can't be read, "
        "4 the server can't be used, 130 interrupted",
    )
    parser.add_argument(
        "--client-batching",
        action="store_true",
        help="send JSON batches of N frames (default: each frame is a request of its own, which TorchServe batches)",
    )
    parser.add_argument(
        "--batch_size",
        "--batch-size",
        type=positive,
        default=4,
        metavar="N",
        help="frames in a JSON batch; without --client-batching only how many answers are shown, since TorchServe's "
        "own batch size is set in config.properties (default: %(default)s)",
    )
    parser.add_argument(
        "--input",
        default=str(SAMPLE),
        help="a video file, a device such as 0 or /dev/video0, or the URL of a stream (default: the clip in data/)",
    )
    parser.add_argument(
        "--url",
        type=http_url,
        default="http://127.0.0.1:8080",
        help="TorchServe's inference address (default: %(default)s)",
    )
    parser.add_argument("--model", default="resnet-18", help="the model's name in TorchServe (default: %(default)s)")
    parser.add_argument(
        "--log-every",
        type=positive,
        default=20,
        metavar="N",
        help="frames from one output to the next (default: %(default)s)",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="TorchServe's key file (default: the token in the variable TORCHSERVE_TOKEN, else ./key_file.json)",
    )
    parser.add_argument(
        "--server-wait",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long to wait for a server that is not up yet (default: %(default)g)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    stop = threading.Event()
    interrupted = threading.Event()

    def interrupt(signum: int, _: object) -> None:
        """Stop reading and finish what is on its way; a second Ctrl-C ends the program at once."""
        signal.signal(signum, signal.SIG_DFL)
        interrupted.set()
        stop.set()

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    try:
        camera = Camera(args.input)
        try:
            # The same number of frames on their way in both ways of batching.
            max_in_flight = BATCHES_IN_FLIGHT if args.client_batching else BATCHES_IN_FLIGHT * args.batch_size
            with TorchServe(args.url, args.model, args.token_file, max_in_flight) as server:
                server.wait_until_ready(args.server_wait, stop)
                code = stream(camera, server, args, stop) if not stop.is_set() else 0
        finally:
            camera.release()
    except SourceError as error:
        print(f"request.py: {error}", file=sys.stderr)
        code = 3
    except ServerError as error:
        print(f"request.py: {error}", file=sys.stderr)
        code = 4
    except BrokenPipeError:
        # Whoever read our output has left, as `| head` does. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    return 130 if interrupted.is_set() else code


if __name__ == "__main__":
    raise SystemExit(main())
