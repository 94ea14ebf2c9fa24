"""Text that ships in Debian packages, for a student to be trained on beside what its teacher writes.

    python -m benchmarks.sparsify_text --debs /tmp/debs --out .sparsify/text --record FILE.json

Six novels (r-cran-janeaustenr), dictionaries, quotations and documentation in prose, cleaned as for
benchmarks/relu2_wins, no paragraph twice. Writes text.txt.xz; developers-reference.txt, of a package of its own (a
book of prose) that is not in it, nor any paragraph of it; and the record: every source with version, licence and
characters. The calibration and the held-out text of this repository, and the packages that they come from, are none
of it. Nothing is installed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import re
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from benchmarks.relu2_wins.build_data import Source, debian_source, documents, fetch

NOVELS, HELDOUT = "r-cran-janeaustenr", "developers-reference"
HELDOUT_CHARACTERS = 120_000
PACKAGES = (  # noqa: SIM905
    "apache2-doc aptitude-doc-en cppreference-doc-en-html debian-faq debian-handbook debian-history debian-policy "
    "debian-reference-en debmake-doc erlang-doc exim4-doc-html fp-docs-3.2.2 ghc-doc gimp-help-en git-doc harden-doc "
    "libreoffice-help-en-us lilypond-doc-html linux-doc-6.1 llvm-14-doc maint-guide maxima-doc octave-doc "
    "openjdk-17-doc perl-doc postgresql-doc-15 python-django-doc python-pandas-doc python-sqlalchemy-doc "
    "python-sympy-doc python3.11-doc r-doc-html racket-doc sqlite3-doc swi-prolog-doc vim-doc zsh-doc"
).split()
PLAIN = ("dict-devil", "dict-foldoc", "dict-gcide", "dict-jargon", "fortunes")  # text without a suffix that says so
MAX_CHARACTERS = 3_000_000  # of a package: none outweighs the novels
_PIECE = 100_000  # characters of a dictionary that are one document
_FOREIGN = re.compile(r"/(?!en)[a-z]{2}([-_][A-Z]{2})?/")  # a folder of another language
PLACES = ("usr/share/dictd", "usr/share/games/fortunes")
_STRING = struct.Struct(">II")  # of R's serialised form, version 2 and 3: flags and length of a CHARSXP
_CHARSXP = re.compile(rb"\x00[\x04\x00]\x00\x09")


def novels(deb: Path) -> Source:
    """A document a chapter. The package keeps lines of text in a lazy-load database: zlib streams of R's serialised
    vectors, found by their headers."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["dpkg-deb", "-x", str(deb), scratch], check=True)
        data = next(Path(scratch).rglob("Rdata.rdb")).read_bytes()
    texts = [
        (f"{place}/{i}", text)
        for place, block in enumerate(_blocks(data))
        for i, text in enumerate(chapters(list(_strings(block))))
    ]
    shown = subprocess.run(["dpkg-deb", "-W", str(deb)], check=True, capture_output=True, text=True).stdout.split()
    return Source(shown[0], shown[1], "public domain (Jane Austen, 1811 to 1818); package: MIT", texts)


def _blocks(data: bytes) -> Iterator[bytes]:
    """Every zlib stream, each after its length."""
    for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", data):
        try:
            yield zlib.decompressobj().decompress(data[match.start() :])
        except zlib.error:
            continue


def _strings(block: bytes) -> Iterator[str]:
    place = 0
    while match := _CHARSXP.search(block, place):
        _, length = _STRING.unpack_from(block, match.start())
        end = match.end() + 4 + length
        if length > 1000 or end > len(block):
            place = match.end()
            continue
        yield block[match.end() + 4 : end].decode("utf-8", errors="ignore")
        place = end


def chapters(lines: list[str]) -> Iterator[str]:
    """Lines joined to one a paragraph, cut at the headings."""
    paragraphs = [" ".join(group) for filled, group in groupby(lines, key=lambda line: bool(line.strip())) if filled]
    chapter: list[str] = []
    for paragraph in paragraphs:
        if re.match(r"(chapter|volume)\b", paragraph, re.I) and len(paragraph) < 60:
            yield "\n\n".join(chapter)
            chapter = []
        else:
            chapter.append(" ".join(paragraph.replace("_", "").split()))
    yield "\n\n".join(chapter)


def plain(deb: Path) -> Source:
    """Dictionaries of dictd and fortunes, in pieces."""
    source = debian_source(deb)  # name, version, licence
    texts = []
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["dpkg-deb", "-x", str(deb), scratch], check=True)
        for path in sorted(p for place in PLACES for p in (Path(scratch) / place).glob("*") if _is_text(p)):
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".dz" else path.read_bytes()
            whole = re.sub(r"\n%\n", "\n\n", data.decode("utf-8", errors="ignore"))
            texts += [(f"{path.name}/{i}", whole[i : i + _PIECE]) for i in range(0, len(whole), _PIECE)]
    return Source(source.name, source.version, source.licence, texts)


def _is_text(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.suffix in ("", ".dz")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debs", type=Path, required=True, help="folder of the .deb files, filled where they lack")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    options = parser.parse_args()
    debs = fetch([NOVELS, *PACKAGES], options.debs)
    found = [novels(debs[0]), *(plain(d) for d in fetch(PLAIN, options.debs)), *map(debian_source, debs[1:])]
    kept, listed = documents(map(_shortened, found))
    held, its_own = documents([debian_source(fetch([HELDOUT], options.debs)[0])])
    paragraphs = [p for _, text in held for p in text.split("\n\n") if len(p) > 80]  # no tables of contents
    options.out.mkdir(parents=True, exist_ok=True)
    text = "\n\n\n".join(_without(text, set(paragraphs)) for _, text in kept)
    (options.out / "text.txt.xz").write_bytes(lzma.compress(text.encode()))
    prose = "\n\n".join(paragraphs)[:HELDOUT_CHARACTERS]
    (options.out / f"{HELDOUT}.txt").write_text(prose, encoding="utf-8")
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.write_text(
        json.dumps({"characters": len(text), "sources": listed, "heldout": its_own}, indent=1) + "\n"
    )


def _without(text: str, paragraphs: set[str]) -> str:
    return "\n\n".join(p for p in text.split("\n\n") if p not in paragraphs)


def _shortened(source: Source) -> Source:
    """Its first English documents by name, up to MAX_CHARACTERS."""
    texts, total = [], 0
    for name, text in source.texts:
        if _FOREIGN.search(name):
            continue
        total += len(text)
        if total <= MAX_CHARACTERS:
            texts.append((name, text))
    return Source(source.name, source.version, source.licence, texts)


if __name__ == "__main__":
    main()
