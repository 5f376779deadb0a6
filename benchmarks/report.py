"""Write the measurements of run.py as README.md and two plots.

python -m benchmarks.report RESULTS.json FOLDER writes them again, also those of a run that was interrupted.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.figures import MIN_BEYOND
from benchmarks.plots import plot_growth, plot_saturation
from benchmarks.tables import (
    cost_table,
    delay_table,
    growth_table,
    live_table,
    saturation_table,
    settings_table,
    static_table,
    table,
    target_table,
)

HEAD = """# Benchmark

`make bench` measures all of this in one run and writes this page, [results.json](results.json) and the plots anew.

{machine}

{duration} A figure is the median of {rounds} rounds, with the lowest and the highest in brackets; each round measures
every server while all others are stopped. Load, client and server share the cores. Compare figures of this page only
with each other: on another machine, or another day on a shared one, all of them are different.

- **original example**: TorchServe's built-in `image_classifier`, one worker, batches of 4; for JSON batches its
  counterpart in TorchServe's default settings. It is measured after Java's compilers have finished.
- **ours**: this project's `create_mar_file.py` and `config.properties`, for JSON batches with `--client-batching`. The
  network is ResNet-18 with untrained weights, which take the same time.
- **LitServe, mosec**: the same handler, number of workers, batch size and delay, behind another server.
- **ceiling**: the same handler in as many processes as there are workers, with the frames in memory and no server.
- **OpenVINO**: archives of `--runtime openvino`. **OpenVINO alone** is the network in as many processes, without our
  handler, on frames that are decoded and cropped already. The rows of int8 show the speed only: untrained weights are
  calibrated with the sample clip, and their agreement means nothing.

**Other processors.** The first cell of each table names the instruction sets of the processor that was measured. On
another machine, whose processor has AVX2 but neither AVX-512 nor AMX, the original example served 13 frames/s, ours 17
in fp32 and 2 in bf16. Such a processor has no instructions for bf16, and PyTorch emulated them; now the handler runs
fp32 there, and `make bench` leaves out the rows of bf16. `lscpu` shows whether a processor has avx512_bf16 or amx_bf16.

**Requests and percentiles.** The tables have the number of requests behind each figure, in all rounds together. A
percentile is printed only if at least {min_beyond} requests lie beyond it: p99 of 500 requests or more, p95 of 100 or
more, else the median (p50), and "-" if there are still fewer. p95 and p99 are of the requests of all rounds together,
which is sound because each round measures the same server under the same load; they have no brackets.
"""

SATURATION = """## Under full load

Frames of 640×480 from the sample clip; 16 requests of single frames are in flight, or 4 JSON batches. Each round
measures for {saturation_s:.0f} s, after a warm-up. A request that is in flight at the start or at the end of this time
counts with the share of its own time that lies within, so that the figures do not move in steps of whole batches. The
milliseconds are from a request to its response. n is the number of requests (of a ceiling: of batches of 4) in all
rounds; what has no server is measured for {in_process_s:.0f} s. "-" was not measured. The CPU includes the second of
warm-up.

{saturation}

![Frames a second of each server](saturation.png)

{cost}
"""

TARGETS = """## Targets

Each is the median of the rounds' own ratios; p99 is that of all rounds together. The requests are those of both sides
of the ratio.

{targets}
"""

LIVE = """## Live cameras

The sample clip, once for each camera, through `request.py --drop oldest --max-age 1000 --jsonl FILE`. The milliseconds
are from capture to response, of all cameras together; the same cores do the clients' reading and encoding.

{live}
"""

GROWTH = """## Larger frames

The sample clip, enlarged, as fast as `request.py --fps max` and the server can process it; one round less, so p95
instead of p99.

{growth}
"""

PLOT = """![Against cameras and frame size](growth.png)
"""

SETTINGS = """## Settings

Each server started anew, one round, fp32, single frames under full load; all other settings are those of
`config.properties`. "In its first seconds" is the CPU while Java's compilers run; the figures of all compilers are
measured after another 25 s. One round has few requests: p95 instead of p99.

{settings}

And with one and two cameras of 25 fps:

{delay}
"""

STATIC = """## Scenes that are still

Cameras of 320×240 whose scene is still for nine tenths of the time: for 3 of 30 s it is the cat of the sample clip that
moves, at another time for each camera, then its last frame; each frame has new noise. One worker, fp32, `request.py
--drop oldest`; one round less. A frame with movement is one of those 3 s. The comparison was measured alone: the median
of 200 frames.

{static}
"""


def page(results: dict[str, Any]) -> str:
    """Return the page. Parts that were not measured are left out."""
    machine = results["machine"]
    minutes = results.get("minutes")
    text = HEAD.format(
        machine=table(
            ["measured on", machine["date"]], [[name, each] for name, each in machine.items() if name != "date"]
        ),
        duration=f"It took {minutes} minutes." if minutes else "It was interrupted.",
        rounds=results["rounds"],
        min_beyond=MIN_BEYOND,
    )
    sections = [text]
    if saturation := results.get("saturation"):
        tables = {"saturation": saturation_table(saturation), "cost": cost_table(saturation)}
        sections.append(
            SATURATION.format(saturation_s=results["saturation_s"], in_process_s=results["in_process_s"], **tables)
        )
    if saturation and results.get("live"):
        sections.append(TARGETS.format(targets=target_table(results)))
    if live := results.get("live"):
        sections.append(LIVE.format(live=live_table(live)))
    if growth := results.get("growth"):
        sections.append(GROWTH.format(growth=growth_table(growth)))
    if has_growth_plot(results):
        sections.append(PLOT)
    if settings := results.get("settings"):
        sections.append(SETTINGS.format(settings=settings_table(settings), delay=delay_table(settings)))
    if static := results.get("static"):
        sections.append(STATIC.format(static=static_table(static)))
    return "\n".join(sections)


def has_growth_plot(results: dict[str, Any]) -> bool:
    return all(results.get(part) for part in ("live", "growth"))


def write(results: dict[str, Any], folder: Path) -> None:
    """Write README.md, saturation.png and growth.png into a folder."""
    if results.get("saturation"):
        plot_saturation(results["saturation"], folder / "saturation.png")
    if has_growth_plot(results):
        plot_growth(results, folder / "growth.png")
    (folder / "README.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
