"""What an experiment finds: claims with intervals committed beforehand, and their verdicts."""

import dataclasses
import json
import math
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from blogjax.train.distributed import is_first, on_first

Verdict = Literal["holds", "fails", "undecided", "not judged"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of a post, as measured.

    Attributes:
      statement: in words.
      source: the post or paper that says so.
      metric: what `value` is, with its unit.
      value: mean over the seeds.
      spread: standard deviation over the seeds (n - 1), None for a single seed.
      seeds: how many runs.
      low, high: the interval in which the claim holds; infinite where it has no edge.
      verdict: see `judge`.
    """

    statement: str
    source: str
    metric: str
    value: float
    spread: float | None
    seeds: int
    low: float
    high: float
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class Result:
    """What `run` returns.

    Attributes:
      claims: in the order in which they are to be read.
      seeds: the seeds that were run.
      measured: further numbers worth keeping, `{name: number, list or dict}`.
      pictures: names of picture files in the work folder, the most telling first.
    """

    claims: Sequence[Claim]
    seeds: Sequence[int]
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pictures: Sequence[str] = ()


def judge(
    statement: str,
    source: str,
    metric: str,
    values: Sequence[float],
    *,
    low: float = -math.inf,
    high: float = math.inf,
    near: float,
    judged: bool = True,
) -> Claim:
    """Compares the mean over seeds with the claim's interval.

    The claim `holds` inside the interval and `fails` outside, but is `undecided` where an edge is
    closer than two spreads, or, with one seed, closer than `near`. NaN fails.

    Args:
      statement, source, metric: see `Claim`.
      values: one per seed.
      low, high: the interval, edges included.
      near: twice the spread to expect between seeds; used where a single seed shows none.
      judged: False leaves the verdict open, for runs too small to tell.

    Raises:
      ValueError: without values, or if the interval is empty.

    >>> judge("small", "a post", "error", [0.1], high=1.0, near=0.2).verdict
    'holds'
    >>> judge("small", "a post", "error", [0.9], high=1.0, near=0.2).verdict
    'undecided'
    >>> judge("small", "a post", "error", [2.0, 2.1, 1.9], high=1.0, near=0.2).verdict
    'fails'
    """
    if not values:
        raise ValueError(f"no values for the claim {statement!r}")
    if not low <= high:
        raise ValueError(f"the interval of {statement!r} is empty: low={low}, high={high}")
    value = statistics.fmean(values)
    spread = None
    if len(values) > 1:  # stdev raises where a value is not finite
        spread = statistics.stdev(values) if math.isfinite(value) else math.nan
    margin = near if spread is None else 2 * spread
    verdict: Verdict
    if not judged:
        verdict = "not judged"
    elif math.isnan(value):
        verdict = "fails"
    elif min(abs(value - low), abs(value - high)) < margin:
        verdict = "undecided"
    else:
        verdict = "holds" if low <= value <= high else "fails"
    return Claim(statement, source, metric, value, spread, len(values), low, high, verdict)


def _finite(tree: Any) -> Any:
    """JSON has neither infinity nor NaN: both become null."""
    if isinstance(tree, Mapping):
        return {k: _finite(v) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(v) for v in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return None
    return tree


def write_json(path: pathlib.Path, record: Any) -> None:
    """Writes the whole file or nothing; of several processes the first one does."""
    if not is_first():
        return
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(_finite(record), indent=2) + "\n")
    os.replace(temporary, path)


def measured_once(path: pathlib.Path, measure: Callable[[], Any]) -> Any:
    """What `measure()` gives, kept in a file and read back from there the next time.

    Args:
      path: of the file, JSON.
      measure: called if there is no such file; on all processes, of whose results the first one's
        counts.

    Returns:
      What was measured, as JSON has it: NaN is None.
    """
    if not on_first(path.exists):
        measured = measure()
        on_first(lambda: write_json(path, measured))
    return on_first(lambda: json.loads(path.read_text()))


def claims_of(record: Mapping[str, Any]) -> list[Claim]:
    """The claims of a `result.json`."""
    claims = []
    for fields in record["claims"]:
        low = -math.inf if fields["low"] is None else fields["low"]
        high = math.inf if fields["high"] is None else fields["high"]
        value = math.nan if fields["value"] is None else fields["value"]
        claims.append(Claim(**{**fields, "low": low, "high": high, "value": value}))
    return claims


def interval(claim: Claim) -> str:
    """The interval as people read it.

    >>> interval(judge("", "", "", [0.0], high=1.0, near=0.0))
    'at most 1'
    """
    if math.isinf(claim.low):
        return "any" if math.isinf(claim.high) else f"at most {claim.high:g}"
    if math.isinf(claim.high):
        return f"at least {claim.low:g}"
    return f"{claim.low:g} to {claim.high:g}"


def measured_value(claim: Claim) -> str:
    """Value and spread."""
    return f"{claim.value:.3g}" + ("" if claim.spread is None else f" ± {claim.spread:.2g}")


def print_claims(claims: Sequence[Claim]) -> None:
    """Prints the table of claims."""
    from rich.console import Console
    from rich.table import Table

    colours = {"holds": "green", "fails": "red", "undecided": "yellow", "not judged": "dim"}
    table = Table(show_lines=False, pad_edge=False, box=None, padding=(0, 2, 0, 0))
    table.add_column("claim", ratio=1)
    table.add_column("measured", no_wrap=True)
    table.add_column("wanted", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for claim in claims:
        colour = colours[claim.verdict]
        table.add_row(
            claim.statement,
            measured_value(claim),
            interval(claim),
            f"[{colour}]{claim.verdict}[/{colour}]",
        )
    Console().print(table)
