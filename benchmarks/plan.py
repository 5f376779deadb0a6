"""What `make bench` measures, how often and for how long, and how long all of it takes.

On a machine with 2 cores (`python -m benchmarks.plan` prints this sum):

    saturation  27 min  11 rows × 3 rounds × 32 s, 8 × 3 × 6 s in process, and 9 servers to start and to warm up
    live         6 min   9 rows × 3 rounds × 10 s, and 3 servers
    growth       2 min   6 rows × 2 rounds ×  7 s, and 1 server
    settings     4 min   8 rows ×           10 s, 4 × 10 s with cameras, and 6 servers
    static       3 min   3 rows × 2 rounds × 23 s, and 1 server
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

from demo.node import PROJECT
from server.runtime import has_bf16

CLIP = PROJECT / "data" / "sample_video.mp4"

CORES = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1

ORIGINAL, FP32, BF16 = "original example", "ours, fp32", "ours, bf16"
OPENVINO_FP32, OPENVINO_BF16, INT8 = "ours, OpenVINO fp32", "ours, OpenVINO bf16", "ours, OpenVINO int8"
LITSERVE, MOSEC = "LitServe, our handler", "mosec, our handler"
# The flags of create_mar_file.py. A processor without bf16 would run fp32 instead. --force: the agreement of int8 with
# fp32 means nothing, since the network is untrained.
FLAGS: dict[str, tuple[str, ...]] = {
    FP32: (),
    OPENVINO_FP32: ("--runtime", "openvino"),
    **({BF16: ("--precision", "bf16")} if has_bf16() else {}),
    **({OPENVINO_BF16: ("--runtime", "openvino", "--precision", "bf16")} if has_bf16() else {}),
    INT8: ("--runtime", "openvino", "--precision", "int8", "--calibrate", str(CLIP), "--force"),
}
# What runs in processes of its own: our handler without a server, and OpenVINO without our handler.
CEILINGS = {name.replace("ours", "ceiling"): name for name in FLAGS}
ALONE = {name.replace("ours, OpenVINO", "OpenVINO alone,"): name for name in FLAGS if "OpenVINO" in name}

# Kinds of requests: their number of frames.
KINDS = {"single": 1, "JSON 4": 4, "JSON 10": 10}
# The servers that are measured with each kind: those that a target compares, and for batches of 10 the recipe.
SATURATION: dict[str, tuple[str, ...]] = {
    "single": (ORIGINAL, *FLAGS, LITSERVE, MOSEC),
    "JSON 4": (ORIGINAL, FP32),
    "JSON 10": (ORIGINAL, FP32),
}
CEILING_BATCH = 4
# The numbers of cameras for each server: up to twice as many as the number that gets the most answers on 2 cores, which
# is 2 or 4 in fp32, and 4 or 8 in bf16.
LIVE: dict[str, tuple[int, ...]] = {FP32: (1, 2, 4, 8), LITSERVE: (1,)}
if BF16 in FLAGS:
    LIVE[BF16] = (1, 4, 8, 16)
# The heights of the frames: the sample clip as it is, and enlarged.
FRAME_SIZES = {"640×480": None, "1280×720": 720, "1920×1080": 1080}

# Cameras of STATIC_FPS frames a second whose scene moves for a tenth of the time: as many as one worker answers, and
# six times as many.
STATIC_FPS, STATIC_CLIP_S, MOVING_SHARE = 5, 30, 0.1  # No clip is repeated.
STATIC: tuple[tuple[int, bool], ...] = ((5, False), (30, False), (30, True))  # cameras, --skip-static

# Requests in flight, of single frames and of JSON batches: request.py's defaults.
SINGLE_IN_FLIGHT, JSON_IN_FLIGHT = 16, 4
MANY_IN_FLIGHT = 64  # enough to fill the largest batch of every worker


@dataclass(frozen=True)
class Trial:
    """A server with a setting that differs from config.properties.

    changes: new values of settings of the model. threads: of each worker. in_flight: each is a row of the table.
    cameras: each number is measured as well. has_all_compilers: Java's thorough compiler is not left out.
    """

    setting: str
    changes: Mapping[str, int] = field(default_factory=dict)
    workers: int | None = None
    threads: int = 1
    has_all_compilers: bool = False
    in_flight: tuple[int, ...] = (SINGLE_IN_FLIGHT,)
    cameras: tuple[int, ...] = ()


UNCHANGED = Trial("as in config.properties", in_flight=(SINGLE_IN_FLIGHT, 32, MANY_IN_FLIGHT), cameras=(1, 2))
TRIALS = (
    UNCHANGED,
    *(Trial(f"batchSize {size}", {"batchSize": size}, in_flight=(MANY_IN_FLIGHT,)) for size in (1, 8)),
    Trial("maxBatchDelay 40 ms", {"maxBatchDelay": 40}, cameras=(1, 2)),
    Trial(f"workers × threads 1 × {CORES}", workers=1, threads=CORES),
    Trial("all of Java's compilers", has_all_compilers=True),
)


@dataclass(frozen=True)
class Plan:
    """Rounds, and the seconds of each measurement."""

    rounds: int = 3
    growth_rounds: int = 2
    static_rounds: int = 2
    saturation_s: float = 30.0
    in_process_s: float = 6.0  # without a server there is no warm-up, and little spread
    live_s: float = 8.0  # 3 rounds of one camera are 600 frames: enough for a p99
    growth_s: float = 5.0
    settings_s: float = 8.0
    static_s: float = 20.0
    warm_up_s: float = 1.0  # of a server that has just been resumed
    # Java's compilers are busy at first: the quick one for seconds, the thorough one, which only the original example
    # has, for a minute or so.
    start_warm_up_s: float = 4.0
    thorough_warm_up_s: float = 25.0


FULL = Plan()
# For trying the benchmark: its figures mean nothing.
QUICK = Plan(
    1,
    1,
    1,
    static_s=3,
    saturation_s=3,
    in_process_s=2,
    live_s=3,
    growth_s=2,
    settings_s=2,
    start_warm_up_s=1,
    thorough_warm_up_s=2,
)

# Seconds, measured on 2 cores: to build an archive, to start and to stop a server, to start and to stop request.py, to
# enlarge the clip, to start and to stop the processes of a ceiling, and until the last responses of a measurement have
# arrived.
CALIBRATION_S = 30.0
ARCHIVE_S, START_S, STOP_S, CLIENT_S, CLIPS_S, CEILING_S, LAST_S = 4.5, 6.0, 4.0, 2.3, 4.0, 5.0, 0.8


def expected_s(plan: Plan) -> dict[str, float]:
    """Return the seconds that each part of the benchmark is expected to take."""
    server_s = ARCHIVE_S + START_S + plan.start_warm_up_s + STOP_S
    row_s = plan.warm_up_s + LAST_S
    stream_s = plan.live_s + CLIENT_S

    started = [name for kind in ("single", "JSON 4") for name in SATURATION[kind]]
    loads = sum(map(len, SATURATION.values()))
    in_process = len(CEILINGS) + len(ALONE)
    saturation = len(FLAGS) * ARCHIVE_S + CALIBRATION_S + len(started) * server_s + in_process * CEILING_S
    saturation += started.count(ORIGINAL) * (plan.thorough_warm_up_s - plan.start_warm_up_s)
    saturation += plan.rounds * (loads * (plan.saturation_s + row_s) + in_process * plan.in_process_s)

    live = len(LIVE) * server_s + plan.rounds * sum(map(len, LIVE.values())) * stream_s
    growth = server_s + CLIPS_S + plan.growth_rounds * 2 * len(FRAME_SIZES) * (plan.growth_s + CLIENT_S)

    settings = len(TRIALS) * server_s + sum(len(trial.in_flight) for trial in TRIALS) * (plan.settings_s + row_s)
    settings += sum(len(trial.cameras) for trial in TRIALS) * stream_s
    settings += sum(plan.thorough_warm_up_s for trial in TRIALS if trial.has_all_compilers)

    static = server_s + CLIPS_S + plan.static_rounds * len(STATIC) * (plan.static_s + CLIENT_S)
    return {"saturation": saturation, "live": live, "growth": growth, "settings": settings, "static": static}


def describe(parts: Mapping[str, float]) -> str:
    """Return the expected minutes, of each part and in total."""
    each = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in parts.items())
    return f"expected: {sum(parts.values()) / 60:.0f} minutes ({each})"


if __name__ == "__main__":
    print(describe(expected_s(FULL)), f"on {os.cpu_count()} cores", sep=", ")
