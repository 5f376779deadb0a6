"""The TorchServe session: connections, payloads, timeouts, and what is made of the answers."""

import base64
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, urlsplit

import numpy as np
import requests
from requests.adapters import HTTPAdapter
from requests_futures.sessions import FuturesSession

from edge.answers import error_text, error_type, failed, read_results, refuses_token
from edge.cameras import Camera, Frame
from edge.in_flight import POLL_S, InFlight, Request
from edge.retries import TRANSIENT, Health, RetryUntil, ServerError, innermost, is_final, is_passing
from edge.stats import Result
from edge.tokens import BearerToken

CONNECT_TIMEOUT_S = 5.0
# How long an answer may take: as long as a server of SLOWEST_FPS has to do for all frames in flight, and a bit. With a
# fixed time, a slow server would drown in requests that are sent again before it comes to them.
SLOWEST_FPS = 3.0
ANSWER_TIMEOUT_S = 2.0
SHORTEST_TIMEOUT_S = 5.0
# max_request_size of TorchServe, unless its configuration says otherwise.
BODY_LIMIT = 6_553_500
TOO_LARGE = "413 one frame is over the server's limit: make it smaller with --resize or --jpeg-quality"
# How long a request still waits for its answer once the run is to end.
GRACE_S = 5.0
# urllib3 calls itself for each attempt: with more it would come to Python's limit. Whoever has patience begins anew.
MOST_ATTEMPTS = 100
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
# Asked about before the first frame is read.
TEST_CAMERA = Camera("test picture")
TEST_PICTURE = TEST_CAMERA.encode(np.full((480, 640, 3), 128, np.uint8))

log = logging.getLogger(__name__)


class TorchServe:
    """A model on a TorchServe server, asked over at most `max_in_flight` kept-alive connections.

    Args:
        as_json: send JSON batches instead of single frames.
        patience_s: how long to try again when the server is away or refuses our token.
        stop: ends all waiting.
    """

    def __init__(
        self,
        url: str,
        model: str,
        token_file: Path | None,
        management_url: str | None,
        as_json: bool,
        max_in_flight: int,
        patience_s: float,
        stop: threading.Event,
    ) -> None:
        self.url = url
        self.health = Health(self.url)
        self._model = model
        self._as_json = as_json
        self._max_in_flight = max_in_flight
        self._stop = stop
        self._body_limit = BODY_LIMIT
        self._predictions = f"{self.url}/predictions/{quote(model, safe='')}"
        self._token = BearerToken(token_file, management_url, stop, self.health)
        self._session = self._open_session(patience_s)
        self._patience_s = patience_s
        self._in_flight = InFlight()

    def __enter__(self) -> "TorchServe":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close(self._session)

    def _open_session(self, patience_s: float) -> FuturesSession:
        session = FuturesSession(max_workers=self._max_in_flight)
        session.auth = self._token
        retries = RetryUntil(
            patience_s,
            self._stop,
            self.health,
            total=MOST_ATTEMPTS,
            status_forcelist=TRANSIENT,
            allowed_methods=None,  # any: to classify a frame twice does no harm
            backoff_factor=0.1,
            backoff_max=1.0,
            raise_on_status=False,
            respect_retry_after_header=False,  # it may say hours; the deadline is ours
        )
        for scheme in ("http://", "https://"):
            session.mount(
                scheme, HTTPAdapter(pool_connections=1, pool_maxsize=self._max_in_flight, max_retries=retries)
            )
        return session

    def wait_until_ready(self, patience_s: float) -> None:
        """Wait until the server takes our token, knows the model and answers a test picture.

        From then on a request is tried again for `patience_s` seconds only. Raises ServerError if the server can't be
        used, at once if waiting would not help, or if `stop` is set.
        """
        self.connect()
        result = self.ask_one(TEST_PICTURE)
        if self._stop.is_set():
            raise ServerError(f"interrupted while waiting for {self.url}")
        if result.outcome != "answered":
            raise ServerError(f"{self.url} does not classify a test picture: {result.error}")
        close(self._session)
        self._token.patience_s = self._patience_s = patience_s
        self._session = self._open_session(patience_s)

    def connect(self) -> None:
        """Wait until the server answers. Raises ServerError if it does not, refuses our token or has no such model."""
        self._token.load()
        address = urlsplit(self.url)
        if self._token.source and address.scheme == "http" and address.hostname not in LOOPBACK:
            log.warning("the token goes to %s in plain text, for everybody to read: use https://", self.url)
        # OPTIONS describes the model's API: TorchServe checks token and model for it, and runs nothing.
        deadline = time.monotonic() + self._patience_s
        while True:
            future = self._session.options(self._predictions, timeout=SHORTEST_TIMEOUT_S, allow_redirects=False)
            while not future.done() and not self._stop.is_set():
                wait([future], timeout=POLL_S)
            if self._stop.is_set():
                raise ServerError(f"interrupted while waiting for {self.url}")
            error = future.exception()
            if error is None:
                self._check(future.result())
                return
            if is_final(error):
                raise ServerError(
                    f"no trusted TLS connection to {self.url}: {innermost(error)} (REQUESTS_CA_BUNDLE names the "
                    f"certificates to trust)"
                ) from error
            if not isinstance(error, requests.ConnectionError | requests.Timeout):
                raise ServerError(f"can't use {self.url}: {innermost(error)}") from error
            if time.monotonic() >= deadline:
                raise ServerError(
                    f"no server at {self.url} ({innermost(error)}): start TorchServe, or pass its address as --url"
                ) from error

    def _check(self, response: requests.Response) -> None:
        """Raise ServerError if the server refuses our token or does not know the model."""
        if response.status_code == requests.codes.unauthorized:
            had = f"refuses the token from {self._token.source}" if self._token.source else "wants a token"
            raise ServerError(
                f"{self.url} {had}: set TORCHSERVE_TOKEN to one that the proxy there knows, without the word Bearer"
            )
        if refuses_token(response) and self._token.source:
            raise ServerError(
                f"{self.url} refuses the token from {self._token.source}: it is not one of its own, or it has expired "
                f"(TorchServe's inference keys live for 60 minutes, unless token_expiration_min is set; a restart "
                f"makes new ones, in its key_file.json)"
            )
        if refuses_token(response):
            raise ServerError(
                f"{self.url} wants a token: run this in the directory where TorchServe was started, whose "
                f"key_file.json holds it, or pass --token-file FILE, or set TORCHSERVE_TOKEN"
            )
        if error_type(response) in ("ModelNotFoundException", "ModelVersionNotFoundException"):
            raise ServerError(
                f"{self.url} has no model {self._model}: start TorchServe with --models {self._model}="
                f"{self._model}.mar, or pass the name of the model it serves as --model"
            )
        if response.status_code in TRANSIENT:
            raise ServerError(f"{self.url} answers {response.status_code} {error_text(response)}")

    def ask_one(self, jpeg: bytes) -> Result:
        """Send a picture that is no camera's and wait for its result."""
        arrived = queue.SimpleQueue[Result]()
        self.ask([Frame(TEST_CAMERA, 1, time.monotonic(), jpeg)], arrived.put)
        self.finish()
        return arrived.get()

    def wait_for_room(self) -> None:
        """Wait while `max_in_flight` requests are out, or until `stop` is set.

        While the server is away a single one is enough to find out when it is back.
        """
        while True:
            self._look_after()
            if self._in_flight.wait_below(1 if self.health.is_told else self._max_in_flight) or self._stop.is_set():
                return

    def ask(self, frames: Sequence[Frame], deliver: Callable[[Result], None], instead_of: int | None = None) -> None:
        """Send a frame, or with JSON a batch of them, without waiting for the answer.

        What is over the server's limit goes in several requests. `deliver` gets one result for each frame, from other
        threads. `instead_of` is the number of a request that was refused as too large.
        """
        retry_until = time.monotonic() + self._patience_s
        parts = [Request(part, deliver, retry_until, self._timeout_s(len(part))) for part in self._split(frames)]
        for number, part in self._in_flight.add(parts, instead_of).items():
            self._post(number, part)

    def finish(self) -> None:
        """Wait for all results; when `stop` is set, for GRACE_S seconds at most, and the rest has failed."""
        give_up_at = math.inf
        while not self._in_flight.wait_below(1):
            self._look_after()
            if self._stop.is_set():
                give_up_at = min(give_up_at, time.monotonic() + GRACE_S)
            if time.monotonic() >= give_up_at:
                self._in_flight.give_up(f"the run ended, and {GRACE_S:g} s later there was no answer")

    def takes(self, jpeg: bytes, size: int) -> bool:
        """Whether the server takes a JSON batch of one picture, filled up with blanks to `size` bytes."""
        if self._stop.is_set():
            raise ServerError("interrupted")
        body = json.dumps({"0": base64.b64encode(jpeg).decode()}).encode().ljust(size)
        headers = {"Content-Type": "application/json"}
        timeout = (CONNECT_TIMEOUT_S, self._timeout_s(1))
        try:
            # Not by the session: what is refused may come back as a broken connection, which it would try again.
            response = requests.post(
                self._predictions, body, headers=headers, auth=self._token, timeout=timeout, allow_redirects=False
            )
        except requests.RequestException:
            return False
        return bool(response.status_code == requests.codes.ok)

    def _look_after(self) -> None:
        """Tell when no answers come, and fail requests whose answers trickle in for longer than any timeout.

        Their threads may be lost for long: what comes after them gets a new session.
        """
        if silence_s := self._in_flight.silence_s():
            self.health.bad(f"none for {silence_s:.0f} s")
        if self._in_flight.give_up("no whole answer in time", overdue_only=True):
            self.health.bad("no whole answer in time")
            lost, self._session = self._session, self._open_session(self._patience_s)
            close(lost)

    def _split(self, frames: Sequence[Frame]) -> list[Sequence[Frame]]:
        """Return the frames in parts within the server's limit, but for a frame that is over it by itself."""
        if len(frames) == 1 or self._size(frames) <= self._body_limit:
            return [frames]
        middle = len(frames) // 2
        return self._split(frames[:middle]) + self._split(frames[middle:])

    def _size(self, frames: Sequence[Frame]) -> int:
        return json_size([frame.jpeg for frame in frames]) if self._as_json else len(frames[0].jpeg)

    def _timeout_s(self, frames: int) -> float:
        """Return how long the answer to a request of so many frames may take."""
        return max(SHORTEST_TIMEOUT_S, ANSWER_TIMEOUT_S + self._max_in_flight * frames / SLOWEST_FPS)

    def _post(self, number: int, request: Request) -> None:
        if self._size(request.frames) > self._body_limit:
            self._in_flight.settle(number, failed(request.frames, TOO_LARGE))
            return
        if self._as_json:
            payload = {str(i): base64.b64encode(frame.jpeg).decode() for i, frame in enumerate(request.frames)}
            body, content_type = json.dumps(payload).encode(), "application/json"
        else:
            body, content_type = request.frames[0].jpeg, "image/jpeg"
        future: Future[requests.Response] = self._session.post(
            self._predictions,
            data=body,
            headers={"Content-Type": content_type},
            timeout=(CONNECT_TIMEOUT_S, request.timeout_s),
            allow_redirects=False,  # A redirected POST would arrive as a GET, without its frames.
        )
        future.add_done_callback(partial(self._answered, number, request))

    def _answered(self, number: int, request: Request, future: "Future[requests.Response]") -> None:
        """Take the answer to a request, in the thread that got it: whatever it is, every frame has its result."""
        try:
            results = self._results(number, request, future)
        except Exception as error:
            log.exception("an answer that nobody foresaw")
            results = failed(request.frames, f"{type(error).__name__}: {error}")
        self._in_flight.settle(number, results)

    def _results(self, number: int, request: Request, future: "Future[requests.Response]") -> list[Result]:
        """Return the results of a request, none if it goes on: tried again, or in parts."""
        if request.is_settled:
            return []  # given up
        error = future.exception()
        response = None if error else future.result()
        if is_passing(error, response) and time.monotonic() < request.retry_until:
            # What urllib3 does not try again: half an answer, and more than MOST_ATTEMPTS.
            self.health.bad(innermost(error) if error else "no answer")
            if not self._stop.wait(POLL_S):
                self._post(number, request)
                return []
        if error or response is None:
            return failed(request.frames, f"no answer: {innermost(error)}" if error else "no answer")
        if response.status_code not in TRANSIENT and not refuses_token(response):
            self.health.good()
        if response.status_code != requests.codes.request_entity_too_large:
            return read_results(response, request.frames, self._as_json)
        # TorchServe's limit is lower than we thought, or that of a proxy before it.
        self._body_limit = min(self._body_limit, self._size(request.frames) - 1)
        if len(request.frames) == 1:
            return failed(request.frames, TOO_LARGE)
        self.ask(request.frames, request.deliver, instead_of=number)
        return []


def close(session: FuturesSession) -> None:
    """Send nothing more; requests that are out may go on, in threads that nobody waits for."""
    session.executor.shutdown(wait=False)
    requests.Session.close(session)


def json_size(jpegs: Sequence[bytes]) -> int:
    """Return the bytes that a JSON batch of pictures has at most."""
    return sum(4 * (len(jpeg) // 3 + 1) + len('"9999": "", ') for jpeg in jpegs) + len("{}")
