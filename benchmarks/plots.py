"""The plots of the page."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes

from benchmarks.figures import Record, distinct, matching, percentiles, pool, values
from benchmarks.plan import BF16, FP32, KINDS
from benchmarks.tables import label


def plot_saturation(records: list[Record], path: Path) -> None:
    """Frames a second of each server, for each kind of request; the whiskers are the lowest and the highest round."""
    servers = distinct(records, "server")
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.42 * len(servers)), layout="constrained")
    height = 0.8 / len(KINDS)
    for number, kind in enumerate(KINDS):
        # Only what was measured; the bars of a server are centred on its name.
        shown = [place for place, name in enumerate(servers) if matching(records, server=name, kind=kind)]
        kinds = [[each for each in KINDS if matching(records, server=servers[place], kind=each)] for place in shown]
        rounds = [values(records, "fps", server=servers[place], kind=kind) for place in shown]
        middle = [median(numbers) for numbers in rounds]
        low = [median(numbers) - min(numbers) for numbers in rounds]
        high = [max(numbers) - median(numbers) for numbers in rounds]
        offsets = [(each.index(kind) - (len(each) - 1) / 2) * height for each in kinds]
        places = [place + offset for place, offset in zip(shown, offsets, strict=True)]
        axes.barh(places, middle, height, xerr=[low, high], label=label(kind), capsize=2, color=f"C{number}")
        for place, value in zip(places, middle, strict=True):
            axes.text(1, place, f"{value:.0f}", va="center", color="white", fontsize=8)
    axes.set_yticks(range(len(servers)), servers)
    axes.invert_yaxis()
    axes.set_xlabel("frames a second under full load (640×480)")
    axes.set_title(records[0]["instruction_sets"], fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_growth(results: dict[str, Any], path: Path) -> None:
    """Against cameras and frame size: frames a second, latency, and the client's CPU."""
    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    live, sizes = results["live"], results["growth"]
    for server in (FP32, BF16):
        counts = distinct(matching(live, server=server), "cameras")
        rounds = [values(live, "fps", server=server, cameras=count) for count in counts]
        line(panels[0, 0], counts, rounds, server[6:])
        p99s = [percentiles(pool(matching(live, server=server, cameras=count))).get("p99_ms") for count in counts]
        known = [(count, p99) for count, p99 in zip(counts, p99s, strict=True) if p99 is not None]
        line(panels[1, 0], [count for count, _ in known], [[p99] for _, p99 in known], server[6:])
    for resize in (False, True):
        names = distinct(sizes, "frames")
        text = "--resize 256" if resize else "as they are"
        for panel, column in ((panels[0, 1], "fps"), (panels[1, 1], "client_ms")):
            line(panel, names, [values(sizes, column, frames=name, resize=resize) for name in names], text)
    panels[0, 0].set_title("cameras of 25 fps")
    panels[0, 1].set_title("frame size, one file at full speed")
    for panel in panels[0]:
        panel.set_ylabel("answered frames a second")
    panels[1, 0].set_ylabel("p99 ms")
    panels[1, 1].set_ylabel("client's CPU, ms a frame")
    for panel in panels.flat:
        panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.suptitle(live[0]["instruction_sets"], fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def line(panel: Axes, places: Sequence[Any], rounds: Sequence[Sequence[float]], text: str) -> None:
    """Draw the medians of the rounds, with the lowest and the highest as whiskers."""
    middle = [median(numbers) for numbers in rounds]
    low = [median(numbers) - min(numbers) for numbers in rounds]
    high = [max(numbers) - median(numbers) for numbers in rounds]
    panel.errorbar(places, middle, yerr=[low, high], marker="o", capsize=3, label=text)
