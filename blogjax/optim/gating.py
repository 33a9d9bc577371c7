"""An update that happens or does not, in place, without a branch.

What: `update_unless`, with which `skip_nonfinite` throws an update away.
Post: none; a part of the base on which every post's training stands.
Equations: (u, s') = update(s); if skip then (-0.0, s) else (u, s').
Differences from the usual ways: a `lax.cond` returns new buffers, and copies state and updates on
  the way in and out, in every step. Selects after the update copy too, since the kernel of the
  parameters then reads the old state beside the kernel that overwrites it. Here whatever in the
  update follows from the new state reads it after the select, and so from the buffer in which it
  is stored. If that changes it, the step is skipped and the result thrown away.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from blogjax.optim.checks import check_same


def update_unless(
    skip: jax.Array, update: Callable[[], tuple[Any, Any]], state: Any
) -> tuple[Any, Any]:
    """Returns `update()`, or where `skip` is set updates of -0.0 and the state as it was.

    The update is computed in either case. What it computes in a skipped step, NaN or other, reaches
    neither result. -0.0 is the number that changes no float to which it is added. An update with
    side effects or `while` loops, which must not see old and new state mixed, gets its selects at
    the end, and XLA its copies.

    Args:
      skip: bool `[]`.
      update: returns updates and the new state, as the `update` of a transformation does.
      state: the old state: a tree of numbers, typed keys and the like, in any dtype.

    Returns:
      Updates and state, with the structure, shapes and dtypes of those that `update` returns.

    Raises:
      ValueError: if the new state has another structure or other shapes than the old one.

    >>> import jax.numpy as jnp
    >>> for skip in (False, True):
    ...     state = jnp.float32(2.0)
    ...     updates, state = update_unless(jnp.array(skip), lambda: (3 * state, state + 1), state)
    ...     print(updates, state)
    6.0 3.0
    -0.0 2.0
    """
    closed, shapes = jax.make_jaxpr(update, return_shape=True)()
    check_same(shapes[1], state, "new state", "state")
    # The tracers that `update` closes over are the constants of its program.
    values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else values[atom]

    def unless_skipped(new: Any, old: Any) -> jax.Array:
        if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
            # As data: the check for keys used twice cannot know that the update is thrown away.
            data = jnp.where(skip, jax.random.key_data(old), jax.random.key_data(new))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(new))
        old = jnp.asarray(old)
        return jnp.where(skip, old if old.dtype == new.dtype else old.astype(new.dtype), new)

    outputs = closed.jaxpr.outvars
    new_updates = outputs[: len(jax.tree.leaves(shapes[0]))]
    new_state = list(zip(outputs[len(new_updates) :], jax.tree.leaves(state), strict=True))
    # A number that is in the state twice belongs to two old ones: nobody may read it as either.
    times = collections.Counter(id(var) for var, _ in new_state)
    early = not (closed.jaxpr.effects or _has_while(closed.jaxpr))
    olds = {id(var): old for var, old in new_state if early and times[id(var)] == 1}
    selected = set()
    for equation in closed.jaxpr.eqns:
        for var, value in _evaluate(closed.jaxpr, equation, read):
            if id(var) in olds:
                value = unless_skipped(value, olds[id(var)])
                selected.add(id(var))
            values[var] = value

    updates = [unless_skipped(jnp.asarray(read(var)), -0.0) for var in new_updates]
    kept = [
        read(var) if id(var) in selected else unless_skipped(jnp.asarray(read(var)), old)
        for var, old in new_state
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), updates + kept)


def _has_while(jaxpr: jex.Jaxpr) -> bool:
    """Whether a `while` stands anywhere in the program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            return True
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(part, "jaxpr", part)
                if isinstance(inner, jex.Jaxpr) and _has_while(inner):
                    return True
    return False


def _evaluate(jaxpr: jex.Jaxpr, equation: Any, read: Callable[[Any], Any]) -> Any:
    """The variables that one equation of a program assigns, and their values."""
    used = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, jex.Literal)))
    made = [v for v in equation.outvars if not isinstance(v, jex.DropVar)]
    alone = jaxpr.replace(
        constvars=(), invars=used, outvars=made, eqns=[equation], effects=equation.effects
    )
    return zip(made, jex.jaxpr_as_fun(jex.ClosedJaxpr(alone, ()))(*map(read, used)), strict=True)
