"""The HTTP session: one request with its token, its deadline and its retries, and whether the server responds."""

import itertools
import logging
import math
import threading
import time
from typing import Any

import requests

from edge.auth import BearerToken
from edge.deadline import DeadlineAdapter
from edge.errors import ServerError
from edge.responses import is_auth_error, is_transient, reason, root_cause
from edge.timing import Timing, backoff_s

MAX_TOKENS = 5  # that one request tries without a pause

log = logging.getLogger(__name__)


class ServerHealth:
    """Whether the server responds. Reported once when all have failed for report_after_s, and once afterwards."""

    def __init__(self, url: str, timing: Timing) -> None:
        self.last_error = ""
        self.is_down = False  # as it was reported
        self.has_responded = False  # ever
        self.url = url
        self._report_after_s = timing.report_after_s
        self._failing_since: float | None = None
        self._lock = threading.Lock()

    def record_failure(self, reason: str) -> None:
        with self._lock:
            self.last_error = reason
            self._failing_since = self._failing_since or time.monotonic()
            if not self.is_down and self.down_for_s() >= self._report_after_s:
                self.is_down = True
                log.warning("%s is not responding (%s); retrying until it does", self.url, reason)

    def record_success(self) -> None:
        with self._lock:
            if self.is_down:
                log.warning("%s is responding again after %.1f s", self.url, self.down_for_s())
            self._failing_since, self.is_down, self.has_responded = None, False, True

    def state(self) -> dict[str, Any]:
        """Return whether the server responds, as it was reported; if not, since when and why: for the web page."""
        if self.is_down:
            return {"state": "not responding", "down_for_s": self.down_for_s(), "error": self.last_error}
        return {"state": "responding" if self.has_responded else "waiting"}

    def error_after(self, wait_s: float) -> ServerError | None:
        """Return the error of a server that did not respond for wait_s; None if it did."""
        if 0 < self.down_for_s() >= wait_s:
            return ServerError(
                f"{self.url} did not respond for {wait_s:g} s ({self.last_error}): see the server's logs"
            )
        return None

    def down_for_s(self) -> float:
        """Return the seconds since the first failure after the last success, 0.0 if there was none."""
        since = self._failing_since
        return time.monotonic() - since if since else 0.0


class RetrySession(requests.Session):
    """A session whose requests are retried until their response is final or the deadline has passed.

    retry_timeout_s: how long after its first failure a request is retried.
    is_streaming: the server has responded to the test image. From then on a rejected token that can't be replaced is
        retried, too: a proxy may get to know a new token later than this device. Before that it is an error of the
        user, unless the key file is still empty, and no attempt lasts longer than the time that is left.
    """

    def __init__(
        self, token: BearerToken, health: ServerHealth, connections: int, stop: threading.Event, timing: Timing
    ) -> None:
        super().__init__()
        self.retry_timeout_s = 0.0
        self.is_streaming = False
        self.auth = self._token = token
        self._health = health
        self._stop = stop
        self._timing = timing
        for scheme in ("http://", "https://"):
            self.mount(scheme, DeadlineAdapter(pool_connections=1, pool_maxsize=connections))

    def request(self, method: str, url: str, **options: Any) -> requests.Response:  # type: ignore[override]
        """Send a request, and retry it while that may help. Runs in a pool thread of FuturesSession.

        Returns the last response. Raises requests.RequestException if the last attempt had none.
        """
        deadline = math.inf
        for attempt in itertools.count():
            response, error = None, None
            try:
                response = self._send(method, url, **options)
                cause = reason(response)
            except requests.RequestException as caught:
                error, cause = caught, root_cause(caught)
            is_rejected = response is not None and is_auth_error(response)
            may_get_token = self.is_streaming or self._token.is_awaited
            if not (may_get_token if is_rejected else is_transient(response, error)):
                if response is not None and not is_rejected:
                    self._health.record_success()
                break
            self._health.record_failure((is_rejected and self._token.problem) or cause)
            deadline = min(deadline, time.monotonic() + self.retry_timeout_s)
            left_s = deadline - time.monotonic()
            pause_s = backoff_s(self._timing.first_backoff_s, self._timing.max_backoff_s, attempt)
            if left_s <= 0 or self._stop.wait(min(pause_s, left_s)):
                break
            if not self.is_streaming and "timeout" in options:
                connect_s, response_s = options["timeout"]
                options["timeout"] = (connect_s, min(response_s, left_s))
        if response is None:
            assert error is not None
            raise error
        return response

    def _send(self, method: str, url: str, **options: Any) -> requests.Response:
        """Send a request, and again with each new token while the server rejects it."""
        options["allow_redirects"] = False  # A redirected POST would arrive as a GET without its frames.
        response = super().request(method, url, **options)
        for _ in range(MAX_TOKENS):
            if not is_auth_error(response) or not self._token.refresh(response):
                break
            response = super().request(method, url, **options)
        return response
