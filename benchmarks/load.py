"""The load: requests over keep-alive connections, one for each request in flight."""

import http.client
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import numpy as np

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Measured:
    """fps: answered frames a second. p50_ms, p99_ms: from a request to its answer. frames: answered in total."""

    fps: float
    p50_ms: float
    p99_ms: float
    frames: int


def saturate(
    url: str,
    headers: dict[str, str],
    bodies: Sequence[bytes],
    frames_per_body: int,
    in_flight: int,
    warm_up_s: float,
    seconds: float,
) -> Measured:
    """Keep `in_flight` requests in flight, and measure after `warm_up_s` seconds for `seconds` seconds.

    Raises RuntimeError if any answer is not 200, or contains an error for a frame.
    """
    address = urlsplit(url)
    begin = time.monotonic() + warm_up_s
    end = begin + seconds
    answered: list[tuple[float, float]] = []  # time of the answer, and latency
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
                now = time.monotonic()
                answered.append((now, now - sent))
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
    latencies = [took for when, took in answered if begin <= when < end]
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return Measured(len(latencies) * frames_per_body / seconds, float(p50), float(p99), frames_per_body * len(answered))
