"""README.md and deploy/README.md: the commands that users know, and the figures of the benchmark."""

import json
import re
from statistics import median
from typing import Any

from demo.node import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")
HERE = "examples/image_classifier/near_real_time_video"

# Users of the original example know these commands: none of them may change.
COMMANDS_THAT_STAY = [
    f"python {HERE}/create_mar_file.py",
    "torchserve --start --model-store model_store --models resnet-18=resnet-18.mar "
    f"--ts-config {HERE}/config.properties",
    f"python {HERE}/request.py",
    f"python {HERE}/create_mar_file.py --client-batching",
    "torchserve --start --model-store model_store --models resnet-18=resnet-18.mar",
    f"python {HERE}/request.py --client-batching",
    f"python {HERE}/request.py --client-batching --batch_size 10",
    f"python {HERE}/request.py --client-batching --batch_size 10 --input 0",
]


def test_commands_that_stay_are_there_word_for_word() -> None:
    lines = README.splitlines()
    assert [command for command in COMMANDS_THAT_STAY if command not in lines] == []


def test_the_planning_table_is_computed_from_the_benchmark() -> None:
    results = json.loads((PROJECT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    single = {
        server: median(each["server_ms"] for each in results["saturation"] if is_ours(each, server))
        for server in ("ours, fp32", "ours, bf16")
    }
    fp32: dict[str, float] = {}
    for frames, resize in sorted({(each["frames"], each["resize"]) for each in results["growth"]}):
        times = [
            each["server_ms"] for each in results["growth"] if (each["frames"], each["resize"]) == (frames, resize)
        ]
        name = "any with `--resize 256`" if resize else frames
        fp32[name] = max(fp32.get(name, 0.0), median(times))
    faster = {"fp32": 0.0, "bf16": single["ours, fp32"] - single["ours, bf16"]}
    planning = (PROJECT / "deploy" / "README.md").read_text(encoding="utf-8")
    for precision, less in faster.items():
        for name, ms in fp32.items():
            cost = round(ms - less, 1)
            cameras = [int(0.7 * 1000 * 2 / (rate * cost)) for rate in (1, 5, 10, 25)]
            assert f"| {precision}, {name} | {cost} | {' | '.join(map(str, cameras))} |\n" in planning


def is_ours(result: dict[str, Any], server: str) -> bool:
    return bool(result["server"] == server and result["kind"] == "single")


def test_the_speed_that_the_readme_states_is_the_measured_one() -> None:
    section = README.split("## How fast it is")[1]
    table = re.search(r"(?m)^\|.*\n(?:\|.*\n)+", section)
    assert table
    assert len(table[0].splitlines()) > 5
    assert table[0] in (PROJECT / "benchmarks" / "README.md").read_text(encoding="utf-8")
