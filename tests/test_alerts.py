"""deploy/alerts.yaml: what it asks for exists, and its alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from metrics import Traffic
from streams import FAILURES
from tasks import TASKS
from tests.kit import ROOT, code_of

ALERTS = ROOT / "deploy" / "alerts.yaml"
RULES = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: apt install prometheus")


def promtool(*arguments: str) -> None:
    run = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_rules_ask_for_metrics_that_a_daemon_has() -> None:
    """Lost otherwise: an alert that never fires, because a metric, a task or an outcome is not called so any more."""
    served = Traffic(TASKS)
    served.count_batch("clip image", 1)
    text = generate_latest(served.registry).decode()
    known = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)) | {"up"}
    known |= {rule["record"] for rule in RULES if "record" in rule}
    for rule in RULES:
        used = re.findall(r"\b(?:lumen[:_][\w:]+|process_\w+|up)\b", rule["expr"])
        assert used and {name.removesuffix("_bucket") for name in used} <= known, rule["expr"]
        for label, values in re.findall(r'(task|outcome)=~?"([^"]+)"', rule["expr"]):
            names = TASKS if label == "task" else ["ok", *(outcome for outcome, _ in FAILURES.values()), "cancelled"]
            for value in values.split("|"):
                assert any(re.fullmatch(value, name) for name in names), value
    pictures = {name for name, task in TASKS.items() if task.takes == "image"}
    assert pictures == {name for name in TASKS if re.fullmatch(".+_classify|.+_image_embed", name)}


@pytest.mark.promtool
@needs_promtool
def test_prometheus_accepts_the_rules_and_the_documented_configuration(tmp_path: Path) -> None:
    """Lost otherwise: a Prometheus that does not start."""
    promtool("check", "rules", str(ALERTS))
    shutil.copytree(ALERTS.parent, tmp_path / "deploy")
    [configuration] = code_of("docs/deployment.md", "Several machines", "yaml")
    (tmp_path / "prometheus.yml").write_text(configuration)
    promtool("check", "config", str(tmp_path / "prometheus.yml"))


# One daemon, a value a minute over 30 minutes: what makes each alert fire.
QUIET = {
    'up{job="lumen-clip",instance="a"}': "1x30",
    'process_start_time_seconds{job="lumen-clip",instance="a"}': "5x30",
    'lumen_queue_depth{job="lumen-clip",instance="a"}': "32x30",
    'lumen_requests_total{job="lumen-clip",instance="a",task="clip_image_embed",outcome="ok"}': "0+600x30",
    'lumen_requests_total{job="lumen-clip",instance="a",task="clip_image_embed",outcome="internal"}': "0+1x30",
    'lumen_request_seconds_bucket{job="lumen-clip",instance="a",task="clip_embed",le="0.5"}': "0+60x30",
    'lumen_request_seconds_bucket{job="lumen-clip",instance="a",task="clip_embed",le="2.5"}': "0+60x30",
    'lumen_request_seconds_bucket{job="lumen-clip",instance="a",task="clip_embed",le="+Inf"}': "0+60x30",
}
TROUBLE = {
    "LumenClipDown": {"up{": "0x30"},
    "LumenClipRestarts": {"process_start": "1 1 1 2 2 3 3 4x24"},
    "LumenClipStalled": {'outcome="ok"': "600x30", 'outcome="internal"': "0x30"},
    "LumenClipQueueLong": {"lumen_queue": "300x30"},
    "LumenClipSearchSlow": {'le="0.5"': "0+10x30"},
    "LumenClipErrors": {'outcome="internal"': "0+30x30"},
}


@pytest.mark.promtool
@needs_promtool
@pytest.mark.parametrize("alert", ["", *TROUBLE])
def test_each_alert_fires_when_it_should_and_no_other(tmp_path: Path, alert: str) -> None:
    """Lost otherwise: an operator who is not called, or who is called for nothing."""
    assert TROUBLE.keys() == {rule["alert"] for rule in RULES if "alert" in rule}
    series = dict(QUIET)
    for part, values in TROUBLE.get(alert, {}).items():
        [name] = [name for name in series if part in name]
        series[name] = values
    shutil.copy(ALERTS, tmp_path)
    firing = 'count by (alertname) (ALERTS{alertstate="firing"})'
    case: dict[str, Any] = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": firing,
                "eval_time": "30m",
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else [],
            }
        ],
    }
    if not alert:
        rate: dict[str, Any] = {"expr": "lumen:pictures:rate5m", "eval_time": "30m"}
        rate["exp_samples"] = [{"labels": 'lumen:pictures:rate5m{job="lumen-clip",instance="a"}', "value": 10}]
        case["promql_expr_test"].append(rate)
    checks = {"rule_files": ["alerts.yaml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "checks.yaml").write_text(json.dumps(checks))
    promtool("test", "rules", str(tmp_path / "checks.yaml"))
