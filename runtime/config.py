"""`ModelConfig`: what the runtime must know of a model, from a Hugging Face config.json or from GGUF metadata.

Knows names and numbers, not weights. A family is data (`_FAMILIES`): its defaults are those of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cache.errors import FormatError, FormatKind, UnsupportedError

if TYPE_CHECKING:
    from runtime.gguf_file import GgufFile

_MAX_INT = 2**31 - 1
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2"}
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16", "float": "fp32"}


@dataclass(frozen=True, slots=True)
class _Family:
    """What differs between the families; `defaults` are the fields that a config.json may leave out."""

    gated: bool
    gguf_act: str  # GGUF does not say the activation: the architecture's name implies it
    defaults: Mapping[str, Any]


_FAMILIES = {
    "llama": _Family(
        gated=True,
        gguf_act="silu",
        defaults={
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "arcee": _Family(
        gated=False,
        gguf_act="relu2",
        defaults={
            "vocab_size": 32000,
            "hidden_size": 2560,
            "intermediate_size": 18432,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "hidden_act": "relu2",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Parameters of a RoPE variant, names as in Hugging Face configs, every one resolved to a number.

    linear, dynamic: factor. llama3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.
    yarn: factor, original_max_position_embeddings, attention_factor, beta_fast, beta_slow, truncate (0 or 1).
    """

    rope_type: str
    parameters: dict[str, float]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Architecture as data. Field names are Hugging Face's."""

    model_type: str  # llama, arcee
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str  # silu, relu, relu2
    gated: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str  # of the checkpoint's matrices: bf16, fp16, fp32, or a GGUF type's name
    embedding_dtype: str | None = None  # as stored; None: not known, and then taken to be `dtype`
    head_dtype: str | None = None  # as stored; None also where the embedding is the head

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> ModelConfig:
        """Reads what `to_json` wrote. FormatError(BAD_HEADER) naming the field that is missing or of the wrong kind."""
        fields = _Fields("manifest.json: config", data, required=True)
        scaling = fields.mapping("rope_scaling")
        family = _family(fields)
        rope = None if scaling is None else _rope_from_json(fields, scaling)
        return cls(
            **_common(fields),
            gated=family.gated,
            rope_scaling=rope,
            rope_theta=fields.number("rope_theta"),
            embedding_dtype=fields.text_or_none("embedding_dtype"),
            head_dtype=fields.text_or_none("head_dtype"),
        )

    @classmethod
    def from_hf(cls, data: Any) -> ModelConfig:
        """From a config.json (old `rope_theta`/`rope_scaling` or new `rope_parameters`), with transformers' defaults.

        Raises UnsupportedError naming the field that this version does not run, FormatError(BAD_HEADER) naming the
        field that makes no sense. `dtype` is what the file says, fp32 where it says nothing.
        """
        fields = _Fields("config.json", data)
        family = _family(fields)
        fields = _Fields("config.json", {**family.defaults, **{k: v for k, v in data.items() if v is not None}})
        # a missing end token has a default, one that is null has none
        fields.data.update({k: None for k in ("bos_token_id", "eos_token_id") if k in data and data[k] is None})
        _refuse_hf(fields)
        heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
        fields.data.setdefault("num_key_value_heads", heads)
        fields.data.setdefault("head_dim", max(1, hidden // heads))
        fields.data["eos_token_ids"] = _id_list(fields, "eos_token_id")
        fields.data["dtype"] = _hf_dtype(fields)
        theta, scaling = _rope_from_hf(fields)
        return cls(**_common(fields), gated=family.gated, rope_scaling=scaling, rope_theta=theta)

    @classmethod
    def from_gguf(cls, file: GgufFile) -> ModelConfig:
        """From the metadata of a GGUF file of architecture llama or arcee.

        Reads one small tensor, `rope_freqs.weight`, where there is one. Raises UnsupportedError, FormatError as
        `from_hf` does.
        """
        arch = file.metadata.get("general.architecture")
        fields = _Fields(file.path.name, {"model_type": arch})
        family = _family(fields, "general.architecture")
        fields.data.update(_gguf_fields(file, str(arch), family))
        theta, scaling = _rope_from_gguf(file, fields, str(arch))
        return cls(**_common(fields), gated=family.gated, rope_scaling=scaling, rope_theta=theta)


class _Fields:
    """Typed access to fields that a file holds; every error names the file and the field."""

    def __init__(self, source: str, data: Any, required: bool = False) -> None:
        if not isinstance(data, dict):
            raise FormatError(FormatKind.BAD_HEADER, f"{source}: not a JSON object")
        self.source, self.data, self.required = source, dict(data), required

    def bad(self, name: str, wanted: str) -> FormatError:
        value = repr(self.data.get(name))[:60]
        return FormatError(FormatKind.BAD_HEADER, f"{self.source}: {name} must be {wanted}, not {value}")

    def unsupported(self, name: str, why: str) -> UnsupportedError:
        value = repr(self.data.get(name))[:60]
        return UnsupportedError(f"{self.source}: {name} = {value} is not supported{why}")

    def integer(self, name: str) -> int:
        value = self.data.get(name)
        if type(value) is not int or not 0 < value <= _MAX_INT:
            raise self.bad(name, "a positive integer")
        return value

    def token_id(self, name: str) -> int | None:
        value = self.data.get(name)
        if value is not None and (type(value) is not int or not 0 <= value <= _MAX_INT):
            raise self.bad(name, "a token id or null")
        return value

    def number(self, name: str) -> float:
        value = self.data.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise self.bad(name, "a positive number")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.data.get(name, None if self.required else False)
        if not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return value

    def text(self, name: str) -> str:
        value = self.data.get(name)
        if not isinstance(value, str):
            raise self.bad(name, "a string")
        return value

    def text_or_none(self, name: str) -> str | None:
        return None if self.data.get(name) is None else self.text(name)

    def mapping(self, name: str) -> dict[str, Any] | None:
        value = self.data.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.bad(name, "an object or null")
        return value


def _family(fields: _Fields, name: str = "model_type") -> _Family:
    model_type = fields.data.get("model_type")
    family = _FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise UnsupportedError(
            f"{fields.source}: {name} = {model_type!r} is not supported; supported are {', '.join(_FAMILIES)}"
        )
    return family


def _common(fields: _Fields) -> dict[str, Any]:
    """The fields that need no translation, checked against each other."""
    act = fields.data.get("hidden_act")
    if not isinstance(act, str) or act not in _ACTIVATIONS:
        raise fields.unsupported("hidden_act", f"; supported are {', '.join(_ACTIVATIONS)}")
    eos = fields.data.get("eos_token_ids")
    if not isinstance(eos, list | tuple) or not all(type(i) is int and 0 <= i <= _MAX_INT for i in eos):
        raise fields.bad("eos_token_ids", "a list of token ids")
    whole = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    numbers = {name: fields.integer(name) for name in whole}
    heads, kv_heads, head_dim = (fields.integer(n) for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    if heads % kv_heads:
        raise fields.bad("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if head_dim % 2:
        raise fields.bad("head_dim", "even")
    return {
        **numbers,
        "model_type": fields.text("model_type"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": _ACTIVATIONS[act],
        "rms_norm_eps": fields.number("rms_norm_eps"),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings"),
        "attention_bias": fields.boolean("attention_bias"),
        "bos_token_id": fields.token_id("bos_token_id"),
        "eos_token_ids": tuple(eos),
        "dtype": fields.text("dtype"),
    }


def _id_list(fields: _Fields, name: str) -> tuple[int, ...]:
    value = fields.data.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i <= _MAX_INT for i in ids):
        raise fields.bad(name, "a token id, a list of them or null")
    return tuple(dict.fromkeys(ids))


def _hf_dtype(fields: _Fields) -> str:
    value = fields.data.get("dtype", fields.data.get("torch_dtype", "float32"))
    name = str(value).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _refuse_hf(fields: _Fields) -> None:
    """Features that would change the result and that no code here computes."""
    if fields.data.get("mlp_bias"):
        raise fields.unsupported("mlp_bias", "; only an FFN without bias is")
    if fields.data.get("sliding_window") and fields.data.get("use_sliding_window", True):
        raise fields.unsupported("sliding_window", "; only full attention is")
    if fields.data.get("partial_rotary_factor", 1) != 1:
        raise fields.unsupported("partial_rotary_factor", "; only 1 is")
    if fields.data.get("quantization_config"):
        raise fields.unsupported("quantization_config", "; use bf16, fp16 or fp32 weights, or a GGUF file")
    kinds = fields.data.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise fields.unsupported("layer_types", "; only full_attention is")


# --- RoPE ---

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
}
_MSCALES = ("mscale", "mscale_all_dim")  # other ways to say yarn's attention_factor


def _rope_from_json(fields: _Fields, scaling: dict[str, Any]) -> RopeScaling:
    rope_type, parameters = scaling.get("rope_type"), scaling.get("parameters")
    keys = _ROPE_KEYS.get(rope_type) if isinstance(rope_type, str) else None
    if not keys or not isinstance(parameters, dict) or set(parameters) != set(keys):
        raise fields.bad("rope_scaling", "a RoPE type with its parameters")
    inner = _Fields(fields.source + ": rope_scaling", parameters)
    return RopeScaling(
        str(rope_type), {k: float(bool(parameters[k])) if k == "truncate" else inner.number(k) for k in keys}
    )


def _rope_from_hf(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """(rope_theta, scaling). As in transformers `rope_scaling` wins over `rope_parameters`, and its own theta over the
    field beside it."""
    name = "rope_scaling" if fields.data.get("rope_scaling") else "rope_parameters"
    given = fields.mapping(name) or {}
    inner = _Fields(f"{fields.source}: {name}", {k: v for k, v in given.items() if v is not None})
    inner.data.setdefault("rope_theta", fields.data.get("rope_theta", 10000.0))
    rope_type = inner.data.setdefault("rope_type", inner.data.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _ROPE_KEYS:
        raise inner.unsupported("rope_type", f"; supported are {', '.join(_ROPE_KEYS)}")
    known = {"rope_theta", "rope_type", "type", "partial_rotary_factor", *_ROPE_KEYS[rope_type]}
    known |= set(_MSCALES) if rope_type == "yarn" else set()
    for key in inner.data.keys() - known:
        raise inner.unsupported(key, f" with rope_type {rope_type}")
    if inner.data.get("partial_rotary_factor", 1) != 1:
        raise inner.unsupported("partial_rotary_factor", "; only 1 is")
    return inner.number("rope_theta"), _scaling(fields, inner)


def _scaling(fields: _Fields, inner: _Fields) -> RopeScaling | None:
    rope_type = inner.text("rope_type")
    if rope_type == "default":
        return None
    original = fields.data.get("original_max_position_embeddings", fields.integer("max_position_embeddings"))
    inner.data.setdefault("original_max_position_embeddings", original)
    if rope_type == "yarn":
        inner.data.setdefault("attention_factor", _attention_factor(inner))
        inner.data.setdefault("beta_fast", 32.0)
        inner.data.setdefault("beta_slow", 1.0)
        inner.data.setdefault("truncate", True)
    parameters = {key: inner.number(key) for key in _ROPE_KEYS[rope_type] if key != "truncate"}
    if rope_type == "yarn":
        parameters["truncate"] = float(inner.boolean("truncate"))
    return RopeScaling(rope_type, parameters)


def _attention_factor(inner: _Fields) -> float:
    """Yarn's scale of the rotated vectors, 0.1 ln(factor) + 1 unless both mscales are given (arXiv 2309.00071, 3.4)."""
    log = math.log(max(1.0, inner.number("factor")))
    if all(inner.data.get(name) for name in _MSCALES):
        top, bottom = (0.1 * inner.number(name) * log + 1.0 for name in _MSCALES)
        return top / bottom
    return 0.1 * log + 1.0


# --- GGUF ---


def _gguf_fields(file: GgufFile, arch: str, family: _Family) -> dict[str, Any]:
    entries = file.entries

    def field(key: str, default: Any = None) -> Any:
        return _scalar(file, f"{arch}.{key}", default)

    _refuse_gguf(file, arch)
    heads, hidden = field("attention.head_count"), field("embedding_length")
    head_dim = field("attention.key_length")
    if head_dim is None and type(heads) is int and type(hidden) is int and heads > 0:
        head_dim = hidden // heads
    rotary = field("rope.dimension_count", head_dim)
    if head_dim is not None and (rotary, field("attention.value_length", head_dim)) != (head_dim, head_dim):
        raise UnsupportedError(
            f"{file.path.name}: {arch}.rope.dimension_count = {rotary} with heads of {head_dim} is not supported"
        )
    embedding = entries.get("token_embd.weight")
    ends = (_scalar(file, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    biases = {f"attn_{n}.bias" for n in ("q", "k", "v", "output")}
    return {
        "vocab_size": embedding.shape[0] if embedding and embedding.shape else field("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": field("feed_forward_length"),
        "num_hidden_layers": field("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": family.gguf_act,
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": field("context_length"),
        "tie_word_embeddings": "output.weight" not in entries,
        "attention_bias": any(name.split(".", 2)[-1] in biases for name in entries),
        "bos_token_id": _scalar(file, "tokenizer.ggml.bos_token_id"),
        "eos_token_ids": tuple(dict.fromkeys(i for i in ends if i is not None)),
        "dtype": main_dtype(file),
    }


def _scalar(file: GgufFile, key: str, default: Any = None) -> Any:
    """One metadata value; UnsupportedError for a list, which is how GGUF says that layers differ."""
    value = file.metadata.get(key, default)
    if isinstance(value, list | np.ndarray):
        raise UnsupportedError(f"{file.path.name}: {key} is a list of {len(value)} values; one value is supported")
    return value


def main_dtype(file: GgufFile) -> str:
    """The type that most bytes of the file's matrices have."""
    sizes: dict[str, int] = {}
    for entry in file.entries.values():
        if len(entry.shape) > 1:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_bytes
    return max(sizes, key=lambda name: sizes[name], default="fp32")


def _refuse_gguf(file: GgufFile, arch: str) -> None:
    for key in (f"{arch}.expert_count", f"{arch}.attention.sliding_window", "adapter.type"):
        if _scalar(file, key):
            raise UnsupportedError(f"{file.path.name}: {key} = {file.metadata[key]} is not supported")
    if _scalar(file, "split.count", 1) not in (0, 1):
        raise UnsupportedError(f"{file.path.name}: split.count = {file.metadata['split.count']}; merge the parts first")


def _rope_from_gguf(file: GgufFile, fields: _Fields, arch: str) -> tuple[float, RopeScaling | None]:
    prefix = f"{arch}.rope.scaling."
    given = {k.removeprefix(prefix): _scalar(file, k) for k in file.metadata if k.startswith(prefix)}
    rope = _Fields(f"{file.path.name}: {arch}.rope", {"freq_base": _scalar(file, f"{arch}.rope.freq_base", 10000.0)})
    theta = rope.number("freq_base")
    old = _scalar(file, f"{arch}.rope.scale_linear")
    if old is not None:
        given.setdefault("factor", old)
    rope_type = given["type"] if "type" in given else _implied_type(given)
    inner = _Fields(f"{file.path.name}: {prefix[:-1]}", {"rope_type": "default" if rope_type == "none" else rope_type})
    if inner.data["rope_type"] not in ("default", "linear", "yarn"):
        raise inner.unsupported("rope_type", "; supported are none, linear, yarn")
    names = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
    names |= {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    harmless = {"type", "attn_factor", "finetuned"}
    for key in given.keys() - names.keys() - harmless:
        raise UnsupportedError(f"{file.path.name}: {prefix}{key} = {given[key]!r} is not supported")
    inner.data.update({names[k]: v for k, v in given.items() if k in names})
    if "factor" in given and "attn_factor" in given:  # llama.cpp multiplies the usual factor with it
        inner.data["attn_factor"] = given["attn_factor"]
        inner.data["attention_factor"] = _attention_factor(inner) * inner.number("attn_factor")
    scaling = _scaling(fields, inner)
    if "rope_freqs.weight" not in file.entries:
        return theta, scaling
    if scaling is not None:
        raise UnsupportedError(f"{file.path.name}: rope_freqs.weight together with {prefix}type is not supported")
    return theta, _llama3_from_factors(fields, theta, file.load("rope_freqs.weight").reshape(-1))


def _implied_type(given: Mapping[str, Any]) -> str:
    """Where a file names no type, llama.cpp takes linear (`load_hparams`); a factor of 0 or 1 scales nothing there."""
    return "none" if given.get("factor", 1) in (0, 1) else "linear"


def _llama3_from_factors(fields: _Fields, theta: float, factors: np.ndarray) -> RopeScaling | None:
    """The llama3 parameters that gave these divisors of the frequencies, float32 [head_dim / 2]; None when all are 1.

    GGUF keeps Llama 3's scaling as the divisors only. With s the share of the unscaled frequency,
    1/divisor = (1-s)/factor + s, and s = (original/wavelength - low) / (high - low) is linear in 1/wavelength, so two
    divisors strictly between 1 and `factor` give the line; low is taken as 1, as scaling (original, low, high) together
    changes nothing. UnsupportedError when the divisors do not lie on such a curve.
    """
    if np.allclose(factors, 1):
        return None
    refused = UnsupportedError(f"{fields.source}: rope_freqs.weight is not a llama3 scaling")
    factor, head_dim = float(factors.max()), 2 * len(factors)
    inv_wavelength = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim) / (2 * math.pi)
    share = (1 / factors.astype(np.float64) - 1 / factor) / (1 - 1 / factor)
    between = (share > 1e-6) & (share < 1 - 1e-6)
    if head_dim != fields.integer("head_dim") or between.sum() < 2 or not np.isfinite(share).all():
        raise refused
    slope, start = np.polyfit(inv_wavelength[between], share[between], 1)
    high = 1 - 1 / start  # start = -low / (high - low)
    original = slope * (high - 1)
    again = np.clip((original * inv_wavelength - 1) / (high - 1), 0, 1)
    if not (high > 1 and original > 0 and np.allclose(again, share, atol=1e-5)):
        raise refused
    values = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": float(high)}
    return RopeScaling("llama3", {**values, "original_max_position_embeddings": float(original)})
