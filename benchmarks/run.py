"""Measure everything in one run on this machine, and write the results: `make bench`.

Writes results.json, README.md, saturation.png and growth.png. Figures of different machines, or of different runs on a
shared machine, can't be compared; ratios within a run can. So each round measures every server once, while all others
are stopped. The report has the median of the rounds, with the lowest and the highest. What is measured, and how long it
takes: plan.py. An interrupted run leaves its measurements in results.part.json; `python -m benchmarks.report` writes
them as a page.
"""

import argparse
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.inputs import prepare
from benchmarks.live import measure_growth, measure_live
from benchmarks.machine import instruction_sets, machine
from benchmarks.plan import FULL, QUICK, describe, expected_s
from benchmarks.results import Results
from benchmarks.saturation import measure_saturation
from benchmarks.servers import progress
from benchmarks.settings import measure_settings
from benchmarks.static import measure_static

HERE = Path(__file__).resolve().parent
PARTS = {
    "saturation": measure_saturation,
    "live": measure_live,
    "growth": measure_growth,
    "settings": measure_settings,
    "static": measure_static,
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measure only these")
    parser.add_argument("--quick", action="store_true", help="one round of seconds: to try the benchmark itself")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write there instead of benchmarks/")
    arguments = parser.parse_args(argv)
    is_partial = arguments.quick or arguments.parts != list(PARTS)
    if is_partial and arguments.output is None:
        parser.error("--quick and --parts need --output: benchmarks/ has the results of whole runs only")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_args(argv)
    # No servers stay behind, also if it is terminated.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    plan = QUICK if arguments.quick else FULL
    expected = expected_s(plan)
    progress(describe({part: expected[part] for part in arguments.parts}))
    output = arguments.output or HERE
    output.mkdir(parents=True, exist_ok=True)
    head = {
        "machine": machine(),
        "rounds": plan.rounds,
        "saturation_s": plan.saturation_s,
        "in_process_s": plan.in_process_s,
    }
    results = Results(output, head, instruction_sets())
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        for part in arguments.parts:
            folder = Path(name) / part
            folder.mkdir()
            PARTS[part](prepare(folder), plan, results)
            progress(f"{part}: {(time.monotonic() - start) / 60:.1f} minutes since the start")
    results.finish(round((time.monotonic() - start) / 60, 1))
    report.write(results.content, output)
    print((output / "README.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
