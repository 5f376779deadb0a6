"""The load: requests over keep-alive connections, one for each request in flight."""

import http.client
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.figures import Request

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Measured:
    """All requests, those of the warm-up included, and the time that is measured."""

    requests: list[Request]
    begin: float
    end: float


def saturate(
    url: str, headers: dict[str, str], bodies: Sequence[bytes], in_flight: int, warm_up_s: float, seconds: float
) -> Measured:
    """Keep `in_flight` requests in flight, and measure after `warm_up_s` seconds for `seconds` seconds.

    Raises RuntimeError if any response is not 200, or contains an error for a frame.
    """
    address = urlsplit(url)
    begin = time.monotonic() + warm_up_s
    end = begin + seconds
    requests: list[Request] = []
    errors: list[str] = []
    round_robin = itertools.cycle(bodies)

    def send_requests() -> None:
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=TIMEOUT_S)
        try:
            while (sent := time.monotonic()) < end and not errors:
                connection.request("POST", address.path, next(round_robin), headers)
                response = connection.getresponse()
                body = response.read()
                if response.status != http.client.OK or b'"error"' in body:
                    errors.append(f"{url}: {response.status} {body[:300]!r}")
                requests.append(Request(sent, time.monotonic()))
        except OSError as error:
            errors.append(f"{url}: {error}")
        finally:
            connection.close()

    threads = [threading.Thread(target=send_requests) for _ in range(in_flight)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise RuntimeError(errors[0])
    return Measured(requests, begin, end)
