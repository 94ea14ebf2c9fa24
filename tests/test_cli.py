"""The command line: options and their sources, exit codes and sentences, plans of real headers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.config import distribution_version
from server.settings import (
    Settings,
    SettingsError,
    api_keys,
    load_options,
    plan_options,
    read_settings,
    unknown_variables,
    variable,
)

MAIN = "import sys; from server.cli import main; main()"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("COLDSTREAM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


def coldstream(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("COLDSTREAM_")} | variables
    command = [sys.executable, "-W", "error", "-c", MAIN, *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, cwd=ROOT)


COMMANDS = {
    "prepare": ["--out", "--calibration", "--cett", "--max-ppl-increase", "--bundles", "--standalone"],
    "plan": ["--memory", "--gpu-memory", "--device", "--json"],
    "serve": [
        *("--host", "--port", "--memory", "--gpu-memory", "--device", "--dtype", "--threads", "--mode", "--cett"),
        *("--ffn-cache", "--max-model-len", "--max-num-seqs", "--api-key", "--served-model-name", "--drain-timeout"),
        *("--api-key-file", "--cors-origin", "--max-body", "--max-queue", "--max-wait", "--log-format"),
        *("--prefix-cache", "--no-prefix-cache", "--prefix-cache-dir", "--prefix-cache-disk"),
    ],
    "bench": [
        *("--memory", "--gpu-memory", "--device", "--dtype", "--threads", "--mode", "--cett", "--ffn-cache"),
        *("--prompt-tokens", "--tokens", "--json"),
    ],
    "perplexity": ["--cett", "--tokens", "--text", "--ffn-cache", "--memory", "--json"],
    "profile": ["--out", "--text", "--tokens", "--quick", "--json"],
    "sparsify": [
        *("--out", "--act", "--gated", "--non-gated", "--attention", "--no-attention", "--tokens", "--active"),
        *("--text", "--device", "--resume", "--json"),
    ],
    "chat": ["--url"],
    "load": ["--url", "--api-key", "--requests", "--concurrency", "--prompt-tokens", "--tokens", "--json"],
    "top": ["--url", "--api-key", "--interval", "--once", "--json"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_flags(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    shown = set(result.output.split())
    assert set(COMMANDS[command]) <= shown


def test_version_is_that_of_the_distribution_and_needs_no_command() -> None:
    found = coldstream("--version")
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == f"coldstream {distribution_version()}\n" and re.search(r"\d+\.\d+", found.stdout)


def test_help_does_not_import_torch() -> None:
    code = "import sys, server.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_flag_wins_over_the_environment_and_that_over_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings({}).port == 8000
    monkeypatch.setenv("COLDSTREAM_PORT", "9001")
    assert read_settings({"port": None}).port == 9001
    assert read_settings({"port": 9002}).port == 9002


def test_every_option_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        **{
            "model": "m",
            "out": "o",
            "calibration": "c",
            "bundles": "int8",
            "standalone": "1",
            "memory": "3GiB",
            "max_ppl_increase": "2.5",
        },
        **{"gpu_memory": "800MB", "device": "cpu", "dtype": "fp32", "threads": "2", "mode": "dense", "cett": "0.2"},
        **{"ffn_cache": "25%", "max_model_len": "128", "max_num_seqs": "2", "host": "::", "port": "1", "api_key": "k"},
        **{
            "served_model_name": "s",
            "drain_timeout": "1.5",
            "audit_rate": "0.5",
            "prompt_tokens": "3",
            "tokens": "4",
            "text": "t",
        },
        **{"as_json": "true", "url": "u", "quick": "1", "interval": "0.5", "once": "1"},
        **{"api_key_file": "f", "cors_origin": "https://a.b,http://c"},
        **{
            "max_body": "1MiB",
            "max_queue": "0",
            "max_wait": "7",
            "log_format": "json",
            "requests": "9",
            "concurrency": "2",
            "prefix_cache": "0",
            "prefix_cache_dir": "p",
            "prefix_cache_disk": "2GiB",
        },
        **{"act": "relu", "gated": "0", "attention": "0", "active": "0.1", "resume": "1"},
    }
    assert set(values) == set(Settings.model_fields)
    for name, value in values.items():
        monkeypatch.setenv(variable(name), value)
    settings = read_settings({})
    assert [n for n, f in Settings.model_fields.items() if getattr(settings, n) == f.default] == []
    assert (settings.memory, settings.gpu_memory, settings.cett) == (3 << 30, 800_000_000, 0.2)
    assert unknown_variables() == []
    assert settings.cors_origin == ("https://a.b", "http://c") and settings.api_key == ("k",)
    assert (load_options(settings).max_queue, load_options(settings).max_wait_s) == (0, 7.0)


def test_keys_are_repeated_or_separated_by_commas_and_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# team\none\n\n  two  \n", encoding="utf-8")
    settings = read_settings({"api_key": ["a,b", "c"], "api_key_file": str(file)})
    assert api_keys(settings) == {"a", "b", "c", "one", "two"}
    assert "a,b" not in repr(settings) and "'c'" not in repr(settings)
    assert api_keys(read_settings({"api_key": []})) == frozenset()
    for text in ("# nothing\n", None):
        file.unlink() if text is None else file.write_text(text, encoding="utf-8")
        with pytest.raises(SettingsError, match=f"--api-key-file {file}: "):
            api_keys(settings)


def test_a_misspelt_variable_is_said() -> None:
    done = coldstream("plan", "--device", COLDSTREAM_MEMROY="3GiB")
    assert "COLDSTREAM_MEMROY is not an option" in done.stderr


@pytest.mark.parametrize(
    ("given", "variables", "start"),
    [
        ({"memory": "lots"}, {}, "--memory: 'lots'"),
        ({}, {"COLDSTREAM_MEMORY": "lots"}, "COLDSTREAM_MEMORY: 'lots'"),
        ({"ffn_cache": "130%"}, {}, "--ffn-cache: '130%'"),
        ({}, {"COLDSTREAM_PORT": "tcp://10.0.0.1:80"}, "COLDSTREAM_PORT: "),
        ({"port": 70000}, {}, "--port: "),
        ({"cett": 1.5}, {}, "--cett: "),
        ({"threads": 0}, {}, "--threads: "),
        ({"threads": 1025}, {}, "--threads: "),
        ({"api_key": ["a", ""]}, {}, "--api-key: "),
        ({"cors_origin": ["example.com"]}, {}, "--cors-origin: example.com is no origin"),
        ({"cors_origin": ["https://a.b/c"]}, {}, "--cors-origin: "),
        ({}, {"COLDSTREAM_CORS_ORIGIN": "https://a.b,"}, "COLDSTREAM_CORS_ORIGIN: "),
        ({"max_body": "0"}, {}, "--max-body: "),
        ({"max_wait": 0}, {}, "--max-wait: "),
        ({}, {"COLDSTREAM_MODE": "sparce"}, "COLDSTREAM_MODE: "),
        ({}, {"COLDSTREAM_JSON": "perhaps"}, "COLDSTREAM_JSON: "),
    ],
)
def test_a_bad_value_names_its_source(
    given: dict[str, object], variables: dict[str, str], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        read_settings(given)
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_the_api_key_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLDSTREAM_API_KEY", "hush")
    assert "hush" not in repr(read_settings({}))


def test_options_reach_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read_settings(
        {"memory": "2GiB", "dtype": "fp32", "threads": 1, "mode": "exact", "ffn_cache": "25%", "max_num_seqs": 3}
    )
    options = load_options(settings)
    assert (options.memory_bytes, options.dtype, options.threads, options.mode) == (2 << 30, "fp32", 1, "exact")
    assert options.ffn_cache is not None and options.ffn_cache.bytes_of(1000) == 250
    monkeypatch.setenv("COLDSTREAM_BUNDLES", "int8")
    monkeypatch.setenv("COLDSTREAM_MAX_PPL_INCREASE", "3")
    pack = load_options(read_settings({"cett": 0.1})).pack
    assert pack is not None and (pack.bundles, pack.max_ppl_increase, pack.cett) == ("int8", 3.0, None)
    planned = plan_options(settings)
    assert (planned.memory_bytes, planned.mode, planned.max_num_seqs) == (2 << 30, "exact", 3)


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["serve", "--device", "cuda"], 1, "--device cuda"),
        (["bench", "m", "--gpu-memory", "1GiB"], 1, "--gpu-memory"),
        (["plan", "--gpu-memory", "1MiB"], 1, "the smallest that works is --gpu-memory"),
        (["serve", "--memory", "lots"], 2, "--memory"),
        (["serve", "--mode", "fast"], 2, "--mode"),
        (["prepare"], 2, "MODEL is missing"),
        (["perplexity", "--cett", "3"], 2, "--cett"),
        (["serve", "--no-such-flag"], 2, "--no-such-flag"),
        (["top", "--once", "--url", "http://127.0.0.1:9"], 1, "--url http://127.0.0.1:9: no coldstream server"),
        (["top", "--interval", "0"], 2, "--interval: input should be greater than 0"),
        (["chat", "--url", "http://127.0.0.1:9"], 1, "--url http://127.0.0.1:9: no coldstream server"),
    ],
)
def test_refusals_are_one_sentence(args: list[str], code: int, words: str) -> None:
    done = CliRunner().invoke(app, args)
    assert done.exit_code == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    done = coldstream("plan", str(tmp_path / "nothing"), HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nothing" in done.stderr


def test_plan_of_a_checkpoint_adds_up(tiny_llama: Any) -> None:
    done = CliRunner().invoke(app, ["plan", str(tiny_llama.checkpoint), "--memory", "2GiB", "--json"])
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])
    uses = plan["tiers"]["cpu"]
    assert plan["budget_bytes"] == 2 << 30
    assert sum(uses.values()) + plan["unused_bytes"] == plan["budget_bytes"]
    assert plan["smallest_budget_bytes"] <= plan["budget_bytes"]


def test_plan_shows_a_table(tiny_llama: Any) -> None:
    done = CliRunner().invoke(app, ["plan", str(tiny_llama.checkpoint), "--memory", "2GiB"])
    assert done.exit_code == 0, done.stderr
    for word in ("process", "resident", "slots", "disk", "2GiB"):
        assert word in done.stdout


def test_plan_of_a_gpu_has_both_tiers(tiny_llama: Any) -> None:
    args = ["plan", str(tiny_llama.checkpoint), "--gpu-memory", "2GiB"]
    done = CliRunner().invoke(app, [*args, "--json"])
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout.splitlines()[-1])
    assert plan["gpu_budget_bytes"] == 2 << 30 and plan["expected"] is None
    for tier, budget in (("gpu", plan["gpu_budget_bytes"]), ("cpu", plan["memory_budget_bytes"])):
        assert sum(plan["tiers"][tier].values()) + plan["unused_bytes"][tier] == budget
    shown = CliRunner().invoke(app, args)
    for word in ("context", "staging", "home", "GPU 2GiB (--gpu-memory)", "not measured"):
        assert word in shown.stdout


def test_a_gpu_budget_and_the_cpu_are_not_both_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["plan", "--gpu-memory", "2GiB", "--device", "cpu"])
    assert done.exit_code == 1 and "--gpu-memory has no meaning with --device cpu" in done.stderr
    monkeypatch.setenv("COLDSTREAM_DEVICE", "cuda")
    from runtime.gpu_machine import gpu_memory

    if gpu_memory() is None:
        done = CliRunner().invoke(app, ["plan"])
        assert done.exit_code == 1 and "--device cuda: no GPU is here" in done.stderr


def test_a_budget_too_small_names_the_smallest(tiny_llama: Any) -> None:
    done = CliRunner().invoke(app, ["plan", str(tiny_llama.checkpoint), "--memory", "10MiB"])
    assert done.exit_code == 1
    assert "--memory" in done.stderr
