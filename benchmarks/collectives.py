"""The collectives of a compiled program, read from its HLO, and what a ring sends for each."""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_CALL = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_BITS = {"pred": 8}


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
      kind: one of `KINDS`.
      bytes: of its results on one device.
      group: how many devices take part together.
      times: how often it runs in one call of the program.
    """

    kind: str
    bytes: int
    group: int
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes that leave one device if it runs on a ring, all runs together.

        Of results of S bytes over n devices: all-reduce `2 (n - 1) / n S`, all-gather and
        all-to-all `(n - 1) / n S`, reduce-scatter `(n - 1) S`, collective-permute S.
        """
        n = self.group
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
        }
        return self.times * self.bytes * share.get(self.kind, (n - 1) / n)


def collectives(hlo: str, devices: int, *, branch: int = 0) -> list[Collective]:
    """Reads the collectives that a run of a program meets, those in loops as often as they turn.

    Args:
      hlo: `compiled.as_text()`.
      devices: that the program runs on; the group of a collective that names none.
      branch: which branch every conditional takes; 0 is False.

    Raises:
      ValueError: for asynchronous collectives, whose results hold their operands too, and if there
        is one in a loop of which XLA does not tell how often it turns.

    >>> text = '''ENTRY %main () -> f32[] {
    ...   %sum = f32[6]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}
    ... }'''
    >>> collectives(text, 4)
    [Collective(kind='all-reduce', bytes=24, group=2, times=1)]
    """
    parts = re.split(r"^(?=(?:ENTRY )?%[\w.-]+ \()", hlo, flags=re.M)
    bodies = {m[1]: part for part in parts if (m := re.match(r"(?:ENTRY )?%([\w.-]+) ", part))}

    @functools.cache
    def inside(name: str) -> tuple[Collective, ...]:
        found: list[Collective] = []
        for line in bodies[name].splitlines():
            if call := _CALL.search(line):
                if call[3]:
                    raise ValueError(f"asynchronous: {line.strip()[:100]}")
                found.append(Collective(call[2], _bytes(call[1]), _group(line, devices)))
            callees = re.findall(r"\b(?:calls|to_apply|body)=%([\w.-]+)", line)
            inner = [c for callee in _taken(line, branch) + callees for c in inside(callee)]
            times = 1
            if inner and " while(" in line:
                turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                if turns is None:
                    raise ValueError(f"a loop of unknown length: {line.strip()[:100]}")
                times = int(turns[1])
            found += [c._replace(times=c.times * times) for c in inner]
        return tuple(found)

    entry = re.search(r"^ENTRY %([\w.-]+)", hlo, flags=re.M)
    return list(inside(entry[1])) if entry else []


def _taken(line: str, branch: int) -> list[str]:
    if found := re.search(r"branch_computations=\{(.*?)\}", line):
        return [found[1].split(", ")[branch].lstrip("%")]
    if found := re.search(r"true_computation=%([\w.-]+), false_computation=%([\w.-]+)", line):
        return [found[1 if branch else 2]]
    return []


def _bytes(results: str) -> int:
    total = 0
    for dtype, shape in re.findall(r"([a-z]+\d*)\w*\[([\d,]*)\]", results):
        bits = _BITS.get(dtype) or int(re.sub(r"\D", "", dtype))
        total += math.prod(int(d) for d in shape.split(",") if d) * bits // 8
    return total


def _group(line: str, devices: int) -> int:
    """The three ways of XLA to write groups: lists, `[groups, size]<=[...]`, axes of a mesh."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\S*)? ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return devices


def sent_by_kind(found: Iterable[Collective]) -> dict[str, float]:
    """Bytes that leave one device, by kind of collective."""
    total: Counter[str] = Counter()
    for collective in found:
        total[collective.kind] += collective.sent  # type: ignore
    return dict(total)
