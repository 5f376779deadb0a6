"""Other settings than those of config.properties: each server started anew, under full load."""

import re
import zipfile
from pathlib import Path

from benchmarks.inputs import Inputs
from benchmarks.live import stream
from benchmarks.plan import CLIP, TRIALS, Plan, Trial
from benchmarks.results import Results
from benchmarks.saturation import load
from benchmarks.servers import build_archive, ours, progress

# The optional flag for Java, see config.properties.
QUICK_JAVA = " -XX:TieredStopAtLevel=1"


def measure_settings(inputs: Inputs, plan: Plan, results: Results) -> None:
    """Measure each trial under full load, and some with cameras too."""
    for number, trial in enumerate(TRIALS, start=1):
        progress(f"settings, {trial.setting}, {number} of {len(TRIALS)}")
        folder = inputs.folder / str(number)
        set_threads(build_archive(folder, inputs.weights), trial.threads)
        with ours(folder, configuration(inputs.config, trial)) as server:
            first = load(server, inputs.frames, 1, 0.0, plan.start_warm_up_s, trial.in_flight[0])
            if trial.has_all_compilers:
                load(server, inputs.frames, 1, 0.0, plan.thorough_warm_up_s, trial.in_flight[0])
            for in_flight in trial.in_flight:
                record = load(server, inputs.frames, 1, plan.warm_up_s, plan.settings_s, in_flight)
                head = {"setting": trial.setting, "in_flight": in_flight, "first_ms": first["server_ms"]}
                results.add("settings", head | record)
            for cameras in trial.cameras:
                record = stream(server, [CLIP] * cameras, seconds=plan.live_s)
                results.add("settings", {"setting": trial.setting, "cameras": cameras} | record)


def configuration(config: str, trial: Trial) -> str:
    """Return config.properties with the settings of a trial."""
    for name, value in trial.changes.items():
        config, count = re.subn(rf'"{name}": \d+', f'"{name}": {value}', config)
        assert count, f"config.properties sets no {name}"
    if trial.workers is not None:
        config += f"\ndefault_workers_per_model={trial.workers}\n"
    if trial.has_all_compilers:
        assert QUICK_JAVA in config
        config = config.replace(QUICK_JAVA, "")
    return config


def set_threads(archive: Path, threads: int) -> None:
    """Set the number of threads that each worker of an archive uses for the network."""
    with zipfile.ZipFile(archive) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    yaml = contents["model-config.yaml"].decode()
    contents["model-config.yaml"] = re.sub(r"\bthreads: \d+", f"threads: {threads}", yaml).encode()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in contents.items():
            file.writestr(name, content)
