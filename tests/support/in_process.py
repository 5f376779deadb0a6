"""handler.py in this process, without TorchServe: for the tests, and for benchmarks/."""

import json
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ts
import yaml
from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handler import VideoFrameHandler

HTTP: dict[str, Any] = {"content-length": "1"}  # a header that every request over HTTP has
JSON = HTTP | {"body": {"content-type": "application/json"}}  # and TorchServe's note of the body's type


class Model:
    """A model whose handler is loaded in this process.

    Args:
        source: an archive of create_mar_file.py, or a folder with the files that are in one.
        batch_size: what TorchServe's batch size would be.
    """

    def __init__(self, source: Path, batch_size: int = 4) -> None:
        with tempfile.TemporaryDirectory() as unpacked:
            if source.is_file():
                with zipfile.ZipFile(source) as file:
                    file.extractall(unpacked)
            folder = Path(unpacked) if source.is_file() else source
            manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
            config = yaml.safe_load((folder / "model-config.yaml").read_text())
            metrics = MetricsCacheYamlImpl(str(Path(ts.__file__).parent / "configs" / "metrics.yaml"))
            self.context = Context(
                "resnet-18",
                str(folder),
                manifest,
                batch_size,
                None,
                "0.12.0",
                metrics=metrics,
                model_yaml_config=config,
            )
            self.handler = VideoFrameHandler()
            self.handler.initialize(self.context)

    def answers(self, bodies: Sequence[Any], headers: Mapping[str, Any] = HTTP) -> list[Any]:
        """Return the response to each request's body, as TorchServe would get it; statuses are in the context."""
        self.context.request_processor = [RequestProcessor(dict(headers)) for _ in bodies]
        return self.handler.handle([{"body": body} for body in bodies], self.context)

    def statuses(self) -> list[int]:
        """Return the HTTP statuses of the latest responses."""
        count = len(self.context.request_processor)
        return [self.context.get_response_status(index)[0] for index in range(count)]
