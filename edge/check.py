"""Looking before streaming: `request.py --check`."""

import statistics
import time
from collections.abc import Sequence

from edge.cameras import Camera, Frame, SourceError
from edge.client import BODY_LIMIT, TEST_CAMERA, TEST_PICTURE, TorchServe, json_size
from edge.retries import ServerError
from edge.stats import Result

ROUNDS = 5
LARGEST_BODY = 64 * 1024 * 1024  # Nothing larger is tried.


def check(cameras: Sequence[Camera], server: TorchServe, per_request: int, max_in_flight: int) -> int:
    """Print what works and what does not, a line each; return request.py's exit code.

    per_request, max_in_flight: of the burst that shows the server's batching.
    """
    pictures, code = [], 0
    for camera in cameras:
        try:
            pictures.append(camera.check())
        except SourceError as error:
            print(f"FAIL  camera: {error}", flush=True)
            code = 3
        else:
            size = f"{len(pictures[-1]):,} bytes a frame"
            print(f"ok    camera {camera.name}: states {camera.fps:g} frames a second, {size}", flush=True)
    try:
        check_server(server, max(pictures, key=len, default=TEST_PICTURE), per_request, max_in_flight)
    except ServerError as error:
        print(f"FAIL  server: {error}", flush=True)
        code = 4
    return code


def check_server(server: TorchServe, picture: bytes, per_request: int, max_in_flight: int) -> None:
    """Print what a server does. Raises ServerError for the first thing that is wrong."""
    server.connect()
    print(f"ok    server {server.url}: reachable, accepts the token, has the model", flush=True)

    (first,) = ask(server, picture, 1, 1)
    label, probability = max((first.predictions or {}).items(), key=lambda item: item[1])
    print(f"ok    model: answers, {label} {probability:.2f}", flush=True)

    latencies = [result.latency_s or 0.0 for _ in range(ROUNDS) for result in ask(server, picture, 1, 1)]
    print(f"ok    latency: {1000 * statistics.median(latencies):.0f} ms for a frame alone (median of {ROUNDS})")

    count = 2 * max_in_flight
    begin = time.monotonic()
    burst = ask(server, picture, count, per_request)
    fps = len(burst) / (time.monotonic() - begin)
    shared = [result.shared_by for result in burst if result.shared_by is not None]
    told = "the server does not tell how they were batched"
    if shared:
        mean = statistics.harmonic_mean(shared)  # over the passes: each is told once by each of its frames
        told = f"a forward pass was shared by {mean:.1f} frames (mean), {max(shared)} (most)"
    what = f"{count} requests of {per_request} frame{'s' if per_request > 1 else ''}, {max_in_flight} at a time"
    print(f"ok    batching: {what}, {fps:.1f} FPS; {told}", flush=True)

    body = largest_body(server, picture)
    frames = 1
    while json_size([picture] * (frames + 1)) <= body:
        frames += 1
    print(f"ok    largest body: {body:,} bytes, a JSON batch of {frames} such frames")


def ask(server: TorchServe, picture: bytes, count: int, per_request: int) -> list[Result]:
    """Send a number of requests as fast as may be; return the results. Raises ServerError if any of them failed."""
    results: list[Result] = []
    now = time.monotonic()
    for _ in range(count):
        server.wait_for_room()
        server.ask([Frame(TEST_CAMERA, number, now, picture) for number in range(1, per_request + 1)], results.append)
    server.finish()
    for result in results:
        if result.outcome != "answered":
            raise ServerError(f"{server.url} does not answer: {result.error}")
    return results


def largest_body(server: TorchServe, picture: bytes) -> int:
    """Return the size in bytes of the largest body that the server takes, to 1 % where it isn't TorchServe's own.

    Raises ServerError if it is not even that of a single picture.
    """
    fits, over = json_size([picture]), LARGEST_BODY
    if server.takes(picture, BODY_LIMIT):
        fits = BODY_LIMIT
        if not server.takes(picture, BODY_LIMIT + 1):
            return fits
    elif not server.takes(picture, fits):
        raise ServerError(f"{server.url} does not take a JSON batch of one picture, {fits:,} bytes")
    else:
        over = BODY_LIMIT
    while over - fits > fits // 100:
        middle = (fits + over) // 2
        if server.takes(picture, middle):
            fits = middle
        else:
            over = middle
    return fits
