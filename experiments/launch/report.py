"""The report of a run: one page of HTML that holds all it shows and loads nothing.

    python -m experiments.launch.report RUN_FOLDER ...

Read are `result.json`, `config.json`, every `metrics.jsonl` and `timings.jsonl`, and the pictures;
what is missing or damaged is named on the page, and the rest is shown.
"""

import array
import base64
import datetime
import io
import json
import math
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blogjax.train.reporting import duration
from experiments.launch import svg
from experiments.launch.axes import axis_range, moving_average
from experiments.launch.configs import flatten
from experiments.launch.result import Claim, interval, measured_value

PICTURE_BYTES = 1_500_000  # of all pictures together; in the page a third more
MAX_RUNS, MAX_PANELS, MAX_FIELDS, MAX_TEXT = 12, 24, 1000, 500
VERDICTS = ("fails", "undecided", "not judged", "holds")  # the first of them is that of all
TITLES = {
    "grad_norm": "gradient norm",
    "update_to_parameters": "update norm / parameter norm",
    "steps_per_second": "steps per second",
    "data_wait_share": "share of time waiting for data",
    "compilations": "programs compiled again",
    "skipped": "steps left out",
}
LAST = tuple(TITLES)  # what says how a run went comes after what it reached
RATE = ("timing", "steps_per_second")

Columns = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]


def write_report(workdir: pathlib.Path) -> pathlib.Path:
    """Writes `report.html` into the folder of a run, the whole page or nothing.

    Args:
      workdir: the folder; nothing outside it is read.

    Returns:
      The path of the page.

    Raises:
      ValueError: if there is no such folder.
      OSError: if the page cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_report(pathlib.Path(folder)).name
    'report.html'
    """
    import jinja2
    from markupsafe import Markup

    if not workdir.is_dir():
        raise ValueError(f"{workdir} is not the folder of a run")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        wanted=interval,
        measured=measured_value,
        line=lambda c: Markup(svg.number_line(c.value, c.spread, c.low, c.high)),
    )
    page = environment.get_template("report.html.jinja").render(_content(workdir))
    path = workdir / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_bytes(page.encode(errors="replace"))  # JSON may hold halves of characters
    os.replace(temporary, path)
    return path


def _content(workdir: pathlib.Path) -> dict[str, Any]:
    notes: list[str] = []
    result = _record(workdir / "result.json", notes)
    stored = _record(workdir / "config.json", notes)
    runs, finished = read_runs(workdir, notes)
    claims = [_claim(fields) for fields in _as(list, result.get("claims"))]
    found = {claim.verdict for claim in claims}
    name = str(result.get("experiment") or stored.get("name") or workdir.resolve().name)
    seconds, measured = _number(result.get("seconds")), json.dumps(result.get("measured"), indent=1)
    lists = re.compile(r"\[([^][{}]*)\]")  # each goes on one line
    measured = lists.sub(lambda m: f"[{' '.join(m[1].split())}]", measured)
    steps = [x[-1] for run in runs.values() for x, _ in run.values()]
    rates = [run[RATE][1] for run in runs.values() if RATE in run]
    panels, undrawn = _panels(runs)
    return {
        "name": name,
        "outcome": outcome(claims) if result else "no result yet",
        "verdict": next((v for v in VERDICTS if v in found), "") if result else "unfinished",
        "finished": finished,
        "took": "" if math.isnan(seconds) else duration(seconds),
        "steps": f"{max(steps):,.0f}" if steps else "",
        "rates": ", ".join(f"{np.nanmedian(y):.3g}" for y in rates if np.isfinite(y).any()),
        "claims": claims,
        "pictures": _pictures(workdir, _as(list, result.get("pictures")), notes),
        "panels": panels,
        "left_out": undrawn,
        "groups": _groups(_as(dict, result.get("config") or stored.get("config")), result),
        "config_name": stored.get("name"),
        "measured": _cut(measured, 20_000) if result.get("measured") else "",
        "notes": notes,
        **{key: result.get(key) for key in ("device", "commit", "command", "resumed")},
        **{key: _as(list, result.get(key)) for key in ("seeds", "overrides")},
        "versions": _as(dict, result.get("versions")),
        "program": _program(workdir, notes),
    }


def _record(path: pathlib.Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        notes.append(f"there is no {path.name}")
        return {}
    try:
        record = json.loads(path.read_text(errors="replace"))
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        notes.append(f"{path.name} is damaged")
    return _as(dict, record)


def _program(workdir: pathlib.Path, notes: list[str]) -> str:
    """What XLA said of the step, the same for every seed."""
    found = [p for p in sorted(workdir.glob("**/program.json")) if "profile" not in p.parts]
    values = {k: _number(v) for k, v in (_record(found[0], notes) if found else {}).items()}
    parts = {"flops": (1e9, "GFLOP"), "peak": (2**20, "MiB at its peak")}
    return ", ".join(
        f"{values[name] / unit:.4g} {word}"
        for name, (unit, word) in parts.items()
        if math.isfinite(values.get(name, math.nan))
    )


def _as(kind: type, value: Any) -> Any:
    """The value if it is of that type, else an empty one."""
    return value if isinstance(value, kind) else kind()


def _number(value: Any, default: float = math.nan) -> float:
    """A finite float of moderate size, so that sums and differences are finite too."""
    if not isinstance(value, int | float) or not abs(value) <= 1e300:
        return default
    return float(value)


def _claim(fields: Any) -> Claim:
    fields = _as(dict, fields)
    spread = _number(fields.get("spread"))
    return Claim(
        *(str(fields.get(key, "")) for key in ("statement", "source", "metric")),
        value=_number(fields.get("value")),
        spread=None if math.isnan(spread) else spread,
        seeds=int(_number(fields.get("seeds"), 0)),
        low=_number(fields.get("low"), -math.inf),
        high=_number(fields.get("high"), math.inf),
        verdict=fields["verdict"] if fields.get("verdict") in VERDICTS else "not judged",
    )


def outcome(claims: Sequence[Claim]) -> str:
    """How many claims hold, in words.

    >>> outcome([])
    'no claims'
    """
    counts = {v: sum(c.verdict == v for c in claims) for v in VERDICTS}
    n, noun = len(claims), "claim" if len(claims) == 1 else "claims"
    if counts["not judged"] == n:
        return f"{n} {noun}, not judged" if n else "no claims"
    words = {"fails": "fails" if counts["fails"] == 1 else "fail"}
    others = [f"{k} {words.get(v, v)}" for v, k in counts.items() if k and v != "holds"]
    return ", ".join([f"{counts['holds']} of {n} {noun} hold{'s' * (n == 1)}", *others])


def read_runs(workdir: pathlib.Path, notes: list[str]) -> tuple[dict[str, Columns], str]:
    """Reads the metrics and timings of all runs in a folder.

    Every folder that holds records is a run; `notes` gets a line for whatever could not be read.

    Returns:
      `{label: {(kind, name): (steps, values)}}`, both float64 and of one length, the steps
      ascending, values NaN where they are not finite, kind `train`, `evaluate` or `timing`; and
      when the last record was made, in words or empty.
    """
    files: dict[pathlib.Path, list[pathlib.Path]] = {}
    for folder, inner, names in os.walk(workdir):
        inner[:] = sorted(d for d in inner if d not in ("checkpoints", "tensorboard", "images"))
        found = [pathlib.Path(folder, n) for n in ("metrics.jsonl", "timings.jsonl") if n in names]
        if found:
            files[pathlib.Path(folder)] = found

    def natural(path: pathlib.Path) -> list[Any]:  # seed2 before seed10
        return [int(p) if p.isdecimal() else p for p in re.split(r"([0-9]+)", path.as_posix())]

    runs: dict[str, Columns] = {}
    for folder in sorted(files, key=natural)[:MAX_RUNS]:
        columns: Columns = {}
        for path in files[folder]:
            columns |= _columns(path, str(path.relative_to(workdir)), notes)
        label = folder.relative_to(workdir).as_posix().replace("seed", "seed ")
        runs["this run" if label == "." else label] = columns
    if len(files) > MAX_RUNS:
        notes.append(f"{len(files)} folders hold records; the curves show the first {MAX_RUNS}")
    never = np.empty(0), np.zeros(1)
    last = max((run.pop(("timing", "time"), never)[1][-1] for run in runs.values()), default=0.0)
    moment = datetime.datetime.fromtimestamp(last if 0 < last < 4e9 else 0, datetime.UTC)
    return runs, f"{moment:%Y-%m-%d %H:%M} UTC" if 0 < last < 4e9 else ""


def _columns(path: pathlib.Path, shown: str, notes: list[str]) -> Columns:
    columns: dict[tuple[str, str], tuple[array.array[float], array.array[float]]] = {}
    damaged = 0
    try:
        with path.open(errors="replace") as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                    step = _number(record.pop("step"))
                    kind = record.pop("kind") if path.name == "metrics.jsonl" else "timing"
                    if not 0 <= step <= 1e15 or kind not in ("train", "evaluate", "timing"):
                        raise ValueError(kind, step)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    damaged += bool(line.strip())
                    continue
                if "update_norm" in record and "param_norm" in record:
                    size = _number(record.pop("param_norm"))
                    update = _number(record.pop("update_norm"))
                    record["update_to_parameters"] = update / size if size > 0 else None
                for name, value in record.items():
                    if value is None or isinstance(value, int | float):
                        empty = array.array("d"), array.array("d")
                        steps, values = columns.setdefault((kind, name), empty)
                        steps.append(step)
                        values.append(_number(value))
    except OSError as error:
        notes.append(f"{shown} cannot be read: {error.strerror}")
    if damaged:
        notes.append(f"{shown}: damaged lines left out: {damaged}")
    elif not columns:
        notes.append(f"{shown} holds no records")
    return {key: _ascending(*map(np.array, pair)) for key, pair in columns.items()}


def _ascending(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By step; of a step that a later start did again, what was written last."""
    order = np.argsort(steps, kind="stable")
    order = order[np.append(np.diff(steps[order]) > 0, True)]
    return steps[order], values[order]


def _panels(runs: Mapping[str, Columns]) -> tuple[list[dict[str, Any]], list[str]]:
    """One panel per metric, and what is not worth one."""
    names = sorted(
        {name for run in runs.values() for _, name in run},
        key=lambda n: (n != "loss", n in LAST, LAST.index(n) if n in LAST else 0, n),
    )
    panels, left_out = [], []
    for name in names:
        values = np.concatenate([run[k][1] for run in runs.values() for k in run if k[1] == name])
        title = TITLES.get(name, name.replace("_", " "))
        if not np.isfinite(values).any():
            left_out.append(f"{title}: never finite")
        elif not values.any():
            left_out.append(f"{title}: always 0")
        elif len(panels) == MAX_PANELS:
            left_out.append(f"{title}: not drawn")
        else:
            panels.append(_panel(name, title, runs, values))
    return panels, left_out


def _panel(
    name: str, title: str, runs: Mapping[str, Columns], values: np.ndarray
) -> dict[str, Any]:
    from markupsafe import Markup

    may_log = name != "data_wait_share"  # a share is compared with 0 and 1
    low, high, log = axis_range(values, may_log)
    words = {"train": "training", "evaluate": "validation", "timing": ""}
    averaged = ("train", "timing") if name == "data_wait_share" else ("train",)
    curves, legend, windows = [], [], set()
    for colour, (label, run) in enumerate(runs.items()):
        parts = []
        for kind in (k for k in words if (k, name) in run):
            x, y = run[kind, name]
            style: svg.Style = "points" if kind == "evaluate" else "line"
            last = y[-1]
            if kind in averaged and len(y) >= 40:
                windows.add(window := max(5, len(y) // 15) | 1)
                # What the axis leaves out counts as its edge, else one spike fills a window.
                inside = np.clip(y, low, high)
                at, means = moving_average(x, np.log10(inside) if log else inside, window)
                means = 10.0**means if log else means
                curves.append(svg.Curve("", at, means, "mean", colour))
                style, last = "raw", means[-1]
            curves.append(svg.Curve(f"{label} {words[kind]}".strip(), x, y, style, colour))
            end = f"{last:.3g}" if math.isfinite(last) else "not finite"
            parts.append(("mean" if style == "raw" else style, words[kind], end))
        if parts:
            legend.append(
                {"label": label if len(runs) > 1 else "", "colour": colour, "parts": parts}
            )
    drawing, notes = svg.chart(title, curves, may_log=may_log)
    if windows:
        sizes = " or ".join(str(w) for w in sorted(windows))
        notes.insert(0, f"thin: single records, bold: {'geometric ' * log}mean of {sizes} records")
    return {"title": title, "svg": Markup(drawing), "legend": legend, "notes": notes}


def _pictures(workdir: pathlib.Path, names: list[Any], notes: list[str]) -> list[dict[str, Any]]:
    """The pictures as `data:` URIs, as many as fit, large ones smaller."""
    shown, room = [], PICTURE_BYTES
    for name in names:
        path = (workdir / str(name)).resolve()
        try:
            if not path.is_relative_to(workdir.resolve()):
                raise ValueError(f"{path} is elsewhere")
            kind, content, size = _picture(path.read_bytes(), room)
        except Exception:  # whatever a damaged picture raises, the page goes on without it
            notes.append(f"the picture {name} is not shown: missing, damaged or too large")
            continue
        room -= len(content)
        uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        title = path.stem.replace("_", " ")
        shown.append({"uri": uri, "title": title, "width": size[0], "height": size[1]})
    return shown


def _picture(content: bytes, room: int) -> tuple[str, bytes, tuple[int, int]]:
    """Type, bytes and size of a picture, made smaller until it has at most `room` bytes."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of pictures made to exhaust the memory
        image = Image.open(io.BytesIO(content))
    if image.format in ("PNG", "JPEG", "GIF", "WEBP") and len(content) <= room:
        return image.format.lower(), content, image.size
    image = image.convert("RGBA")
    for width in (1600, 1100, 700):
        file = io.BytesIO()
        image.thumbnail((width, 4 * width))
        image.save(file, "PNG")
        if file.tell() <= room:
            return "png", file.getvalue(), image.size
    raise ValueError("too large for this page")


def _groups(config: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The resolved config as `{group: [(name, value, was it changed by the command line)]}`."""
    changed = {
        str(argument).partition("=")[0].lstrip("-").removeprefix("no").removeprefix("config.")
        for argument in _as(list, result.get("overrides"))
    }
    groups: dict[str, list[Any]] = {}
    fields = flatten(config)
    ordered = sorted(fields.items(), key=lambda field: "." in field[0])
    for field, value in ordered[:MAX_FIELDS]:
        group, _, name = field.rpartition(".")
        text = _cut(json.dumps(value, ensure_ascii=False), MAX_TEXT)
        groups.setdefault(group, []).append((name, text, field in changed))
    if len(fields) > MAX_FIELDS:
        groups["config.json"] = [(f"{len(fields) - MAX_FIELDS} more fields", "", False)]
    return groups


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"


if __name__ == "__main__":
    try:
        for argument in sys.argv[1:]:
            print(write_report(pathlib.Path(argument)))
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
