"""README.md, docs/ and deploy/README.md: the commands that users know, the links, and the figures of the benchmark."""

import json
import re
from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.plan import STATIC_FPS
from demo.node import PROJECT

README = (PROJECT / "README.md").read_text(encoding="utf-8")
HERE = "examples/image_classifier/near_real_time_video"

CONVERTED = ["OpenVINO fp32", "OpenVINO bf16", "OpenVINO int8"]
LARGE = ("640×480", False)  # frames of the sample clip, and whether they are shrunk

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


# The sections with bash blocks, whose commands are run: those of make by test_demo.py and by CI, all others by
# tests/integration/test_recipes.py.
COMMANDS_THAT_ARE_RUN = {
    "README.md": ["Quick start", "TorchServe batches", "The client batches", "Several tasks on one camera"],
    "deploy/README.md": ["Several machines behind nginx"],
    "docs/cameras-and-outputs.md": ["Predictions on the terminal", "Before you stream: --check"],
    "docs/developing.md": ["The HTTP interface"],
    "docs/security.md": ["Keys"],
    "docs/troubleshooting.md": ["The weights can't be downloaded"],
}


def pages() -> dict[str, str]:
    """Return the text of all documents by their path, without the folders that git ignores."""
    folders = [PROJECT, *(PROJECT / name for name in ("architecture", "benchmarks", "data", "deploy", "docs", "tests"))]
    paths = [path for folder in folders for path in sorted(folder.glob("*.md"))]
    return {path.relative_to(PROJECT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def headings(page: str) -> Iterator[tuple[str, str]]:
    """Yield the headings of a page, each with the text below it. A # in a code block is a comment."""
    parts = re.split(r"(?m)^#+ (.*)\n", re.sub(r"(?ms)^```.*?^```", lambda block: block[0].replace("\n#", "\n "), page))
    yield from zip(parts[1::2], parts[2::2], strict=True)


def anchor(heading: str) -> str:
    """Return the name that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_commands_that_stay_are_there_word_for_word() -> None:
    lines = README.splitlines()
    assert [command for command in COMMANDS_THAT_STAY if command not in lines] == []


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_every_command_is_in_a_section_whose_commands_are_run() -> None:
    found = {
        path: [heading for heading, text in headings(page) if "```bash\n" in text] for path, page in pages().items()
    }
    assert {path: sections for path, sections in found.items() if sections} == COMMANDS_THAT_ARE_RUN


def test_links_lead_to_files_and_headings_that_exist() -> None:
    anchors = {path: {anchor(heading) for heading, _ in headings(page)} for path, page in pages().items()}
    checked, broken = 0, []
    for path, page in pages().items():
        text = re.sub(r"(?ms)^```.*?^```|`[^`]*`", "", page)
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if link.startswith(("http://", "https://")):
                continue
            name, _, heading = link.partition("#")
            target = (PROJECT / path).parent.joinpath(name).resolve() if name else PROJECT / path
            is_right = target.exists()
            if heading and is_right:
                is_right = heading in anchors[target.relative_to(PROJECT).as_posix()]
            checked += 1
            broken += [] if is_right else [f"{path}: {link}"]
    assert broken == []
    assert checked > 50


def test_the_planning_table_is_computed_from_the_benchmark() -> None:
    results = json.loads((PROJECT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    single = {
        server: median(each["server_ms"] for each in results["saturation"] if is_ours(each, server))
        for server in ("ours, fp32", "ours, bf16", *(f"ours, {runtime}" for runtime in CONVERTED))
    }
    fp32: dict[str, float] = {}
    for frames, resize in sorted({(each["frames"], each["resize"]) for each in results["growth"]}):
        times = [
            each["server_ms"] for each in results["growth"] if (each["frames"], each["resize"]) == (frames, resize)
        ]
        name = "any with `--resize 256`" if resize else frames
        fp32[name] = max(fp32.get(name, 0.0), median(times))
    planning = (PROJECT / "deploy" / "README.md").read_text(encoding="utf-8")
    for precision in ("fp32", "bf16", *CONVERTED):
        less = single["ours, fp32"] - single[f"ours, {precision}"]
        for name, ms in fp32.items() if precision in ("fp32", "bf16") else [(LARGE[0], fp32[LARGE[0]])]:
            cost = round(ms - less, 1)
            cameras = [int(0.7 * 1000 * 2 / (rate * cost)) for rate in (1, 5, 10, 25)]
            assert f"| {precision}, {name} | {cost} | {' | '.join(map(str, cameras))} |\n" in planning


def test_the_planning_row_of_still_scenes_is_computed_from_the_benchmark() -> None:
    results = json.loads((PROJECT / "benchmarks" / "results.json").read_text(encoding="utf-8"))
    still = [each for each in results["static"] if each["skips"]]
    moving = median(each["moving"] / each["captured"] for each in still)
    # Of the frames of a still scene one in 7 to 9.5 s is sent, whatever the rate.
    others_fps = STATIC_FPS * median((each["sent"] - each["moving"]) / each["captured"] for each in still)
    cost = median(each["server_ms"] for each in results["growth"] if (each["frames"], each["resize"]) == LARGE)
    cameras = [int(0.7 * 1000 * 2 / ((moving * rate + others_fps) * round(cost, 1))) for rate in (1, 5, 10, 25)]
    row = f"| fp32, 640×480, `--skip-static`, still for nine tenths of the time | {cost:.1f} |"
    planning = (PROJECT / "deploy" / "README.md").read_text(encoding="utf-8")
    assert f"{row} {' | '.join(map(str, cameras))} |\n" in planning


def is_ours(result: dict[str, Any], server: str) -> bool:
    return bool(result["server"] == server and result["kind"] == "single")


def test_the_speed_that_the_readme_states_is_the_measured_one() -> None:
    table = re.search(r"(?m)^\|.*\n(?:\|.*\n)+", dict(headings(README))["How fast it is"])
    assert table
    lines = table[0].splitlines()
    names = ["original example", "ours, fp32", *(f"ours, {runtime}" for runtime in CONVERTED)]
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in names]
    measured = (PROJECT / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line not in measured] == []
