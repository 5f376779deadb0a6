"""The measurements. All are written to a file after each of them: an interrupted run keeps what it has measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures import Record


def to_json(results: Mapping[str, Any]) -> str:
    """Return the results as JSON, each record on a line of its own."""
    parts = []
    for name, value in results.items():
        if isinstance(value, list):
            text = "[" + ",".join(f"\n  {json.dumps(record)}" for record in value) + "\n ]"
        else:
            text = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


class Results:
    """Records of each part of the benchmark. While it runs they are in results.part.json, then in results.json."""

    def __init__(self, folder: Path, head: Mapping[str, Any], instruction_sets: str) -> None:
        self.content: dict[str, Any] = dict(head)
        self._sets = instruction_sets
        self._folder = folder
        self._part = folder / "results.part.json"

    def add(self, part: str, record: Record) -> None:
        """Add a record to a part, and write all of them."""
        self.content.setdefault(part, []).append(record | {"instruction_sets": self._sets})
        self._write()

    def finish(self, minutes: float) -> None:
        """Replace results.json, now that it is complete."""
        self.content = {"minutes": minutes, **self.content}
        self._write()
        self._part.replace(self._folder / "results.json")

    def _write(self) -> None:
        # A reader, or a run that ends here, never has half a file.
        new = self._part.with_suffix(".new")
        new.write_text(to_json(self.content), encoding="utf-8")
        new.replace(self._part)
