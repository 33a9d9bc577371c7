"""What a partial restore took and what not, as data and as text for people."""

import dataclasses
import pathlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple


class Mismatch(NamedTuple):
    """A leaf that is in both, but not alike: where it lies in the checkpoint, and both layouts."""

    source: str
    saved: str
    wanted: str


@dataclasses.dataclass(frozen=True)
class RestoreReport:
    """What `restore_partial` did. `str` of it is for people: whole subtrees are one line.

    Attributes:
      folder: of the checkpoints.
      step: of the one read.
      taken: path in the state to path in the checkpoint.
      mismatched: by path in the state; shape or dtype differ, and it stayed as it was.
      missing: path in the state to the path that the checkpoint does not have; stayed as it was.
      excluded: paths in the state that were not asked for.
      left_over: paths in the checkpoint that went nowhere.
    """

    folder: pathlib.Path
    step: int
    taken: Mapping[str, str]
    mismatched: Mapping[str, Mismatch]
    missing: Mapping[str, str]
    excluded: tuple[str, ...]
    left_over: tuple[str, ...]

    def __str__(self) -> str:
        state = [*self.taken, *self.mismatched, *self.missing, *self.excluded]
        sources = [x.source for x in self.mismatched.values()]
        checkpoint = {*self.taken.values(), *sources, *self.left_over}
        mismatched = [
            f"{_arrow(path, x.source)}: {x.saved} in the checkpoint, {x.wanted} in the state"
            for path, x in self.mismatched.items()
        ]
        sections = {
            "mismatched, left as they were": mismatched,
            "missing in the checkpoint, left as they were": _grouped(self.missing, state),
            "not asked for, left as they were": _grouped(self.excluded, state),
            "left over in the checkpoint": _grouped(self.left_over, checkpoint),
        }
        head = f"{len(self.taken)} of {len(state)} leaves taken"
        lines = [f"{head} from step {self.step} of {self.folder}{':' if self.taken else ''}"]
        lines += _shortened(_grouped(self.taken, state))
        for title, section in sections.items():
            lines += [f"{title}:", *_shortened(section)] if section else []
        return "\n".join(lines)


def nodes(path: str) -> list[str]:
    """The nodes on the way to a leaf, from the top, with the leaf itself.

    >>> nodes("params/head/bias")
    ['params', 'params/head', 'params/head/bias']
    """
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts) + 1)]


def _grouped(paths: Collection[str] | Mapping[str, str], everything: Iterable[str]) -> list[str]:
    """A line for each highest node all of whose leaves are in `paths`, and from one place."""
    inside, total = (Counter(n for p in ps for n in nodes(p)) for ps in (paths, everything))
    places: dict[str, set[str | None]] = defaultdict(set)
    for path in paths:
        source = paths[path] if isinstance(paths, Mapping) else path
        for node in nodes(path):
            places[node].add(_stem(source, path[len(node) :]))
    lines = {}
    for path in paths:
        whole = (n for n in nodes(path) if inside[n] == total[n] and places[n] != {None})
        node = next(n for n in whole if len(places[n]) == 1)
        (place,) = places[node]
        leaves = "leaf" if total[node] == 1 else "leaves"
        count = f" ({total[node]} {leaves})" if node != path else ""
        lines[_arrow(node, place or "the root") + count] = None
    return [*lines]


def _stem(source: str, rest: str) -> str | None:
    """Where the node of a leaf comes from; None if it has another place in its node there."""
    if not rest:
        return source
    if f"/{source}".endswith(rest):
        return source[: max(len(source) - len(rest), 0)]
    return None


def _arrow(path: str, source: str) -> str:
    return path if path == source else f"{path} <- {source}"


def _shortened(lines: list[str], limit: int = 20) -> list[str]:
    more = [f"and {len(lines) - limit} more"] if len(lines) > limit else []
    return [f"  {line}" for line in lines[:limit] + more]
