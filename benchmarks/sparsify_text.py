"""Text that ships in Debian packages, for a student to be trained on beside what its teacher writes.

    python -m benchmarks.sparsify_text --debs /tmp/debs --out .sparsify/text --record FILE.json

Six novels (r-cran-janeaustenr) and documentation in prose, cleaned as for benchmarks/relu2_wins, no paragraph twice.
Writes text.txt.xz, heldout.txt of a package of its own (a book of prose) that is not in it, and the record: every
source with version, licence and characters. The calibration and the held-out text of this repository, and the packages
that they come from, are none of it. Nothing is installed.
"""

from __future__ import annotations

import argparse
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
PACKAGES = (
    "debian-faq",
    "debian-policy",
    "debian-reference-en",
    "git-doc",
    "gnome-user-docs",
    "libreoffice-help-en-us",
    "perl-doc",
    "postgresql-doc-15",
    "python-django-doc",
    "python3.11-doc",
    "vim-doc",
)
MAX_CHARACTERS = 1_200_000  # of a package: none outweighs the novels
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debs", type=Path, required=True, help="folder of the .deb files, filled where they lack")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    options = parser.parse_args()
    debs = fetch([NOVELS, *PACKAGES], options.debs)
    kept, listed = documents([novels(debs[0]), *(_shortened(debian_source(d)) for d in debs[1:])])
    options.out.mkdir(parents=True, exist_ok=True)
    text = "\n\n\n".join(text for _, text in kept)
    (options.out / "text.txt.xz").write_bytes(lzma.compress(text.encode()))
    held, its_own = documents([debian_source(fetch([HELDOUT], options.debs)[0])])
    paragraphs = (p for _, text in held for p in text.split("\n\n") if len(p) > 80)  # no tables of contents
    prose = "\n\n".join(paragraphs)[:HELDOUT_CHARACTERS]
    (options.out / "heldout.txt").write_text(prose, encoding="utf-8")
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.write_text(
        json.dumps({"characters": len(text), "sources": listed, "heldout": its_own}, indent=1) + "\n"
    )


def _shortened(source: Source) -> Source:
    """Its first documents by name, up to MAX_CHARACTERS."""
    texts, total = [], 0
    for name, text in source.texts:
        total += len(text)
        if total <= MAX_CHARACTERS:
            texts.append((name, text))
    return Source(source.name, source.version, source.licence, texts)


if __name__ == "__main__":
    main()
