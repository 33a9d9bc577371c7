"""A task put on a mesh: one program per function, the state donated to each step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from blogjax.train import mesh as meshes
from blogjax.train.per_device import View, check_view, differing_leaves, on_each_device
from blogjax.train.state import abstract_state
from blogjax.train.task import Task

# Streams beside those of the steps, which count up from 0.
INIT, EVALUATE, RENDER = (2**32 - 1 - i for i in range(3))


class Compiled(NamedTuple):
    """The functions of a task jitted for a mesh, and the shapes they work on.

    In a per-device view `differing` tells which leaves of a state are not the same on all devices.
    """

    abstract: Any
    step: Any
    evaluate: Callable[..., Any] | None
    render: Callable[..., Any] | None
    differing: Callable[[Any], Any] | None = None


def compile_task(task: Task, mesh: Mesh, view: View = "jit") -> Compiled:
    """Jits the functions of a task for a mesh.

    They take the root key of the run; each folds in what it needs. `render` never communicates, so
    it sees the global batch in every view.

    Raises:
      ValueError: if the state has no proper `step` (see `abstract_state`), or the task, the mesh
        and the view do not go together (see `per_device.check_view`).
    """
    check_view(task, mesh, view)
    abstract = abstract_state(task, mesh)
    placed = jax.tree.map(lambda x: x.sharding, abstract)
    split, whole = meshes.batch_sharding(mesh), meshes.replicated(mesh)

    def viewed(function: Any, returns_state: bool = False) -> Any:
        if task.axis_name is None or function is None:
            return function
        return on_each_device(
            function, task.axis_name, mesh, view, state=abstract, returns_state=returns_state
        )

    take_step = viewed(task.step, returns_state=True)

    def step(state: Any, batch: Any, key: jax.Array) -> Any:
        return take_step(state, batch, jax.random.fold_in(key, state.step))

    def on_batch(function: Callable[..., Any] | None, stream: int) -> Callable[..., Any] | None:
        if function is None:
            return None

        # The same numbers at every evaluation: what changes is the state alone.
        def call(state: Any, batch: Any, index: jax.Array, key: jax.Array) -> Any:
            key = jax.random.fold_in(jax.random.fold_in(key, stream), index)
            return function(state, batch, key)

        return jax.jit(call, in_shardings=(placed, split, whole, whole), out_shardings=whole)

    differing = None
    if task.axis_name is not None:
        compare = differing_leaves(task.axis_name, mesh, view, abstract)
        one_each = jax.device_put(np.zeros(mesh.size, np.int32), split)
        differing = functools.partial(compare, devices=one_each)

    return Compiled(
        abstract=abstract,
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(placed, split, whole),
            out_shardings=(placed, whole),
        ),
        evaluate=on_batch(viewed(task.evaluate), EVALUATE),
        render=on_batch(task.render, RENDER),
        differing=differing,
    )
