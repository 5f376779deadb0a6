"""mosec with our handler: python -m benchmarks.mosec_server --address HOST --port PORT; settings are variables."""

import json
import os
from pathlib import Path
from typing import Any

import mosec

from tests.support.in_process import Model


class Frames(mosec.Worker):  # type: ignore[misc]
    """Single frames, which mosec batches."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model(Path(os.environ["BENCH_ARCHIVE"]))

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[Any]:
        return self.model.answers(data)


class JsonBatches(Frames):
    """JSON batches, one at a time."""

    def forward(self, data: bytes) -> Any:  # type: ignore[override]
        return self.model.answers([json.loads(data)])[0]


if __name__ == "__main__":
    workers, batch_size = int(os.environ["BENCH_WORKERS"]), int(os.environ["BENCH_BATCH_SIZE"])
    route = "/predictions/resnet-18"
    server = mosec.Server()
    if batch_size > 1:
        delay_ms = int(os.environ["BENCH_DELAY_MS"])
        server.append_worker(Frames, workers, max_batch_size=batch_size, max_wait_time=delay_ms, route=route)
    else:
        server.append_worker(JsonBatches, workers, route=route)
    server.run()
