"""Text that ships in packages, made into token files: Debian documentation packages and this environment's own docs.

    python benchmarks/relu2_wins/build_data.py --debs /tmp/debs --out benchmarks/relu2_wins/data

Writes tokenizer.json (a byte-level BPE learnt here), train.u16.xz, calibration.u16, heldout.u16 (uint16 tokens,
documents ended by token 0) and sources.json: every source with version, licence and characters kept. The three texts
share no document, and no paragraph occurs twice. Debian packages are fetched with `apt-get download` into --debs,
unless they lie there; nothing is installed. Of what is written here only sources.json is meant to be committed.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import html
import importlib.metadata
import json
import lzma
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGES = (  # noqa: SIM905
    "apache2-doc cppreference-doc-en-html debian-policy debian-reference-en developers-reference erlang-doc "
    "exim4-doc-html fp-docs-3.2.2 gap-doc ghc-doc git-doc libboost1.81-doc libglib2.0-doc libgtk-3-doc "
    "libreoffice-help-en-us lilypond-doc-html linux-doc-6.1 llvm-14-doc maxima-doc octave-doc openjdk-17-doc perl-doc "
    "postgresql-doc-15 python3.11-doc python-django-doc python-pandas-doc python-sqlalchemy-doc python-sympy-doc "
    "qtbase5-doc-html qtdeclarative5-doc-html r-doc-html racket-doc singular-doc sqlite3-doc swi-prolog-doc vim-doc "
    "wx3.2-doc zsh-doc"
).split()
END = "<eos>"  # token 0
MIN_DOCUMENT, MAX_DOCUMENT, MAX_FILE = 400, 200_000, 4_000_000  # characters, characters, bytes
SHORT, SHORT_COPIES = 30, 20  # paragraphs under SHORT characters (headings) may occur SHORT_COPIES times
HELDOUT_SHARE = 0.012  # of the documents, each for calibration and for held-out figures


@dataclass(frozen=True)
class Source:
    """Where documents come from; texts are (path, text)."""

    name: str
    version: str
    licence: str
    texts: list[tuple[str, str]] = field(repr=False)


# --- Text of one file ---

_DROP = re.compile(r"<(script|style|head|nav|svg|footer)\b.*?</\1>|<!--.*?-->", re.S | re.I)
_PRE = re.compile(r"<pre\b[^>]*>(.*?)</pre>", re.S | re.I)
_BLOCK = re.compile(r"</?(?:p|div|h[1-6]|li|ul|ol|dl|dt|dd|table|tr|section|article|blockquote|hr|br)\b[^>]*>", re.I)
_TAG = re.compile(r"<[^>]{0,2000}>")
_POD = re.compile(r"^=\w+ ?(.*)$", re.M)
_POD_CODE = re.compile(r"[A-Z]<<? ?([^<>]*?) ?>?>")
_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".pod")


def html_text(page: str) -> str:
    """Visible text, paragraphs parted by an empty line; <pre> keeps its line ends."""
    page = _DROP.sub(" ", page)
    kept: list[str] = []

    def keep(match: re.Match[str]) -> str:
        kept.append(_TAG.sub("", match[1]).strip("\n"))
        return f"\n\n\0{len(kept) - 1}\0\n\n"

    page = _BLOCK.sub("\n\n", _PRE.sub(keep, page))
    blocks = (" ".join(b.split()) for b in _TAG.sub("", page).split("\n\n"))
    joined = "\n\n".join(b for b in blocks if b)
    return html.unescape(re.sub(r"\0(\d+)\0", lambda m: kept[int(m[1])], joined))


def pod_text(source: str) -> str:
    return _POD_CODE.sub(r"\1", _POD.sub(r"\1", source))


def docstrings(source: str) -> str:
    """The docstrings of a module, in order."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(d for d in found if d and len(d) > 60)


def read_text(path: Path) -> str:
    """A documentation file's text by its suffix; empty for what is none."""
    name = path.name.removesuffix(".gz")
    if not name.endswith((".html", ".htm", *_TEXT_SUFFIXES)) or name.startswith(("changelog", "NEWS", "genindex")):
        return ""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE:
        return ""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8", errors="ignore")
    if name.endswith((".html", ".htm")):
        return html_text(text)
    return pod_text(text) if name.endswith(".pod") else text


# --- Sources ---


def fetch(packages: Iterable[str], debs: Path) -> list[Path]:
    """The .deb of every package, downloaded where it is missing."""
    debs.mkdir(parents=True, exist_ok=True)
    missing = [p for p in packages if not list(debs.glob(f"{p}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "-q", "download", *missing], cwd=debs, check=True)
    return [sorted(debs.glob(f"{p}_*.deb"))[-1] for p in packages]


def debian_source(deb: Path) -> Source:
    """Every documentation file of one .deb. Python's documentation is taken from its sources where both are there."""
    shown = subprocess.run(["dpkg-deb", "-W", str(deb)], check=True, capture_output=True, text=True).stdout.split()
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["dpkg-deb", "-x", str(deb), scratch], check=True)
        root = Path(scratch)
        files = sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
        texts = [(str(p.relative_to(root)), read_text(p)) for p in files]
        licences = {line for p in root.glob("usr/share/doc/*/copyright") for line in _licences(p)}
    return Source(shown[0], shown[1], ", ".join(sorted(licences)) or "see its copyright file", _long(texts))


def _licences(copyright_file: Path) -> list[str]:
    text = copyright_file.read_text(encoding="utf-8", errors="ignore") if copyright_file.is_file() else ""
    return [m.strip()[:40] for m in re.findall(r"^License: *(\S.*)$", text, re.M)][:6]


def _long(texts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, text[:MAX_DOCUMENT]) for name, text in texts if len(text) >= MIN_DOCUMENT]


def python_source(name: str) -> Source:
    """README (in METADATA) and docstrings of one installed distribution."""
    found = importlib.metadata.distribution(name)
    meta = found.metadata
    texts = [("METADATA", str(meta.get_payload()))]
    for file in found.files or ():
        path = Path(str(found.locate_file(file)))
        if path.suffix == ".py" and path.is_file():
            texts.append((str(file), docstrings(path.read_text(encoding="utf-8", errors="ignore"))))
    licence = meta.get("License-Expression") or meta.get("License") or ""
    classes = [c.rpartition(":: ")[2] for c in meta.get_all("Classifier") or () if c.startswith("License")]
    return Source(f"pypi:{name}", found.version, licence.split("\n")[0][:80] or ", ".join(classes), _long(texts))


def sources(debs: list[Path], processes: int) -> Iterator[Source]:
    """All of them, in a fixed order. Holds every text in memory: some 300 MB."""
    names = sorted({d.metadata["Name"] for d in importlib.metadata.distributions()}, key=str.lower)
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(debian_source, debs)
        yield from pool.map(python_source, names)


# --- Documents ---


class Deduplicator:
    """Takes out paragraphs seen before, in any document; short ones may come a few times."""

    def __init__(self) -> None:
        self._seen: Counter[bytes] = Counter()

    def __call__(self, text: str) -> str:
        return "\n\n".join(p for p in re.split(r"\n[ \t]*\n", text) if p.strip() and self._new(p))

    def _new(self, paragraph: str) -> bool:
        key = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()
        self._seen[key] += 1
        return self._seen[key] <= (SHORT_COPIES if len(paragraph) < SHORT else 1)


def is_prose(text: str) -> bool:
    """English enough: nearly all ASCII, and mostly letters and spaces (no tables of numbers)."""
    sample = text[:20_000]
    letters = sum(c.isalpha() or c == " " for c in sample)
    return len(sample.encode()) < 1.03 * len(sample) and letters > 0.7 * len(sample)


def documents(found: Iterable[Source]) -> tuple[list[tuple[bytes, str]], list[dict[str, object]]]:
    """(hash of the name, text) of every document kept, ordered by hash: a fixed shuffle; and the list of sources."""
    clean = Deduplicator()
    kept: list[tuple[bytes, str]] = []
    listed: list[dict[str, object]] = []
    for source in found:
        cleaned = ((name, clean(text)) for name, text in source.texts)
        mine = [(name, text) for name, text in cleaned if len(text) >= MIN_DOCUMENT and is_prose(text)]
        keys = (hashlib.blake2b(f"{source.name}/{name}".encode(), digest_size=8).digest() for name, _ in mine)
        kept += zip(keys, (text for _, text in mine), strict=True)
        chars = sum(len(text) for _, text in mine)
        if chars:
            row = {"name": source.name, "version": source.version, "licence": source.licence}
            listed.append({**row, "documents": len(mine), "characters": chars})
            print(f"{source.name:40} {len(mine):7} documents {chars / 1e6:8.2f} M characters", flush=True)
    return sorted(kept), listed


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE as in GPT-2, with END as token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], max_tokens: int) -> tuple[np.ndarray, int]:
    """Tokens of the documents, each ended by token 0, uint16, cut at `max_tokens`; and the UTF-8 bytes they stand for.

    Whole batches of documents are read until there are enough tokens: the bytes are those of all tokens made.
    """
    out: list[np.ndarray] = []
    pending = iter(texts)
    num_tokens = num_bytes = 0
    while num_tokens < max_tokens and (batch := list(islice(pending, 512))):
        for text, one in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            out.append(np.asarray([*one.ids, 0], np.uint16))
            num_tokens += out[-1].size
            num_bytes += len(text.encode())
    tokens = np.concatenate(out) if out else np.empty(0, np.uint16)
    return tokens[:max_tokens], round(num_bytes * min(1.0, max_tokens / max(1, num_tokens)))


def split(kept: list[tuple[bytes, str]]) -> dict[str, list[str]]:
    """Documents by use, by the hash of their names."""
    edge = int(HELDOUT_SHARE * 256**8)
    uses: dict[str, list[str]] = {"train": [], "calibration": [], "heldout": []}
    for key, text in kept:
        again = hashlib.blake2b(key, digest_size=8).digest()  # another order than that of the documents
        place = int.from_bytes(again, "big")
        uses["heldout" if place < edge else "calibration" if place < 2 * edge else "train"].append(text)
    return uses


def build(debs: list[Path], out: Path, options: argparse.Namespace) -> None:
    out.mkdir(parents=True, exist_ok=True)
    kept, listed = documents(sources(debs, options.processes))
    uses = split(kept)
    sample = uses["train"][:: max(1, round(sum(map(len, uses["train"])) / options.tokenizer_characters))]
    tokenizer = train_tokenizer(sample, options.vocab_size)
    tokenizer.save(str(out / "tokenizer.json"))
    sizes: dict[str, dict[str, Any]] = {}
    for use, texts in uses.items():
        tokens, num_bytes = encode(tokenizer, texts, options.max_tokens)
        sizes[use] = {"tokens": len(tokens), "bytes_per_token": num_bytes / max(1, len(tokens))}
        if use == "train":
            (out / "train.u16.xz").write_bytes(lzma.compress(tokens.tobytes(), preset=options.preset))
        else:
            tokens.tofile(out / f"{use}.u16")
        sizes[use]["sha256"] = hashlib.sha256(tokens.tobytes()).hexdigest()
        print(use, sizes[use], flush=True)
    record = {"vocab_size": options.vocab_size, "texts": sizes, "sources": listed}
    (out / "sources.json").write_text(json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debs", type=Path, required=True, help="folder of the .deb files, filled where they lack")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--packages", nargs="*", default=PACKAGES)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--max-tokens", type=int, default=48_000_000)
    parser.add_argument("--tokenizer-characters", type=int, default=20_000_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--preset", type=int, default=4, help="of xz")
    options = parser.parse_args(argv)
    build(fetch(options.packages, options.debs), options.out, options)


if __name__ == "__main__":
    sys.exit(main())
