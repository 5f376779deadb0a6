"""deploy/monitoring/: every alert is tested, and the dashboard is whole."""

import itertools
import json
import re

import yaml

from tests.support.monitoring import ALERT_TESTS, DASHBOARD, PANELS, QUERIES, RULES, VARIABLES


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    for rule in RULES:
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}
    quiet, firing = yaml.safe_load(ALERT_TESTS.read_text(encoding="utf-8"))["tests"]
    assert [test["exp_samples"] for test in quiet["promql_expr_test"]] == [[]]
    labels = [sample["labels"] for test in firing["promql_expr_test"] for sample in test["exp_samples"]]
    tested = [name for label in labels for name in re.findall(r'alertname="(\w+)"', label)]
    assert set(tested) == {rule["alert"] for rule in RULES}
    # Both ask for what was firing.
    assert {test["expr"] for each in (quiet, firing) for test in each["promql_expr_test"]} == {
        'max by (alertname, instance, camera, reason) (last_over_time(ALERTS{alertstate="firing"}[20m]))'
    }


def test_dashboard_is_whole() -> None:
    """What Grafana would not complain of, but show badly."""
    assert DASHBOARD["id"] is None  # or else the import overwrites whatever dashboard has that number
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for name in ("node", "camera"):
        assert VARIABLES[name]["datasource"]["uid"] == "${datasource}"
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
        for source in (panel, *panel["targets"]):
            assert source["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            assert re.fullmatch(r"(\{\{\w+\}\} ?)+\w*", target["legendFormat"])
            names = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            kept = re.match(r".*?sum by \(([\w, ]+)\)", target["expr"])
            assert kept is None or set(names) == set(kept[1].split(", ")) - {"le"}
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert max(place["x"] + place["w"] for place in places) == 24  # as wide as Grafana's grid
    for one, other in itertools.combinations(places, 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert is_beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"])))
    assert used == {"__rate_interval", *VARIABLES}
    for query in QUERIES:
        assert re.findall(r"\[.*?\]", query) == ["[$__rate_interval]"] * len(re.findall(r"\brate\(", query))
