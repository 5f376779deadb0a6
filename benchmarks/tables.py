"""The tables of the page. The first cell of each names the instruction sets of the processor."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.figures import (
    Record,
    distinct,
    highest,
    matching,
    percentile,
    percentiles,
    pool,
    ratios,
    requests_of,
    spread,
    values,
)
from benchmarks.plan import BF16, FP32, INT8, KINDS, LITSERVE, MOSEC, OPENVINO_BF16, OPENVINO_FP32, ORIGINAL

Records = list[Record]
# One line of the targets: text, target, measured, requests.
Target = tuple[str, str, str, str]

# The ratios under full load: text, target, and the servers and kinds of requests of both sides.
TARGETS = [
    ("fp32, single frames: of the original example", "≥ 1.6", (FP32, "single"), (ORIGINAL, "single")),
    ("OpenVINO fp32, single frames: of the original example", "≥ 1.6", (OPENVINO_FP32, "single"), (ORIGINAL, "single")),
    ("bf16, single frames: of the original example", "≥ 2.6", (BF16, "single"), (ORIGINAL, "single")),
    ("OpenVINO bf16, single frames: of the original example", "≥ 2.6", (OPENVINO_BF16, "single"), (ORIGINAL, "single")),
    ("int8, single frames: of the original example", "≥ 4.5", (INT8, "single"), (ORIGINAL, "single")),
    ("OpenVINO fp32, single frames: of fp32", "≥ 1.05", (OPENVINO_FP32, "single"), (FP32, "single")),
    ("int8, single frames: of fp32", "≥ 2.5", (INT8, "single"), (FP32, "single")),
    ("fp32, single frames: of its ceiling", "≥ 0.85", (FP32, "single"), ("ceiling, fp32", "single")),
    ("bf16, single frames: of its ceiling", "≥ 0.80", (BF16, "single"), ("ceiling, bf16", "single")),
    ("int8, single frames: of its ceiling", "≥ 0.80", (INT8, "single"), ("ceiling, OpenVINO int8", "single")),
    ("fp32, JSON batches of 4: of the original example", "≥ 2.0", (FP32, "JSON 4"), (ORIGINAL, "JSON 4")),
    ("fp32, JSON batches of 4: of single frames", "≥ 1.0", (FP32, "JSON 4"), (FP32, "single")),
    ("fp32, single frames: of LitServe", "≥ 1.0", (FP32, "single"), (LITSERVE, "single")),
    ("fp32, single frames: of mosec", "≥ 1.0", (FP32, "single"), (MOSEC, "single")),
]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def label(kind: str) -> str:
    return "single frames" if kind == "single" else f"batches of {kind[5:]}"


def saturation_table(records: Records) -> str:
    """The main table, which is also in the project's README."""
    header = [f"{records[0]['instruction_sets']}: frames/s, latency, requests", *map(label, KINDS)]

    def cell(rounds: Records) -> str:
        if not rounds:
            return "-"
        fps, count = spread(values(rounds, "fps"), 1), requests_of(rounds)
        if "latencies_ms" not in rounds[0]:
            return f"{fps}, n = {count}"
        return f"{fps}, {highest(pool(rounds))}, n = {count}"

    return table(
        header,
        [
            [server, *(cell(matching(records, server=server, kind=kind)) for kind in KINDS)]
            for server in distinct(records, "server")
        ],
    )


def cost_table(records: Records) -> str:
    header = [f"{records[0]['instruction_sets']}: single frames", "requests", "p50 ms", "server's CPU, ms a frame"]
    header += ["load's CPU, ms a frame", "server's memory, MB"]
    columns = [("p50_ms", 0), ("server_ms", 1), ("load_ms", 1), ("memory_mb", 0)]
    served = [record for record in records if record["kind"] == "single" and "latencies_ms" in record]
    lines = []
    for server in distinct(served, "server"):
        rounds = matching(served, server=server)
        cells = [spread(values(rounds, column), digits) for column, digits in columns]
        lines.append([server, str(requests_of(rounds)), *cells])
    return table(header, lines)


def target_table(results: Mapping[str, Any]) -> str:
    """The targets, each with the median of the rounds' own ratios."""
    saturation, live = results.get("saturation", []), results.get("live", [])
    lines = full_load_targets(saturation) + one_camera_targets(live) + many_cameras_targets(live)
    sets = (saturation + live)[0]["instruction_sets"]
    return table([f"{sets}: ratio", "target", "measured", "requests"], lines)


def full_load_targets(saturation: Records) -> list[Target]:
    lines = []
    for text, target, *sides in TARGETS:
        ours, theirs = (matching(saturation, server=server, kind=kind) for server, kind in sides)
        requests = f"{requests_of(ours)} : {requests_of(theirs)}"
        if ours:  # A processor without bf16 has no row of bf16.
            lines.append((text, target, spread(ratios(ours, theirs), 2), requests))
    return lines


def one_camera_targets(live: Records) -> list[Target]:
    """The p99 of one camera; it rests on the frames of all rounds together."""
    ours, theirs = (pool(matching(live, server=server, cameras=1)) for server in (FP32, LITSERVE))
    p99s = [percentiles(each).get("p99_ms") for each in (ours, theirs)]
    ratio = f"{p99s[0] / p99s[1]:.2f}" if p99s[0] and p99s[1] else "-"
    counts = [sum(each.values()) for each in (ours, theirs)]
    return [
        ("one camera, fp32: p99 from capture to response", "≤ 120 ms", percentile(ours, 99), str(counts[0])),
        ("one camera, fp32: p99 of LitServe's", "≤ 1.3", ratio, f"{counts[0]} : {counts[1]}"),
    ]


def many_cameras_targets(live: Records) -> list[Target]:
    """Twice as many cameras as the number that gets the most answers."""
    lines = []
    for server in (FP32, BF16):
        cameras = {
            n: matching(live, server=server, cameras=n) for n in distinct(matching(live, server=server), "cameras")
        }
        answered = {n: median(values(records, "fps")) for n, records in cameras.items()}
        best = max(answered, key=lambda n: answered[n], default=0)
        if 2 * best in answered:
            text = f"{server[6:]}: answered with {2 * best} cameras, of the most ({best} cameras)"
            counts = f"{requests_of(cameras[2 * best])} : {requests_of(cameras[best])}"
            lines.append((text, "≥ 0.9", f"{answered[2 * best] / answered[best]:.2f}", counts))
    return lines


def live_table(records: Records) -> str:
    header = [f"{records[0]['instruction_sets']}: cameras of 25 fps", "answered frames", "answered fps", "dropped %"]
    header += ["p50 ms", "p99 ms", "mean batch", "client, CPU ms a captured frame", "client, MB"]
    header += ["server, CPU ms an answered frame", "server, MB"]
    columns = [("mean_batch", 1), ("client_ms", 1), ("client_mb", 0), ("server_ms", 1), ("server_mb", 0)]
    lines = []
    for server, cameras in dict.fromkeys((record["server"], record["cameras"]) for record in records):
        rounds = matching(records, server=server, cameras=cameras)
        cells = [str(requests_of(rounds)), spread(values(rounds, "fps"), 1)]
        cells.append(spread([100 * record["dropped"] / record["captured"] for record in rounds]))
        cells += [spread(values(rounds, "p50_ms")), percentile(pool(rounds), 99)]
        others = [spread(values(rounds, column), digits) for column, digits in columns]
        # request.py reports the batch of a TorchServe with our handler only.
        lines.append([f"{server}: {cameras}", *cells, "-" if server == LITSERVE else others[0], *others[1:]])
    return table(header, lines)


def growth_table(records: Records) -> str:
    header = [f"{records[0]['instruction_sets']}: frames", "answered frames", "answered fps", "p95 ms"]
    header += ["client, CPU ms a frame", "client, MB", "server, CPU ms a frame"]
    columns = [("client_ms", 1), ("client_mb", 0), ("server_ms", 1)]
    lines = []
    for frames, resize in dict.fromkeys((record["frames"], record["resize"]) for record in records):
        rounds = matching(records, frames=frames, resize=resize)
        cells = [str(requests_of(rounds)), spread(values(rounds, "fps"), 1), percentile(pool(rounds), 95)]
        cells += [spread(values(rounds, column), digits) for column, digits in columns]
        lines.append([frames + (", --resize 256" if resize else ""), *cells])
    return table(header, lines)


def static_table(records: Records) -> str:
    header = [f"{records[0]['instruction_sets']}: cameras of 5 fps", "captured frames", "sent frames"]
    header += ["frames with movement", "of them answered %", "p50 ms", "client, CPU ms a captured frame"]
    header += ["comparison, CPU ms a frame of 1080p"]
    lines = []
    for cameras, skips in dict.fromkeys((record["cameras"], record["skips"]) for record in records):
        rounds = matching(records, cameras=cameras, skips=skips)
        cells = [str(sum(values(rounds, column))) for column in ("captured", "sent", "moving")]
        cells.append(spread([100 * record["moving_answered"] / record["moving"] for record in rounds], 1))
        cells += [spread(values(rounds, "p50_ms")), spread(values(rounds, "client_ms"), 1)]
        cells.append(spread(values(rounds, "compare_ms"), 2) if skips else "-")
        lines.append([f"{cameras}, --skip-static" if skips else str(cameras), *cells])
    return table(header, lines)


def settings_table(records: Records) -> str:
    header = [f"{records[0]['instruction_sets']}: setting", "in flight", "requests", "frames/s", "p50 ms", "p95 ms"]
    header += ["server's CPU, ms a frame", "in its first seconds"]
    lines = [
        [
            *(str(record[column]) for column in ("setting", "in_flight", "requests")),
            f"{record['fps']:.1f}",
            *(percentile(record["latencies_ms"], percent) for percent in (50, 95)),
            *(f"{record[column]:.1f}" for column in ("server_ms", "first_ms")),
        ]
        for record in records
        if "in_flight" in record
    ]
    return table(header, lines)


def delay_table(records: Records) -> str:
    header = [f"{records[0]['instruction_sets']}: setting", "cameras", "answered frames"]
    header += ["p50 ms", "p95 ms", "mean batch"]
    lines = [
        [
            *(str(record[column]) for column in ("setting", "cameras", "requests")),
            *(percentile(record["latencies_ms"], percent) for percent in (50, 95)),
            f"{record['mean_batch']:.1f}",
        ]
        for record in records
        if "cameras" in record
    ]
    return table(header, lines)
