"""A model as its author published it: safetensors (one file or sharded) or GGUF, under Hugging Face's tensor names.

Opening reads headers only; a tensor is read when it is asked for, and its pages are dropped from the page cache
again. Knows files and names; not what the runtime does with a tensor.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from cache.errors import FormatError, FormatKind, UnsupportedError
from runtime.config import ModelConfig
from runtime.gguf_file import MAGIC, GgufFile, check_type, open_gguf
from runtime.open_file import open_file
from runtime.safetensors_file import SafetensorsFile, open_safetensors
from runtime.tensor_entry import PLAIN_DTYPES, TensorEntry, read_into

_EDGE_BYTES = 64 << 10  # of each end of a file, in its fingerprint
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4 << 10  # and between: models differ in the middle when their embeddings were frozen
_SMALL_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True, slots=True)
class FileFingerprint:
    """Identity of one file, cheap to take: sha256 over its size, its header, its first and last 64 KiB and 64 samples.

    `mtime_ns` is kept for people; `matches` does not compare it, as copying a checkpoint changes it.
    """

    name: str
    size: int
    sha256: str
    mtime_ns: int

    def matches(self, other: FileFingerprint) -> bool:
        """Whether both are of the same content, as far as the fingerprint sees."""
        return (self.name, self.size, self.sha256) == (other.name, other.size, other.sha256)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> FileFingerprint:
        """Reads what `to_json` wrote. FormatError(BAD_HEADER) when it is something else."""
        try:
            return cls(str(data["name"]), int(data["size"]), str(data["sha256"]), int(data["mtime_ns"]))
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                FormatKind.BAD_HEADER, f"manifest.json: a fingerprint cannot be read ({error})"
            ) from error


class Checkpoint(Protocol):
    """What `open_checkpoint` gives. Names are Hugging Face's, e.g. model.layers.0.mlp.gate_proj.weight."""

    @property
    def path(self) -> Path:
        """The directory, or the GGUF file."""

    @property
    def kind(self) -> str:
        """safetensors or gguf."""

    @property
    def config(self) -> ModelConfig: ...

    def names(self) -> list[str]:
        """All tensors, in the order of the files."""

    def shape(self, name: str) -> tuple[int, ...]:
        """In Hugging Face's orientation. FormatError(MISSING_TENSOR) for an unknown name, as below."""

    def num_bytes(self, name: str) -> int:
        """Bytes in the file."""

    def dtype(self, name: str) -> str:
        """bf16, fp16, fp32, or a quantised GGUF type's name in lower case."""

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor's bytes are."""

    def load(self, name: str) -> torch.Tensor:
        """The tensor: bf16, fp16, fp32 as stored, quantised types as float32. Owned by the caller."""

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor by name, one at a time: only the one just given is in memory."""

    def fingerprint(self) -> list[FileFingerprint]:
        """Of every file that decides what the tensors are. Reads a few hundred KiB."""

    def tokenizer_files(self) -> list[Path]:
        """The files that the tokenizer is made from, those that exist."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a Hugging Face directory, a GGUF file or a hub id; headers only.

    A hub id ("owner/name") is used when no such path exists; it is downloaded into Hugging Face's cache, or taken from
    there. Raises FormatError or UnsupportedError with one sentence naming file and field.
    """
    local = Path(path)
    if local.is_dir():
        return SafetensorsCheckpoint(local)
    if local.is_file():
        return _open_file(local)
    if _HUB_ID.fullmatch(str(path)):
        return SafetensorsCheckpoint(download(str(path)))
    raise FormatError(FormatKind.MISSING_FILE, f"{path}: there is no such file or directory")


def _open_file(path: Path) -> Checkpoint:
    with open_file(path) as file:
        magic = file.read(len(MAGIC))
    if magic == MAGIC:
        return GgufCheckpoint(path)
    if path.suffix == ".safetensors":
        raise UnsupportedError(f"{path}: give the directory that holds it, a model needs its config.json too")
    raise FormatError(FormatKind.BAD_MAGIC, f"{path}: neither a GGUF file nor a model directory")


def download(repo_id: str) -> Path:
    """The hub repository's snapshot in the local cache: what a load needs, and no weights of a model we do not run."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        small = Path(snapshot_download(repo_id, allow_patterns=["config.json", _INDEX, *_SMALL_FILES]))
        ModelConfig.from_hf(_read_json(small / "config.json"))  # refuses before gigabytes are fetched
        return Path(snapshot_download(repo_id, allow_patterns=["model.safetensors", "model-*-of-*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        raise FormatError(
            FormatKind.MISSING_FILE,
            f"{repo_id}: there is no such path, and the model could not be fetched from the hub ({_first_line(error)})",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_TABLES = {"embedding_dtype": "model.embed_tokens.weight", "head_dtype": "lm_head.weight"}


class _Tensors:
    """What both kinds share: entries by Hugging Face name."""

    def __init__(self, path: Path, config: ModelConfig, entries: dict[str, TensorEntry]) -> None:
        stored = {f: entries[n].dtype if n in entries else None for f, n in _TABLES.items()}
        self.path, self.config, self._entries = path, replace(config, **stored), entries  # type: ignore[arg-type]

    def names(self) -> list[str]:
        return list(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Where the tensor's bytes are. FormatError(MISSING_TENSOR) when the checkpoint has none of that name."""
        if name not in self._entries:
            raise FormatError(FormatKind.MISSING_TENSOR, f"{self.path}: the tensor {name} is missing")
        return self._entries[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def num_bytes(self, name: str) -> int:
        return self.entry(name).num_bytes

    def dtype(self, name: str) -> str:
        return self.entry(name).dtype

    def load(self, name: str) -> torch.Tensor:
        entry = self.entry(name)
        _check_float(entry)
        return _read_float(entry)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name in self._entries:
            yield name, self.load(name)


class SafetensorsCheckpoint(_Tensors):
    """A Hugging Face directory: config.json and model.safetensors, or an index and its shards."""

    kind = "safetensors"

    def __init__(self, path: Path) -> None:
        """Raises FormatError (MISSING_FILE, MISSING_TENSOR, TRUNCATED, BAD_HEADER), UnsupportedError."""
        config = _read_config(path)
        self._files, entries = _open_files(path)
        super().__init__(path, replace(config, dtype=_main_dtype(entries, config.dtype)), entries)

    def fingerprint(self) -> list[FileFingerprint]:
        small = [p for name in ("config.json", "generation_config.json", _INDEX) if (p := self.path / name).is_file()]
        shards = [_fingerprint(file.path, file.header_bytes) for file in self._files]
        return [_fingerprint(path, 0) for path in small] + shards

    def tokenizer_files(self) -> list[Path]:
        return [p for name in _SMALL_FILES[1:] if (p := self.path / name).is_file()]


class ResidentFile(_Tensors):
    """One safetensors file of a model whose configuration is known: what a packed model keeps of a checkpoint."""

    def __init__(self, path: Path, config: ModelConfig) -> None:
        """Raises FormatError (MISSING_FILE, TRUNCATED, BAD_HEADER)."""
        super().__init__(path, config, open_safetensors(path).entries)


class GgufCheckpoint(_Tensors):
    """A GGUF file of one of the supported architectures. `file` is its header, for the tokenizer."""

    kind = "gguf"

    def __init__(self, path: Path) -> None:
        """Raises FormatError (MISSING_FILE, BAD_MAGIC, BAD_VERSION, TRUNCATED, BAD_HEADER), UnsupportedError."""
        self.file: GgufFile = open_gguf(path)
        named = {_hf_name(name): entry for name, entry in self.file.entries.items() if name != "rope_freqs.weight"}
        super().__init__(path, ModelConfig.from_gguf(self.file), named)

    def load(self, name: str) -> torch.Tensor:
        entry = self.entry(name)
        plain = entry.dtype in PLAIN_DTYPES
        tensor = _read_float(entry) if plain else torch.from_numpy(self.file.load(entry.name))
        heads = self._rotary_heads(name)
        return unpermute(tensor, heads) if heads else tensor

    def _rotary_heads(self, name: str) -> int:
        if ".self_attn.q_proj." in name:
            return self.config.num_attention_heads
        return self.config.num_key_value_heads if ".self_attn.k_proj." in name else 0

    def fingerprint(self) -> list[FileFingerprint]:
        return [_fingerprint(self.path, self.file.header_bytes)]

    def tokenizer_files(self) -> list[Path]:
        return [self.path]


def _read_float(entry: TensorEntry) -> torch.Tensor:
    tensor = torch.empty(entry.shape, dtype=PLAIN_DTYPES[entry.dtype])
    read_into(entry.path, entry.offset, tensor.view(-1).view(torch.uint8).numpy())
    return tensor


def unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a q or k projection from GGUF's order (pairs 2i, 2i+1 rotate) to Hugging Face's (i, i + head_dim/2).

    tensor [heads * head_dim, ...]; undoes `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py.
    """
    rest = tensor.shape[1:]
    return tensor.reshape(heads, -1, 2, *rest).transpose(1, 2).reshape(tensor.shape).contiguous()


# --- Names ---

_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_NAME = re.compile(r"(?:blk\.(0|[1-9]\d*)\.)?(\w+)\.(weight|bias)")


def _hf_name(name: str) -> str:
    """GGUF's name of a tensor as Hugging Face's; one that is unknown stays, for `check_tensors` to refuse."""
    match = _GGUF_NAME.fullmatch(name)
    if match is None:
        return name
    layer, stem, suffix = match.groups()
    if layer is None:
        return f"{_GGUF_TOP[stem]}.{suffix}" if stem in _GGUF_TOP else name
    return f"model.layers.{layer}.{_GGUF_LAYER[stem]}.{suffix}" if stem in _GGUF_LAYER else name


def expected_tensors(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a model of this configuration has, in the order of the layers."""
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    yield "model.embed_tokens.weight", (c.vocab_size, c.hidden_size)
    attention = {"q_proj": (q, c.hidden_size), "k_proj": (kv, c.hidden_size), "v_proj": (kv, c.hidden_size)}
    attention["o_proj"] = (c.hidden_size, q)
    ffn = {"gate_proj": (c.intermediate_size, c.hidden_size)} if c.gated else {}
    ffn |= {"up_proj": (c.intermediate_size, c.hidden_size), "down_proj": (c.hidden_size, c.intermediate_size)}
    for layer in range(c.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (c.hidden_size,)
        for name, shape in attention.items():
            yield f"{prefix}self_attn.{name}.weight", shape
            if c.attention_bias:
                yield f"{prefix}self_attn.{name}.bias", shape[:1]
        yield prefix + "post_attention_layernorm.weight", (c.hidden_size,)
        for name, shape in ffn.items():
            yield f"{prefix}mlp.{name}.weight", shape
    yield "model.norm.weight", (c.hidden_size,)
    if not c.tie_word_embeddings:
        yield "lm_head.weight", (c.vocab_size, c.hidden_size)


def check_tensors(checkpoint: Checkpoint) -> None:
    """Compares the headers with the configuration; reads no tensor.

    Raises FormatError (MISSING_TENSOR, BAD_SHAPE) for the first tensor that is missing or has another shape,
    UnsupportedError for one whose type cannot be loaded, or that the model would have to compute with and does not.
    """
    names, expected = set(checkpoint.names()), set()
    for name, shape in expected_tensors(checkpoint.config):
        if name not in names:
            raise FormatError(FormatKind.MISSING_TENSOR, f"{checkpoint.path}: the tensor {name} is missing")
        if checkpoint.shape(name) != shape:
            found = list(checkpoint.shape(name))
            raise FormatError(
                FormatKind.BAD_SHAPE,
                f"{checkpoint.path}: {name} has the shape {found}, the configuration says {list(shape)}",
            )
        _check_loadable(checkpoint, name)
        expected.add(name)
    for name in checkpoint.names():
        if name not in expected and not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
            raise UnsupportedError(
                f"{checkpoint.path}: the tensor {name} is not part of a {checkpoint.config.model_type} model"
            )


def _check_loadable(checkpoint: Checkpoint, name: str) -> None:
    if isinstance(checkpoint, GgufCheckpoint):
        check_type(checkpoint.entry(name))
    elif isinstance(checkpoint, SafetensorsCheckpoint):
        _check_float(checkpoint.entry(name))


def _check_float(entry: TensorEntry) -> None:
    if entry.dtype not in PLAIN_DTYPES:
        raise UnsupportedError(f"{entry.path}: {entry.name} has the dtype {entry.dtype}; bf16, fp16 and fp32 are read")


# --- Files ---


def _read_config(path: Path) -> ModelConfig:
    """config.json, with the end tokens of generation_config.json added: chat models name theirs only there."""
    config = ModelConfig.from_hf(_read_json(path / "config.json"))
    generation = path / "generation_config.json"
    if not generation.is_file():
        return config
    ends = _read_json(generation).get("eos_token_id")
    more = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(i) is int and i >= 0 for i in more):
        raise FormatError(FormatKind.BAD_HEADER, f"{generation}: eos_token_id must be a token id or a list of them")
    return replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise FormatError(FormatKind.MISSING_FILE, f"{path}: cannot be opened ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(FormatKind.BAD_HEADER, f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise FormatError(FormatKind.BAD_HEADER, f"{path}: not a JSON object")
    return data


def _open_files(path: Path) -> tuple[list[SafetensorsFile], dict[str, TensorEntry]]:
    if (path / _INDEX).is_file():
        return _open_shards(path)
    if not (path / "model.safetensors").is_file():
        raise FormatError(FormatKind.MISSING_FILE, f"{path}: there is neither a model.safetensors nor a {_INDEX} in it")
    file = open_safetensors(path / "model.safetensors")
    return [file], file.entries


def _open_shards(path: Path) -> tuple[list[SafetensorsFile], dict[str, TensorEntry]]:
    weight_map = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise FormatError(FormatKind.BAD_HEADER, f"{path / _INDEX}: weight_map does not map tensors to files beside it")
    files = {name: open_safetensors(path / name) for name in dict.fromkeys(weight_map.values())}
    for tensor, name in weight_map.items():
        if tensor not in files[name].entries:
            raise FormatError(
                FormatKind.MISSING_TENSOR, f"{path / name}: the tensor {tensor}, named by the index, is missing"
            )
    return list(files.values()), {tensor: files[name].entries[tensor] for tensor, name in weight_map.items()}


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _main_dtype(entries: dict[str, TensorEntry], default: str) -> str:
    sizes: dict[str, int] = {}
    for entry in entries.values():
        if len(entry.shape) > 1:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_bytes
    return max(sizes, key=lambda name: sizes[name], default=default)


def _fingerprint(path: Path, header_bytes: int) -> FileFingerprint:
    with open_file(path) as file:
        stat = path.stat()
        digest = hashlib.sha256(stat.st_size.to_bytes(8, "little"))
        digest.update(file.read(max(header_bytes, _EDGE_BYTES)))
        for i in range(1, _NUM_SAMPLES + 1):
            file.seek(stat.st_size * i // (_NUM_SAMPLES + 1))
            digest.update(file.read(_SAMPLE_BYTES))
        file.seek(max(0, stat.st_size - _EDGE_BYTES))
        digest.update(file.read(_EDGE_BYTES))
    return FileFingerprint(path.name, stat.st_size, digest.hexdigest(), stat.st_mtime_ns)
