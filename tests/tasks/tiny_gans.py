"""Small adversarial tasks, whose numbers are known or that have a state."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.core.random import normal, uniform
from blogjax.models.gan import MLPCritic
from blogjax.tasks.adversarial import Generated, adversarial_task
from blogjax.tasks.critics import ConstrainedCritic, constrain

KEY = 7


def batch_of(n=12, seed=0, **arrays):
    x = np.random.default_rng(seed).normal(size=(n, 2)).astype(np.float32)
    rows = {"x": x, "row": np.arange(n, dtype=np.int32), "weight": np.ones(n, np.float32)}
    return {name: jnp.asarray(value) for name, value in {**rows, **arrays}.items()}


def reals(batch, keys):
    return batch["x"]


def linear(params, x):
    return x @ params["w"] + params["b"]


def linear_init(key):
    critic = {"w": jnp.array([0.3, -0.0]), "b": jnp.zeros(())}
    return {"generator": {"params": jnp.array([0.5, -0.0])}, "critic": {"params": critic}}


def shifted(params, model_state, keys, batch, train):
    """Noise from the batch itself, so that an oracle knows it."""
    return Generated(params[None] + batch["z"])


def random_shift(params, model_state, keys, batch, train):
    return Generated(params[None] + normal(keys, (len(keys), 2)))


def linear_task(
    generator_tx=None,
    critic_tx=None,
    *,
    critic=linear,
    generate=random_shift,
    init=linear_init,
    **options,
):
    options = {"loss": "wasserstein", "real": reals, **options}
    txs = (tx or optax.sgd(0.1) for tx in (generator_tx, critic_tx))
    return adversarial_task(init, generate, critic, *txs, **options)


def start(task):
    return jax.jit(task.init)(jax.random.key(0))


def take(task, state, batch, key=KEY):
    return jax.device_get(jax.jit(task.step)(state, batch, jax.random.key(key)))


class Noisy(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, z, train):
        h = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(nn.Dense(3)(z))
        return nn.Dense(2)(jnp.tanh(h))


def normed_task(axis_name=None, **options):
    """A generator with batch statistics and one more of its own; a critic with singular vectors."""
    net, judge = Noisy(axis_name), MLPCritic((3,), activation=jnp.tanh)

    def init(key):
        keys = jax.random.split(key)
        generator = Noisy().init(keys[0], jnp.zeros((2, 3)), train=True)
        return {
            "generator": {**generator, "latents": {"mean": jnp.zeros(3)}},
            "critic": judge.init(keys[1], jnp.zeros((1, 2))),
        }

    def generate(params, model_state, keys, batch, train):
        z = uniform(keys, (len(keys), 3))
        variables = {"params": params, "batch_stats": model_state["batch_stats"]}
        made, new = net.apply(variables, z, train=train, mutable=["batch_stats"])
        return Generated(made, {**new, "latents": {"mean": jnp.mean(z, axis=0)}})

    critic = constrain(lambda params, x: judge.apply({"params": params}, x), "sn")
    options = {"real": reals, "loss": "non_saturating", "axis_name": axis_name, **options}
    return adversarial_task(init, generate, critic, optax.sgd(0.1), optax.sgd(0.1), **options)


def counting_init(key):
    counts = {"stats": {"calls": jnp.zeros((), jnp.int32), "mean": jnp.zeros(())}}
    made = linear_init(key)
    return {**made, "generator": {**made["generator"], **counts, "other": {"k": jnp.ones(())}}}


def counting_task(**options):
    """Linear players with states: how often each was used, and the mean of what was made."""

    def generate(params, model_state, keys, batch, train):
        assert train
        made = params[None] + normal(keys, (len(keys), 2))
        stats = {"calls": model_state["stats"]["calls"] + 1, "mean": jnp.mean(made)}
        return Generated(made, {"stats": stats})

    critic = ConstrainedCritic(
        linear,
        init_state=lambda key, params: jnp.zeros((), jnp.int32),
        reparametrize=lambda params, state: (params, state + 1),
    )
    txs = optax.adam(0.1), optax.adam(0.1)
    return adversarial_task(counting_init, generate, critic, *txs, real=reals, **options)
