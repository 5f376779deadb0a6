"""Both recipes of README.md, from the archive to the answers: `make demo`, or `python -m deploy.demo`.

Works in a temporary directory and on free ports, and leaves nothing running, whether it ends well, fails or is
interrupted. Exit code: 0 if every frame of the clip was answered both ways, else that of the step that failed.
"""

import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from create_mar_file import RESNET18, DownloadError, download_weights
from deploy.node import PROJECT, NodeError, torchserve


def run(script: str, *arguments: str, folder: Path) -> None:
    """Run one of the project's scripts in a folder, shown as one would type it. Raises CalledProcessError."""
    print(f"\n$ python {script} {shlex.join(arguments)}".rstrip(), flush=True)
    subprocess.run([sys.executable, str(PROJECT / script), *arguments], cwd=folder, check=True)


def choose_model() -> str:
    """Return resnet-18 if its weights are here or can be had, else the model whose weights pip brought."""
    try:
        download_weights(RESNET18.url)
    except DownloadError as error:
        print(f"ResNet-18's weights can't be downloaded ({error.__cause__}): going on with efficientnet-lite0")
        return "efficientnet-lite0"
    return "resnet-18"


def interrupt(*_: object) -> None:
    """Leave as with Ctrl-C, by way of every cleanup."""
    raise KeyboardInterrupt


def main() -> int:
    # SIGINT too: a shell that starts us in the background has it ignored. Windows has no SIGHUP.
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)
    try:
        with tempfile.TemporaryDirectory(prefix="demo-") as name:
            folder = Path(name)
            model = choose_model()
            for recipe in ([], ["--client-batching"]):
                run("create_mar_file.py", "--model", model, *recipe, folder=folder)
                print(f"\nstarting TorchServe with {model}", flush=True)
                with torchserve(folder, [model]) as node:
                    options = ["--url", node.url, "--model", model, "--log-every", "100"]
                    run("request.py", *options, *recipe, folder=folder)
                print("TorchServe has stopped", flush=True)
            print("\nBoth ways work. README.md has the commands to type, and what they do.")
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
