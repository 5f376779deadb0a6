"""The arithmetic of the figures: rates, and percentiles that rest on enough requests."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

# A percentile is printed only if so many requests lie beyond it: p99 needs 500 requests, p95 100, p50 10.
MIN_BEYOND = 5
PERCENTILES = (99, 95, 50)

Record = dict[str, Any]
# The number of requests for each latency in whole milliseconds, as a string: as in JSON.
Latencies = dict[str, int]


@dataclass(frozen=True)
class Request:
    """When a request was sent, and when its response was complete: seconds of a monotonic clock."""

    sent: float
    answered: float


def rate(requests: Iterable[Request], begin: float, end: float) -> float:
    """Return the requests a second from `begin` to `end`.

    A request that is in flight at either time counts with the share of its time that lies between both. So the figure
    does not depend on whether a burst of responses comes just before the end or just after it, as a mere count does.

    >>> rate([Request(0.0, 2.0), Request(2.0, 4.0), Request(4.0, 6.0)], begin=1.0, end=5.0)
    0.5
    """
    shares = (
        max(0.0, min(request.answered, end) - max(request.sent, begin)) / (request.answered - request.sent)
        for request in requests
    )
    return sum(shares) / (end - begin)


def count_latencies(milliseconds: Iterable[float]) -> Latencies:
    """Return the number of requests for each latency in whole milliseconds."""
    counts = Counter(round(value) for value in milliseconds)
    return {str(value): counts[value] for value in sorted(counts)}


def pool(records: Sequence[Record]) -> Latencies:
    """Return the latencies of several rounds together."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record["latencies_ms"])
    return dict(counts)


def percentiles(latencies: Mapping[str, int]) -> dict[str, float]:
    """Return the percentiles for which there are enough requests, highest first: {"p99_ms": ..., "p50_ms": ...}."""
    values = np.repeat([float(value) for value in latencies], list(latencies.values()))
    # In whole numbers: 500 × (1 - 0.99) is a little less than 5.
    enough = [percent for percent in PERCENTILES if len(values) * (100 - percent) >= 100 * MIN_BEYOND]
    return {f"p{percent}_ms": float(np.percentile(values, percent)) for percent in enough}


def highest(latencies: Mapping[str, int]) -> str:
    """Return the highest percentile for which there are enough requests as text ("p99 358 ms"), "-" if there is none.

    >>> highest({"20": 499})
    'p95 20 ms'
    """
    return next((f"{name[:-3]} {value:.0f} ms" for name, value in percentiles(latencies).items()), "-")


def percentile(latencies: Mapping[str, int], percent: int) -> str:
    """Return one percentile as text, "-" if there are not enough requests."""
    value = percentiles(latencies).get(f"p{percent}_ms")
    return "-" if value is None else f"{value:.0f}"


def latency_fields(milliseconds: Iterable[float]) -> Record:
    """Return the fields of a record that describe latencies: requests, percentiles and the latencies themselves."""
    latencies = count_latencies(milliseconds)
    return {"requests": sum(latencies.values()), **percentiles(latencies), "latencies_ms": latencies}


def spread(numbers: Sequence[float], digits: int = 0) -> str:
    """Return the median of the rounds, with the lowest and the highest if there were several."""
    if not numbers:
        return "-"
    text = f"{median(numbers):.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ({min(numbers):.{digits}f}–{max(numbers):.{digits}f})"


def matching(records: Iterable[Record], **where: Any) -> list[Record]:
    """Return the records with these values."""
    return [record for record in records if all(record.get(key) == value for key, value in where.items())]


def values(records: Iterable[Record], column: str, **where: Any) -> list[float]:
    """Return a column of the records that match, one value for each round."""
    return [record[column] for record in matching(records, **where) if column in record]


def distinct(records: Iterable[Record], column: str) -> list[Any]:
    """Return the different values of a column in their order."""
    return list(dict.fromkeys(record[column] for record in records))


def requests_of(records: Iterable[Record]) -> int:
    """Return the number of requests of several records together."""
    return sum(record["requests"] for record in records)


def ratios(ours: Iterable[Record], theirs: Iterable[Record]) -> list[float]:
    """Return the ratio of the frames a second in each round that both have."""
    others = {record["round"]: record["fps"] for record in theirs}
    return [record["fps"] / others[record["round"]] for record in ours if record["round"] in others]
