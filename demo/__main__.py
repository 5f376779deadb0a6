"""Both recipes of README.md, from the archive to the answers: `make demo`, or `python -m demo`.

While it streams, request.py serves its web page, and prints the address. With --cluster, `make cluster`: four cameras,
nginx, and two TorchServe nodes. Works in a temporary directory and on free ports, and leaves nothing running, if it
succeeds, fails or is interrupted. Exit code: 0 if every frame of the clip was answered, else the exit code of the step
that failed.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

from archive.downloads import trained_weights
from archive.errors import DownloadError
from demo.node import PROJECT, NodeError, free_ports, torchserve
from demo.proxy import nginx, node_config

NODES = 2
CAMERAS = 4


def run(script: str, *arguments: str, folder: Path, environment: dict[str, str] | None = None) -> None:
    """Print a command with one of the project's scripts, and run it in a folder. Raises CalledProcessError."""
    print(f"\n$ python {script} {shlex.join(arguments)}".rstrip(), flush=True)
    command = [sys.executable, str(PROJECT / script), *arguments]
    subprocess.run(command, cwd=folder, env=os.environ | (environment or {}), check=True)


def choose_model() -> str:
    """Return resnet-18 if its weights are here or can be downloaded, else the model whose weights come with pip."""
    try:
        trained_weights("resnet-18")
    except DownloadError as error:
        print(f"ResNet-18's weights can't be downloaded ({error.__cause__}): going on with efficientnet-lite0")
        return "efficientnet-lite0"
    return "resnet-18"


def interrupt(*_: object) -> None:
    """End as with Ctrl-C, so that every cleanup runs."""
    raise KeyboardInterrupt


def both_recipes(folder: Path, model: str) -> None:
    for recipe in ([], ["--client-batching"]):
        run("create_mar_file.py", "--model", model, *recipe, folder=folder)
        print(f"\nstarting TorchServe with {model}", flush=True)
        with torchserve(folder, [model]) as node:
            options = ["--url", node.url, "--model", model, "--log-every", "100", "--http", str(free_ports(1)[0])]
            run("request.py", *options, *recipe, folder=folder)
        print("TorchServe has stopped", flush=True)
    print("\nBoth ways work. README.md lists the commands and explains them.")


def cluster(folder: Path, model: str) -> None:
    run("create_mar_file.py", "--model", model, "--max-frames", "8", folder=folder)
    with ExitStack() as running:
        addresses = []
        for number in range(1, NODES + 1):
            print(f"\nstarting TorchServe node {number} of {NODES}", flush=True)
            home = folder / f"node-{number}"
            shutil.copytree(folder / "model_store", home / "model_store")
            node = running.enter_context(torchserve(home, [model], node_config((os.cpu_count() or 1) // NODES)))
            addresses.append(urlsplit(node.url).netloc)
        print("starting nginx", flush=True)
        proxy = running.enter_context(nginx(folder / "nginx", addresses))
        options = ["--url", proxy.url, "--model", model, "--quiet", "--http", str(free_ports(1)[0])]
        for number in range(1, CAMERAS + 1):
            shutil.copy(PROJECT / "data" / "sample_video.mp4", folder / f"camera-{number}.mp4")
            options += ["--input", f"camera-{number}.mp4"]
        print("\nwith a token of nginx in TORCHSERVE_TOKEN, and its certificate in REQUESTS_CA_BUNDLE:", flush=True)
        run("request.py", *options, folder=folder, environment=proxy.environment())
        print(f"\nFPS is each camera's: {CAMERAS} files of 25 frames a second, which wait for the server.")
        for address, count in sorted(Counter(proxy.nodes_that_answered()).items()):
            print(f"node {address} answered {count} requests")
    print("nginx and TorchServe have stopped. deploy/README.md explains how to do this with machines of your own.")


def main() -> int:
    parser = argparse.ArgumentParser(description="The recipes of README.md, or a cluster, on this machine.")
    parser.add_argument("--cluster", action="store_true", help="two TorchServe nodes behind nginx, and four cameras")
    args = parser.parse_args()
    # A proxy may be needed to download the weights; requests to this machine must not use it.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "localhost", "127.0.0.1"]))
    # SIGINT too: a shell that starts this program in the background sets it to be ignored. Windows has no SIGHUP.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="demo-") as name:
            show = cluster if args.cluster else both_recipes
            show(Path(name), choose_model())
    except subprocess.CalledProcessError as error:
        return error.returncode
    except NodeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
