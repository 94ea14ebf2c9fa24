"""Text to token ids and back, for tokenizer.json files and for vocabularies inside GGUF files.

Knows bytes and ids; not the model, and not how a chat is rendered (it only keeps the template). Encoding is the
`tokenizers` package's. Decoding is ours, by bytes: the text of ids is the UTF-8 text of their tokens' bytes, so that
decoding step by step gives the same as decoding at once.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from cache.errors import ColdstreamError, FormatError, FormatKind, UnsupportedError

if TYPE_CHECKING:
    from runtime.checkpoint import Checkpoint
    from runtime.gguf_file import GgufFile

INFO_FILE = "tokenizer_info.json"
_SPACE = "\u2581"  # how SentencePiece writes a space inside a token


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a text. Only within trusted ones are control tokens recognised."""

    text: str
    trusted: bool = True


class Tokenizer:
    """One tokenizer. Immutable after it is made; encoding and decoding may be called from any thread."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        bos_token: str | None = None,
        eos_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
    ) -> None:
        """Raises UnsupportedError for a decoder that is not byte level and not SentencePiece's."""
        inner.no_truncation()  # a tokenizer.json may carry its training's length limit
        inner.no_padding()
        self._inner = inner
        self._style = _style(inner)
        added = inner.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._plain = _without_control(inner, added)
        self._edges = _Edges.of(token.content for token in added.values() if token.special)
        self.bos_token = bos_token
        self.eos_ids = eos_ids
        self.chat_template = chat_template

    # --- making one ---

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer that came with a checkpoint, directory or GGUF file. Raises as `from_dir` and `from_gguf`."""
        from runtime.checkpoint import GgufCheckpoint

        return (
            cls.from_gguf(checkpoint.file) if isinstance(checkpoint, GgufCheckpoint) else cls.from_dir(checkpoint.path)
        )

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """From a directory with tokenizer.json and either our own tokenizer_info.json or Hugging Face's files.

        Raises FormatError: MISSING_FILE without tokenizer.json, BAD_HEADER when a file cannot be read.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FormatError(FormatKind.MISSING_FILE, f"{file}: the tokenizer is missing")
        try:
            inner = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises bare Exception
            raise FormatError(FormatKind.BAD_HEADER, f"{file}: not a tokenizer that can be read ({error})") from error
        info = _own_info(folder) if (folder / INFO_FILE).is_file() else _hf_info(folder, inner)
        return cls(inner, info.bos_token, info.eos_ids, info.chat_template)

    @classmethod
    def from_gguf(cls, file: GgufFile) -> Tokenizer:
        """Built from the metadata `tokenizer.*` of a GGUF file, models gpt2 and llama (SentencePiece BPE).

        Raises UnsupportedError naming the model or pre-tokenizer that is not known, FormatError(BAD_HEADER) when the
        vocabulary makes no sense, FormatError(MISSING_FILE) when the file carries none.
        """
        vocab = _GgufVocab.read(file)
        build = {"gpt2": _build_gpt2, "llama": _build_llama}.get(vocab.model)
        if build is None:
            raise UnsupportedError(f"{file.path.name}: tokenizer.ggml.model = {vocab.model!r} is not supported")
        try:
            inner = build(vocab)
        except ColdstreamError:
            raise
        except Exception as error:  # the package raises bare Exception
            raise vocab.bad(f"a tokenizer cannot be built from it ({error})") from error
        inner.add_tokens(_added_tokens(vocab))
        inner.post_processor = _post_processor(vocab)
        ends = [i for name in ("eos", "eot", "eom") if (i := vocab.token_id(name)) is not None]
        return cls(inner, vocab.token("bos"), tuple(dict.fromkeys(ends)), vocab.chat_template)

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_info.json into the directory, which must exist; `from_dir` reads them."""
        folder = Path(path)
        self.save_json(folder / "tokenizer.json")
        info = {
            "version": 1,
            "bos_token": self.bos_token,
            "bos_id": self.bos_id,
            "eos_token": self.eos_token,
            "eos_ids": list(self.eos_ids),
            "add_bos": self.add_bos,
            "chat_template": self.chat_template,
        }
        (folder / INFO_FILE).write_text(json.dumps(info, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def save_json(self, path: Path) -> None:
        """Writes the file that the `tokenizers` package reads, without what lies beside it."""
        self._inner.save(str(path), pretty=False)

    # --- what it knows ---

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included. The model's embedding may have more rows (padding) than that."""
        return self._inner.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int | None:
        return None if self.bos_token is None else self._inner.token_to_id(self.bos_token)

    @property
    def eos_token(self) -> str | None:
        """The first end token's text."""
        return self._inner.id_to_token(self.eos_ids[0]) if self.eos_ids else None

    @property
    def add_bos(self) -> bool:
        """Whether `encode(..., add_special=True)` begins with the begin token."""
        return self.bos_id is not None and self.bos_id in self._inner.encode("").ids[:1]

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens: not shown by `decode` unless asked for."""
        return self._special_ids

    def token_id(self, token: str) -> int | None:
        """The id of a token written as in the vocabulary, None when there is none."""
        return self._inner.token_to_id(token)

    # --- text to ids and back ---

    def encode(self, text: str, add_special: bool = True, allow_special: bool = True) -> list[int]:
        """Token ids of the text; `add_special` adds what the model's own tokenizer adds (usually a begin token).

        Control tokens written in the text are recognised if `allow_special`, else they are text like any other. Lone
        surrogates become U+FFFD.
        """
        inner = self._inner if allow_special else self._plain
        return list(inner.encode(_sound(text), add_special_tokens=add_special).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added, by all cores at once."""
        found = self._inner.encode_batch([_sound(text) for text in texts], add_special_tokens=False)
        return [list(encoding.ids) for encoding in found]

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """Token ids of the parts' joined text, in which control tokens are recognised within trusted parts alone.

        As long as no other part holds (a piece of) one, that is `encode` of the joined text; else the text between the
        trusted control tokens is encoded without any, as `encode` does with text between control tokens. Nothing added.
        """
        parts = [Part(_sound(part.text), part.trusted) for part in parts]
        whole = self._inner.encode("".join(part.text for part in parts), add_special_tokens=False)
        found = [span for _, span in self._control_tokens(whole, "".join(part.text for part in parts))]
        if all(any(a <= start and end <= b for a, b in _trusted(parts)) for start, end in found):
            return list(whole.ids)
        out: list[int] = []
        text = ""
        for part in parts:
            done = 0
            for token_id, (start, end) in self._control_tokens_of(part):
                out += [*self._text_ids(text + part.text[done:start]), token_id]
                text, done = "", end
            text += part.text[done:]
        return out + self._text_ids(text)

    def untrusted_spans(self, text: str) -> list[tuple[int, int]]:
        """Where the text holds a control token, or at its edges a piece that a neighbour could complete to one: [start,
        end) in characters, ascending, apart. Empty for nearly every text."""
        text = _sound(text)
        spans = [span for _, span in self._control_tokens(self._inner.encode(text, add_special_tokens=False), text)]
        ahead, behind = self._edges.begins(text), self._edges.ends(text)
        return _merged(
            [*spans, *([(0, ahead)] if ahead else []), *([(len(text) - behind, len(text))] if behind else [])]
        )

    def _control_tokens_of(self, part: Part) -> list[tuple[int, tuple[int, int]]]:
        if not part.trusted:
            return []
        return self._control_tokens(self._inner.encode(part.text, add_special_tokens=False), part.text)

    def _control_tokens(self, encoding: tokenizers.Encoding, text: str) -> list[tuple[int, tuple[int, int]]]:
        """(id, [start, end) in the text) of the control tokens found, without the blanks that some take along."""
        out = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._special_ids:
                bare = text[start:end].strip()
                start += text[start:end].find(bare)
                out.append((token_id, (start, start + len(bare))))
        return out

    def _text_ids(self, text: str) -> list[int]:
        return self.encode(text, add_special=False, allow_special=False) if text else []

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; of a control token its name; empty for an id outside the vocabulary."""
        token = self._inner.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        return _byte_level(token) if self._style.byte_level else _sentencepiece(token)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD. No spaces are tidied up."""
        raw = b"".join(self.token_bytes(i) for i in ids if not (skip_special and i in self._special_ids))
        return self._strip(raw).decode("utf-8", "replace")

    def _strip(self, raw: bytes) -> bytes:
        return raw[1:] if self._style.strip_space and raw.startswith(b" ") else raw


class IncrementalDecoder:
    """Decodes ids as they come: all pushes and the flush together are `decode` of all ids.

    Never gives half a character: bytes wait until they are one, or certainly none (then U+FFFD). `continuing` says that
    the text goes on from a prompt, so that a SentencePiece tokenizer's leading space is kept.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, continuing: bool = False) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._at_start = not continuing
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps empty."""
        if self._skip_special and token_id in self._tokenizer.special_ids:
            return ""
        raw = self._tokenizer.token_bytes(token_id)
        if self._at_start and raw:
            raw, self._at_start = self._tokenizer._strip(raw), False
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """What is left: U+FFFD for a character that never became whole. The decoder is at its start again."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


# --- Control tokens in a text ---


def _sound(text: str) -> str:
    """The text; half a surrogate pair, which JSON may carry, as U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _without_control(inner: tokenizers.Tokenizer, added: Mapping[int, AddedToken]) -> tokenizers.Tokenizer:
    """The same tokenizer, blind to control tokens written in a text. The vocabulary is shared; added tokens get the ids
    they have, since the package counts on from the vocabulary in their order here as when it reads a file."""
    plain = tokenizers.Tokenizer(inner.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(inner, name) is not None:
            setattr(plain, name, getattr(inner, name))
    plain.add_tokens([added[i] for i in sorted(added)])
    plain.encode_special_tokens = True
    return plain


@dataclass(frozen=True, slots=True)
class _Edges:
    """Proper beginnings and ends of control tokens: what two texts set side by side could make one of."""

    heads: frozenset[str]
    tails: frozenset[str]
    longest: int

    @classmethod
    def of(cls, tokens: Iterable[str]) -> _Edges:
        texts = list(tokens)
        heads = frozenset(text[:i] for text in texts for i in range(1, len(text)))
        tails = frozenset(text[i:] for text in texts for i in range(1, len(text)))
        return cls(heads, tails, max(map(len, texts), default=0))

    def begins(self, text: str) -> int:
        """Length of the longest beginning of `text` that ends a control token."""
        return next((n for n in range(min(self.longest, len(text)), 0, -1) if text[:n] in self.tails), 0)

    def ends(self, text: str) -> int:
        """Length of the longest end of `text` that begins a control token."""
        return next((n for n in range(min(self.longest, len(text)), 0, -1) if text[len(text) - n :] in self.heads), 0)


def _trusted(parts: Iterable[Part]) -> list[tuple[int, int]]:
    """[start, end) of the trusted parts in the joined text."""
    out, at = [], 0
    for part in parts:
        if part.trusted:
            out.append((at, at + len(part.text)))
        at += len(part.text)
    return out


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The union of spans, ascending and apart."""
    out: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if out and start <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((start, end))
    return out


# --- Bytes of a token ---


@dataclass(frozen=True, slots=True)
class _Style:
    """How tokens spell bytes: GPT-2's byte alphabet, or SentencePiece's ▁ and <0xNN>."""

    byte_level: bool
    strip_space: bool = False  # one leading space of the text belongs to the encoding, not to the text


def _style(inner: tokenizers.Tokenizer) -> _Style:
    if inner.decoder is None:
        raise UnsupportedError(
            "tokenizer.json: decoder = None is not supported; supported are ByteLevel and SentencePiece's"
        )
    state = json.loads(cast(bytes, inner.decoder.__getstate__()))
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return _Style(byte_level=True)
    if kinds == ["Metaspace"] and steps[0]["replacement"] == _SPACE:
        return _Style(byte_level=False, strip_space=steps[0].get("prepend_scheme", "always") != "never")
    spaced = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "} in steps
    strips = [step for step in steps if step["type"] == "Strip"]
    sound = all(s == {"type": "Strip", "content": " ", "start": 1, "stop": 0} for s in strips) and len(strips) < 2
    if spaced and sound and "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        return _Style(byte_level=False, strip_space=bool(strips))
    raise UnsupportedError(
        f"tokenizer.json: decoder = {'+'.join(kinds)} is not supported; supported are ByteLevel and SentencePiece's"
    )


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other 68 bytes for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def _byte_level(token: str) -> bytes:
    alphabet = _byte_alphabet()
    if all(c in alphabet for c in token):
        return bytes(alphabet[c] for c in token)
    return token.encode("utf-8", "replace")  # an added token is written as it is


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(_SPACE, " ").encode("utf-8", "replace")


# --- Files beside tokenizer.json ---


@dataclass(frozen=True, slots=True)
class _Info:
    bos_token: str | None
    eos_ids: tuple[int, ...]
    chat_template: str | None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(FormatKind.BAD_HEADER, f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise FormatError(FormatKind.BAD_HEADER, f"{path}: not a JSON object")
    return data


def _own_info(folder: Path) -> _Info:
    path = folder / INFO_FILE
    data = _read_json(path)
    if data.get("version") != 1:
        raise FormatError(FormatKind.BAD_VERSION, f"{path}: version {data.get('version')!r} is not read, only 1")
    bos, ends, template = data.get("bos_token"), data.get("eos_ids"), data.get("chat_template")
    texts = all(value is None or isinstance(value, str) for value in (bos, template))
    if not texts or not isinstance(ends, list) or not all(type(i) is int for i in ends):
        raise FormatError(FormatKind.BAD_HEADER, f"{path}: bos_token, eos_ids or chat_template is of the wrong kind")
    return _Info(bos, tuple(ends), template)


def _hf_info(folder: Path, inner: tokenizers.Tokenizer) -> _Info:
    """From tokenizer_config.json, special_tokens_map.json (older models) and chat_template.jinja, where they exist."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= {k: v for k, v in _read_json(folder / name).items() if v is not None}
    bos, eos = (_token_text(folder, config, name) for name in ("bos_token", "eos_token"))
    eos_id = None if eos is None else inner.token_to_id(eos)
    return _Info(bos, () if eos_id is None else (eos_id,), _chat_template(folder, config))


def _token_text(folder: Path, config: dict[str, Any], name: str) -> str | None:
    value = config.get(name)
    text = value.get("content") if isinstance(value, dict) else value  # older files describe the token as an object
    if text is not None and not isinstance(text, str):
        raise FormatError(FormatKind.BAD_HEADER, f"{folder / 'tokenizer_config.json'}: {name} is not a token")
    return text


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FormatError(FormatKind.BAD_HEADER, f"{file}: not a text file ({error})") from error
    value = config.get("chat_template")
    if isinstance(value, list):  # several, by name
        value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}.get("default")
    if value is not None and not isinstance(value, str):
        raise FormatError(FormatKind.BAD_HEADER, f"{folder / 'tokenizer_config.json'}: chat_template is not a template")
    return value


# --- GGUF ---

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type
_SPECIAL = (_UNKNOWN, _CONTROL)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _SPACES
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True)
class _GgufVocab:
    """The metadata `tokenizer.*`, checked."""

    source: str
    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    chat_template: str | None
    metadata: dict[str, Any]

    @classmethod
    def read(cls, file: GgufFile) -> _GgufVocab:
        meta, source = file.metadata, file.path.name
        tokens = meta.get("tokenizer.ggml.tokens")
        if tokens is None:
            raise FormatError(FormatKind.MISSING_FILE, f"{source}: the file carries no tokenizer")
        merges = meta.get("tokenizer.ggml.merges", [])
        if not _are_texts(tokens) or not _are_texts(merges):
            raise FormatError(
                FormatKind.BAD_HEADER, f"{source}: tokenizer.ggml: tokens or merges are not lists of strings"
            )
        num = len(tokens)
        template = meta.get("tokenizer.chat_template")
        vocab = cls(
            source=source,
            model=str(meta.get("tokenizer.ggml.model")),
            pre=str(meta.get("tokenizer.ggml.pre", "default")),
            tokens=tokens,
            kinds=[int(k) for k in _numbers(meta, source, "token_type", np.ones(num))],
            merges=merges,
            scores=_numbers(meta, source, "scores", np.zeros(num)),
            chat_template=template if isinstance(template, str) else None,
            metadata=meta,
        )
        vocab._check()
        return vocab

    def _check(self) -> None:
        if len(set(self.tokens)) != len(self.tokens):
            raise self.bad("a token occurs twice")
        if not len(self.tokens) == len(self.kinds) == len(self.scores):
            raise self.bad("tokens, token types and scores differ in number")
        for name in ("bos", "eos", "eot", "eom", "unknown"):
            self.token_id(name)

    def bad(self, what: str) -> FormatError:
        return FormatError(FormatKind.BAD_HEADER, f"{self.source}: tokenizer.ggml: {what}")

    def token_id(self, name: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < len(self.tokens)):
            raise self.bad(f"{name}_token_id = {value!r} is not in the vocabulary")
        return value

    def token(self, name: str) -> str | None:
        token_id = self.token_id(name)
        return None if token_id is None else self.tokens[token_id]

    def flag(self, name: str, default: bool) -> bool:
        value = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise self.bad(f"{name} must be true or false")
        return value


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _numbers(meta: dict[str, Any], source: str, name: str, default: np.ndarray) -> list[float]:
    value = meta.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, np.ndarray) or not np.isfinite(value).all():
        raise FormatError(FormatKind.BAD_HEADER, f"{source}: tokenizer.ggml.{name} is not a list of numbers")
    return [float(number) for number in value]


def _adds(vocab: _GgufVocab) -> tuple[bool, bool]:
    """(begin, end): whether they are added. Where the file does not say, the defaults are llama.cpp's."""
    begins = vocab.model == "llama" or _PRE_TOKENIZERS.get(vocab.pre) is _pre_llama3
    return vocab.flag("add_bos_token", begins), vocab.flag("add_eos_token", False)


def _post_processor(vocab: _GgufVocab) -> processors.PostProcessor:
    begin, end = _adds(vocab)
    bos, eos = vocab.token_id("bos") if begin else None, vocab.token_id("eos") if end else None
    special = [(vocab.tokens[i], i) for i in (bos, eos) if i is not None]
    parts = [*([] if bos is None else [vocab.tokens[bos]]), "$A", *([] if eos is None else [vocab.tokens[eos]])]
    return processors.TemplateProcessing(
        single=parts, pair=[*parts, "$B:1"], special_tokens=list(dict.fromkeys(special))
    )


def _pre_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _pre_digits() -> pre_tokenizers.PreTokenizer:
    """Every digit alone, then GPT-2's pattern."""
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _pre_gpt2()])


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _pre_llama3() -> pre_tokenizers.PreTokenizer:
    return _split(_LLAMA3)


def _pre_qwen2() -> pre_tokenizers.PreTokenizer:
    return _split(_QWEN2)


# tokenizer.ggml.pre, as llama.cpp's llama-vocab.cpp groups them
_PRE_TOKENIZERS = {
    **dict.fromkeys(("default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"), _pre_gpt2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _pre_digits),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _pre_llama3),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), _pre_qwen2),
}


def _build_gpt2(vocab: _GgufVocab) -> tokenizers.Tokenizer:
    make_pre = _PRE_TOKENIZERS.get(vocab.pre)
    if make_pre is None:
        raise UnsupportedError(
            f"{vocab.source}: tokenizer.ggml.pre = {vocab.pre!r} is not supported; "
            f"supported are {', '.join(_PRE_TOKENIZERS)}"
        )
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    ignore_merges = make_pre is _pre_llama3
    inner = tokenizers.Tokenizer(models.BPE(ids, [_merge(vocab, m) for m in vocab.merges], ignore_merges=ignore_merges))
    inner.normalizer = normalizers.NFC() if make_pre is _pre_qwen2 else None
    inner.pre_tokenizer = make_pre()
    inner.decoder = decoders.ByteLevel()
    return inner


def _merge(vocab: _GgufVocab, text: str) -> tuple[str, str]:
    left, space, right = text.partition(" ")
    if not (left and space and right):
        raise vocab.bad(f"the merge {text[:40]!r} is not two tokens")
    return left, right


def _build_llama(vocab: _GgufVocab) -> tokenizers.Tokenizer:
    """SentencePiece BPE with byte fallback, as a merge list: the merge of highest score comes first."""
    for name in ("remove_extra_whitespaces", "precompiled_charsmap"):
        value = vocab.metadata.get(f"tokenizer.ggml.{name}")
        if value is not None and np.size(value) and np.any(value):
            raise UnsupportedError(f"{vocab.source}: tokenizer.ggml.{name} is not supported")
    ids = {token: i for i, token in enumerate(vocab.tokens)}
    merges = [_merge(vocab, m) for m in vocab.merges] or _merges_from_scores(vocab, ids)
    model = models.BPE(ids, merges, unk_token=vocab.token("unknown"), fuse_unk=True, byte_fallback=True)
    inner = tokenizers.Tokenizer(model)
    prefix = vocab.flag("add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return inner


def _merges_from_scores(vocab: _GgufVocab, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, by falling score of the token made, then by the ids of the parts."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, score, kind in zip(vocab.tokens, vocab.scores, vocab.kinds, strict=True):
        if kind in (*_SPECIAL, _USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-score, left, right, token[:cut], token[cut:]))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _added_tokens(vocab: _GgufVocab) -> list[AddedToken]:
    """The tokens that are found in a text before anything else looks at it. Only control tokens are special."""
    return [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(vocab.tokens, vocab.kinds, strict=True)
        if kind in (*_SPECIAL, _USER_DEFINED)
    ]
