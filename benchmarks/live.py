"""Cameras and frames of several sizes through request.py: what is answered, latencies, CPU and memory of both sides."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks.figures import Record, latency_fields
from benchmarks.inputs import Inputs, larger_clip
from benchmarks.plan import BF16, CLIP, CORES, FLAGS, FP32, FRAME_SIZES, LITSERVE, LIVE, Plan
from benchmarks.results import Results
from benchmarks.saturation import load, running
from benchmarks.servers import Server, build_archive, other, ours, progress
from demo.node import PROJECT

Lines = list[dict[str, Any]]  # of --jsonl

START_S = 1.5  # until request.py has imported its modules, and streams
AGE_LIMIT_MS = 1000
NOT_ANSWERED = ("dropped", "expired", "failed")


def measure_live(inputs: Inputs, plan: Plan, results: Results) -> None:
    """Measure cameras of 25 frames a second."""
    flags = ["--drop", "oldest", "--max-age", str(AGE_LIMIT_MS)]
    with ExitStack() as cleanup:
        servers = {}
        for name in [name for name in (FP32, BF16) if name in FLAGS]:
            folder = inputs.folder / name
            archive = build_archive(folder, inputs.weights, *FLAGS[name])
            servers[name] = cleanup.enter_context(ours(folder, inputs.config))
            if name == FP32:
                size, delay_ms = inputs.setting("batchSize"), inputs.setting("maxBatchDelay")
                lit = other("lit", inputs.folder / "lit", archive, CORES, size, delay_ms)
                servers[LITSERVE] = cleanup.enter_context(lit)
        for server in servers.values():
            load(server, inputs.frames, 1, 0.0, plan.start_warm_up_s)
            cleanup.callback(server.resume)
            server.pause()
        for number in range(1, plan.rounds + 1):
            for name, counts in LIVE.items():
                for cameras in counts:
                    progress(f"live, round {number} of {plan.rounds}, {name}, {cameras} cameras")
                    with running(servers[name]) as server:
                        record = stream(server, [CLIP] * cameras, *flags, seconds=plan.live_s)
                    results.add("live", {"server": name, "cameras": cameras, "round": number} | record)


def measure_growth(inputs: Inputs, plan: Plan, results: Results) -> None:
    """Measure frames of several sizes, with and without --resize, as fast as request.py and the server can."""
    clips = {name: larger_clip(inputs.folder, height) if height else CLIP for name, height in FRAME_SIZES.items()}
    build_archive(inputs.folder / "frames", inputs.weights)
    with ours(inputs.folder / "frames", inputs.config) as server:
        load(server, inputs.frames, 1, 0.0, plan.start_warm_up_s)
        for number in range(1, plan.growth_rounds + 1):
            progress(f"frame sizes, round {number} of {plan.growth_rounds}")
            for name, clip in clips.items():
                for flags in ([], ["--resize", "256"]):
                    record = stream(server, [clip], "--fps", "max", *flags, seconds=plan.growth_s)
                    results.add("growth", {"frames": name, "resize": bool(flags), "round": number} | record)


def stream(
    server: Server, sources: Sequence[Path], *flags: str, seconds: float, count: Callable[[Lines], Record] | None = None
) -> Record:
    """Run request.py on a server for some seconds; return its summary, and the CPU and memory of both sides.

    count: returns further figures, from the lines of --jsonl.
    """
    lines = Path(tempfile.gettempdir(), f"benchmark-{os.getpid()}.jsonl")
    lines.unlink(missing_ok=True)
    command = [sys.executable, str(PROJECT / "request.py"), "--quiet", "--loop", "--url", server.url.split("/pred")[0]]
    command += [f"--input={path}" for path in sources] + ["--jsonl", str(lines), *flags]
    environment = os.environ | {"TORCHSERVE_TOKEN": server.headers.get("Authorization", "Bearer -").split()[1]}
    cpu_s = server.cpu_s()
    client = psutil.Popen(command, env=environment, cwd=server.folder, stderr=subprocess.PIPE, text=True)
    time.sleep(START_S)
    begun, begun_s = time.monotonic(), sum(client.cpu_times()[:2])
    time.sleep(seconds)
    cores = (sum(client.cpu_times()[:2]) - begun_s) / (time.monotonic() - begun)
    memory = client.memory_full_info().uss / 1e6
    client.send_signal(signal.SIGINT)
    rows = parse_summary(client.communicate(timeout=60)[1])
    results = [json.loads(line) for line in lines.read_text().splitlines()]
    lines.unlink()
    counts = {name: sum(int(row[name]) for row in rows) for name in ("captured", "answered", *NOT_ANSWERED)}
    fps = sum(float(row["FPS"]) for row in rows)
    record = {
        "captured": counts["captured"],
        "dropped": counts["dropped"] + counts["expired"],
        "failed": counts["failed"],
        "fps": fps,
        "mean_batch": max(float(row["batch"]) for row in rows) if server.folder else 1.0,
        "client_ms": 1000 * cores / (fps * counts["captured"] / counts["answered"]),
        "client_mb": memory,
        "server_ms": 1000 * (server.cpu_s() - cpu_s) / counts["answered"],
        "server_mb": server.memory_mb(),
    }
    latencies = latency_fields(line["latency_ms"] for line in results if line["latency_ms"] is not None)
    return (count(results) if count else {}) | record | latencies


def parse_summary(text: str) -> list[dict[str, str]]:
    """Return the rows of the summary that request.py prints. Raises RuntimeError if there is none."""
    lines = [re.split(r" {2,}", line) for line in text.splitlines()]
    header = next((line for line in lines if line[0] == "camera"), None)
    if header is None:
        raise RuntimeError(f"request.py printed no summary: {text}")
    rows = lines[lines.index(header) + 1 :]
    return [dict(zip(header, line, strict=True)) for line in rows if len(line) == len(header)]
