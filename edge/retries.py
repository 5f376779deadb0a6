"""What is tried again, how long, and what the user hears of it."""

import logging
import random
import ssl
import threading
import time
from typing import Any

import requests
from urllib3.exceptions import MaxRetryError
from urllib3.util import Retry

from edge.answers import one_line

# A server that is busy (503, see TorchServe's queue), that lost a worker (500, 507), or a proxy before it.
TRANSIENT = frozenset({429, 500, 502, 503, 504, 507})
# Shorter troubles are not worth a line.
NOTICE_AFTER_S = 2.0

log = logging.getLogger(__name__)


class ServerError(Exception):
    """A server that can't be used, with its address and what to do."""


class Health:
    """Whether the server answers, told to the user once when it does no more and once when it does again."""

    def __init__(self, url: str) -> None:
        self.trouble = ""  # what was wrong last
        self.is_told = False
        self._url = url
        self._lock = threading.Lock()
        self._since: float | None = None

    def bad(self, trouble: str) -> None:
        with self._lock:
            self.trouble = trouble
            now = time.monotonic()
            self._since = self._since or now
            if not self.is_told and now - self._since >= NOTICE_AFTER_S:
                self.is_told = True
                log.warning("%s gives no answers (%s); trying until it does", self._url, trouble)

    def good(self) -> None:
        with self._lock:
            if self._since and self.is_told:
                log.warning("%s answers again after %.1f s", self._url, time.monotonic() - self._since)
            self._since, self.is_told = None, False

    def is_away(self, seconds: float) -> bool:
        """Whether all that came from the server for so long was trouble."""
        since = self._since
        return since is not None and time.monotonic() - since >= seconds


class RetryUntil(Retry):
    """urllib3's Retry, ended by time as well as by a number of attempts, and by `stop`.

    patience_s: how long after the first failure another attempt may begin.
    """

    def __init__(
        self, patience_s: float, stop: threading.Event, health: Health, deadline: float | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        self._patience_s, self._stop, self._health, self._deadline = patience_s, stop, health, deadline

    def new(self, **options: Any) -> "RetryUntil":
        limits = {"patience_s": self._patience_s, "stop": self._stop, "health": self._health}
        return super().new(**limits, deadline=self._deadline, **options)

    def get_backoff_time(self) -> float:
        # With jitter at all lengths: the requests in flight should not come back all at once.
        return super().get_backoff_time() * random.uniform(0.5, 1)

    def increment(
        self,
        method: str | None = None,
        url: str | None = None,
        response: Any = None,
        error: Any = None,
        _pool: Any = None,
        _stacktrace: Any = None,
    ) -> "RetryUntil":
        """Note one more failure. Raises MaxRetryError when there shall be no further attempt."""
        self._health.bad(f"{response.status} {response.reason}" if response is not None else innermost(error))
        deadline = self._deadline or time.monotonic() + self._patience_s
        if time.monotonic() >= deadline or self._stop.is_set() or is_final(error):
            raise MaxRetryError(_pool, url or "", error)
        following = super().increment(method, url, response, error, _pool, _stacktrace)
        following._deadline = deadline
        return following


def is_final(error: BaseException | None) -> bool:
    """Whether an error will be the same in a second: a certificate that is not trusted, or no TLS at all."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = cause(error)
    return error is not None and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)


def is_passing(error: BaseException | None, response: requests.Response | None) -> bool:
    """Whether another attempt may help."""
    if response is not None:
        return response.status_code in TRANSIENT
    passing = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)
    return isinstance(error, passing) and not is_final(error)


def cause(error: BaseException) -> BaseException | None:
    """Return what is one level below an error: requests wraps urllib3, which wraps the operating system."""
    inner = [getattr(error, "reason", None), error.__cause__, error.__context__, *error.args]
    return next((reason for reason in inner if isinstance(reason, BaseException)), None)


def innermost(error: BaseException) -> str:
    """Return what the error at the bottom says."""
    while below := cause(error):
        error = below
    return one_line(str(error)) or type(error).__name__
