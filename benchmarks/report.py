"""Write the measurements of run.py as README.md and two plots."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot
from matplotlib.axes import Axes

Rows = list[dict[str, Any]]

KINDS = ["single", "JSON 4", "JSON 10"]


def values(rows: Rows, column: str, **where: Any) -> list[float]:
    """Return a column of the rows that match, one value for each round."""
    return [row[column] for row in rows if all(row.get(key) == value for key, value in where.items()) and column in row]


def spread(numbers: Sequence[float], digits: int = 0) -> str:
    """Return the median of the rounds, with the lowest and the highest if there were several."""
    if not numbers:
        return "-"
    text = f"{median(numbers):.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ({min(numbers):.{digits}f}–{max(numbers):.{digits}f})"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def distinct(rows: Rows, column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))


def saturation_table(rows: Rows) -> str:
    """The main table, which is also in the project's README."""
    header = [
        "frames/s, p99 ms",
        *("single frames" if kind == "single" else f"batches of {kind[5:]}" for kind in KINDS),
    ]
    lines = []
    for server in distinct(rows, "server"):
        cells = []
        for kind in KINDS:
            cell = spread(values(rows, "fps", server=server, kind=kind), 1)
            p99 = values(rows, "p99_ms", server=server, kind=kind)
            cells.append(f"{cell}, {median(p99):.0f} ms" if p99 else cell)
        lines.append([server, *cells])
    return table(header, lines)


def cost_table(rows: Rows) -> str:
    header = ["single frames", "p50 ms", "server's CPU, ms a frame", "load's CPU, ms a frame", "server's memory, MB"]
    columns = [("p50_ms", 0), ("server_ms", 1), ("load_ms", 1), ("memory_mb", 0)]
    lines = [
        [server, *(spread(values(rows, column, server=server, kind="single"), digits) for column, digits in columns)]
        for server in distinct(rows, "server")
        if not server.startswith("ceiling")
    ]
    return table(header, lines)


def ratio_table(results: dict[str, Any]) -> str:
    """The targets, each with the median of the rounds' own ratios."""
    rows, live = results["saturation"], results["live"]

    def ratio(kind: str, one: str, other: str, other_kind: str = "") -> list[float]:
        pairs = zip(
            values(rows, "fps", server=one, kind=kind),
            values(rows, "fps", server=other, kind=other_kind or kind),
            strict=True,
        )
        return [first / second for first, second in pairs]

    fp32, bf16, lit, mosec = "ours, fp32", "ours, bf16", "LitServe, our handler", "mosec, our handler"
    lines = [
        [text, wanted, spread(numbers, 2)]
        for text, wanted, numbers in [
            ("fp32, single frames: of the original example", "≥ 2.0", ratio("single", fp32, "original example")),
            ("fp32, single frames: of its ceiling", "≥ 0.85", ratio("single", fp32, "ceiling, fp32")),
            ("bf16, single frames: of the original example", "≥ 3.3", ratio("single", bf16, "original example")),
            ("bf16, single frames: of its ceiling", "≥ 0.80", ratio("single", bf16, "ceiling, bf16")),
            ("fp32, JSON batches of 4: of the original example", "≥ 2.0", ratio("JSON 4", fp32, "original example")),
            ("fp32, JSON batches of 4: of single frames", "≥ 1.0", ratio("JSON 4", fp32, fp32, "single")),
            ("fp32, single frames: of LitServe", "≥ 1.0", ratio("single", fp32, lit)),
            ("fp32, single frames: of mosec", "≥ 1.0", ratio("single", fp32, mosec)),
            ("fp32, JSON batches of 4: of LitServe", "≥ 1.0", ratio("JSON 4", fp32, lit)),
            ("fp32, JSON batches of 4: of mosec", "≥ 1.0", ratio("JSON 4", fp32, mosec)),
        ]
    ]
    ours, theirs = (values(live, "p99_ms", server=server, cameras=1) for server in (fp32, lit))
    lines.append(["one camera, fp32: p99 from capture to answer", "≤ 120 ms", spread(ours)])
    pairs = [first / second for first, second in zip(ours, theirs, strict=True)]
    lines.append(["one camera, fp32: p99 of LitServe's", "≤ 1.3", spread(pairs, 2)])
    for server in (fp32, bf16):
        answered = {n: median(values(live, "fps", server=server, cameras=n)) for n in distinct(live, "cameras")}
        best = max(answered, key=lambda n: answered[n])
        if 2 * best in answered:
            text = f"{server[6:]}: answered with {2 * best} cameras, of the most ({best} cameras)"
            lines.append([text, "≥ 0.9", f"{answered[2 * best] / answered[best]:.2f}"])
    return table(["ratio", "target", "measured"], lines)


def live_table(rows: Rows) -> str:
    header = ["cameras of 25 fps", "answered fps", "dropped %", "p50 ms", "p99 ms", "mean batch"]
    header += ["client, CPU ms a captured frame", "client, MB", "server, CPU ms an answered frame", "server, MB"]
    lines = []
    for server in distinct(rows, "server"):
        for cameras in distinct(rows, "cameras"):
            chosen = [row for row in rows if row["server"] == server and row["cameras"] == cameras]
            if not chosen:
                continue
            columns = [("p50_ms", 0), ("p99_ms", 0), ("per_pass", 1), ("client_ms", 1), ("client_mb", 0)]
            columns += [("server_ms", 1), ("server_mb", 0)]
            cells = [spread(values(chosen, column), digits) for column, digits in columns]
            if "LitServe" in server:
                cells[2] = "-"
            dropped = [100 * row["dropped"] / row["captured"] for row in chosen]
            lines.append([f"{server}: {cameras}", spread(values(chosen, "fps"), 1), spread(dropped), *cells])
    return table(header, lines)


def growth_table(rows: Rows) -> str:
    header = ["frames", "answered fps", "p99 ms", "client, CPU ms a frame", "client, MB", "server, CPU ms a frame"]
    columns = [("fps", 1), ("p99_ms", 0), ("client_ms", 1), ("client_mb", 0), ("server_ms", 1)]
    lines = []
    for frames in distinct(rows, "frames"):
        for resize in (False, True):
            cells = [spread(values(rows, column, frames=frames, resize=resize), digits) for column, digits in columns]
            lines.append([frames + (", --resize 256" if resize else ""), *cells])
    return table(header, lines)


def settings_table(rows: Rows) -> str:
    header = ["setting", "frames/s", "p50 ms", "p99 ms", "server's CPU, ms a frame", "in its first seconds"]
    columns: list[tuple[str, Callable[[float], str]]] = [
        ("fps", "{:.1f}".format),
        ("p50_ms", "{:.0f}".format),
        ("p99_ms", "{:.0f}".format),
        ("server_ms", "{:.1f}".format),
        ("first_ms", "{:.1f}".format),
    ]
    lines = [
        [f"{row['setting']} {row['value']}", *(form(row[column]) if column in row else "-" for column, form in columns)]
        for row in rows
    ]
    return table(header, lines)


def delay_table(rows: Rows) -> str:
    header = ["maxBatchDelay", *(f"{n}: {what}" for n in (1, 2) for what in ("p50 ms", "p99 ms", "mean batch"))]
    columns = [f"{what}_{n}" for n in (1, 2) for what in ("p50_ms", "p99_ms", "per_pass")]
    lines = [
        [row["value"], *(f"{row[column]:.{1 if 'pass' in column else 0}f}" for column in columns)]
        for row in rows
        if "p50_ms_1" in row
    ]
    return table(header, lines)


def plot_saturation(rows: Rows, path: Path) -> None:
    """Frames a second of each server, for each kind of request; the whiskers are the lowest and the highest round."""
    servers = distinct(rows, "server")
    figure, axes = pyplot.subplots(figsize=(9, 4.8), layout="constrained")
    height = 0.8 / len(KINDS)
    for number, kind in enumerate(KINDS):
        rounds = [values(rows, "fps", server=server, kind=kind) for server in servers]
        middle = [median(numbers) for numbers in rounds]
        low = [median(numbers) - min(numbers) for numbers in rounds]
        high = [max(numbers) - median(numbers) for numbers in rounds]
        places = [place + (number - 1) * height for place in range(len(servers))]
        label = "single frames" if kind == "single" else f"batches of {kind[5:]}"
        axes.barh(places, middle, height, xerr=[low, high], label=label, capsize=2)
        for place, value in zip(places, middle, strict=True):
            axes.text(1, place, f"{value:.0f}", va="center", color="white", fontsize=8)
    axes.set_yticks(range(len(servers)), servers)
    axes.invert_yaxis()
    axes.set_xlabel("frames a second under full load (640×480)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def plot_growth(results: dict[str, Any], path: Path) -> None:
    """Against cameras, batch size and frame size: frames a second, p99 and memory."""
    figure, panels = pyplot.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    live, sizes = results["live"], results["growth"]
    batches = [row for row in results["settings"] if row["setting"] == "batchSize"]
    for server in ("ours, fp32", "ours, bf16"):
        cameras = distinct(live, "cameras")
        for panel, column in ((panels[0, 0], "fps"), (panels[1, 0], "p99_ms")):
            rounds = [values(live, column, server=server, cameras=n) for n in cameras]
            line(panel, [str(n) for n in cameras], rounds, server[6:])
    for panel, column in ((panels[0, 1], "fps"), (panels[1, 1], "p99_ms")):
        line(panel, [row["value"] for row in batches], [[row[column]] for row in batches], "fp32")
    memory = panels[1, 1].twinx()
    memory.plot([row["value"] for row in batches], [row["memory_mb"] for row in batches], "s--", color="tab:green")
    memory.set_ylabel("server's memory, MB (green)")
    memory.set_ylim(0, 1.1 * memory.get_ylim()[1])
    for resize in (False, True):
        frames = distinct(sizes, "frames")
        label = "--resize 256" if resize else "as they are"
        for panel, column in ((panels[0, 2], "fps"), (panels[1, 2], "client_ms")):
            line(panel, frames, [values(sizes, column, frames=name, resize=resize) for name in frames], label)
    titles = ["cameras of 25 fps", "TorchServe's batch size, full load", "frame size, one file at full speed"]
    for column_number, title in enumerate(titles):
        panels[0, column_number].set_title(title)
        panels[0, column_number].set_ylabel("answered frames a second")
        panels[1, column_number].set_ylabel("p99 ms")
    panels[1, 2].set_ylabel("client's CPU, ms a frame")
    for panel in panels.flat:
        panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def line(panel: Axes, places: Sequence[str], rounds: Sequence[Sequence[float]], label: str) -> None:
    """Draw the medians of the rounds, with the lowest and the highest as whiskers."""
    middle = [median(numbers) for numbers in rounds]
    low = [median(numbers) - min(numbers) for numbers in rounds]
    high = [max(numbers) - median(numbers) for numbers in rounds]
    panel.errorbar(places, middle, yerr=[low, high], marker="o", capsize=3, label=label)


def write(results: dict[str, Any], folder: Path) -> None:
    """Write README.md, saturation.png and growth.png into a folder."""
    plot_saturation(results["saturation"], folder / "saturation.png")
    plot_growth(results, folder / "growth.png")
    machine = results["machine"]
    (folder / "README.md").write_text(
        f"""# Benchmark

`make bench` measures all of this in one run and writes this page, [results.json](results.json) and the plots anew.

{table(["measured on", machine["date"]], [[name, text] for name, text in machine.items() if name != "date"])}

It took {results["minutes"]} minutes. A figure is the median of {results["rounds"]} rounds, with the lowest and the
highest in brackets; each round measures every server while all others are stopped. Load, client and server share the
cores. Compare figures of this page only with each other: on another machine, or another day on a shared one, all of
them are different.

- **original example**: TorchServe's built-in `image_classifier`, one worker, batches of 4; for JSON batches its
  counterpart in TorchServe's default settings. It is measured after Java's compilers have finished.
- **ours**: this project's `create_mar_file.py` and `config.properties`, for JSON batches with `--client-batching`. The
  network is ResNet-18 with untrained weights, which take the same time.
- **LitServe, mosec**: the same handler, number of workers, batch size and delay, behind another server.
- **ceiling**: the same handler in as many processes as there are workers, with the frames in memory and no server.

## Under full load

Frames of 640×480 from the sample clip; 16 requests of single frames are in flight, or 4 JSON batches. The milliseconds
are the 99th percentile from a request to its answer.

{saturation_table(results["saturation"])}

![Frames a second of each server](saturation.png)

{cost_table(results["saturation"])}

## Targets

Each is the median of the rounds' own ratios.

{ratio_table(results)}

## Live cameras

The sample clip, once for each camera, through `request.py --drop oldest --max-age 1000`. The milliseconds are from
capture to answer, of the slowest camera; the same cores do the clients' reading and encoding.

{live_table(results["live"])}

## Larger frames

The sample clip, enlarged, as fast as `request.py --fps max` and the server can process it; one round less.

{growth_table(results["growth"])}

![Against cameras, batch size and frame size](growth.png)

## Settings

Each server started anew, one round, fp32, single frames under full load, 16 in flight (64 for all batch sizes); all
other settings are those of `config.properties`. "In its first seconds" is the CPU while Java's compilers run; the
figures of "all" compilers are measured after another 25 s.

{settings_table(results["settings"])}

And with one and two cameras of 25 fps:

{delay_table(results["settings"])}
""",
        encoding="utf-8",
    )
