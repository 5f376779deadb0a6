"""Render every SVG beside this file to a PNG of the same name, at twice its size.

    python architecture/render.py

Needs resvg-py (pip) and the font DejaVu Sans (Debian and Ubuntu: fonts-dejavu-core).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import resvg_py

HERE = Path(__file__).resolve().parent
ZOOM = 2.0
FONT = "DejaVu Sans"
PROBE = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="99" height="30">'
    '<text x="5" y="20" font-family="{}">Sample</text></svg>'
)


def font_is_installed(family: str) -> bool:
    """Whether text in `family` looks different from text in a family nobody has."""
    wanted, missing = (
        resvg_py.svg_to_bytes(svg_string=PROBE.format(name), serif_family="missing") for name in (family, "missing")
    )
    return wanted != missing


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description="Render the SVGs to PNGs.").parse_args(argv)

    if not font_is_installed(FONT):
        print(f"the font {FONT} is not installed", file=sys.stderr)
        return 1
    for svg in sorted(HERE.glob("*.svg")):
        png = svg.with_suffix(".png")
        png.write_bytes(resvg_py.svg_to_bytes(svg_path=str(svg), zoom=ZOOM))
        print(f"{svg.name} -> {png.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
