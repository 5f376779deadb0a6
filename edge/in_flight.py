"""The requests on their way to the server: how many there may be, and that each of their frames gets one result."""

import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edge.answers import failed
from edge.cameras import Frame
from edge.stats import Result

POLL_S = 0.5


@dataclass
class Request:
    """Frames on their way, and who takes their results.

    retry_until: when no other attempt is begun any more, time.monotonic() seconds.
    timeout_s: how long the answer to an attempt may take.
    """

    frames: Sequence[Frame]
    deliver: Callable[[Result], None]
    retry_until: float
    timeout_s: float
    is_settled: bool = False

    def is_overdue(self) -> bool:
        """Whether no timeout of the connection has ended it, though one should have."""
        return time.monotonic() > self.retry_until + 2 * self.timeout_s


class InFlight:
    """The requests whose results are not all delivered yet; any thread may call its methods."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._requests: dict[int, Request] = {}
        self._changed = threading.Condition()
        self._heard_at = time.monotonic()

    def add(self, requests: Sequence[Request], instead_of: int | None = None) -> dict[int, Request]:
        """Add requests; return them by their numbers.

        With `instead_of` they take the place of another one; nothing is added if that one is settled already.
        """
        with self._changed:
            if instead_of is not None:
                replaced = self._requests.get(instead_of)
                if replaced is None or replaced.is_settled:
                    return {}
                del self._requests[instead_of]
            if not self._requests:
                self._heard_at = time.monotonic()
            numbered = {next(self._numbers): request for request in requests}
            self._requests.update(numbered)
            return numbered

    def wait_below(self, most: int) -> bool:
        """Return whether fewer than `most` are out, after a change or POLL_S seconds at the latest."""
        with self._changed:
            if len(self._requests) >= most:
                self._changed.wait(POLL_S)
            return len(self._requests) < most

    def silence_s(self) -> float:
        """Return how long none of the requests has been settled, if that is half of what one may take, else 0.0."""
        with self._changed:
            silence_s = time.monotonic() - self._heard_at
            longest_s = max((request.timeout_s for request in self._requests.values()), default=math.inf)
            return silence_s if silence_s > longest_s / 2 else 0.0

    def settle(self, number: int, results: Sequence[Result]) -> None:
        """Deliver a request's results, if there are any, once: it may be given up and answered at the same time."""
        with self._changed:
            request = self._requests.get(number)
            if not results or request is None or request.is_settled:
                return
            request.is_settled = True
            self._heard_at = time.monotonic()
        for result in results:
            request.deliver(result)
        with self._changed:
            del self._requests[number]
            self._changed.notify_all()

    def give_up(self, error: str, overdue_only: bool = False) -> bool:
        """Fail all requests, or those that are overdue; return whether there were any."""
        with self._changed:
            late = {
                number: request
                for number, request in self._requests.items()
                if not overdue_only or request.is_overdue()
            }
        for number, request in late.items():
            self.settle(number, failed(request.frames, error))
        return bool(late)
