"""Build the archive that TorchServe serves: weights, labels, preprocessing, handler.py and server/ in one file.

Writes model_store/<model>.mar in the current directory. Exit codes: 0 written, 1 an input is wrong, int8 is not exact
enough or the archive can't be written, 2 wrong usage, 3 the weights can't be downloaded, 130 interrupted.
"""

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import torch
    import yaml

    from archive.conversion import MIN_AGREEMENT, convert, quantize
    from archive.downloads import TRAINED, trained_weights
    from archive.errors import ArchiveError
    from archive.labels import read_labels, trained_labels
    from archive.weights import network_of, outputs
    from server.images import MAX_PIXELS
    from server.models import MODELS
    from server.runtime import has_bf16
    from server.tasks import TASKS
except ImportError as error:
    sys.exit(f"create_mar_file.py: {error}: install the packages of a server, pip install '<project folder>[server]'")

HERE = Path(__file__).resolve().parent
TOP_K = 5
THREADS_PER_WORKER = 1  # TorchServe starts a worker for each core.
MIN_SCORE = 0.7  # of a person
# A request of 16 frames takes a core 53 s, with AVX2 only 208; TorchServe ends a worker after 120.
POSE_TIMEOUT_S = 600
MAX_REQUEST_PIXELS = 4 * MAX_PIXELS


def preprocessing(model: str) -> dict[str, object]:
    """Return how the frames of a model become what its network was trained with."""
    if MODELS[model].task == "pose-estimation":
        # Pixels: the shorter edge, unless the longer one would get longer than max_size. Keypoint R-CNN does the rest.
        return {"min_size": 800, "max_size": 1333}
    reference = TRAINED[model].transforms()
    is_video = MODELS[model].task == "activity-recognition"
    return {
        "resize": reference.resize_size if is_video else reference.resize_size[0],  # both edges, or the shorter one
        "crop": reference.crop_size if is_video else reference.crop_size[0],  # both edges, pixels
        "interpolation": reference.interpolation.value,
        "mean": reference.mean,  # RGB, of values from 0 to 1
        "std": reference.std,
    }


def model_config(args: argparse.Namespace) -> dict[str, object]:
    """Return the settings of the archive, its model-config.yaml; see config.properties for the others."""
    handler: dict[str, Any] = {"network": args.model, "runtime": args.runtime, "precision": args.precision}
    handler |= {"threads": THREADS_PER_WORKER, "preprocessing": preprocessing(args.model), "min_edge": 0}
    if args.precision == "int8":  # Otherwise decoding would take as long as the network.
        resize = handler["preprocessing"]["resize"]
        handler["min_edge"] = max(resize) if isinstance(resize, list) else resize
    task, max_pixels = TASKS[MODELS[args.model].task], MAX_REQUEST_PIXELS
    if args.max_frames:  # Full HD is enough for a frame of a batch, and a single frame may have 4K.
        max_pixels = min(max(args.max_frames * 1920 * 1080, 3840 * 2160), MAX_REQUEST_PIXELS)
    handler |= {"max_frames": args.max_frames or task.max_frames, "max_pixels": max_pixels}
    config: dict[str, object] = {"handler": handler}
    if MODELS[args.model].task == "pose-estimation":
        handler["min_score"] = MIN_SCORE if args.min_score is None else args.min_score
        config["responseTimeout"] = POSE_TIMEOUT_S
    else:
        handler["top_k"] = TOP_K
    if args.client_batching:
        # A request is a batch already: none waits for others. These settings have precedence over
        # config.properties, though not over a snapshot; 1 ms is the shortest delay TorchServe takes.
        config |= {"batchSize": 1, "maxBatchDelay": 1}
    return config


def write_archive(model_store: Path, model: str, network: Any, labels: list[str], config: dict[str, object]) -> Path:
    """Write model_store/<model>.mar, first elsewhere, then moved into place: it is complete at any time.

    network: one of PyTorch, or an openvino.Model.
    """
    model_store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model_store, prefix=".create_mar_file-") as staging_name:
        staging = Path(staging_name).resolve()  # The archiver runs in it: what is relative would be elsewhere.
        serialized = save_network(network, staging / model)
        shutil.copytree(HERE / "server", staging / "extra" / "server", ignore=shutil.ignore_patterns("__pycache__"))
        for file in staging.glob("*.bin"):  # OpenVINO's weights, beside its network
            file.rename(staging / "extra" / file.name)
        (staging / "extra" / "index_to_name.json").write_text(json.dumps(dict(enumerate(labels))), encoding="utf-8")
        (staging / "model-config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        # The archiver builds in <temporary directory>/<model> and deletes what it finds there: give it one of its own.
        scratch = staging / "scratch"
        scratch.mkdir()
        command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", model, "--version", "1.0"]
        command += ["--handler", str(HERE / "handler.py"), "--extra-files", "extra"]
        command += ["--serialized-file", serialized.name, "--config-file", "model-config.yaml"]
        command += ["--archive-format", "zip-store", "--export-path", "."]
        environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
        try:
            subprocess.run(command, cwd=staging, env=environment, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or [f"exit code {error.returncode}"])[-1]
            raise ArchiveError(f"torch-model-archiver failed: {reason}") from error
        archive = model_store / f"{model}.mar"
        (staging / archive.name).replace(archive)
    return archive


def save_network(network: Any, path: Path) -> Path:
    """Write a network, and return its file: path.pth of PyTorch, or path.xml of OpenVINO, with path.bin beside it."""
    if not isinstance(network, torch.nn.Module):
        import openvino

        try:
            openvino.save_model(network, path.with_suffix(".xml"), compress_to_fp16=False)
        except RuntimeError as error:
            raise ArchiveError(f"OpenVINO can't write the archive into model_store: {error}") from error
        return path.with_suffix(".xml")
    with io.BytesIO() as file:  # With a file of its own torch hides why it can't write.
        torch.save(network.state_dict(), file)
        path.with_suffix(".pth").write_bytes(file.getvalue())
    return path.with_suffix(".pth")


def converted(network: torch.nn.Module, labels: list[str], handler: Any, args: argparse.Namespace) -> Any:
    """Return a network as the runtime takes it; print how exact int8 is. Raises ArchiveError."""
    if args.runtime == "pytorch":
        return network
    try:
        task = TASKS[MODELS[args.model].task](handler, labels)
        model = convert(network, task, handler["preprocessing"])
        if args.precision != "int8":
            return model
        quantized, agreement = quantize(model, task, args.calibrate, handler["min_edge"])
    except ImportError as error:
        advice = "install what it needs, pip install '<project folder>[server,openvino]'"
        raise ArchiveError(f"{error}: {advice}") from error
    except RuntimeError as error:
        raise ArchiveError(f"OpenVINO can't convert {args.model} with these weights: {error}") from error
    if not agreement.is_good and not args.force:
        advice = "calibrate with more videos of your cameras, use another precision, or write it with --force"
        raise ArchiveError(f"{agreement}; expected the same label for {100 * MIN_AGREEMENT:.0f} %: {advice}")
    print(agreement)
    return quantized


def new_parser() -> argparse.ArgumentParser:
    """Return the table of flags."""
    parser = argparse.ArgumentParser(
        description="Build model_store/<model>.mar in the current directory.",
        epilog="exit codes: 0 written; 1 an input is wrong, int8 is not exact enough or the archive can't be written; "
        "2 wrong usage; 3 the weights can't be downloaded; 130 interrupted",
    )
    add = parser.add_argument
    text = "the archive for requests that are JSON batches already: TorchServe does not batch them again"
    add("--client-batching", action="store_true", help=text)
    text = "the network (default: %(default)s)"
    add("--model", choices=list(MODELS), default="resnet-18", help=text)
    text = "what runs the network; openvino is faster on x86-64 processors, and has no pose estimation"
    add("--runtime", choices=["pytorch", "openvino"], default="pytorch", help=f"{text} (default: %(default)s)")
    text = "of the network: bf16 is faster if the processor has it; int8, of openvino, if it has VNNI or AMX"
    add("--precision", choices=["fp32", "bf16", "int8"], default="fp32", help=f"{text} (default: %(default)s)")
    text = "of int8: a video of your camera, from which the ranges of the values are learned; may be repeated"
    add("--calibrate", type=video, action="append", metavar="VIDEO", help=text)
    text = f"of int8: write the archive also if less than {100 * MIN_AGREEMENT:.0f} %% of the first labels are the same"
    add("--force", action="store_true", help=text)
    text = f"of pose estimation: how certain a person must be to be in the answer, from 0 to 1 (default: {MIN_SCORE})"
    add("--min-score", type=score, metavar="SCORE", help=text)
    text = "frames that a request may have: fewer, if one device must not delay the others (default: 256; pose: 16)"
    add("--max-frames", type=int, metavar="N", help=text)
    text = "a state dict, checkpoint or safetensors file of your own (default: torchvision's trained weights)"
    add("--weights", type=Path, metavar="FILE", help=text)
    text = (
        "the labels of a head of your own: one a line, or index_to_name.json (default: those of torchvision's weights)"
    )
    add("--labels", type=Path, metavar="FILE", help=text)
    return parser


def video(text: str) -> Path:
    if "://" in text:
        advice = "record some minutes of the camera, ffmpeg -i ADDRESS -t 600 -c copy FILE"
        raise argparse.ArgumentTypeError(f"expected a video file, got an address: {advice}")
    return Path(text)


def score(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (value := float(text)) <= 1:
            return value
    raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = new_parser()
    args = parser.parse_args(argv)
    task = TASKS[MODELS[args.model].task]
    is_pose = task.name == "pose-estimation"
    if args.max_frames is not None and not task.clip_frames <= args.max_frames <= task.max_frames:
        expected = f"from {task.clip_frames} to {task.max_frames}, got {args.max_frames}"
        parser.error(f"--max-frames of {args.model}: expected a number {expected}")
    if args.labels and not args.weights:
        parser.error("--labels goes with --weights: torchvision's weights have labels of their own")
    if args.min_score is not None and not is_pose:
        parser.error(f"--min-score goes with pose estimation: {args.model} finds no persons")
    if is_pose and args.runtime == "openvino":
        parser.error(f"--runtime openvino does not go with {args.model}: it can't convert its network")
    if is_pose and args.precision != "fp32":
        parser.error(f"--precision {args.precision} does not go with {args.model}: it is not exact for pixels")
    if args.precision == "int8" and not (args.runtime == "openvino" and args.calibrate):
        parser.error("--precision int8 goes with --runtime openvino and --calibrate VIDEO")
    if args.calibrate and args.precision != "int8":
        parser.error("--calibrate goes with --precision int8: nothing else is calibrated")
    if args.force and args.precision != "int8":
        parser.error("--force goes with --precision int8: nothing else is checked")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    for name in ("SIGTERM", "SIGHUP"):  # So that nothing half-written is left behind. Windows has no SIGHUP.
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        labels = read_labels(args.labels) if args.labels else trained_labels(args.model)
        weights = args.weights or trained_weights(args.model)
        network, changes = network_of(args.model, weights, len(labels))
        config = model_config(args)
        served = converted(network, labels, config["handler"], args)
        archive = write_archive(Path("model_store"), args.model, served, labels, config)
    except ArchiveError as error:
        print(f"create_mar_file.py: {' '.join(str(error).split())}", file=sys.stderr)  # One line, whatever files hold.
        return error.exit_code
    except OSError as error:
        print(f"create_mar_file.py: can't write the archive into model_store: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("create_mar_file.py: interrupted", file=sys.stderr)
        return 130
    if args.precision == "bf16" and not has_bf16():
        text = "this processor has no bf16: a worker on one like it runs the network in fp32"
        print(f"create_mar_file.py: {text}", file=sys.stderr)
    if changes:
        print(f"{weights}: {changes}")
    kind = "JSON batches" if args.client_batching else "frames"
    print(f"{archive}: {args.model}, {len(labels)} {outputs(args.model)}, {args.runtime} {args.precision}, for {kind}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
