"""Cameras whose scene is still for nine tenths of the time, with and without --skip-static."""

import time
from pathlib import Path
from statistics import median

import cv2
import numpy as np

from benchmarks.figures import Record
from benchmarks.inputs import Inputs
from benchmarks.live import Lines, stream
from benchmarks.plan import CLIP, MOVING_SHARE, STATIC, STATIC_CLIP_S, STATIC_FPS, Plan, Trial
from benchmarks.results import Results
from benchmarks.saturation import load
from benchmarks.servers import build_archive, ours, progress
from benchmarks.settings import configuration
from edge.changes import changed_percent, small_image

FRAMES = STATIC_FPS * STATIC_CLIP_S
MOVING_FRAMES = round(MOVING_SHARE * FRAMES)
NOISE = 4.0  # grey levels, the standard deviation of a pixel
SIZE = (320, 240)
COMPARISONS = 200


def measure_static(inputs: Inputs, plan: Plan, results: Results) -> None:
    """Measure as many cameras as one worker answers, and six times as many."""
    most = max(cameras for cameras, _ in STATIC)
    clips = [write_clip(inputs.folder / f"{number}.avi", number / most) for number in range(most)]
    compare_ms = measure_comparison()
    build_archive(inputs.folder / "server", inputs.weights)
    with ours(inputs.folder / "server", configuration(inputs.config, Trial("one worker", workers=1))) as server:
        load(server, inputs.frames, 1, 0.0, plan.start_warm_up_s)
        for number in range(1, plan.static_rounds + 1):
            for cameras, skips in STATIC:
                progress(f"still scenes, round {number} of {plan.static_rounds}, {cameras} cameras")
                flags = ["--drop", "oldest", *(["--skip-static"] if skips else [])]
                chosen = clips[:: most // cameras]  # those that move at regular intervals
                record = stream(server, chosen, *flags, seconds=plan.static_s, count=count_movement)
                head = {"cameras": cameras, "skips": skips, "round": number, "compare_ms": compare_ms}
                results.add("static", head | record)


def write_clip(path: Path, phase: float) -> Path:
    """Write a clip that is still but for MOVING_SHARE of its time, and begins at `phase`, a share of its length."""
    capture, random = cv2.VideoCapture(str(CLIP)), np.random.default_rng(int(1000 * phase))
    images = [cv2.resize(capture.read()[1], SIZE) for _ in range(5 * MOVING_FRAMES)][::5]
    images += images[-1:] * (FRAMES - MOVING_FRAMES)
    noise = random.normal(0, NOISE, images[0].shape)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), STATIC_FPS, SIZE)
    for number in range(FRAMES):
        image = images[(number + first_of(phase)) % FRAMES]
        # The same noise at another place is as good as new noise.
        shifted = np.roll(noise, random.integers(SIZE[1]) * SIZE[0] * 3)
        writer.write(np.clip(image + shifted, 0, 255).astype(np.uint8))
    writer.release()
    return path


def first_of(phase: float) -> int:
    """Return with which frame of the scene a clip begins."""
    return int(phase * FRAMES)


def count_movement(lines: Lines) -> Record:
    """Return how many frames were sent, how many have movement, and how many of these were answered."""
    most = max(cameras for cameras, _ in STATIC)
    begins = {line["camera"]: first_of(int(Path(line["camera"]).stem) / most) for line in lines}
    moving = [
        line["outcome"] for line in lines if (line["frame"] - 1 + begins[line["camera"]]) % FRAMES < MOVING_FRAMES
    ]
    sent = sum(line["outcome"] in ("answered", "failed") for line in lines)
    return {"sent": sent, "moving": len(moving), "moving_answered": moving.count("answered")}


def measure_comparison() -> float:
    """Return the milliseconds of CPU, all threads together, to compare a frame of 1920 × 1080: the median."""
    capture = cv2.VideoCapture(str(CLIP))
    frames = [cv2.resize(capture.read()[1], (1920, 1080)) for _ in range(8)]
    before, times_ms = small_image(frames[0]), []
    for number in range(COMPARISONS):
        start = time.process_time()
        changed_percent(before, small_image(frames[number % len(frames)]))
        times_ms.append(1000 * (time.process_time() - start))
    return median(times_ms)
