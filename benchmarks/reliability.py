"""Runs the fault suite and writes what survived to `docs/reliability.md`.

    python -m benchmarks.reliability

The figures are those that the tests record of themselves; a test that fails writes nothing. Its
tables stand in the document between markers.
"""

import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

from benchmarks.machine import surroundings, write

ROOT = pathlib.Path(__file__).resolve().parents[1]
SUITE = (
    "tests/faults",
    "tests/integration/test_two_processes.py",
    "tests/integration/test_views.py",
)
DOCUMENT = ROOT / "docs" / "reliability.md"
FIGURES = ("<!-- figures -->", "<!-- end of figures -->")
LOSSES = ("<!-- losses -->", "<!-- end of losses -->")


def run_suite() -> dict[str, dict[str, Any]]:
    """What every test of the suite has recorded, by its name; exits where one fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "junit.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "slow", *SUITE, f"--junitxml={path}",
             "-o", "junit_family=xunit1"],
            cwd=ROOT,
        )  # fmt: skip
        if done.returncode != 0:
            sys.exit("error: the suite failed; nothing is written")
        return recorded(path.read_text())


def recorded(junit: str) -> dict[str, dict[str, Any]]:
    """`{test: {"seconds", property...}}` of a report of pytest's.

    >>> xml = '<s><testcase name="test_a[1]" time="2.5"><properties>'
    >>> xml += '<property name="kills" value="20"/></properties></testcase></s>'
    >>> recorded(xml)
    {'test_a[1]': {'seconds': 2.5, 'kills': '20'}}
    """
    found = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        found[case.get("name")] = {"seconds": float(case.get("time", 0)), **properties}
    return found


def figures_table(record: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each figure that is not a row of losses."""
    lines = ["| what | number |", "|---|---|"]
    for properties in record.values():
        for name, value in properties.items():
            if name != "seconds" and not name.startswith("losses"):
                lines.append(f"| {name} | {value} |")
    return "\n".join(lines)


def losses_table(record: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each run whose losses were recorded, one number per column."""
    rows: dict[str, list[str]] = {}
    for properties in record.values():
        for name, value in properties.items():
            if name.startswith("losses of "):
                rows[name.removeprefix("losses of ")] = value.split()
    steps = range(1, 1 + max(map(len, rows.values()), default=0))
    lines = ["| run | " + " | ".join(f"step {i}" for i in steps) + " |"]
    lines.append("|---" * (len(steps) + 1) + "|")
    lines += [f"| {name} | {' | '.join(values)} |" for name, values in rows.items()]
    return "\n".join(lines)


def between(text: str, markers: tuple[str, str], body: str) -> str:
    r"""`text` with what stands between two markers written anew.

    Raises:
      ValueError: if a marker is missing.

    >>> between("a <b> old </b> c", ("<b>", "</b>"), "new")
    'a <b>\nnew\n</b> c'
    """
    head, found, rest = text.partition(markers[0])
    _, closed, tail = rest.partition(markers[1])
    if not found or not closed:
        raise ValueError(f"the document lacks the markers {' ... '.join(markers)}")
    return f"{head}{markers[0]}\n{body}\n{markers[1]}{tail}"


def main() -> None:
    """Runs, writes `results/reliability.json` and the tables."""
    record = run_suite()
    write("reliability", {**surroundings(), "tests": record})
    text = between(DOCUMENT.read_text(), FIGURES, figures_table(record))
    DOCUMENT.write_text(between(text, LOSSES, losses_table(record)))


if __name__ == "__main__":
    main()
