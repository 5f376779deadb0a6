"""README.md: its commands as they stand there, typed in a folder that has the project where the README wants it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from deploy.node import PROJECT, java_environment
from tests.conftest import CATS, frames_of, jpeg
from tests.scripts import ISOLATED, Output, is_isolation_possible, json_lines, outputs

README = (PROJECT / "README.md").read_text(encoding="utf-8")
HERE = "examples/image_classifier/near_real_time_video"

# What users type who learned it elsewhere; none of it may change.
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
DESCRIBE = (
    'curl --fail --silent http://127.0.0.1:8081/models/resnet-18 -H "Authorization: Bearer $(python -c '
    '\'import json; print(json.load(open("key_file.json"))["management"]["key"])\')"'
)


def commands(section: str) -> list[str]:
    """Return the lines of a section's bash blocks."""
    found, heading, fence = [], "", None
    for line in README.splitlines():
        if line.startswith("```"):
            fence = line[3:] if fence is None else None
        elif fence is None and line.startswith("#"):
            heading = line.lstrip("# ")
        elif fence == "bash" and heading == section and line:
            found.append(line)
    return found


def shown() -> list[list[Any]]:
    """Return the answers of the outputs that the README shows."""
    blocks = re.findall(r"(?ms)^```\n(With .*?)```", README)
    return [output.answers for block in blocks for output in outputs(block)]


def test_commands_that_stay_are_there_word_for_word() -> None:
    lines = README.splitlines()
    assert [command for command in COMMANDS_THAT_STAY if command not in lines] == []


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the project in it, as it is in this checkout."""
    folder = tmp_path_factory.mktemp("workplace")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "model_store", "logs")
    shutil.copytree(PROJECT, folder / HERE, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Iterator[dict[str, str]]:
    """The environment of a user who activated the venv and has ResNet-18's weights in torch's cache.

    The weights are random, as the real ones cannot be had everywhere.
    """
    cache = tmp_path_factory.mktemp("torch")
    (cache / "hub" / "checkpoints").mkdir(parents=True)
    shutil.copy(weights, cache / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    with tempfile.TemporaryDirectory(prefix="ts-") as scratch:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        yield {
            **os.environ,
            **java_environment(),
            "PATH": path,
            "TORCH_HOME": str(cache),
            "TMPDIR": scratch,
            "TEMP": scratch,
        }


def type_in(lines: list[str], folder: Path, environment: dict[str, str]) -> list[str]:
    """Type commands, each of which must succeed; return what each printed on standard output."""
    steps = [f"{{ {line}\n}} > {number}.out 2> {number}.err" for number, line in enumerate(lines)]
    script = "\n".join(["set -e", "ip link set lo up", *steps])
    done = subprocess.run([*ISOLATED, "bash", "-c", script], cwd=folder, env=environment, timeout=400, check=False)
    printed = [folder / f"{number}.out" for number in range(len(lines)) if (folder / f"{number}.out").exists()]
    if done.returncode:
        pytest.fail(f"{lines[len(printed) - 1]}\n{printed[-1].with_suffix('.err').read_text()}")
    return [path.read_text() for path in printed]


@pytest.mark.skipif(not is_isolation_possible(), reason="needs Linux namespaces: unshare and ip")
def test_recipes_as_written(workplace: Path, environment: dict[str, str], clip: Any) -> None:
    (workplace / "frame.jpg").write_bytes(jpeg(clip[0]))
    build, start, stream, stop = commands("TorchServe batches")
    configure, build_2, start_2, stream_2, stream_10, stop_2 = commands("The client batches")
    (curl,) = commands("How it works")
    (renew,) = commands("When something is wrong")
    keys = "cat key_file.json"
    (check,), (write,) = commands("Cameras"), commands("Where answers go")
    first = [build, start, stream, DESCRIBE, curl, keys, renew, keys, curl, "ss -ltnH", check, write, stop]
    second = [configure, build_2, start_2, stream_2, DESCRIBE, stream_10, keys, "ss -ltnH", stop_2]
    printed = type_in(first + second, workplace, environment)

    frames, description, answer = outputs(printed[2]), json.loads(printed[3])[0], json.loads(printed[4])
    assert_shows_the_clip(frames, batch_size=4)
    assert all(len(answer) == 5 for output in frames for answer in output.answers)
    assert (description["batchSize"], description["maxBatchDelay"]) == (4, 5)
    assert len(answer) == 5
    old, new = (json.loads(printed[step])["inference"]["key"] for step in (5, 7))
    assert old != new
    assert json.loads(printed[8]) == answer

    assert [line.split()[0] for line in printed[10].splitlines()] == ["ok"] * 6
    assert len(json_lines(workplace / "results.jsonl")) == len(frames_of(workplace / "labelled.mp4")) == 375

    # The archive's own settings hold, though the first recipe was run in the same folder.
    batches, description, tens = outputs(printed[16]), json.loads(printed[17])[0], outputs(printed[18])
    assert_shows_the_clip(batches, batch_size=4)
    assert all(len(output.answers[0]) == 4 for output in batches)
    assert (description["batchSize"], description["maxBatchDelay"]) == (1, 1)
    assert_shows_the_clip(tens, batch_size=10)
    assert [len(output.answers[0]) for output in tens] == [10] * 19

    for started, listeners in ((printed[1], printed[9]), (printed[15], printed[20])):
        assert "Allowed Urls: [none]" in started
        listening = {line.split()[3].rpartition(":")[0] for line in listeners.splitlines()}
        assert listening <= {"127.0.0.1", "[::ffff:127.0.0.1]"}
        assert len(listeners.splitlines()) == 5
    secrets = {key["key"] for step in (5, 7, 19) for key in json.loads(printed[step]).values()}
    assert len(secrets) == 3 + 1 + 3
    telling = {workplace / f"{step}.out" for step in (5, 7, 19)} | {workplace / "key_file.json"}
    files = [path for path in workplace.rglob("*") if path.is_file() and path not in telling]
    assert {path.name for path in files} >= {"ts_log.log", "model_log.log", "access_log.log", "resnet-18.mar", "1.err"}
    assert any(path.suffix == ".cfg" for path in files), "TorchServe writes snapshots"
    assert [path for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)] == []


@pytest.mark.skipif(not is_isolation_possible(), reason="needs Linux namespaces: unshare and ip")
def test_efficientnet_prints_what_the_readme_shows(workplace: Path, environment: dict[str, str]) -> None:
    printed = type_in(commands("Without ResNet-18's weights"), workplace, environment)
    found = outputs(printed[2])
    assert_shows_the_clip(found, batch_size=4)
    assert all(next(iter(answer)) in CATS for output in found for answer in output.answers)
    frames, (batch,) = shown()
    assert frames == batch
    assert len(frames) == 4
    for in_readme, answer in zip(frames, found[0].answers, strict=True):
        assert in_readme == pytest.approx(answer, abs=1e-3)


def assert_shows_the_clip(found: list[Output], batch_size: int) -> None:
    assert [output.number for output in found] == [*range(20, 361, 20), 375]
    assert {output.batch_size for output in found} == {batch_size}


def test_flags_are_all_in_the_readme() -> None:
    for script in ("create_mar_file.py", "request.py"):
        done = subprocess.run([sys.executable, PROJECT / script, "--help"], capture_output=True, text=True, timeout=60)
        flags = set(re.findall(r"--[a-z][a-z_-]+", done.stdout)) - {"--help"}
        assert len(flags) >= 4
        assert [flag for flag in sorted(flags) if f"`{flag}" not in README] == []


def test_the_planning_table_is_reckoned_from_the_benchmark() -> None:
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


def test_the_speed_that_the_readme_tells_is_the_measured_one() -> None:
    section = README.split("## How fast it is")[1]
    table = re.search(r"(?m)^\|.*\n(?:\|.*\n)+", section)
    assert table
    assert len(table[0].splitlines()) > 5
    assert table[0] in (PROJECT / "benchmarks" / "README.md").read_text(encoding="utf-8")
