"""The files of deploy/monitoring/."""

import json

import yaml

from demo.node import PROJECT

MONITORING = PROJECT / "deploy" / "monitoring"
ALERT_TESTS = PROJECT / "tests" / "support" / "alerts_test.yml"
RULES = [
    rule
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
