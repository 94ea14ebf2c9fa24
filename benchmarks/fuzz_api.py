"""Does a running server do what its /openapi.json says? schemathesis makes up requests, valid and not, for every path.

Needs `pip install schemathesis`, best into an environment of its own (give its command with --schemathesis): it brings
some thirty packages, and is no dependency of coldstream for that. Without --url a server with the default model and a
short context is started. The last line is one JSON object; exit code 1 when anything undeclared, or a 500, was seen.

    python -m benchmarks.fuzz_api --schemathesis /path/to/st
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext

from benchmarks.serving import Served, serving

CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance"),
    *("response_schema_conformance", "unsupported_method", "allow_header_conformance"),
)
SERVER = ("--max-model-len", "64", "--max-num-seqs", "4", "--ffn-cache", "60%")


def main() -> int:
    options = _options()
    command = shutil.which(options.schemathesis)
    if command is None:
        print(f"--schemathesis {options.schemathesis}: no such command; pip install schemathesis", file=sys.stderr)
        return 2
    source = nullcontext(None) if options.url else serving(SERVER)
    with source as served:
        url = options.url or _url(served)
        done = subprocess.run(_command(command, url, options), capture_output=True, text=True)
    print(done.stdout + done.stderr)
    print(json.dumps({**_counts(done.stdout), "seed": options.seed, "passed": done.returncode == 0}))
    return 0 if done.returncode == 0 else 1


def _command(command: str, url: str, options: argparse.Namespace) -> list[str]:
    flags = {
        "--checks": ",".join(CHECKS),
        "--phases": "examples,coverage,fuzzing",
        "--max-examples": str(options.examples),
        "--seed": str(options.seed),
        "--request-timeout": "120",
        "--generation-database": "none",
    }
    return [command, "run", f"{url}/openapi.json", "--no-color", *(part for pair in flags.items() for part in pair)]


def _url(served: Served | None) -> str:
    assert served is not None
    return served.url


def _counts(report: str) -> dict[str, int]:
    """Cases made and cases that failed, as schemathesis says at its end."""
    found = re.search(r"(\d+) generated, (?:(\d+) found )?", report)
    return {"cases": int(found[1]), "cases_failed": int(found[2] or 0)} if found else {}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--schemathesis", default="st", help="its command")
    parser.add_argument("--examples", type=int, default=40, help="cases an endpoint in the last phase")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
