"""The project in a folder of the user's, with a sample clip that is over sooner where that makes no difference."""

import shutil
import subprocess
from pathlib import Path

import imageio_ffmpeg

from demo.node import PROJECT
from tests.support.frames import CLIP


def copy_project(folder: Path) -> Path:
    """Copy the project as it is in this checkout; return the folder."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "model_store", "logs")
    shutil.copytree(PROJECT, folder, ignore=ignored)
    return folder


def shorten_clip(target: Path, frames: int) -> None:
    """Write the sample clip's first frames, as they are in it."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", str(CLIP), "-c", "copy"]
    subprocess.run([*command, "-frames:v", str(frames), str(target)], check=True, timeout=120)
