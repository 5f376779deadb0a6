"""Tests of cameras, server and models before streaming: `request.py --check`."""

import math
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from edge.cameras import Camera
from edge.client import TEST_CAMERA, TEST_IMAGE, TorchServeClient, open_clients
from edge.drawing import labels_of
from edge.errors import ServerError, SourceError
from edge.frames import Frame, Result
from edge.options import Options
from edge.payload import MAX_BODY_BYTES, json_size, pixels
from edge.responses import one_line
from edge.timing import Timing

ROUNDS = 5
MEASURED_S = 3.0


def check(cameras: Sequence[Camera], options: Options, stop: threading.Event, timing: Timing) -> int:
    """Print a line for each thing that works, or fails; return the exit code of request.py."""
    options = replace(options, server_wait_s=min(options.server_wait_s, timing.check_s))
    images, code = [], 0
    for camera in cameras:
        try:
            image = camera.check()
            if image is None:
                print(f"ok    camera {camera.name}: a pipe, which is read only once, by the run", flush=True)
                continue
            images.append(image)
            size = f"{len(image):,} bytes per frame"
            print(f"ok    camera {camera.name}: states {camera.fps:g} frames/s, {size}", flush=True)
        except SourceError as error:
            print(f"FAIL  camera: {error}", flush=True)
            code = error.exit_code
    image = max(images, key=len, default=TEST_IMAGE)
    with open_clients(options, stop, timing) as clients:
        for client in clients:
            try:
                check_model(client, image, options.url)
            except ServerError as error:
                print(f"FAIL  server: {error}", flush=True)
                code = error.exit_code
    return code


def check_model(client: TorchServeClient, image: bytes, url: str) -> None:
    """Print what the server does with a model. Raises ServerError for the first thing that fails."""
    client.connect()
    print(f"ok    server {url}: reachable, accepts the token, has the model {client.model}", flush=True)
    client.learn_model()
    info, frames = client.info, client.frames_per_request
    (first, *_) = predict(client, image, 1, info.clip_frames)
    clip = f", clips of {info.clip_frames} frames at {info.frame_rate:g} frames/s" if info.clip_frames > 1 else ""
    kind = ", ".join(filter(None, [info.task, info.runtime])) + clip
    print(f"ok    model {client.model}: {kind}: {one_line(labels_of(first)[0])}", flush=True)

    latencies = [predict(client, image, 1, info.clip_frames)[-1].latency_s or 0.0 for _ in range(ROUNDS)]
    what = f"a clip of {info.clip_frames} frames" if info.clip_frames > 1 else "a single frame"
    print(f"ok    latency: {1000 * statistics.median(latencies):.0f} ms for {what} (median of {ROUNDS})", flush=True)

    results, fps = under_load(client, image, frames)
    sizes = [result.batch_size for result in results if result.batch_size is not None]
    # The harmonic mean: each forward pass is counted once by each of its frames.
    batch = f"mean batch {statistics.harmonic_mean(sizes):.1f}, largest {max(sizes)}" if sizes else "batch not stated"
    requests = f"{len(results) // frames} requests of {frames} frame{'s' if frames > 1 else ''}"
    print(f"ok    batching: {requests}, {client.max_in_flight} in flight, {fps:.1f} FPS; {batch}", flush=True)

    fitting = (MAX_BODY_BYTES - json_size([])) // (json_size([image]) - json_size([]))
    fitting = max(1, min(fitting, info.max_frames, info.max_pixels // pixels(image)))
    smaller = ", larger clips are sent with half the width and height" if fitting < info.clip_frames else ""
    print(f"ok    request limit: {MAX_BODY_BYTES:,} bytes, a JSON batch of {fitting} such frames{smaller}", flush=True)


def under_load(client: TorchServeClient, image: bytes, frames: int) -> tuple[list[Result], float]:
    """Send requests of so many frames for some seconds; return the results, and how many there were a second."""
    count = 2 * client.max_in_flight
    while True:
        begin = time.monotonic()
        results = predict(client, image, count, frames)
        elapsed_s = time.monotonic() - begin
        if elapsed_s > MEASURED_S / 2:
            return results, len(results) / elapsed_s
        count = math.ceil(count * MEASURED_S / elapsed_s)  # At first the server is cold.


def predict(client: TorchServeClient, image: bytes, count: int, frames_per_request: int) -> list[Result]:
    """Send requests as fast as possible; return the results. Raises ServerError if one failed."""
    results: list[Result] = []
    now = time.monotonic()
    frames = [Frame(TEST_CAMERA, number, now, image) for number in range(1, frames_per_request + 1)]
    for _ in range(count):
        client.wait_for_slot()
        if any(result.outcome != "answered" for result in results):  # Others would fail, too, one after the other.
            break
        client.submit(frames, results.append)
    client.drain()
    for result in results:
        if result.outcome != "answered":
            raise ServerError(f"no prediction: {result.error}")
    return results
