"""The files of docker/: what they name exists, expressions ask for what is exposed, promtool's own tests pass."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.dashboard import Expression, alert_expressions, dashboard_expressions
from server.settings import Settings, unknown_variables
from tests.test_metrics import FAMILIES

DOCKER = Path(__file__).resolve().parents[1] / "docker"
DASHBOARD = json.loads((DOCKER / "grafana/dashboards/coldstream.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((DOCKER / "alerts.yml").read_text(encoding="utf-8"))
SAMPLES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
EXPOSED = {f"coldstream_{name}{end}": labels for name, (kind, labels) in FAMILIES.items() for end in SAMPLES[kind]}


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


@pytest.mark.parametrize(
    "expression",
    dashboard_expressions(DASHBOARD) + alert_expressions(ALERTS),
    ids=lambda e: f"{e.place}: {e.text[:40]}",
)
def test_expressions_ask_for_what_is_exposed(expression: Expression) -> None:
    names = set(re.findall(r"\b(?:coldstream|process)_\w+|\bup\b", expression.text))
    own = {name for name in names if name.startswith("coldstream_")}
    assert names and own <= set(EXPOSED) and names - own <= {"process_resident_memory_bytes", "up"}
    known = {"le", "instance", "job"}.union(*(EXPOSED[name] for name in own))
    grouped = {
        label.strip() for labels in re.findall(r"by \(([^)]*)\)", expression.text) for label in labels.split(",")
    }
    shown = set(re.findall(r"\{\{(\w+)\}\}", expression.legend))
    assert grouped <= known and shown <= known
    assert not grouped or shown <= grouped


def test_every_metric_has_a_panel() -> None:
    asked = " ".join(expression.text for expression in dashboard_expressions(DASHBOARD))
    assert [name for name in FAMILIES if f"coldstream_{name}" not in asked] == []
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in DASHBOARD["panels"]]
    assert len(set(places)) == len(places) == len({p["id"] for p in DASHBOARD["panels"]})


def test_an_alert_with_two_comparisons_is_refused() -> None:
    rule = {"alert": "A", "expr": "a > 1 and b > 2"}
    with pytest.raises(ValueError, match="A: expected one comparison, found 2"):
        alert_expressions({"groups": [{"rules": [rule]}]})


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "--syntax-only", "prometheus.yml"),  # only compose has the key's file
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=" ".join,
)
def test_promtool(arguments: tuple[str, ...]) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool: not installed (apt-get install prometheus)")
    done = subprocess.run([promtool, *arguments], cwd=DOCKER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((DOCKER / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    fired = {t["alertname"] for test in tests for t in test["alert_rule_test"] if t.get("exp_alerts")}
    silent = {t["alertname"] for test in tests for t in test["alert_rule_test"] if not t.get("exp_alerts")}
    assert fired == silent == {rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]}


def test_the_seccomp_profile_denies_by_default_and_allows_io_uring() -> None:
    profile = json.loads((DOCKER / "seccomp.json").read_text(encoding="utf-8"))
    assert profile["defaultAction"] == "SCMP_ACT_ERRNO"
    free = [rule for rule in profile["syscalls"] if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule]
    allowed = {name for rule in free for name in rule["names"]}
    assert {"io_uring_setup", "io_uring_enter", "io_uring_register", "pread64", "mmap", "futex"} <= allowed
    denied = {"bpf", "clone", "clone3", "keyctl", "mount", "ptrace", "reboot", "setns", "unshare", "userfaultfd"}
    assert denied.isdisjoint(allowed)


def environment(names: Any) -> list[str]:
    return [name for name in names if name.startswith("COLDSTREAM_")]


def test_compose_names_files_and_variables_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    server = compose["services"]["server"]
    for service in compose["services"].values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source in compose["volumes"] or source.startswith("${") or (DOCKER / source).exists(), mount
    assert (DOCKER / server["security_opt"][1].removeprefix("seccomp=")).is_file()
    assert any(mount.endswith(":ro") for mount in server["volumes"]) and server["mem_limit"] and server["read_only"]
    for name in environment(server["environment"]):
        monkeypatch.setenv(name, "1")
    assert unknown_variables() == []
    assert seconds(server["stop_grace_period"]) > Settings.model_fields["drain_timeout"].default
    (key,) = compose["services"]["prometheus"]["configs"]  # else a server with a key is never scraped
    assert compose["configs"][key]["content"] == "${COLDSTREAM_API_KEY:-none}"
    (scraped,) = yaml.safe_load((DOCKER / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert scraped["authorization"] == {"credentials_file": f"/{key}"}


def test_kubernetes_probes_and_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = list(yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text(encoding="utf-8")))
    (pod,) = (d["spec"]["template"]["spec"] for d in documents if d["kind"] == "Deployment")
    (container,) = pod["containers"]
    assert pod["enableServiceLinks"] is False  # a Service named coldstream would set COLDSTREAM_PORT
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert pod["terminationGracePeriodSeconds"] > float(variables["COLDSTREAM_DRAIN_TIMEOUT"])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert unknown_variables() == [] and container["resources"]["limits"]["memory"]
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    assert {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v} == claims


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_images_have_two_stages_and_run_as_a_user(name: str) -> None:
    text = (DOCKER / name).read_text(encoding="utf-8")
    stages = text.split("\nFROM ${BASE}")
    assert text.index("ARG BASE=") < text.index("FROM ${BASE}") and len(stages) == 3
    assert "g++" in stages[1] and "g++" not in stages[2]
    assert "\nUSER coldstream\n" in stages[2] and "HEALTHCHECK" in stages[2] and "/health" in stages[2]
