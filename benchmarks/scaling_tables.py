"""The tables of docs/scaling.md, from the record of benchmarks.scaling."""

from collections.abc import Mapping, Sequence
from typing import Any

OPTIMIZERS = {"adamw": "AdamW", "lion": "Lion", "vote": "majority vote"}
DTYPES = {"float32": "float32", "mixed": "bfloat16, parameters float32", "bfloat16": "bfloat16"}
NAMES = ["network", "parameters", "dtype", "optimiser", "data x fsdp", "batch"]


def document(text: str, record: Mapping[str, Any]) -> str:
    """The document with its tables written anew.

    Raises:
      ValueError: if a marker is missing.
    """
    parts = {"checks of sent bytes": sent_checks(record), "checks of memory": memory_checks(record)}
    for name, predicted in record["predicted"].items():
        parts[f"memory of {name}"] = memory_table(predicted)
        parts[f"bytes sent by {name}"] = sent_table(predicted)
    for name, body in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"scaling.md lacks the markers {begin} ... {end}")
        text = f"{head}{begin}\n{body}\n{end}{tail}"
    return text


def memory_table(predicted: Mapping[str, Any]) -> str:
    """Parameters, gradients, moments and average together, on a device."""
    layouts = {"64 x 1": "data-parallel", "8 x 8": "fsdp of 8", "1 x 64": "fsdp of 64"}
    rows = []
    for precision in ("float32", "bfloat16"):
        for optimizer in ("adamw", "lion"):
            found = _rows(predicted, precision, optimizer)
            cells = [si(sum(found[layout]["memory"].values())) for layout in layouts]
            rows.append([DTYPES[precision], OPTIMIZERS[optimizer], *cells])
    return _table(["parameters in", "optimiser", *layouts.values()], rows)


def sent_table(predicted: Mapping[str, Any]) -> str:
    """Bytes that a device sends in a step."""
    full, half = (_rows(predicted, dtype, "lion") for dtype in ("float32", "bfloat16"))
    votes = _rows(predicted, "float32", "vote")
    rows = []
    for layout in full:
        by_reduce = [si(sum(found[layout]["sent"].values())) for found in (full, half)]
        by_all = si(sum(full[layout]["sent_without_reduce_scatter"].values()))
        vote = si(sum(votes[layout]["sent"].values())) if layout in votes else "-"
        split = not layout.endswith(" x 1")
        rows.append([layout, *by_reduce, by_all if split else "-", vote])
    header = ["data x fsdp", "float32", "bfloat16", "float32, no reduce-scatter", "majority vote"]
    return _table(header, rows)


def sent_checks(record: Mapping[str, Any]) -> str:
    """Bytes sent, predicted and read."""
    rows = []
    for entry in record["read"]:
        if entry["case"]["batch"] == 0.5:  # for the memory alone
            continue
        expected = sum(entry["predicted"]["sent"].values())
        split, end = (
            sum(kind["sent"] for kind in entry[stage].values())
            for stage in ("partitioned", "compiled")
        )
        kinds = ", ".join(
            f"{kind['number']:.0f} {name}"
            for name, kind in sorted(entry["compiled"].items(), key=lambda x: -x[1]["sent"])
        )
        rows.append([*_names(entry), si(expected), si(split), off(split, expected), si(end), kinds])
    header = [*NAMES, "predicted", "partitioned", "off by", "at the end", "collectives, at the end"]
    return _table(header, rows)


def memory_checks(record: Mapping[str, Any]) -> str:
    """State, predicted and read, and what was only read."""
    rows = []
    for entry in record["read"]:
        of, read = entry["predicted"]["memory"], entry["memory"]
        expected = of["parameters"] + of["moments"] + of["average"]
        state = [si(expected), si(read["aliased"]), off(read["aliased"], expected)]
        rest = [si(size) for size in (of["gradients"], read["temporaries"], read["peak"])]
        rows.append([*_names(entry), *state, *rest])
    found = ["state predicted", "state read", "off by", "gradients predicted"]
    header = [*NAMES, *found, "temporaries read", "peak read"]
    return _table(header, rows)


def _rows(predicted: Mapping[str, Any], precision: str, optimizer: str) -> dict[str, Any]:
    return {
        row["layout"]: row
        for row in predicted["rows"]
        if (row["precision"], row["optimizer"]) == (precision, optimizer)
    }


def _names(entry: Mapping[str, Any]) -> list[str]:
    case = entry["case"]
    name = {"ddpm": "DDPM", "stack": "stack"}[case["network"]]
    return [
        f"{name}, {case['size']}",
        f"{entry['parameters'] / 1e6:.1f} M",
        DTYPES[case["precision"]],
        OPTIMIZERS[case["optimizer"]],
        case["layout"],
        f"{entry['batch']}",
    ]


def si(size: float) -> str:
    """Bytes with three digits, in powers of 1000.

    >>> si(7049441294), si(230160), si(0)
    ('7.05 GB', '230 kB', '0 B')
    """
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if size >= 10**power * 0.9995:
            scaled = size / 10**power
            digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{digits}f} {unit}"
    return f"{size:.0f} B"


def off(read: float, predicted: float) -> str:
    """How far what was read is from the prediction, in percent.

    >>> off(101, 100), off(1000001, 1000000)
    ('+1.00%', '<0.01%')
    """
    share = read / predicted - 1
    return "<0.01%" if abs(share) < 1e-4 else f"{share:+.2%}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
