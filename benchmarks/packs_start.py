"""How long a start with many node packs takes, on one rank and on several, and whether files that packs write stay whole.

    python -m benchmarks.packs_start                      60 small packs, 10 starts with one rank and with 3
    python -m benchmarks.packs_start --packs 20 --starts 3

Each pack reads its settings when it is imported, adds an entry and writes them back in two parts, as packs of users do
with files of their own. The last line is JSON: seconds of each start, how many files were corrupted, and how many packs
could not be imported. Exit status 1 when a file was, or when several ranks took more than 2 s longer (medians).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

from tests.e2e.server import Server

MOST_LONGER_S = 2.0
_PACK = '''"""A pack that writes when it is imported."""
import json, os

PATH = os.path.join(os.path.dirname(__file__), "settings.json")
settings = {"starts": []}
if os.path.exists(PATH):
    with open(PATH) as file:
        settings = json.load(file)
settings["starts"].append(os.environ.get("RANK", "0"))
text = json.dumps(settings | {"padding": "x" * 20000})
with open(PATH, "w") as file:
    file.write(text[:10000])
    file.flush()
    file.write(text[10000:])


class Node:
    CATEGORY, FUNCTION, RETURN_TYPES = "packs", "run", ("INT",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def run(self):
        return (1,)


NODE_CLASS_MAPPINGS = {"PackNode" + os.path.basename(os.path.dirname(__file__)): Node}
'''


def make_packs(base: str, count: int) -> list[str]:
    """Write the packs; the paths of their settings."""
    settings = []
    os.makedirs(os.path.join(base, "custom_nodes"))
    for number in range(count):
        folder = os.path.join(base, "custom_nodes", f"pack_{number:02}")
        os.makedirs(folder)
        with open(os.path.join(folder, "__init__.py"), "w", encoding="utf-8") as file:
            file.write(_PACK)
        settings.append(os.path.join(folder, "settings.json"))
    return settings


def start(base: str, ranks: int) -> tuple[float, int]:
    """Start a server and end it: seconds until it listens, and packs that could not be imported."""
    began = time.monotonic()
    with Server(base, ranks) as server:
        seconds = time.monotonic() - began
        failed = sum(line.startswith("Cannot import") for line in server.log)
        answers = server.json("/object_info")
        expected = sum(os.path.isdir(os.path.join(base, "custom_nodes", name)) for name in _packs(base))
        failed += expected - sum(name.startswith("PackNode") for name in answers)
    return seconds, failed


def _packs(base: str) -> list[str]:
    return os.listdir(os.path.join(base, "custom_nodes"))


def corrupted(settings: list[str], entries: int) -> int:
    """How many files are no JSON, or do not have an entry of every rank of every start."""
    bad = 0
    for path in settings:
        try:
            with open(path, encoding="utf-8") as file:
                bad += len(json.load(file)["starts"]) != entries
        except ValueError:
            bad += 1
    return bad


def main(argv: list[str]) -> int:
    """Returns the exit status."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--starts", type=int, default=10)
    arguments = parser.parse_args(argv)
    counts = (1, arguments.ranks)
    with tempfile.TemporaryDirectory() as folder:
        bases = [os.path.join(folder, str(ranks)) for ranks in counts]
        settings = [make_packs(base, arguments.packs) for base in bases]
        runs: list[list[tuple[float, int]]] = [[], []]
        for number in range(arguments.starts + 1):  # in turn, so that what else the machine does slows both
            for base, ranks, mine in zip(bases, counts, runs, strict=True):
                mine.append(start(base, ranks))
                if number:  # the first start compiles the packs
                    print(f"{ranks} ranks: {mine[-1][0]:.2f} s", flush=True)
        broken = [
            corrupted(paths, ranks * len(mine)) for paths, ranks, mine in zip(settings, counts, runs, strict=True)
        ]
    result = {
        f"{ranks} ranks": {
            "seconds": [round(seconds, 2) for seconds, _ in mine[1:]],
            "median_s": round(statistics.median(seconds for seconds, _ in mine[1:]), 2),
            "corrupted_files": bad,
            "failed_imports": sum(failed for _, failed in mine),
        }
        for ranks, mine, bad in zip(counts, runs, broken, strict=True)
    }
    one, several = (statistics.median(seconds for seconds, _ in mine[1:]) for mine in runs)
    longer = several - one
    print(json.dumps({"packs": arguments.packs, "starts": arguments.starts, "longer_s": round(longer, 2), **result}))
    bad = any(broken) or any(failed for mine in runs for _, failed in mine)
    return 1 if bad or longer > MOST_LONGER_S else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
