"""LitServe with our handler: python -m benchmarks.lit_server PORT; its settings are environment variables."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import litserve
from fastapi import Body

from tests.support.in_process import Model

Raw = Annotated[bytes, Body(media_type="application/octet-stream")]


class Frames(litserve.LitAPI):  # type: ignore[misc]
    """Single frames, which LitServe batches."""

    def setup(self, device: str) -> None:  # noqa: ARG002
        self.model = Model(Path(os.environ["BENCH_ARCHIVE"]))

    def decode_request(self, request: Raw) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, x: list[bytes]) -> list[Any]:
        return self.model.answers(x)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> Any:
        return output


class JsonBatches(Frames):
    """JSON batches, one at a time."""

    def predict(self, x: bytes) -> Any:  # type: ignore[override]
        return self.model.answers([json.loads(x)])[0]


if __name__ == "__main__":
    batch_size, delay_s = int(os.environ["BENCH_BATCH_SIZE"]), int(os.environ["BENCH_DELAY_MS"]) / 1000
    path = "/predictions/resnet-18"
    if batch_size > 1:
        api = Frames(max_batch_size=batch_size, batch_timeout=delay_s, api_path=path)
    else:
        api = JsonBatches(api_path=path)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=int(os.environ["BENCH_WORKERS"]))
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning", access_log=False
    )
