"""Four live cameras, both recipes, a real TorchServe, and a fault every 20 seconds: `make soak MINUTES=10`.

Exit codes: 0 all is well, 1 the counts don't add up, a stream did not recover, a frame failed, or something grew.
"""

import argparse
import itertools
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import psutil

from tests.support.archives import Archives
from tests.support.faults import BATCHED, FAULTS, FLAGS, SINGLE, Site, resources
from tests.support.frames import CLIP, frames_of, jpeg, small
from tests.support.mjpeg_camera import mjpeg_camera
from tests.support.scripts import Run, json_lines, longest_gap, running

FPS = 5
EVERY_S = 20.0
RECOVERY_S = 10.0
WARM_UP_S = 20.0
# How much more the processes may hold at the end than at the start.
MAX_GROWTH = {"threads": 20, "descriptors": 24, "sockets": 20, "processes": 0, "megabytes": 30}


def recovery_s(request: Run, camera: str, since: float) -> float:
    """Return how long after a moment a frame was answered that was captured since, at most RECOVERY_S seconds."""
    while not (found := request.answered(camera, since)):
        if time.time() > since + RECOVERY_S:
            return RECOVERY_S
        time.sleep(0.2)
    return found[0] - since


def say(*columns: object) -> None:
    widths = (23, 15, 20, 18, 14)
    print(
        "".join(str(column).ljust(width) for column, width in zip(columns, widths, strict=False)).rstrip(), flush=True
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1, help="of the order of the faults")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    problems: list[str] = []
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        jpegs = [jpeg(small(frame)) for frame in frames_of(CLIP)]
        cameras = [cleanup.enter_context(mjpeg_camera(jpegs, fps=FPS)) for _ in range(4)]
        site = Site(folder, Archives(folder), cameras, cleanup)
        runs: dict[str, Run] = {}
        for model, pair in ((SINGLE, cameras[:2]), (BATCHED, cameras[2:])):
            (folder / model).mkdir()
            inputs = itertools.chain.from_iterable(("--input", camera.url) for camera in pair)
            command = ["--url", site.proxy.url, "--model", model, *inputs, *FLAGS[model], "--max-age", "30000"]
            runs[model] = cleanup.enter_context(running(site.node, folder / model, *command))
        streams = [(runs[SINGLE], camera.url) for camera in cameras[:2]]
        streams += [(runs[BATCHED], camera.url) for camera in cameras[2:]]
        time.sleep(WARM_UP_S)
        before = {model: resources(request.process) for model, request in runs.items()}
        server_before = memory(site)

        say("fault", "lasted s", "recovery s")
        chance, order = random.Random(args.seed), list[str]()
        recoveries: dict[str, list[float]] = defaultdict(list)
        end = time.monotonic() + 60 * args.minutes
        while time.monotonic() < end:
            following = time.monotonic() + EVERY_S
            order = order or chance.sample(list(FAULTS), len(FAULTS))
            name = order.pop()
            begin = time.monotonic()
            with FAULTS[name].begin(site):
                time.sleep(FAULTS[name].seconds)
            lasted, over = time.monotonic() - begin, time.time()
            slowest = max(recovery_s(request, camera, over) for request, camera in streams)
            recoveries[name].append(slowest)
            say(name, f"{lasted:.1f}", f"{slowest:.1f}" if slowest < RECOVERY_S else "none within 10")
            if slowest >= RECOVERY_S:
                problems.append(f"a stream did not recover from {name}")
            time.sleep(max(0.0, following - time.monotonic()))
        time.sleep(WARM_UP_S / 2)

        after = {model: resources(request.process) for model, request in runs.items()}
        server_after = memory(site)
        summaries = {model: request.end() for model, request in runs.items()}
        print()
        say("camera", "captured", "answered", "failed / dropped", "longest gap s")
        for (model, found), number in zip(summaries.items(), (0, 2), strict=True):
            lines = json_lines(runs[model].output)
            for index, (camera, row) in enumerate(found.items(), start=number + 1):
                lost = f"{row['failed']} / {int(row['dropped']) + int(row['expired'])}"
                gap = longest_gap(lines, camera)
                name = f"{index} ({'JSON batches' if number else 'single frames'})"
                say(name, row["captured"], row["answered"], lost, f"{gap:.1f}")
                if row["failed"] != "0":
                    problems.append(f"camera {index}: {row['failed']} frames failed")
        injected = sum(map(len, recoveries.values()))
        survived = sum(seconds < RECOVERY_S for each in recoveries.values() for seconds in each)
        print(f"\nfaults injected {injected}, survived {survived}; recovery in seconds, median and longest:")
        for name, each in sorted(recoveries.items()):
            say(f"  {name}", f"{statistics.median(each):.1f}", f"{max(each):.1f}")
        print()
        say("at start -> at end", "single frames", "JSON batches")
        for what, allowed in MAX_GROWTH.items():
            pairs = [(before[model][what], after[model][what]) for model in runs]
            say(what, *(f"{old} -> {new}" for old, new in pairs))
            problems += [f"{what} grew from {old} to {new}" for old, new in pairs if new > old + allowed]
        print(f"TorchServe, with its workers: {server_before:.0f} MB -> {server_after:.0f} MB")
        if server_after > 1.2 * server_before:
            problems.append("TorchServe grew")
    for problem in problems:
        print(f"soak: {problem}", file=sys.stderr)
    print("failed" if problems else "all is well")
    return 1 if problems else 0


def memory(site: Site) -> float:
    """Return the megabytes of TorchServe and its workers."""
    return sum(member.memory_info().rss for member in site.family() if member.status() != psutil.STATUS_ZOMBIE) / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
