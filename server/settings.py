"""`Settings`: every option of the command line, once, with its default; a flag wins over COLDSTREAM_*.

Knows names, types and ranges of options; not what a model or a tier does with them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from cache.budget import parse_size
from runtime.plan import FfnCache, PlanOptions

if TYPE_CHECKING:
    from runtime.load import LoadOptions
    from runtime.pack import PackOptions

PREFIX = "COLDSTREAM_"
AUDIT_RATE = 1 / 1024  # unless asked otherwise; where there are no audits, only who asked is told
_ELSEWHERE = frozenset({"COLDSTREAM_CACHE_DIR"})  # read by the runtime: where packed models are kept

Act = Literal["relu2", "relu", "drelu"]
Bundles = Literal["auto", "bf16", "fp16", "fp32", "int8"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "bf16", "fp32"]
Mode = Literal["auto", "sparse", "exact", "dense"]
LogFormat = Literal["text", "json"]


class SettingsError(ValueError):
    """An option that cannot be read; one sentence that names the flag or the variable."""


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _share(value: object) -> object:
    return FfnCache.parse(value) if isinstance(value, str) else value


def _names(value: object) -> object:
    """Texts with commas, one or several, as the names in them."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return value
    names = tuple(name.strip() for text in texts for name in str(text).split(","))
    if "" in names:
        raise ValueError("one of the values is empty")
    return names


def _origins(values: tuple[str, ...]) -> tuple[str, ...]:
    """Origins as browsers send them."""
    for value in values:
        if value != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", value):
            raise ValueError(f"{value} is no origin; write https://example.com, without a path, or * for all")
    return values


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_names)]
Size = Annotated[int, BeforeValidator(_size), Field(gt=0)]
Share = Annotated[FfnCache, BeforeValidator(_share)]
Positive = Annotated[int, Field(gt=0)]
Cett = Annotated[float, Field(gt=0, lt=1)]


class Settings(BaseSettings):
    """All options. A field `max_model_len` is the flag --max-model-len and the variable COLDSTREAM_MAX_MODEL_LEN."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, frozen=True, populate_by_name=True)

    model: str | None = None
    # prepare
    out: Path | None = None
    calibration: Path | None = None
    max_ppl_increase: Annotated[float, Field(gt=0, le=100)] = 1.0
    bundles: Bundles = "auto"
    standalone: bool = False
    # what runs a model
    memory: Size | None = None
    gpu_memory: Size | None = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    threads: Annotated[int, Field(gt=0, le=1024)] | None = None
    mode: Mode = "auto"
    cett: Cett | None = None
    ffn_cache: Share | None = None
    max_model_len: Positive | None = None
    max_num_seqs: Positive = 4
    prefix_cache: bool = True
    # serve
    prefix_cache_dir: Path | None = None
    prefix_cache_disk: Size | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    api_key: Annotated[Names, Field(repr=False)] = ()
    api_key_file: Path | None = None
    cors_origin: Annotated[Names, AfterValidator(_origins)] = ()
    max_body: Size = 16 << 20
    max_queue: Annotated[int, Field(ge=0)] = 64
    max_wait: Annotated[float, Field(gt=0)] = 300.0
    log_format: LogFormat = "text"
    served_model_name: str | None = None
    audit_rate: Annotated[float, Field(ge=0, le=1)] | None = None
    drain_timeout: Annotated[float, Field(ge=0)] = 30.0
    # bench, perplexity
    prompt_tokens: Positive = 128
    tokens: Positive | None = None
    text: Path | None = None
    as_json: bool = Field(False, validation_alias=f"{PREFIX}JSON")
    # profile
    quick: bool = False
    # sparsify
    act: Act = "relu2"
    gated: bool | None = None
    attention: bool = True
    active: Annotated[float, Field(gt=0, lt=1)] = 0.08
    resume: bool = False
    # chat, top
    url: str = "http://127.0.0.1:8000"
    # load
    requests: Positive = 32
    concurrency: Positive = 4
    interval: Annotated[float, Field(gt=0, le=3600)] = 2.0
    once: bool = False


def flag(name: str) -> str:
    """The flag of a field."""
    return {"model": "MODEL", "as_json": "--json"}.get(name, f"--{name.replace('_', '-')}")


def variable(name: str) -> str:
    """The environment variable of a field."""
    return f"{PREFIX}{'JSON' if name == 'as_json' else name.upper()}"


def read_settings(given: Mapping[str, Any]) -> Settings:
    """Settings from the flags given (None: not given), the environment, and defaults. Raises SettingsError."""
    named = {k: v for k, v in given.items() if v is not None and v != []}
    try:
        return Settings(**named)
    except ValidationError as error:
        raise SettingsError(_sentence(error, named)) from None


def unknown_variables() -> list[str]:
    """Variables that look like options and are none, so that a misspelt one does not pass in silence."""
    known = {variable(name) for name in Settings.model_fields} | _ELSEWHERE
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def _sentence(error: ValidationError, named: Mapping[str, Any]) -> str:
    first = error.errors()[0]
    field = str(first["loc"][0]).removeprefix(PREFIX).lower()
    field = "as_json" if field == "json" else field
    source = flag(field) if field in named else variable(field)
    reason = str(first["msg"]).removeprefix("Value error, ")
    shown = "" if field == "api_key" or repr(first["input"]) in reason else f" (got {first['input']!r})"
    return f"{source}: {reason[:1].lower()}{reason[1:]}{shown}"


def api_keys(settings: Settings) -> frozenset[str]:
    """Every key that is let in: those given, and those of the file, one a line, lines with # left out.

    Raises SettingsError for a file that cannot be read or holds none: it must not open the server to everybody.
    """
    if settings.api_key_file is None:
        return frozenset(settings.api_key)
    try:
        lines = settings.api_key_file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingsError(f"--api-key-file {settings.api_key_file}: {reason}") from None
    found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not found:
        raise SettingsError(f"--api-key-file {settings.api_key_file}: holds no key")
    return frozenset([*settings.api_key, *found])


def client_key(settings: Settings) -> str | None:
    """The key that a client of ours sends: the first of those given."""
    return next(iter(settings.api_key), None)


def load_options(settings: Settings) -> LoadOptions:
    """What the runtime is told of the options."""
    from runtime.load import LoadOptions

    return LoadOptions(
        memory_bytes=settings.memory,
        gpu_memory_bytes=settings.gpu_memory,
        device=settings.device,
        dtype=settings.dtype,
        threads=settings.threads,
        mode=settings.mode,
        cett=settings.cett,
        ffn_cache=settings.ffn_cache,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_queue=settings.max_queue,
        max_wait_s=settings.max_wait,
        prefix_cache=settings.prefix_cache,
        prefix_cache_dir=settings.prefix_cache_dir,
        prefix_cache_disk=settings.prefix_cache_disk,
        audit_rate=AUDIT_RATE if settings.audit_rate is None else settings.audit_rate,
        pack=pack_options(settings),
    )


def pack_options(settings: Settings) -> PackOptions:
    """How a checkpoint is packed that `serve` or `bench` finds not packed yet: its CETT is the contract's choice, for
    --cett says what is served."""
    from runtime.load import default_calibration
    from runtime.pack import PackOptions

    return PackOptions(
        settings.calibration or default_calibration(),
        max_ppl_increase=settings.max_ppl_increase,
        bundles=settings.bundles,
        standalone=settings.standalone,
    )


def plan_options(settings: Settings) -> PlanOptions:
    """What the planner is told of the options."""
    return PlanOptions(
        memory_bytes=settings.memory,
        gpu_memory_bytes=settings.gpu_memory,
        device=settings.device,
        dtype=settings.dtype,
        mode=settings.mode,
        cett=settings.cett,
        ffn_cache=settings.ffn_cache,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_queue=settings.max_queue,
        bundles=settings.bundles,
        threads=settings.threads,
    )
