"""Programs that some tests need besides what pip installs."""

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from demo.proxy import PATH

# Program -> the command that installs it.
INSTALL = {
    "chromium": "apt-get install chromium",
    "curl": "apt-get install curl",
    "faketime": "apt-get install faketime",
    "gst-rtsp-server": "apt-get install python3-gi gir1.2-gst-rtsp-server-1.0 "
    "gstreamer1.0-plugins-{base,good,bad,ugly}",
    "ip": "apt-get install iproute2",
    "nginx": "apt-get install nginx",
    "openssl": "apt-get install openssl",
    "prometheus": "apt-get install prometheus",
    "promtool": "apt-get install prometheus",
    "unshare": "apt-get install util-linux (and Linux namespaces must be permitted)",
}
# For commands that mount, or use ports and files which a user's own programs may be using: a network, processes and
# mounts of their own, which end with the first of them.
ISOLATED = ["unshare", "--net", "--pid", "--mount", "--map-root-user", "--fork", "--mount-proc", "--kill-child"]

SYSTEM_PYTHON = "/usr/bin/python3"
RTSP_CHECK = [
    *(SYSTEM_PYTHON, "-c"),
    "import gi; gi.require_version('Gst', '1.0'); gi.require_version('GstRtspServer', '1.0')\n"
    "from gi.repository import Gst, GstRtspServer; Gst.init(None)\n"
    "[Gst.ElementFactory.find(name).get_name() for name in ('x264enc', 'h264parse', 'rtph264pay', 'jpegenc')]",
]


@cache
def is_there(program: str) -> bool:
    """Whether a program can be used."""
    if program == "gst-rtsp-server":
        # The system's Python imports it, and has the encoder.
        return Path(SYSTEM_PYTHON).exists() and subprocess.run(RTSP_CHECK, capture_output=True).returncode == 0
    if shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), PATH])) is None:
        return False
    return program != "unshare" or subprocess.run([*ISOLATED, "true"], capture_output=True).returncode == 0


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip a test where a program is missing. The reason has a line for each of them, see tests/conftest.py."""
    missing = [program for program in programs if not is_there(program)]
    reason = "\n".join(f"{program} is missing: {INSTALL[program]}" for program in missing)
    return pytest.mark.skipif(bool(missing), reason=reason)
