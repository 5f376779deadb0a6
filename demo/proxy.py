"""nginx in front of TorchServe nodes, with deploy/nginx/torchserve.conf, for as long as a `with` block lasts.

Used by the demo and by the tests: it listens on a free port of 127.0.0.1, and all files that it reads and writes are
in a folder. In production the system's nginx has this configuration, as in deploy/README.md.
"""

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from demo.node import POLL_S, PROJECT, NodeError, end, free_ports

READY_TIMEOUT_S = 30.0
EXAMPLE_NODE = "10.0.0.11:8080"  # in nodes.conf
# nginx is often in a directory that only root's PATH contains.
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin"])


@dataclass(frozen=True)
class Proxy:
    """A running nginx.

    token: the token of a device called demo.
    certificate: the certificate that a client has to trust.
    log: the access log, a line for each request.
    """

    url: str
    token: str
    certificate: Path
    log: Path

    def environment(self) -> dict[str, str]:
        """Return the variables with which request.py is authorized."""
        return {"TORCHSERVE_TOKEN": self.token, "REQUESTS_CA_BUNDLE": str(self.certificate)}

    def nodes_that_answered(self) -> list[str]:
        """Return the node, host:port, that answered each answered request."""
        tried = re.findall(r'(?m)" 200 bytes=.* nodes="(.*)" statuses', self.log.read_text())
        return [nodes.split(", ")[-1] for nodes in tried]


def node_config(workers: int) -> str:
    """Return the configuration of a node behind nginx with a number of workers, its share of this machine's cores."""
    parts = [PROJECT / "config.properties", PROJECT / "deploy" / "nginx" / "node.properties"]
    return "\n".join(part.read_text() for part in parts) + f"\ndefault_workers_per_model={max(1, workers)}\n"


@contextmanager
def nginx(folder: Path, nodes: Sequence[str]) -> Iterator[Proxy]:
    """Forward requests to the nodes, each host:port, until the block ends.

    Raises NodeError if nginx or openssl is missing, or if nginx does not start.
    """
    for program in ("nginx", "openssl"):
        if not shutil.which(program, path=PATH):
            raise NodeError(f"{program} is not installed: apt install nginx openssl, or brew install nginx openssl")
    (port,) = free_ports(1)
    files = folder / "torchserve"
    files.mkdir(parents=True)
    example = (PROJECT / "deploy" / "nginx" / "nodes.conf").read_text().splitlines()
    lines = [line for line in example if line.startswith(f"server {EXAMPLE_NODE} ")]
    of_nodes = "\n".join(line.replace(EXAMPLE_NODE, node) for node in nodes for line in lines)
    (files / "nodes.conf").write_text(of_nodes)
    token = secrets.token_hex(32)
    (files / "tokens.conf").write_text(f'"Bearer {token}" demo;\n')
    certificate = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=localhost"]
    certificate += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    certificate += ["-keyout", "server.key", "-out", "server.crt"]
    try:
        subprocess.run(certificate, cwd=files, check=True, capture_output=True, text=True, timeout=READY_TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        raise NodeError(f"openssl can't create a certificate:\n{error.stderr}") from error

    config = (PROJECT / "deploy" / "nginx" / "torchserve.conf").read_text()
    for old, new in (("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"), ("/var/log/nginx/", f"{folder}/")):
        assert old in config
        config = config.replace(old, new)
    (folder / "torchserve.conf").write_text(config)
    temporary = "".join(f"{kind}_temp_path temp;\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    # Started by root, nginx would switch to the user nobody, who may not read a private temporary folder.
    user = "user root;\n" if hasattr(os, "geteuid") and os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"{user}worker_processes auto;\npid nginx.pid;\nevents {{}}\nhttp {{\n{temporary}include torchserve.conf;\n}}\n"
    )

    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "error.log", "-g", "daemon off;"]
    process = psutil.Popen(command, env=os.environ | {"PATH": PATH}, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(POLL_S)
        else:
            raise NodeError("nginx does not start:\n" + (folder / "error.log").read_text())
        yield Proxy(f"https://localhost:{port}", token, files / "server.crt", folder / "torchserve.log")
    finally:
        end(process)
