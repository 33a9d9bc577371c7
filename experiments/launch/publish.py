"""Publishes a finished run, and keeps README's table current.

    python -m experiments.launch.publish [RUN_FOLDER ...]

Each run's `result.json` and pictures go to `docs/results/<experiment>/`; then README's table is
written anew from `blogjax.catalog` and the published results. Without a folder only the latter.
"""

import json
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from blogjax import catalog
from experiments.launch.result import claims_of, measured_value

ROOT = pathlib.Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- catalogue: made by `make readme` -->", "<!-- end of catalogue -->"
MAX_PICTURE = 400_000


def publish(folder: pathlib.Path, results: pathlib.Path) -> pathlib.Path:
    """Copies what is worth keeping of a run.

    Raises:
      ValueError: if the run is unfinished, was not judged, has overrides or comes from uncommitted
        code, or if a picture is too large for git.
    """
    source = folder / "result.json"
    if not source.exists():
        raise ValueError(f"{folder} has no result.json: the run is not finished")
    record = json.loads(source.read_text())
    if any(claim["verdict"] == "not judged" for claim in record["claims"]):
        raise ValueError(f"{folder} was not judged; publish a run of the full config")
    if record["overrides"]:
        raise ValueError(f"{folder} is no run of a published config: {record['overrides']}")
    if (record["commit"] or "dirty").endswith("dirty"):
        raise ValueError(f"{folder} was run from uncommitted code; commit and run again")
    target = results / record["experiment"]
    target.mkdir(parents=True, exist_ok=True)
    for name in record["pictures"]:
        size = (folder / name).stat().st_size
        if size > MAX_PICTURE:
            raise ValueError(f"{folder / name} has {size} bytes, more than {MAX_PICTURE}")
        shutil.copy(folder / name, target / name)
    shutil.copy(source, target / "result.json")
    return target


def published(results: pathlib.Path) -> dict[str, Any]:
    """The published records, by experiment."""
    return {p.parent.name: json.loads(p.read_text()) for p in results.glob("*/result.json")}


def _outcome(record: Mapping[str, Any] | None, name: str) -> str:
    if record is None:
        return "not published yet"
    claims = claims_of(record)
    counts = {v: sum(c.verdict == v for c in claims) for v in ("holds", "fails", "undecided")}
    words = {"holds": "hold", "fails": "fail", "undecided": "undecided"}
    text = ", ".join(f"{n} of {len(claims)} {words[v]}" for v, n in counts.items() if n)
    return f"[{text}](docs/results/{name}/result.json)"


def _link(path: str) -> str:
    return f"[{path.removeprefix('blogjax/')}]({path})"


def table(records: Mapping[str, Any]) -> str:
    """README's table of posts."""
    lines = [
        "| post | method | files | experiment | claims |",
        "|---|---|---|---|---|",
    ]
    for post in catalog.POSTS:
        urls = ", ".join(f"[{u.rpartition('/')[2]}]({u})" for u in post.urls)
        names = {pathlib.Path(path).stem: path for path in post.experiments}
        experiment = ", ".join(f"[{name}]({path})" for name, path in names.items())
        outcome = "; ".join(_outcome(records.get(name), name) for name in names)
        files = ", ".join(_link(m) for m in post.modules)
        row = (f"{post.title} ({urls})", post.method, files, experiment, outcome)
        lines.append(f"| {' | '.join(row)} |")
    built = f"{len(catalog.POSTS)} of {catalog.TOTAL_POSTS} posts so far"
    lines += ["", f"{built}. Next: {'; '.join(catalog.NEXT)}."]
    return "\n".join(lines)


def claims_table(record: Mapping[str, Any]) -> str:
    """The claims of one result as README shows them."""
    lines = ["| claim | measured | verdict |", "|---|---|---|"]
    lines += [f"| {c.statement} | {measured_value(c)} | {c.verdict} |" for c in claims_of(record)]
    return "\n".join(lines)


def readme(text: str, records: Mapping[str, Any]) -> str:
    """README with its generated parts written anew.

    Raises:
      ValueError: if a marker is missing.
    """
    parts = {f"<!-- claims of {name} -->": claims_table(r) for name, r in records.items()}
    parts = {
        begin: (begin.replace("claims", "end of claims"), body) for begin, body in parts.items()
    }
    parts[BEGIN] = (END, table(records))
    for begin, (end, body) in parts.items():
        if begin != BEGIN and begin not in text:
            continue
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"README.md lacks the markers {begin} ... {end}")
        text = f"{head}{begin}\n{body}\n{end}{tail}"
    return text


def main(folders: list[str]) -> None:
    """Publishes the folders and rewrites README."""
    results = ROOT / "docs" / "results"
    for folder in folders:
        print(f"published {publish(pathlib.Path(folder), results).relative_to(ROOT)}")
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(), published(results)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as problem:
        sys.exit(f"error: {problem}")
