"""What the multi-task task refuses, and the combiners by name."""

import jax
import jax.numpy as jnp
import optax
import pytest

from blogjax.multitask.loss_weighting import WeightedLoss, inverse_loss
from blogjax.multitask.registry import COMBINERS, named_combiner
from blogjax.tasks.multitask import MultitaskOutput, multitask_task


def start(key):
    return {"params": {"w": jnp.ones(2)}}


BATCH = {"weight": jnp.ones(2), "row": jnp.arange(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("a", "a")}, r"names must be different.*\['a', 'a'\]"),
        ({"names": ()}, r"at least one, got \[\]"),
        ({"names": "ab"}, r"sequence of names, one for each task, got 'ab'"),
        ({"names": ("a", 2)}, r"sequence of names.*\('a', 2\)"),
        (
            {"combiner": "min_norm", "weighting": inverse_loss},
            "a combiner or a weighting, got both",
        ),
        ({"combiner": "max_norm"}, r"'max_norm' is unknown; valid: min_norm, .*upgrad"),
        ({"mode": "map"}, r"mode is 'map', but must be one of jacrev, scan"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        multitask_task(start, lambda *_: None, optax.sgd(0.1), **{"names": ("a", "b"), **change})


@pytest.mark.parametrize(
    ("losses", "options", "message"),
    [
        (jnp.ones((2, 3)), {}, r"\(2, 2\) for the tasks p, q, got shape \(2, 3\)"),
        (jnp.ones(2), {}, r"one number per example and task, \(2, 2\).*got shape \(2,\)"),
        (jnp.ones((1, 2)), {}, r"got shape \(1, 2\)"),
        (jnp.ones((2, 2), jnp.int32), {}, r"real numbers, got int32"),
        ((jnp.ones((2, 2)), jnp.ones(2)), {}, r"weights of shape \(2,\) for losses of shape"),
        (
            (jnp.ones((2, 2)), None, {"weight/p": jnp.ones(2)}),
            {},
            r"may not be called \['weight/p'\]",
        ),
        (
            (jnp.ones((2, 2)), None, {"v": (jnp.ones(2), jnp.ones(1))}),
            {},
            r"weights of shape \(1,\) for rows of shape \(2,\)",
        ),
        (
            jnp.ones((2, 2)),
            {"weighting": lambda losses: WeightedLoss(losses, losses)},
            r"a scalar and weights of shape \(2,\), got shapes \(2,\) and \(2,\)",
        ),
        (
            jnp.ones((2, 2)),
            {"combiner": "min_norm", "shared": {"v": True}},
            r"\('v',\)[\s\S]*\('w',\)",
        ),
        (jnp.ones((2, 2)), {"combiner": "min_norm", "shared": "w"}, "must be bools, got 'w'"),
        (
            jnp.ones((2, 2)),
            {"weighting": inverse_loss, "shared": lambda params: True},
            "shared must be bools, got <function",
        ),
        (
            jnp.ones((2, 2)),
            {"weighting": lambda losses: losses},
            "the weighting must return a WeightedLoss, got",
        ),
    ],
)  # fmt: skip
def test_bad_losses_are_refused(losses, options, message):
    parts = losses if isinstance(losses, tuple) else (losses,)
    output = lambda params, ms, batch, key: MultitaskOutput(*parts)  # noqa: E731
    task = multitask_task(start, output, optax.sgd(1.0), names=("p", "q"), **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(task.step, task.init(jax.random.key(0)), BATCH, jax.random.key(0))


def test_losses_must_say_what_they_are():
    losses = lambda params, ms, batch, key: jnp.ones((2, 2)) * params["w"][None]  # noqa: E731
    task = multitask_task(start, losses, optax.sgd(1.0), names=("p", "q"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="losses must return a MultitaskOutput, got"):
        jax.eval_shape(task.step, task.init(jax.random.key(0)), BATCH, jax.random.key(0))


def test_every_combiner_goes_by_its_name():
    assert all(named_combiner(name).__name__ == f"{name}_weights" for name in COMBINERS)
    with pytest.raises(ValueError, match=r"c is 2, but must lie in \[0, 1\)"):
        named_combiner("cagrad", c=2)(jnp.eye(2))
