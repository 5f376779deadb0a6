"""All servers under full load, and the handler alone."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import requests

from benchmarks.figures import Record, latency_fields, rate
from benchmarks.in_process import ceiling
from benchmarks.inputs import Inputs
from benchmarks.load import saturate
from benchmarks.plan import (
    ALONE,
    CEILING_BATCH,
    CEILINGS,
    CORES,
    FLAGS,
    FP32,
    JSON_IN_FLIGHT,
    KINDS,
    LITSERVE,
    MOSEC,
    ORIGINAL,
    SATURATION,
    SINGLE_IN_FLIGHT,
    Plan,
)
from benchmarks.results import Results
from benchmarks.servers import RAW, Server, build_archive, original, other, ours, progress
from tests.support.in_process import Model

JSON = {"Content-Type": "application/json"}
MAX_DIFFERENCE = 0.05  # of a probability: the rounding of bf16


def measure_saturation(inputs: Inputs, plan: Plan, results: Results) -> None:
    """Measure frames a second and latencies of all servers under full load, and of the handler alone."""
    archives = {name: build_archive(inputs.folder / name, inputs.weights, *flags) for name, flags in FLAGS.items()}
    expected = Model(archives[FP32]).answers(inputs.frames[:4])
    with ExitStack() as cleanup:
        servers: dict[tuple[str, bool], Server] = {}
        # Each has separate servers for single frames and for JSON batches, as in the recipes.
        for kind, is_json in (("single", False), ("JSON 4", True)):
            for name in SATURATION[kind]:
                progress(f"starting {name}, {kind}")
                server = cleanup.enter_context(start(name, is_json, inputs, archives))
                size = KINDS[kind]
                bodies = inputs.bodies(size)
                check(server, bodies[0], expected[:size])
                warm_up_s = plan.thorough_warm_up_s if name == ORIGINAL else plan.start_warm_up_s
                load(server, bodies, size, 0.0, warm_up_s)
                cleanup.callback(server.resume)
                server.pause()
                servers[name, is_json] = server
        in_process = {
            name: cleanup.enter_context(ceiling(archives[served], inputs.frames, CORES, name in ALONE))
            for name, served in (CEILINGS | ALONE).items()
        }
        for number in range(1, plan.rounds + 1):
            for kind, names in SATURATION.items():
                for name in names:
                    progress(f"saturation, round {number} of {plan.rounds}, {kind}, {name}")
                    size = KINDS[kind]
                    with running(servers[name, size > 1]) as server:
                        record = load(server, inputs.bodies(size), size, plan.warm_up_s, plan.saturation_s)
                    results.add("saturation", {"server": name, "kind": kind, "round": number} | record)
            for name, model in in_process.items():
                progress(f"saturation, round {number} of {plan.rounds}, {name}")
                fps, batches = model.measure(CEILING_BATCH, plan.in_process_s)
                record = {"server": name, "kind": "single", "round": number, "fps": fps, "requests": batches}
                results.add("saturation", record)


def start(name: str, is_json: bool, inputs: Inputs, archives: Mapping[str, Path]) -> AbstractContextManager[Server]:
    """Return a server that is about to start, in a folder of its own."""
    folder = inputs.folder / ("json" if is_json else "single") / name
    size, delay_ms = 1 if is_json else inputs.setting("batchSize"), inputs.setting("maxBatchDelay")
    if name == ORIGINAL:
        return original(folder, inputs.weights, is_json)
    if name in (LITSERVE, MOSEC):
        return other("lit" if name == LITSERVE else "mosec", folder, archives[FP32], CORES, size, delay_ms)
    if is_json:
        build_archive(folder, inputs.weights, "--client-batching", *FLAGS[name])
    else:
        (folder / "model_store").mkdir(parents=True)
        shutil.copy(archives[name], folder / "model_store")
    return ours(folder, inputs.config)


def check(server: Server, body: bytes, expected: Sequence[dict[str, float]]) -> None:
    """Raise RuntimeError if a server does not respond as expected, within the rounding of bf16."""
    headers = server.headers | (JSON if len(expected) > 1 and server.folder else RAW)
    predictions = requests.post(server.url, body, headers=headers, timeout=60).json()
    for prediction, right in zip([predictions] if len(expected) == 1 else predictions, expected, strict=True):
        best = next(iter(right))
        if abs(prediction.get(best, 0.0) - right[best]) > MAX_DIFFERENCE:
            raise RuntimeError(f"{server.url} responds with {prediction}, expected {right}")


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Resume a paused server for as long as the block lasts."""
    server.resume()
    try:
        yield server
    finally:
        server.pause()


def load(
    server: Server,
    bodies: Sequence[bytes],
    size: int,
    warm_up_s: float,
    seconds: float,
    in_flight: int | None = None,
) -> Record:
    """Saturate a server; return frames a second, latencies, and the CPU milliseconds of server and load for a frame."""
    in_flight = in_flight or (SINGLE_IN_FLIGHT if size == 1 else JSON_IN_FLIGHT)
    headers = server.headers | (JSON if size > 1 and server.folder else RAW)
    cpu_s, own_s = server.cpu_s(), time.process_time()
    measured = saturate(server.url, headers, bodies, in_flight, warm_up_s, seconds)
    frames = size * len(measured.requests)
    complete = [each for each in measured.requests if measured.begin <= each.answered < measured.end]
    return {
        "fps": size * rate(measured.requests, measured.begin, measured.end),
        "server_ms": 1000 * (server.cpu_s() - cpu_s) / frames,
        "load_ms": 1000 * (time.process_time() - own_s) / frames,
        "memory_mb": server.memory_mb(),
    } | latency_fields(1000 * (each.answered - each.sent) for each in complete)
