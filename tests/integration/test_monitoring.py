"""deploy/monitoring/: what it asks for is there. A real Prometheus watches a real node and a real request.py."""

import math
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from demo.node import Node, free_ports
from tests.support.endpoints import address
from tests.support.frames import Pixels, jpeg, small
from tests.support.mjpeg_camera import mjpeg_camera
from tests.support.monitoring import ALERT_TESTS, MONITORING, QUERIES, RULES, VARIABLES
from tests.support.nodes import post
from tests.support.programs import needs
from tests.support.scripts import MODEL, OUTCOMES, json_lines, running, wait_until

# On a machine that is busy with something else these are right when they become active.
ALERTS_OF_SLOWNESS = {"AnswersLate", "RequestsQueue"}

needs_prometheus = needs("prometheus", "promtool")


@needs_prometheus
@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("check config", MONITORING / "prometheus.yml"),
        ("check rules", MONITORING / "alerts.yml"),
        ("test rules", ALERT_TESTS),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else value,
)
def test_promtool_is_content(command: str, file: Path) -> None:
    done = subprocess.run(["promtool", *command.split(), str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """A Prometheus that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of a response of its HTTP API, which must be a success."""
        response = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10)
        assert response.ok, response.text
        return response.json()["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Return the labels and the number of every series of the result."""
        result = self.get("query", query=expression)["result"]
        return [(series["metric"], float(series["value"][1])) for series in result]

    def total(self, metric: str) -> float:
        """Return the sum of a metric's series, 0 if there are none."""
        return sum(value for _, value in self.query(metric))

    def rules(self) -> dict[str, tuple[str, str]]:
        """Return alert -> health and state, as of the latest evaluation."""
        groups = self.get("rules")["groups"]
        return {rule["name"]: (rule["health"], rule["state"]) for group in groups for rule in group["rules"]}


@contextmanager
def prometheus(folder: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    """Run Prometheus with the project's configuration, but every second, and with these targets of the jobs."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "1s"}
    assert {job["job_name"] for job in config["scrape_configs"]} == set(targets)
    for job in config["scrape_configs"]:
        job["static_configs"][0]["targets"] = [targets[job["job_name"]]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(MONITORING / "alerts.yml", folder)

    listen = f"127.0.0.1:{free_ports(1)[0]}"
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=tsdb"]
    command += [f"--web.listen-address={listen}"]
    log = folder / "prometheus.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            return requests.get(f"http://{listen}/-/ready", timeout=10).ok
        except requests.ConnectionError:
            return False

    try:
        wait_until(is_ready)
        yield Prometheus(f"http://{listen}")
    finally:
        process.kill()
        process.wait()


def left(wrong: Callable[[], Any]) -> Any:
    """Wait until nothing is wrong any more, and return what still is."""
    with suppress(AssertionError):
        wait_until(lambda: not wrong())
    return wrong()


@needs_prometheus
def test_prometheus_sees_what_happens(node: Node, clip: list[Pixels], tmp_path: Path) -> None:
    """Every query of the dashboard has numbers, no alert is active, and the counters are right."""
    targets = {"torchserve": address(node, "metrics_address"), "edge": f"127.0.0.1:{free_ports(1)[0]}"}
    camera_options = ["--http", targets["edge"].rpartition(":")[2]]
    with (
        mjpeg_camera([jpeg(small(frame)) for frame in clip[:10]], fps=3) as camera,
        prometheus(tmp_path, targets) as watching,
    ):
        wait_until(lambda: watching.query('up{job="torchserve"} == 1') != [])
        counters = ("handler_frames_decoded_total", "handler_frames_per_pass_sum", "handler_refused_total")
        before = {counter: watching.total(counter) for counter in counters}
        assert post(node, MODEL, b"no image").status_code == 400
        with running(node, tmp_path, "--input", camera.url, *camera_options) as edge:

            def panels_without_numbers() -> list[str]:
                expressions = [query.replace("$__rate_interval", "10s") for query in QUERIES]
                for name in ("node", "camera"):  # as Grafana does when all are chosen
                    all_of_them = VARIABLES[name]["allValue"]
                    expressions = [expression.replace(f"${name}", all_of_them) for expression in expressions]
                return [
                    expression
                    for expression in expressions
                    if all(math.isnan(value) for _, value in watching.query(expression))
                ]

            assert left(panels_without_numbers) == []
            for name, expected in (("node", targets["torchserve"]), ("camera", camera.url)):
                query = re.fullmatch(r"label_values\((.*), (\w+)\)", VARIABLES[name]["query"]["query"])
                assert query
                assert watching.get(f"label/{query[2]}/values", **{"match[]": query[1]}) == [expected]

            def wrong_alerts() -> dict[str, tuple[str, str]]:
                latencies = [line["latency_ms"] for line in json_lines(edge.output) if line["latency_ms"] is not None]
                is_slow = max(latencies, default=0) > 500
                return {
                    name: found
                    for name, found in watching.rules().items()
                    if found != ("ok", "inactive") and not (is_slow and name in ALERTS_OF_SLOWNESS)
                }

            assert left(wrong_alerts) == {}
            assert set(watching.rules()) == {rule["alert"] for rule in RULES}

            # Then nothing more comes, and all that came is accounted for.
            camera.mode = "stalled"

            def differences() -> dict[str, tuple[float, float]]:
                outcomes = Counter(line["outcome"] for line in json_lines(edge.output))
                true = {
                    "camera_frames_captured_total": outcomes.total(),
                    "camera_latency_seconds_count": outcomes["answered"],
                    "handler_frames_decoded_total": outcomes["answered"] + 1,  # and request.py's test image
                    "handler_frames_per_pass_sum": outcomes["answered"] + 1,
                    "handler_refused_total": 1,
                } | {f'camera_frames_total{{outcome="{outcome}"}}': outcomes[outcome] for outcome in OUTCOMES}
                found = {metric: watching.total(metric) - before.get(metric, 0) for metric in true}
                return {metric: (found[metric], true[metric]) for metric in true if found[metric] != true[metric]}

            assert left(differences) == {}
            assert edge.end()[camera.url]["answered"] != "0"
        # As when a device is lost.
        wait_until(lambda: watching.rules()["EdgeDeviceDown"] == ("ok", "pending"))


def test_same_camera_twice(node: Node, short_clip: Path, tmp_path: Path) -> None:
    """Prometheus rejects a page that holds a series twice."""
    (port,) = free_ports(1)
    inputs = ["--input", str(short_clip), "--input", str(short_clip), "--fps", "5"]
    with running(node, tmp_path, *inputs, "--metrics-port", f"localhost:{port}") as edge:
        wait_until(lambda: edge.lines() > 0)
        page = requests.get(f"http://localhost:{port}/metrics", timeout=10).text
        # The next test counts the requests: none of this one may be in flight.
        edge.process.send_signal(signal.SIGINT)
        edge.process.wait(timeout=60)
    cameras = re.findall(r'(?m)^camera_frames_captured_total\{camera="(.*)",model="efficientnet-lite0"\}', page)
    assert cameras == [f"{short_clip} (input 1)", f"{short_clip} (input 2)"]
