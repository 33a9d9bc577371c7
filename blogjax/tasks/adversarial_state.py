"""What an adversarial task holds, and the small functions on it.

Apart from `adversarial.py` so that the task itself can be read in one piece.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.core import unfreeze

from blogjax.core.broadcasting import per_example
from blogjax.core.random import Key
from blogjax.train.task import Batch

PLAYERS = ("critic", "generator")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdversarialState:
    """State of an `adversarial_task`; the dicts have the keys `critic` and `generator`.

    Attributes:
      step: int32 `[]`, calls of `step`, skipped ones included.
      skipped: int32 `[]`, how many of them were skipped.
      params: the parameters of both.
      model_state: the generator's other variables, such as batch statistics, and the state of the
        critic's constraint, such as singular vectors.
      opt_state: the states of both optimisers.
      ema: `{"params": ..., "model_state": ...}`, averages of the generator's, float32 or better;
        None without `ema_decay`.
    """

    step: jax.Array
    skipped: jax.Array
    params: dict[str, Any]
    model_state: dict[str, Any]
    opt_state: dict[str, Any]
    ema: Any

    @property
    def averaged_params(self) -> Any:
        """The generator's parameters to evaluate and to sample with: the average if any."""
        return self.params["generator"] if self.ema is None else self.ema["params"]

    @property
    def averaged_model_state(self) -> Any:
        """The generator's model state that goes with `averaged_params`."""
        return self.model_state["generator"] if self.ema is None else self.ema["model_state"]


class Generated(NamedTuple):
    """What a generator returns.

    Attributes:
      examples: `[B, ...]`, of the shape of real ones.
      model_state: the new model state; None leaves it as it was.

    Two linen networks, the generator with batch norm, as `adversarial_task` wants them:

    >>> import optax
    >>> from blogjax.core.random import normal
    >>> from blogjax.models.gan import DCGANCritic, DCGANGenerator
    >>> from blogjax.tasks.adversarial import adversarial_task
    >>> generator, judge = DCGANGenerator(channels=1, widths=(8, 4)), DCGANCritic((4, 8))
    >>> def init(key):
    ...     keys = jax.random.split(key)
    ...     return {
    ...         "generator": generator.init(keys[0], jnp.zeros((1, 16)), train=True),
    ...         "critic": judge.init(keys[1], jnp.zeros((1, 8, 8, 1))),
    ...     }
    >>> def generate(params, model_state, keys, batch, train):
    ...     variables, z = {"params": params, **model_state}, normal(keys, (len(keys), 16))
    ...     if not train:
    ...         return Generated(generator.apply(variables, z, train=False))
    ...     return Generated(*generator.apply(variables, z, train=True, mutable=["batch_stats"]))
    >>> def critic(params, x):
    ...     return judge.apply({"params": params}, x)
    >>> task = adversarial_task(init, generate, critic, optax.adam(2e-4), optax.adam(2e-4))
    >>> list(jax.eval_shape(task.init, jax.random.key(0)).model_state["generator"])
    ['batch_stats']
    """

    examples: jax.Array
    model_state: Any = None


# generate(params, model_state, keys [B], batch, train) -> Generated
Generate = Callable[[Any, Any, Key, Batch, bool], Generated]


def checked_networks(variables: Any) -> dict[str, dict[str, Any]]:
    """Refuses an `init` that does not give a generator and a critic without state of its own.

    Raises:
      ValueError: naming what there is and what there should be.

    >>> checked_networks({"generator": {"params": 1}, "critic": {"params": 2, "batch_stats": 3}})
    Traceback (most recent call last):
        ...
    ValueError: the critic may have nothing but 'params', got ['batch_stats'] too: ...
    """

    def names(tree: Any) -> list[str] | str:
        return sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__

    if names(variables) != sorted(PLAYERS):
        raise ValueError(f"init must return networks {PLAYERS}, got {names(variables)}")
    for name in PLAYERS:
        if not isinstance(variables[name], Mapping) or "params" not in variables[name]:
            raise ValueError(f"the {name} needs 'params', got {names(variables[name])}")
    more = sorted(set(variables["critic"]) - {"params"})
    if more:
        raise ValueError(
            f"the critic may have nothing but 'params', got {more} too: with batch statistics its "
            "output for one example would depend on the others"
        )
    return {name: unfreeze(dict(variables[name])) for name in PLAYERS}


def checked_real(x: jax.Array) -> jax.Array:
    """Refuses integers: pixels of 0 to 255 would be compared with generated ones of -1 to 1.

    Raises:
      TypeError: if the examples are not floating.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"real examples are {x.dtype}, but must be floating, as `real_images` makes them"
        )
    return x


def checked_generated(out: Any) -> Generated:
    """Refuses what is not a `Generated`.

    Raises:
      TypeError: naming what it is.
    """
    if not isinstance(out, Generated):
        raise TypeError(f"generate must return a Generated, got {type(out).__name__}")
    return out


def checked_condition(given: Any) -> tuple[Any, ...]:
    """Refuses what is not a tuple: a bare array would be taken apart row by row.

    Raises:
      TypeError: naming what it is.
    """
    if not isinstance(given, tuple):
        raise TypeError(f"condition must return a tuple of arrays, got {type(given).__name__}")
    return given


def without_padding(batch: Batch) -> dict[str, jax.Array]:
    """Puts zeros into rows of weight 0: the derivative by what is there would be 0 times NaN.

    >>> rows = {"row": jnp.array([0, 7]), "weight": jnp.array([1.0, 0.0])}
    >>> out = without_padding({**rows, "x": jnp.array([2.0, jnp.nan])})
    >>> out["x"].tolist(), out["row"].tolist()
    ([2.0, 0.0], [0, 7])
    """
    padding = batch["weight"] == 0
    return {
        name: x if name == "row" else jnp.where(per_example(padding, x), jnp.zeros_like(x), x)
        for name, x in batch.items()
    }


def dealt(batch: Batch, hands: int) -> dict[str, jax.Array]:
    """Deals row i to hand i modulo `hands`: `[B, ...]` becomes `[hands, B / hands, ...]`.

    Equal blocks of rows, as devices have them, deal themselves: no row has to move.

    Raises:
      ValueError: if the rows do not divide.

    >>> dealt({"weight": jnp.arange(6.0)}, 2)["weight"].tolist()
    [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    """
    size = batch["weight"].shape[0]
    if size % hands:
        raise ValueError(
            f"a batch of {size} rows (of each device, where there is an axis_name) does not divide "
            f"among critic_steps={hands}"
        )
    return {
        name: jnp.swapaxes(jnp.reshape(x, (size // hands, hands, *x.shape[1:])), 0, 1)
        for name, x in batch.items()
    }


def widened(x: jax.Array) -> jax.Array:
    """What an average of `x` begins with: a copy of `x`, float32 or better where it is floating.

    A copy, since nobody may give away a state in which one buffer stands twice.
    """
    floating = jnp.issubdtype(x.dtype, jnp.inexact)
    return jnp.array(x, jnp.promote_types(x.dtype, jnp.float32) if floating else x.dtype)


def towards(average: jax.Array, x: jax.Array, rate: jax.Array, skip: jax.Array) -> jax.Array:
    """Moves an average to `x`, by a share of the way, unless `skip`; a counter becomes that of `x`.

    >>> towards(jnp.zeros(2), jnp.array([1.0, 8.0]), jnp.array(0.25), jnp.array(False)).tolist()
    [0.25, 2.0]
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    # -0.0 leaves every number as it was, in place; see `skip_nonfinite`.
    way = rate.astype(average.dtype) * (x.astype(average.dtype) - average)
    return average + jnp.where(skip, -0.0, way)


def first_at_fault(critic: jax.Array, generator: jax.Array) -> jax.Array:
    """Tells which leaves of the first bad update were bad; what comes after it is bad as well.

    Args:
      critic: bool `[updates, leaves]`.
      generator: bool `[leaves]`, of the update that comes last.

    Returns:
      bool, the critic's leaves and the generator's.

    >>> first_at_fault(jnp.array([[False, False], [True, False]]), jnp.array([True])).tolist()
    [True, False, False]
    """
    fails = jnp.any(critic, axis=1)
    first = jnp.cumsum(fails) == fails
    of_critic = jnp.any(critic & first[:, None], axis=0)
    return jnp.append(of_critic, generator & ~jnp.any(fails))


def kept_dtype(new: Any, old: Any) -> jax.Array:
    """Returns `new` in the dtype of `old`: optax widens momenta of bfloat16 in the first step."""
    old, new = jnp.asarray(old), jnp.asarray(new)
    return new if new.dtype == old.dtype else new.astype(old.dtype)


def choose(skip: jax.Array, old: Any, new: Any) -> jax.Array:
    """Returns `old` where `skip` is set, to the bit, else `new`; typed keys too.

    >>> choose(jnp.array(True), jnp.float32(1.0), jnp.float32(jnp.nan)).tolist()
    1.0
    """
    old, new = jnp.asarray(old), jnp.asarray(new)
    if jnp.issubdtype(new.dtype, jax.dtypes.prng_key):
        # As data: the check for keys used twice cannot know that one of the two is thrown away.
        data = jnp.where(skip, jax.random.key_data(old), jax.random.key_data(new))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(new))
    return jnp.where(skip, old, new)
