"""Part of a checkpoint into another state: fine-tuning, another head, another optimiser.

`Checkpoints.restore` refuses a state that differs in one leaf; here the leaves that fit are taken,
under any mesh, the others stay, and a report says which. The other run's folder is only read. Of
several processes all must call it; what one of them cannot read none of them takes.
"""

import difflib
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from blogjax.train.checkpoint import (
    CheckpointError,
    check_content,
    check_description,
    read_by_all,
)
from blogjax.train.distributed import on_first
from blogjax.train.mesh import sharding_of
from blogjax.train.restore_report import Mismatch, RestoreReport, nodes
from blogjax.train.task import leaf_paths

__all__ = ["Mismatch", "RestoreReport", "restore_partial"]

T = TypeVar("T")


def restore_partial(
    folder: str | pathlib.Path,
    state: Any,
    step: int | None = None,
    *,
    include: str | Sequence[str] = ".*",
    exclude: str | Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    cast: bool = False,
) -> tuple[Any, RestoreReport]:
    r"""Takes from a checkpoint the leaves whose path, shape and dtype are those of `state`.

    The content of what is taken is checked against the checkpoint's fingerprints. Leaves that are
    not taken are those of `state` itself, as they are. Dtypes of 64 bits need `jax_enable_x64`.

    Args:
      folder: a run's working folder or its `checkpoints`; nothing in it is changed.
      state: tree of arrays, or of `ShapeDtypeStruct`, on any mesh; what is taken comes to lie as
        its leaf here does, on the first device where that has no sharding.
      step: which checkpoint; default the newest.
      include: regular expressions of nodes of `state`; one that matches the whole path of a node
        (`params/head`, `.*/bias`) stands for all below it. By default everything is taken that
        fits, the step and the optimiser's moments too; for a new run ask for `"params"`.
      exclude: the same, of nodes to leave as they are.
      rename: `{node of state: node of the checkpoint}`, where they differ; plain paths, the
        longest that fits counts, `""` is the root. `{"params": "ema"}` starts from the average;
        `{"": "params"}` is for a `state` that is nothing but parameters. One node of the
        checkpoint may serve several of the state, each of which gets a copy.
      cast: takes floating leaves of another floating dtype as well, converted to the state's.

    Returns:
      `(state, report)`.

    Raises:
      ValueError: if nothing is taken (with the report), there is no checkpoint of `step`, or a
        pattern or name of `include`, `exclude` or `rename` stands for nothing.
      CheckpointError: if there is no checkpoint at all, or what is read of this one is damaged;
        no other is tried.

    >>> import tempfile
    >>> from blogjax.train.checkpoint import Checkpoints
    >>> folder = tempfile.mkdtemp()
    >>> checkpoints = Checkpoints(folder)
    >>> checkpoints.save(7, {"params": {"trunk": jnp.ones(2), "head": jnp.ones(10)}})
    >>> checkpoints.close()
    >>> state = {"params": {"trunk": jnp.zeros(2), "head": jnp.zeros(3)}}
    >>> state, report = restore_partial(folder, state)
    >>> print(str(report).replace(folder, "runs/a"))
    1 of 2 leaves taken from step 7 of runs/a:
      params/trunk
    mismatched, left as they were:
      params/head: float32[10] in the checkpoint, float32[3] in the state
    >>> state["params"]["trunk"].tolist(), state["params"]["head"].tolist()
    ([1.0, 1.0], [0.0, 0.0, 0.0])
    """
    leaves, structure = jax.tree.flatten(state)
    wanted = dict(zip(leaf_paths(state), leaves, strict=True))
    chosen = _matching("include", include, wanted) - _matching("exclude", exclude, wanted)
    reader = _Reader(folder, step)
    meta = reader.description()
    sources = _sources(wanted, rename or {}, meta["layout"])
    report = _compare(reader, wanted, chosen, sources, meta["layout"], cast)
    if not report.taken:
        raise ValueError(f"nothing to take: {report}")
    read = reader.read({source: wanted[path] for path, source in report.taken.items()}, meta)
    placed = set()
    for path, source in report.taken.items():
        value, leaf = read[source], wanted[path]
        if source in placed:  # steps donate the state: no two of its leaves may be one buffer
            value = jnp.copy(value)
        placed.add(source)
        if value.dtype != leaf.dtype:
            value = value.astype(leaf.dtype)
        wanted[path] = jax.device_put(value, sharding_of(leaf))
    return structure.unflatten(wanted.values()), report


class _Reader:
    """One checkpoint of a folder that may belong to a run still going on: never written to."""

    def __init__(self, folder: str | pathlib.Path, step: int | None):
        import orbax.checkpoint as ocp
        from etils import epath

        self._ocp: Any = ocp
        # A run that goes on saves and deletes: all processes take what the first one saw.
        self.folder, self.steps = on_first(lambda: _checkpoints(pathlib.Path(folder).absolute()))
        if not self.steps:
            raise CheckpointError(f"there is no checkpoint in {self.folder}")
        if step is not None and step not in self.steps:
            raise ValueError(f"no checkpoint of step {step} in {self.folder}; it has {self.steps}")
        self.step: int = self.steps[-1] if step is None else step
        self._items = epath.Path(self.folder) / str(self.step)

    def description(self) -> dict[str, Any]:
        """Its layout and fingerprints."""
        handler = self._ocp.JsonCheckpointHandler()
        return self._sound(
            lambda: check_description(handler.restore(self._items / "meta"), self.step)
        )

    def read(self, leaves: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, jax.Array]:
        """The leaves of these paths, in the dtypes they were saved in, each lying as given."""
        taken = self._sound(lambda: self._read(leaves, meta["layout"]))
        self._sound(lambda: check_content(meta["fingerprints"], taken))
        return taken

    def _read(self, leaves: Mapping[str, Any], layout: Mapping[str, Any]) -> dict[str, jax.Array]:
        ocp, handler = self._ocp, self._ocp.PyTreeCheckpointHandler()
        tree = jax.tree.map(lambda _: 0, handler.metadata(self._items / "state").tree)
        paths, structure = leaf_paths(tree), jax.tree.structure(tree)
        targets: dict[str, Any] = dict.fromkeys(paths, ocp.PLACEHOLDER)
        how: dict[str, Any] = dict.fromkeys(paths, ocp.RestoreArgs())
        for path, leaf in leaves.items():
            shape, name = layout[path]
            dtype = leaf.dtype if str(leaf.dtype) == name else jnp.dtype(name)
            target = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding_of(leaf))
            targets[path] = target
            how[path] = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(
            item=structure.unflatten(targets[p] for p in paths),
            restore_args=structure.unflatten(how[p] for p in paths),
        )
        restored = handler.restore(self._items / "state", args=args)
        found = dict(zip(paths, structure.flatten_up_to(restored), strict=True))
        return {path: found[path] for path in leaves}

    def _sound(self, read: Callable[[], T]) -> T:
        """Tells in one line what is wrong with the checkpoint, and which others there are."""
        try:
            return read_by_all(read)
        except CheckpointError as error:
            others = [step for step in self.steps if step != self.step]
            raise CheckpointError(
                f"checkpoint {self.step} in {self.folder} is damaged: {error}; "
                + (f"step= takes one of the others: {others}" if others else "there is no other")
            ) from error


def _checkpoints(folder: pathlib.Path) -> tuple[pathlib.Path, list[int]]:
    """The folder of a run's checkpoints, and the steps of those that are finished."""
    if (folder / "checkpoints").is_dir():
        folder = folder / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    return folder, sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())


def _compare(
    reader: _Reader,
    wanted: Mapping[str, Any],
    chosen: Collection[str],
    sources: Mapping[str, str],
    layout: Mapping[str, Any],
    cast: bool,
) -> RestoreReport:
    taken, mismatched, missing = {}, {}, {}
    for path, leaf in wanted.items():
        source = sources[path]
        if path not in chosen:
            continue
        if source not in layout:
            missing[path] = source
            continue
        shape, dtype = layout[source]
        # Read without 64 bits it would be cut to 32, and look damaged.
        cut = not dtype.startswith("key<") and jax.dtypes.canonicalize_dtype(dtype) != dtype
        alike = dtype == str(leaf.dtype) or (cast and _floating(dtype) and _floating(leaf.dtype))
        if list(leaf.shape) == shape and alike and not cut:
            taken[path] = source
        else:
            saved = f"{dtype}{shape}{' (to read it: jax_enable_x64)' if cut else ''}"
            mismatched[path] = Mismatch(source, saved, f"{leaf.dtype}{[*leaf.shape]}")
    used = {*taken.values(), *(x.source for x in mismatched.values())}
    return RestoreReport(
        folder=reader.folder,
        step=reader.step,
        taken=taken,
        mismatched=mismatched,
        missing=missing,
        excluded=tuple(path for path in wanted if path not in chosen),
        left_over=tuple(path for path in layout if path not in used),
    )


def _floating(dtype: Any) -> bool:
    # A key's dtype has a name that is no dtype's.
    return not str(dtype).startswith("key<") and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)


def _matching(name: str, patterns: str | Sequence[str], paths: Iterable[str]) -> set[str]:
    matched = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None
        found = {path for path in paths if any(map(compiled.fullmatch, nodes(path)))}
        if not found:
            raise ValueError(
                f"{name}: {pattern!r} matches nothing in the state{_near(pattern, paths)}"
            )
        matched |= found
    return matched


def _sources(
    wanted: Iterable[str], rename: Mapping[str, str], layout: Iterable[str]
) -> dict[str, str]:
    for here, there in rename.items():
        for node, paths, where in ((here, wanted, "state"), (there, layout, "checkpoint")):
            if node and not any(node in nodes(path) for path in paths):
                raise ValueError(f"rename: there is no {node!r} in the {where}{_near(node, paths)}")
    result = {}
    for path in wanted:
        ends = [node for node in ("", *nodes(path)) if node in rename]
        parts = [rename[ends[-1]], path[len(ends[-1]) :].strip("/")] if ends else [path]
        result[path] = "/".join(part for part in parts if part)
    return result


def _near(name: str, paths: Iterable[str]) -> str:
    known = list(dict.fromkeys(node for path in paths for node in nodes(path)))
    near = difflib.get_close_matches(name, known, n=3)
    top = sorted(node for node in known if "/" not in node)
    return f"; did you mean {', '.join(map(repr, near))}?" if near else f"; at its top are {top}"
