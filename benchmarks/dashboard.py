"""Hold the dashboard and the alerts to a real server and a real Prometheus: every expression must return data.

    python -m benchmarks.dashboard [--seconds S] [--plot PNG] [--json JSON] [-- SERVE...]

Starts `coldstream serve` and Debian's `prometheus` (with docker/alerts.yml), drives the recorded load below, then runs
each PromQL expression of docker/grafana/dashboards/coldstream.json, and both sides of each alert's comparison, over the
time of the load. Exits with 1 and names the expressions without a finite value. The plot is three of the dashboard's
panels, drawn from the same answers. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.serving import serving
from clients import APIError, Client

ROOT = Path(__file__).resolve().parents[1]
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "coldstream.json"
ALERTS = ROOT / "docker" / "alerts.yml"
RATE_INTERVAL = "15s"  # what stands for Grafana's $__rate_interval, at a scrape a second
PLOTTED = ("Hit rate", "Read between tiers", "Tokens")
_STEP_S = 1
_PAUSE_S = 15  # after the load: an idle engine is one that audits
_COMPARISON = re.compile(r"\s(?:==|!=|>=|<=|>|<)\s")
_UNITS = {"percentunit": ("%", 100.0), "binBps": ("MiB/s", 1 / (1 << 20)), "none": ("", 1.0)}

# The recorded load: (start, as a share of the time; prompt; tokens). One reader, then more than run at once, a pause.
LOAD = (
    (0.00, "Tell me about the sea.", 20),
    (0.20, "What is a tier of memory?", 20),
    *((0.40 + 0.01 * i, f"Count to {10 * i + 10} in words.", 16) for i in range(5)),
    (0.70, "Name three colours and a reason for each.", 20),
)


@dataclass(frozen=True)
class Expression:
    """Where a query stands, its text as it is written there, and the legend."""

    place: str
    text: str
    legend: str = ""

    @property
    def query(self) -> str:
        return self.text.replace("$__rate_interval", RATE_INTERVAL)


def dashboard_expressions(dashboard: dict[str, Any]) -> list[Expression]:
    return [
        Expression(panel["title"], target["expr"], target["legendFormat"])
        for panel in dashboard["panels"]
        for target in panel["targets"]
    ]


def alert_expressions(rules: dict[str, Any]) -> list[Expression]:
    """Both sides of each alert's one comparison, but not a side that is a number."""
    found = []
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        sides = _COMPARISON.split(rule["expr"])
        if len(sides) != 2:
            raise ValueError(f"{rule['alert']}: expected one comparison, found {len(sides) - 1}")
        found += [Expression(rule["alert"], side) for side in sides if not _is_number(side)]
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- a Prometheus ---


@contextmanager
def prometheus(target: str) -> Iterator[str]:
    """A Prometheus that scrapes `target` (host:port) every second; its URL. Its data are forgotten."""
    program = shutil.which("prometheus")
    if program is None:
        raise SystemExit("prometheus is not installed (Debian: apt-get install prometheus)")
    with tempfile.TemporaryDirectory() as name:
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [{"job_name": "coldstream", "static_configs": [{"targets": [target]}]}],
        }
        (Path(name) / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        url, process = _start(program, Path(name))
        try:
            yield url
        finally:
            process.terminate()
            process.wait(30)


def _start(program: str, home: Path) -> tuple[str, subprocess.Popen[bytes]]:
    for port in range(19090, 19190):  # it cannot be asked for a free one
        address = f"127.0.0.1:{port}"
        options = [f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/data"]
        command = [program, *options, f"--web.listen-address={address}", "--log.level=error"]
        process = subprocess.Popen(command)
        while process.poll() is None:
            if _is_ready(f"http://{address}"):
                return f"http://{address}", process
            time.sleep(0.2)
    raise SystemExit("prometheus found no free port in 19090..19189, or its configuration is wrong")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/-/ready").is_success
    except httpx.HTTPError:
        return False


def ask(url: str, expression: Expression, start_s: float, end_s: float) -> dict[str, list[tuple[float, float]]]:
    """Finite points (seconds since the start, value) of each series that the expression has in that time, by legend."""
    parameters = {"query": expression.query, "start": start_s, "end": end_s, "step": _STEP_S}
    body = httpx.get(f"{url}/api/v1/query_range", params=parameters, timeout=60).json()
    if body["status"] != "success":
        raise SystemExit(f"{expression.place}: {expression.query}: {body['error']}")
    series: dict[str, list[tuple[float, float]]] = {}
    for result in body["data"]["result"]:
        points = [(at - start_s, float(value)) for at, value in result["values"]]
        finite = [(at, value) for at, value in points if math.isfinite(value)]
        if finite:
            series[_legend(expression.legend, result["metric"])] = finite
    return series


def _legend(template: str, labels: dict[str, str]) -> str:
    if not template:
        return json.dumps(labels, sort_keys=True)
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), template)


# --- the load ---


def drive(url: str, seconds: float) -> dict[str, int]:
    """The recorded load, stretched over the time, one bad request and one that is left; what came of it."""
    outcome = {"answered": 0, "failed": 0, "left": 0}
    started = time.monotonic()
    threads = [threading.Thread(target=_answer, args=(url, *request, seconds, started, outcome)) for request in LOAD]
    threads.append(threading.Thread(target=_leave, args=(url, outcome)))
    for thread in threads:
        thread.start()
    with Client(url) as client:
        try:
            client.completions("", temperature=7)
        except APIError:
            outcome["failed"] += 1
    for thread in threads:
        thread.join()
    time.sleep(max(_PAUSE_S, started + seconds - time.monotonic()))
    return outcome


def _answer(
    url: str, share: float, prompt: str, tokens: int, seconds: float, started: float, outcome: dict[str, int]
) -> None:
    time.sleep(max(0.0, started + share * seconds - time.monotonic()))
    with Client(url) as client:
        client.chat([{"role": "user", "content": prompt}], max_tokens=tokens, temperature=0)
    outcome["answered"] += 1


def _leave(url: str, outcome: dict[str, int]) -> None:
    with Client(url) as client:
        stream = client.stream_chat([{"role": "user", "content": "Go on for long."}], max_tokens=100)
        for count, _ in enumerate(stream):
            if count == 3:
                break
        stream.close()
    outcome["left"] += 1


# --- the judgement ---


def measure(
    arguments: Sequence[str], seconds: float
) -> tuple[dict[str, Any], dict[str, dict[str, list[tuple[float, float]]]]]:
    """(what is written as JSON, the series of the plotted panels by title and legend)."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    alerts = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))
    with serving([*arguments, "--audit-rate", "0.02"]) as served, prometheus(served.url.removeprefix("http://")) as url:
        start_s = time.time()
        outcome = drive(served.url, seconds)
        end_s = time.time()
        rows, drawn = [], {title: {} for title in PLOTTED}
        for kind, expressions in (
            ("dashboard", dashboard_expressions(dashboard)),
            ("alert", alert_expressions(alerts)),
        ):
            for expression in expressions:
                series = ask(url, expression, start_s, end_s)
                rows.append({"of": kind, "in": expression.place, "expr": expression.text, **_summary(series)})
                if kind == "dashboard" and expression.place in drawn:
                    drawn[expression.place] |= series
        version = httpx.get(f"{url}/api/v1/status/buildinfo").json()["data"]["version"]
        firing = [a["labels"]["alertname"] for a in httpx.get(f"{url}/api/v1/alerts").json()["data"]["alerts"]]
        hits = ask(url, Expression("hits", "coldstream_neuron_cache_hits_total", "{{tier}}"), start_s, end_s)
    figures = {
        "prometheus": version,
        "seconds": round(end_s - start_s, 1),
        "load": outcome,
        "expressions": len(rows),
        "empty": [row["expr"] for row in rows if row["series"] == 0],
        "alerts_pending_or_firing": firing,
        "hits": {tier: points[-1][1] for tier, points in hits.items()},
        "rows": rows,
    }
    return figures, drawn


def _summary(series: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    values = [value for points in series.values() for _, value in points]
    if not values:
        return {"series": 0}
    return {
        "series": len(series),
        "points": len(values),
        "min": float(f"{min(values):.4g}"),
        "max": float(f"{max(values):.4g}"),
    }


def plot(drawn: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """Three panels of the dashboard, one below the other, over the same time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    units = {panel["title"]: panel["fieldConfig"]["defaults"]["unit"] for panel in _panels()}
    figure, axes = pyplot.subplots(len(drawn), 1, figsize=(9, 6.6), sharex=True, layout="constrained")
    for axis, (title, series) in zip(axes, drawn.items(), strict=True):
        unit, scale = _UNITS[units[title]]
        for legend, points in series.items():
            axis.plot([at for at, _ in points], [value * scale for _, value in points], label=legend, linewidth=1.6)
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes[-1].set_xlabel("seconds of the load")
    figure.savefig(path, dpi=100)


def _panels() -> Sequence[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return panels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the load, at least")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("serve", nargs="*", help="of `coldstream serve`: the model and options")
    arguments = parser.parse_args()
    figures, drawn = measure(arguments.serve, arguments.seconds)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.plot is not None:
        plot(drawn, arguments.plot)
    print(json.dumps({name: value for name, value in figures.items() if name != "rows"}))
    if figures["empty"]:
        raise SystemExit(f"{len(figures['empty'])} of {figures['expressions']} expressions returned no data")


if __name__ == "__main__":
    main()
