"""The client of a TorchServe server: payloads, requests in flight, and a result for each frame."""

import base64
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import requests
from requests_futures.sessions import FuturesSession

from edge import responses
from edge.auth import BearerToken
from edge.cameras import Camera
from edge.errors import ServerError
from edge.frames import Frame, Result
from edge.options import BATCHES_IN_FLIGHT, LOOPBACK, Options
from edge.payload import MAX_BODY_BYTES, fitting, is_too_large
from edge.responses import ModelInfo
from edge.session import RetrySession, ServerHealth
from edge.timing import Timing

# A frame may take so many times as long as that of the fastest response: other models share the cores, and there may be
# more in it.
LOAD_FACTOR = 10
TEST_CAMERA = Camera("test image")
TEST_IMAGE = TEST_CAMERA.encode(np.full((480, 640, 3), 128, np.uint8))

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """Frames in flight. `on_result` gets one result for each of them, in a pool thread."""

    frames: Sequence[Frame]
    on_result: Callable[[Result], None]
    timeout_s: float


class TorchServeClient:
    """Sends frames to a model, with at most `max_in_flight` requests in flight. `stop` ends all waiting.

    A request runs in a pool thread of FuturesSession: RetrySession.request() sends and retries it, then _complete()
    parses the response.
    """

    def __init__(self, model: str, token: BearerToken, options: Options, stop: threading.Event, timing: Timing) -> None:
        self.model, self.info = model, ModelInfo()
        self._token, self._options, self._stop, self._timing = token, options, stop, timing
        self._url = f"{options.url}/predictions/{quote(model, safe='')}"
        self.health = ServerHealth(self._url if len(options.model) > 1 else options.url, timing)
        self._frame_s = 0.0  # that the server may take for a frame, if it is slow
        self._session = RetrySession(token, self.health, self.max_in_flight, stop, timing)
        self._session.retry_timeout_s = options.server_wait_s
        self._pool = FuturesSession(max_workers=self.max_in_flight, session=self._session)
        self._in_flight: set[Request] = set()
        self._changed = threading.Condition()
        self._last_completed_at = 0.0

    def __enter__(self) -> "TorchServeClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.executor.shutdown(wait=False)
        self._session.close()

    @property
    def is_json(self) -> bool:
        """Whether requests are JSON batches."""
        return self._options.client_batching or self.info.clip_frames > 1

    @property
    def frames_per_request(self) -> int:
        if self.info.clip_frames > 1:
            return self.info.clip_frames
        return self._options.batch_size if self.is_json else 1

    @property
    def max_in_flight(self) -> int:
        """Return how many requests may be in flight: the same number of frames in both ways of batching."""
        batch_size = 1 if self.is_json else min(self._options.batch_size, self.info.batch_size)
        return self._options.max_in_flight or BATCHES_IN_FLIGHT * batch_size

    def wait_until_ready(self) -> None:
        """Wait until the server responds to a test image. Raises ServerError if it does not, or if `stop` is set.

        After that, requests are retried for --server-wait, or for --max-age if that is shorter.
        """
        self.connect()
        self.learn_model()
        self._session.retry_timeout_s = min(self._options.server_wait_s, self._options.max_age_s)
        self._session.is_streaming = True

    def learn_model(self) -> None:
        """Send a test image; learn from the response what the model is, and how slow. Raises ServerError."""
        is_json, timing = self.is_json, self._timing
        timeouts = (timing.connect_s, max(self._timeouts(1)[1], timing.first_response_s))
        response = self._result(self._pool.post(self._url, **self._payload([TEST_IMAGE]), timeout=timeouts))
        self.info = ModelInfo.of(response)
        frame = Frame(TEST_CAMERA, 1, time.monotonic(), TEST_IMAGE)
        (result,) = responses.parse_response(response, [frame], is_json, self.info.task)
        if result.outcome != "answered":
            advice = f"; {responses.WORKERS}" if response.status_code in responses.TRANSIENT else ""
            raise ServerError(f"{self._url} has no prediction for a test image: {result.error}{advice}")
        self._frame_s = self._time_per_frame(response, self.info.clip_frames)

    def connect(self) -> None:
        """Wait until the server responds. Raises ServerError if it does not, or does not accept token or model."""
        self._token.load()
        url, model = self._options.url, self.model
        is_open = urlsplit(url).scheme == "http" and urlsplit(url).hostname not in LOOPBACK
        if is_open and self._token.source and model == self._options.model[0]:
            log.warning("the token goes to %s unencrypted, and others may read it: use https://", url)
        # OPTIONS describes the model's API: TorchServe checks token and model for it, and runs no inference.
        response = self._result(self._pool.options(self._url, timeout=self._timeouts(1)))
        if responses.is_auth_error(response):
            raise self._token.rejection(url, response)
        if responses.error_fields(response).get("type") in ("ModelNotFoundException", "ModelVersionNotFoundException"):
            advice = f"start TorchServe with --models {model}={model}.mar, or pass the name of the model it serves"
            raise ServerError(f"{url} has no model {model}: {advice} as --model")
        if response.status_code in responses.TRANSIENT:
            raise ServerError(f"{url} responds with {responses.reason(response)}")

    def _result(self, future: "Future[requests.Response]") -> requests.Response:
        """Wait for a response. Raises ServerError if there is none, or if `stop` is set."""
        report_at = time.monotonic() + self._timing.min_response_s
        while not future.done() and not self._stop.is_set():
            wait([future], timeout=self._timing.poll_s)
            if time.monotonic() > report_at:
                log.warning("waiting for the first response of %s", self._url)
                report_at = math.inf
        if self._stop.is_set():
            raise ServerError(f"interrupted while waiting for {self._options.url}")
        try:
            return future.result()
        except OSError as error:  # requests.RequestException, or a CA bundle that is missing
            raise responses.connection_error(self._options.url, error) from error

    def wait_for_slot(self) -> None:
        """Wait while `max_in_flight` requests are in flight. While the server is down, send the next one alone."""
        while not self._stop.is_set():
            if self._wait_below(1 if self.health.is_down else self.max_in_flight):
                return

    def submit(self, frames: Sequence[Frame], on_result: Callable[[Result], None]) -> None:
        """Send frames without waiting for the response, in several requests if one would be too large."""
        jpegs: Sequence[bytes] = [frame.jpeg for frame in frames]
        if self.info.clip_frames > 1:
            jpegs = fitting(jpegs, self.info.max_pixels)
        exceeds = is_too_large(jpegs, self.info.max_pixels) if self.is_json else len(jpegs[0]) > MAX_BODY_BYTES
        if exceeds and len(frames) == 1:
            on_result(Result.failed(frames[0], responses.TOO_LARGE))
            return
        if exceeds or len(frames) > self.info.max_frames:
            middle = len(frames) // 2
            self.submit(frames[:middle], on_result)
            self.submit(frames[middle:], on_result)
            return
        timeouts = self._timeouts(len(frames))
        request = Request(frames, on_result, timeouts[1])
        with self._changed:
            if not self._in_flight:
                self._last_completed_at = time.monotonic()
            future = self._pool.post(self._url, **self._payload(jpegs), timeout=timeouts)
            self._in_flight.add(request)
        future.add_done_callback(partial(self._complete, request))

    def drain(self) -> None:
        """Wait until no request is in flight; once `stop` is set, for drain_s, and then fail the others."""
        deadline = math.inf
        while not self._wait_below(1):
            if self._stop.is_set():
                deadline = min(deadline, time.monotonic() + self._timing.drain_s)
            if time.monotonic() >= deadline:
                for request in list(self._in_flight):
                    self._fail(request, f"no response within {self._timing.drain_s:g} s of the end of the run")

    def _complete(self, request: Request, future: "Future[requests.Response]") -> None:
        """Parse a response. Whatever happened, each frame gets a result."""
        try:
            response = future.result()
            if response.ok:  # The test image may have been slower than this model is: the server was busy, or cold.
                self._frame_s = min(self._frame_s, self._time_per_frame(response, len(request.frames)))
            self._deliver(request, responses.parse_response(response, request.frames, self.is_json, self.info.task))
        except OSError as error:  # requests.RequestException, or a CA bundle that is missing
            self._fail(request, f"no response: {responses.root_cause(error)}")
        except Exception as error:
            log.exception("unexpected error of a request")
            self._fail(request, f"{type(error).__name__}: {error}")

    def _fail(self, request: Request, error: str) -> None:
        self._deliver(request, [Result.failed(frame, error) for frame in request.frames])

    def _deliver(self, request: Request, results: Sequence[Result]) -> None:
        """Pass on the results of a request, once: its response may arrive while drain() fails it."""
        with self._changed:
            if request in self._in_flight:
                for result in results:
                    request.on_result(result)
                self._in_flight.remove(request)
                self._last_completed_at = time.monotonic()
                self._changed.notify_all()

    def _wait_below(self, limit: int) -> bool:
        """Return whether fewer than `limit` requests are in flight, after poll_s at the latest."""
        with self._changed:
            if len(self._in_flight) >= limit:
                self._changed.wait(self._timing.poll_s)
            silence_s = time.monotonic() - self._last_completed_at
            if silence_s > max((request.timeout_s for request in self._in_flight), default=math.inf) / 2:
                self.health.record_failure(f"no response for {silence_s:.0f} s")
            return len(self._in_flight) < limit

    def _timeouts(self, frames: int) -> tuple[float, float]:
        """Return the connect timeout, and the response timeout of a request of so many frames."""
        return self._timing.connect_s, self._timing.response_timeout_s(self.max_in_flight * frames, self._frame_s)

    def _time_per_frame(self, response: requests.Response, frames: int) -> float:
        """Return the seconds that a frame may take if the server is as slow as for this response; 0.0 if it is fast."""
        elapsed_s = response.elapsed.total_seconds()
        if elapsed_s <= self._timing.slow_s:
            return 0.0
        return min(LOAD_FACTOR * elapsed_s / frames, self._timing.max_response_per_frame_s)

    def _payload(self, jpegs: Sequence[bytes]) -> dict[str, Any]:
        if not self.is_json:
            return {"data": jpegs[0], "headers": {"Content-Type": "image/jpeg"}}
        batch = {str(number): base64.b64encode(jpeg).decode() for number, jpeg in enumerate(jpegs)}
        return {"data": json.dumps(batch).encode(), "headers": {"Content-Type": "application/json"}}


@contextmanager
def open_clients(options: Options, stop: threading.Event, timing: Timing) -> Iterator[list[TorchServeClient]]:
    """Yield a client for each model, and close them at the end. They share the token."""
    token = BearerToken(options.token_file, options.management_url, timing)
    with ExitStack() as clients:
        yield [clients.enter_context(TorchServeClient(model, token, options, stop, timing)) for model in options.model]
