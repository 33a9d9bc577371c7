"""The optimisers that the conformance suite runs; a new one is one entry of `CASES`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.optim.accumulate import accumulate
from blogjax.optim.hidden_accumulation import accumulating_adam, accumulating_sgdm
from blogjax.optim.lion import lion
from blogjax.optim.majority_vote import distributed_lion
from blogjax.optim.normalize import centralize_gradients, normalize_gradients
from blogjax.optim.sign_power import scale_by_sign_power
from blogjax.optim.skip_nonfinite import skip_nonfinite
from blogjax.optim.sparse_rows import lazy_rows
from blogjax.optim.stochastic_rounding import stochastic_rounding
from blogjax.optim.tiger import tiger


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An optimiser as a function of its learning rate, and what it promises.

    `lr`: a rate at which it converges. `period`: calls per update. `nan`: where one NaN in the
    gradients is seen in the parameters. `fails`: rows of the table that it does not pass, with the
    reason; the suite insists that it fails them, so that the reason cannot become untrue.
    """

    make: Callable[..., optax.GradientTransformation]
    lr: float = 0.05
    period: int = 1
    nan: Literal["entry", "leaf", "nowhere"] = "entry"
    fails: Mapping[str, str] = dataclasses.field(default_factory=dict)


SHAPES = {"dense": {"kernel": (8, 16), "bias": (16,)}, "embedding": (64, 16)}


def tree(seed: int, dtype: Any = jnp.float32) -> Any:
    """Normal numbers in the shapes of a small network."""
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def one_voter(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Binds the axis over which `tx` communicates, with this one device on it."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        one = jax.tree.map(lambda x: x[None], (updates, state, params))
        out = jax.vmap(lambda args: tx.update(*args), axis_name="voters")(one)
        return jax.tree.map(lambda x: x[0], out)

    return optax.GradientTransformation(tx.init, update)


COPY = {"in_place": "two kernels read the old momentum, so it is copied"}
BRANCH = {"in_place": "what a lax.cond returns is a new buffer"}
UNCHECKED = {
    f"bad_input[{name}]": "not checked"
    for name in ("integer", "complex", "broadcast", "rank", "complex_gradient")
}
DRIFTS = {"dtypes[bfloat16-float32]": "the momentum becomes float32 after one step"}
LEAVES = {"flatten": "looks at leaves or rows, which a flat vector has not"}

CASES = {
    "lion": Case(lambda learning_rate: lion(learning_rate)),
    "lion, bf16 momentum": Case(lambda learning_rate: lion(learning_rate, mu_dtype=jnp.bfloat16)),
    "lion, cautious": Case(
        lambda learning_rate: lion(learning_rate, cautious=0.0), nan="leaf",
        fails=LEAVES | {"in_place": "the mean of the mask needs it in a buffer"},
    ),
    "lion, smooth": Case(lambda learning_rate: lion(learning_rate, mode="smooth"), fails=COPY),
    "tiger": Case(lambda learning_rate: tiger(learning_rate), nan="nowhere", fails=LEAVES),
    "tiger, 2 microbatches": Case(
        lambda learning_rate: tiger(learning_rate, accumulate_steps=2), period=2, nan="nowhere",
        fails=LEAVES,
    ),
    "sgdm, 2 microbatches": Case(
        lambda learning_rate: accumulating_sgdm(learning_rate, accumulate_steps=2), 0.3, period=2
    ),
    "adam, 2 microbatches": Case(
        lambda learning_rate: accumulating_adam(learning_rate, accumulate_steps=2), period=2
    ),
    "sign power": Case(
        lambda learning_rate: optax.chain(
            scale_by_sign_power(optax.linear_schedule(1.0, 0.5, 100)),
            optax.scale_by_learning_rate(learning_rate),
        ),
    ),
    "lazy rows of lion": Case(
        lambda learning_rate: lazy_rows(lion(learning_rate), lambda p: jax.tree.map(
            lambda x: x.shape == SHAPES["embedding"], p)),
    ),
    "accumulate 2, lion": Case(
        lambda learning_rate: accumulate(lion(learning_rate), 2), period=2, nan="nowhere",
        fails=BRANCH,
    ),
    "stochastic rounding, lion": Case(
        lambda learning_rate: stochastic_rounding(lion(learning_rate), jax.random.key(0)),
    ),
    "normalised by leaf, sgd": Case(
        lambda learning_rate: optax.chain(normalize_gradients("leaf"), optax.sgd(learning_rate)),
        0.2, nan="leaf", fails=LEAVES | {"in_place": "the scaled gradient lies in a buffer"},
    ),
    "centralised, sgd": Case(
        lambda learning_rate: optax.chain(centralize_gradients(), optax.sgd(learning_rate)),
        0.2, nan="leaf", fails=LEAVES | {"converges": "keeps the mean of every output's weights"},
    ),
    "skip_nonfinite of lion": Case(
        lambda learning_rate: skip_nonfinite(lion(learning_rate)), nan="nowhere"
    ),
    "majority vote": Case(
        lambda learning_rate: one_voter(distributed_lion(learning_rate, "voters")),
        fails={
            "in_place": "the ballots lie in buffers",
            "per_device[shard_map]": "JAX cannot map an axis inside shard_map with check_vma=True",
        },
    ),
    "optax.lion": Case(
        lambda learning_rate: optax.lion(learning_rate), fails=COPY | UNCHECKED | DRIFTS
    ),
    "optax.adamw": Case(
        lambda learning_rate: optax.adamw(learning_rate), fails=UNCHECKED | DRIFTS
    ),
    "optax.sgd, momentum": Case(
        lambda learning_rate: optax.sgd(learning_rate, momentum=0.9),
        fails=UNCHECKED | DRIFTS | {"bad_input[none]": "not checked"},
    ),
}  # fmt: skip
