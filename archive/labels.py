"""The labels of a model, by class index: torchvision's, or those of a file."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from archive.downloads import TRAINED
from archive.errors import ArchiveError

EXPECTED = 'expected one label a line, or JSON: ["cat", "dog"] or {"0": "cat", "1": "dog"}'
# What a file may hold instead of labels, by what all of its lines are (but for a header), and by its first line.
OTHER_LINES = {
    "CSV": r".*(,\S|;|\t).*|.*,\s*\d+|.*,",
    "YAML": r"- .*|[\"']?\w+[\"']?:(\s.*)?",
    "a table": r".*\|.*",
    "quoted lines": r"\".*\",?|'.*',?|[()]",
}
OTHER_STARTS = {
    "YAML": r"---$|(names|nc|classes|labels|path|train):(\s|$)",
    "code": r"((const|let|var|export)\s.*|\w+(:.*)?\s*=\s*)[\[{(]|\(['\"]|\w+\([\[{]",
    "HTML": r"(?i)<([?!]|/?(html|head|body|annotation)\b)",
    "a pointer of Git LFS": r"version https://git-lfs",
}
NUMBERED = r"[(#]?(\d+)([\s,;:)|=_-]+|\.\s+)\S"
NUMBERED_AT_END = r"(.*\S)(?:\s+|\s*[=:>]\s*)(\d+)"


def trained_labels(model: str) -> list[str]:
    """Return the labels of a model's trained weights, with underscores for spaces; keypoints of pose estimation."""
    meta = TRAINED[model].meta
    return [label.replace(" ", "_") for label in meta.get("keypoint_names") or meta["categories"]]


def read_labels(path: Path) -> list[str]:
    """Return the labels in a file: one a line, or TorchServe's index_to_name.json.

    Raises ArchiveError if the file holds something else, or if labels are equal: predictions are keyed by them.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").rstrip("\x1a \n")
    except UnicodeDecodeError as error:
        raise ArchiveError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    except OSError as error:
        raise ArchiveError(f"can't read the labels in {path}: {error.strerror}") from error
    if "\0" in text:
        raise ArchiveError(f"{path} is not UTF-8 (it has zeros): save it as UTF-8")
    if not text.strip():
        raise ArchiveError(f"{path} is empty, {EXPECTED}")
    # A label of a word in brackets, such as [unknown], is no JSON.
    is_json = text.lstrip()[0] in "{[" and not re.match(r"\s*(\[\w+\]|{\w+})\s*\n", text)
    labels, what = (json_labels(path, text), "label") if is_json else (line_labels(path, text), "line")
    seen: set[str] = set()
    for number, label in enumerate(labels, start=1):
        if not label:
            raise ArchiveError(f"{path}, {what} {number} is empty, {EXPECTED}")
        if label in seen:
            raise ArchiveError(
                f"{path}, {what} {number}: the label {label!r} is there already, expected different ones"
            )
        seen.add(label)
    return labels


def line_labels(path: Path, text: str) -> list[str]:
    """Return the lines of a text. Raises ArchiveError if they are clearly something else than labels."""
    lines = [line.strip() for line in text.splitlines()]
    rows = [line for line in lines if not re.match(r"(#|//)\s", line)]
    kinds = ["comments"] * (len(rows) < len(lines)) + ["CSV"] * any("\t" in line for line in lines)
    kinds += [kind for kind, start in OTHER_STARTS.items() if re.match(start, lines[0])]
    for body in (rows, rows[1:]):
        has_header = body is not rows and re.search("[,;|\t]", rows[0])
        if body and (body is rows or has_header):
            kinds += [kind for kind, row in OTHER_LINES.items() if all(re.fullmatch(row, each) for each in body)]
        if len(body) > 1:
            kinds += ["numbered lines"] * are_numbered(body)
    if kinds:
        advice = 'expected one label a line; if these are the labels, write them as JSON: ["cat", "dog"]'
        raise ArchiveError(f"{path} has {kinds[0]} ({lines[0][:40]!r}), {advice}")
    return lines


def are_numbered(lines: list[str]) -> bool:
    """Whether all lines have their number, at the start or behind different texts. "Zone 1" and "Zone 2" are labels."""
    ranges = [*range(len(lines))], [*range(1, len(lines) + 1)]
    at_start = [found for line in lines if (found := re.match(NUMBERED, line))]
    at_end = [found for line in lines if (found := re.fullmatch(NUMBERED_AT_END, line))]
    are_different = len({found[1] for found in at_end}) == len(lines)
    return sorted(int(found[1]) for found in at_start) in ranges or (
        are_different and sorted(int(found[2]) for found in at_end) in ranges
    )


def json_labels(path: Path, text: str) -> list[str]:
    """Return the labels of an index_to_name.json. Of a list such as ["n0123", "tabby"] the last item counts."""
    try:
        names: Any = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ArchiveError(f"{path} is not JSON ({error}), {EXPECTED}") from error
    if isinstance(names, dict) and "object_type_names" in names:  # as TorchServe's object detector has it
        names = names["object_type_names"]
    if isinstance(names, dict) and names and all(isinstance(index, int) for index in names.values()):
        raise ArchiveError(f"{path} has numbers by names, {EXPECTED}")
    if isinstance(names, dict):
        if missing := [str(index) for index in range(len(names)) if str(index) not in names]:
            raise ArchiveError(
                f'{path} has {len(names)} names and none for "{missing[0]}" (they begin at 0), {EXPECTED}'
            )
        names = [names[str(index)] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ArchiveError(f"{path} has no names, {EXPECTED}")
    labels = [name[-1] if isinstance(name, list) and name else name for name in names]
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise ArchiveError(f"{path}, label {index} is {json.dumps(label)[:40]}, {EXPECTED}")
    # ImageNet has two cranes, a bird and a machine, which differ in the first item.
    counts = Counter(labels)
    pairs = zip(labels, names, strict=True)
    return [
        (f"{label} ({name[0]})" if counts[label] > 1 and name is not label else label).strip() for label, name in pairs
    ]


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises ValueError if it has a key twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} is there twice")
    return dict(pairs)
