"""What runs a network on the processor or the GPU of a worker: PyTorch or OpenVINO, in some precision."""

from __future__ import annotations

import logging
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from server.models import load_network

# Otherwise OpenVINO and NNCF report their use to Intel, at each import.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]

# What the layers compute with; of int8 those that are not quantized.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}

log = logging.getLogger(__name__)


def has_bf16() -> bool:
    """Return whether the processor computes in bf16; PyTorch emulates it on others, eight times slower than fp32."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    # For oneDNN any AVX-512 is enough. Older releases of PyTorch do not know avx512_bf16.
    cpuinfo = Path("/proc/cpuinfo")
    is_known = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return is_known or (cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text())


def usable_precision(precision: str, device: torch.device) -> str:
    """Return the precision of a network on a device: fp32 instead of bf16 on a processor that has no bf16."""
    if precision == "bf16" and device.type == "cpu" and not has_bf16():
        log.warning("this processor has no bf16: the network runs in fp32, which is faster")
        return "fp32"
    return precision


def device_of(gpu: int | None, runtime: str) -> torch.device:
    """Return the device of a worker to which TorchServe gave a GPU, or none."""
    if gpu is None or not torch.cuda.is_available():
        return torch.device("cpu")
    if runtime == "openvino":
        log.warning("OpenVINO runs on the processor: with number_of_gpu=0 TorchServe starts a worker for each core")
        return torch.device("cpu")
    return torch.device(f"cuda:{gpu}")


class OpenVinoNetwork:
    """A network in OpenVINO's format, compiled for this processor. It takes batches of uint8, and normalizes them.

    model: its file, or an openvino.Model.
    """

    def __init__(self, model: Any, dtype: torch.dtype, threads: int) -> None:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32", "NUM_STREAMS": 1}
        # Pinned threads of all workers would share the first core.
        settings |= {"INFERENCE_NUM_THREADS": threads, "ENABLE_CPU_PINNING": False}
        self._request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        pixels = batch.movedim(1, -1).contiguous().numpy()
        return torch.from_numpy(self._request.infer([pixels], share_inputs=True)[0])


def load_model(
    path: Path, settings: dict[str, Any], labels: int, task: Any, device: torch.device
) -> tuple[Callable[[Any], Any], torch.dtype, str]:
    """Return the model in the file of an archive, the type of the batches that it takes, and its precision here."""
    precision = usable_precision(settings["precision"], device)
    dtype = PRECISIONS[precision]
    if settings["runtime"] == "openvino":
        return OpenVinoNetwork(path, dtype, settings["threads"]), torch.uint8, precision
    network = load_network(settings["network"], torch.load(path, device, weights_only=True), labels)
    return task.prepare(network).to(device, dtype), dtype, precision
