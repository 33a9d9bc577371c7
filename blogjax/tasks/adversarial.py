"""The adversarial task: a generator and a critic, two losses, two optimisers.

What: `adversarial_task` turns two networks and a game into a `Task`. One step is `critic_steps`
  updates of the critic, each on rows of its own, then one of the generator.
Post: https://kexue.fm/archives/8757
Paper: Arjovsky et al. 2017, arXiv:1701.07875, algorithm 1.
Equations: for k < n: theta <- theta + tx_D(grad_theta mean_i [real(D(x_i)) + fake(D(G(z_i)))
  + penalty_i]) over the rows i = k mod n, projected; then phi <- phi + tx_G(grad_phi mean_j
  generator(D(G(z_j)))); ema' = ema + (1 - d)(phi - ema), d = min(decay, (1 + t)/(10 + t)).
Differences from the post: it describes critics, not the loop around them. Differences from the
  usual loops: the critic's turn changes nothing of the generator, its batch statistics included.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.core import unfreeze

from blogjax.core.broadcasting import per_example
from blogjax.core.masked import masked_sum
from blogjax.core.norms import global_norm
from blogjax.core.random import Key, fold_in_rows, split_keys
from blogjax.gradients.input_gradient import check_rows
from blogjax.losses.adversarial import (
    AdversarialLoss,
    LossName,
    critic_loss,
    game,
    generator_loss,
)
from blogjax.optim.checks import check_same
from blogjax.optim.gating import update_unless
from blogjax.optim.skip_nonfinite import nonfinite_leaves
from blogjax.tasks.adversarial_state import (
    PLAYERS,
    AdversarialState,
    Generate,
    Generated,
    checked_condition,
    checked_generated,
    checked_networks,
    checked_real,
    choose,
    dealt,
    first_at_fault,
    kept_dtype,
    towards,
    widened,
    without_padding,
)
from blogjax.tasks.critics import ConstrainedCritic, Score, unconstrained
from blogjax.tasks.denoising import scaled
from blogjax.tasks.gradient import PARAMETERS, ema_decay_with_warmup
from blogjax.train.task import Batch, Metrics, NonfiniteLeaves, Sums, Task, leaf_paths

__all__ = ["AdversarialState", "Generate", "Generated", "adversarial_task", "real_images"]


def real_images(batch: Batch, keys: Key) -> jax.Array:
    """Returns the batch's `image`, uint8 scaled to [-1, 1]; how `adversarial_task` reads a batch.

    >>> batch = {"image": jnp.full((1, 2, 2, 1), 255, jnp.uint8)}
    >>> float(real_images(batch, jax.random.split(jax.random.key(0), 1)).max())
    1.0
    """
    del keys
    return scaled(batch["image"])


def adversarial_task(
    init: Callable[[Key], Mapping[str, Mapping[str, Any]]],
    generate: Generate,
    critic: Score | ConstrainedCritic,
    generator_tx: optax.GradientTransformation,
    critic_tx: optax.GradientTransformation,
    *,
    loss: LossName | AdversarialLoss = "hinge",
    critic_steps: int = 1,
    generator_draws: int = 1,
    ema_decay: float | None = None,
    real: Callable[[Batch, Key], jax.Array] = real_images,
    condition: Callable[[Batch], tuple[Any, ...]] = lambda batch: (),
    evaluate: Callable[[AdversarialState, Batch, Key], Mapping[str, jax.Array]] | None = None,
    render: Callable[[AdversarialState, Batch, Key], dict[str, jax.Array]] | None = None,
    axis_name: str | None = None,
    unroll: bool = True,
) -> Task:
    """Makes a task in which a generator and a critic train against each other.

    A batch of B rows serves one step: `critic_steps` updates of the critic with `B / critic_steps`
    rows each, then one of the generator. Update k has the rows whose place in the batch is k modulo
    `critic_steps`; so the split needs no communication and is the same on any number of devices.
    The generator is updated on `generator_draws` examples for each row of update 0 (of the data it
    sees only what `generate` and `condition` read, such as labels). The reference of gradient
    normalisation on CIFAR-10, 5 updates with 64 rows and 128 generated images, is `B = 320,
    critic_steps=5, generator_draws=2`.

    Losses are weighted means over the global batch's rows of an update. Rows of weight 0 count
    nothing, whatever they hold, except in a generator's batch statistics: the functions given here
    see zeros in them. The numbers of a row are drawn from `fold_in(fold_in(key, k), row)`,
    k = `critic_steps + j` for draw j of the generator's update.

    The critic's updates leave parameters and state of the generator as they are, to the bit, and
    the other way round: batch statistics move in the generator's update only, singular vectors in
    the critic's only.

    If a gradient of any update is not finite, the whole step is left out: parameters, model states,
    both optimisers and the average stay as they were, to the bit; `step` and `skipped` count, and
    the metrics say which leaves were at fault. So neither player ever gets ahead of the other. The
    price is that the critic as it was is kept until the generator's gradient is known. Parameters
    that overflow from finite gradients in the last updates are reported as a lost state, as in
    `gradient_task`.

    Args:
      init: `init(key) -> {"generator": {"params": tree, **model_state}, "critic": {"params":
        tree}}`.
      generate: `generate(params, model_state, keys, batch, train) -> Generated`, one example for
        each of the keys `[B]` and rows of `batch`; see `Generated` for linen networks. `train`
        tells training from what `evaluate` and `render` may ask of the same function.
      critic: `critic(params, x, *args) -> [B]`, or that with a constraint; see `tasks.critics`. It
        has no model state: a critic with batch statistics would judge an example by its company
        (`gradients.input_gradient.check_per_example` tells whether one does).
      generator_tx: the generator's optimiser.
      critic_tx: the critic's, applied `critic_steps` times per step; schedules count updates.
      loss: the game, `"wasserstein"`, `"hinge"`, `"non_saturating"`, `"least_squares"` or one of
        your own; see `losses.adversarial`.
      critic_steps: updates of the critic per step, at least 1.
      generator_draws: generated examples per row in the generator's update, at least 1.
      ema_decay: in [0, 1); the decay of the generator's average after warm-up, for which see
        `gradient.ema_decay_with_warmup`.
      real: `real(batch, keys) -> [B, ...]`, the examples of a batch, augmented if need be; default
        its `image`.
      condition: what of a batch the critic is given beside the example, such as
        `lambda batch: (batch["label"],)`.
      evaluate: `evaluate(state, batch, key) -> {name: [B] or [B, ...]}`, averaged over the
        evaluation data. Generate from `state.averaged_params` and `averaged_model_state`, with
        `fold_in_rows(key, batch["row"])` for keys; `critic(state.params["critic"],
        state.model_state["critic"], x, *args)` is what a constrained critic says.
      render: `render(state, batch, key) -> {name: [n, h, w, c]}`, in [0, 1].
      axis_name: the mapped axis under `pmap` or `shard_map(..., check_vma=False)`; see
        `train.per_device`. Each device's rows must then divide by `critic_steps`, and the
        generator's batch norm needs the name too.
      unroll: whether the critic's updates stand in the program one after the other. False makes a
        loop of them, which compiles faster; not for convolutions on a CPU, where XLA runs them
        about ten times slower inside a loop.

    Returns:
      A `Task` whose state is an `AdversarialState`. Metrics: `loss` (what the critic minimises,
      penalty included), `critic_real` and `critic_fake` (its outputs), `penalty` if it has one,
      `critic_grad_norm`, all averaged over the critic's updates; `generator_loss`,
      `generator_grad_norm`, `critic_param_norm`, `generator_param_norm`, `skipped` (so far) and a
      `NonfiniteLeaves`.

    Raises:
      ValueError: if an option is out of range or unknown; from `init`, if a network is missing, has
        no `params`, or the critic has more than that; in a step, if the rows do not divide by
        `critic_steps`, the generated examples are not shaped as the real ones, outputs of critic,
        penalty or game are not one number per example, or a model state comes back with another
        layout.
      TypeError: if a count is no integer; in a step, if real examples or the critic's output are
        not floating, `generate` returns no `Generated` or `condition` no tuple.

    >>> from blogjax.core.random import normal
    >>> def init(key):
    ...     return {"generator": {"params": jnp.zeros(2)}, "critic": {"params": jnp.ones(2)}}
    >>> def generate(params, model_state, keys, batch, train):
    ...     return Generated(params + normal(keys, (len(keys), 2)))
    >>> task = adversarial_task(
    ...     init, generate, lambda params, x: x @ params, optax.sgd(0.5), optax.set_to_zero(),
    ...     loss="wasserstein", real=lambda batch, keys: batch["x"])
    >>> batch = {"x": jnp.ones((4, 2)), "row": jnp.arange(4), "weight": jnp.ones(4)}
    >>> state, metrics = jax.jit(task.step)(task.init(jax.random.key(0)), batch, jax.random.key(1))
    >>> state.params["generator"].tolist()  # up the critic's slope
    [0.5, 0.5]
    """
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
    for name, count in (("critic_steps", critic_steps), ("generator_draws", generator_draws)):
        if operator.index(count) < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    played, judge = game(loss), unconstrained(critic)
    optimisers = {
        "critic": optax.with_extra_args_support(critic_tx),
        "generator": optax.with_extra_args_support(generator_tx),
    }

    def over_devices(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def over_devices_mean(x: jax.Array) -> jax.Array:
        # Counters are the same everywhere, and a mean would make them floats.
        return jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    def init_state(key: Key) -> AdversarialState:
        networks_key, constraint_key = split_keys(key)
        variables = checked_networks(init(networks_key))
        params = {name: variables[name].pop("params") for name in PLAYERS}
        model_state = {
            "critic": judge.init(constraint_key, params["critic"]),
            "generator": variables["generator"],
        }
        ema = None
        if ema_decay is not None:
            ema = {"params": params["generator"], "model_state": model_state["generator"]}
            ema = jax.tree.map(widened, ema)
        return AdversarialState(
            step=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state={name: tx.init(params[name]) for name, tx in optimisers.items()},
            ema=ema,
        )

    def scores(params: Any, x: jax.Array, rows: Batch) -> jax.Array:
        given = checked_condition(condition(rows))
        check_rows(x, given)
        out = judge.score(params, x, *given)
        if out.shape != x.shape[:1]:
            raise ValueError(
                f"the critic must return one number per example, shape {x.shape[:1]}, "
                f"got {out.shape}"
            )
        if not jnp.issubdtype(out.dtype, jnp.floating):
            raise TypeError(f"the critic's output is {out.dtype}, but must be floating")
        return out

    def gradient(
        params: Any, objective: Callable[..., Any], rows: Batch
    ) -> tuple[Any, Metrics, Any]:
        """Of the mean over the rows of `objective(params) -> ({name: [B]}, state)`."""
        weight = rows["weight"]
        total = over_devices(jnp.sum(weight))
        total = jnp.where(total == 0, 1, total)

        def mean(params: Any) -> tuple[jax.Array, Any]:
            values, model_state = objective(params)
            means = {name: masked_sum(v, weight) / total for name, v in values.items()}
            return means["loss"], (means, model_state)

        (_, (means, model_state)), grads = jax.value_and_grad(mean, has_aux=True)(params)
        means, grads = over_devices((means, grads))
        means["grad_norm"] = global_norm(grads)
        return grads, means, model_state

    def changes(
        player: str, grads: Any, opt_state: Any, params: Any, loss: jax.Array
    ) -> tuple[Any, Any]:
        updates, new = optimisers[player].update(grads, opt_state, params, value=loss, grad=grads)
        return updates, jax.tree.map(kept_dtype, new, opt_state)

    def step(state: AdversarialState, batch: Batch, key: Key) -> tuple[AdversarialState, Metrics]:
        params, model_state, opt_state = state.params, state.model_state, state.opt_state
        fakes_by = params["generator"], model_state["generator"]
        groups = dealt(without_padding(batch), critic_steps)
        update_keys = fold_in_rows(key, jnp.arange(critic_steps + generator_draws))
        # Keys of all updates at once: each kernel of random numbers less compiles faster.
        row_keys = jax.vmap(fold_in_rows)(update_keys[:critic_steps], groups["row"])
        critic_keys = jax.vmap(lambda of_rows: split_keys(of_rows, 3))(row_keys)
        of_row = jax.vmap(jax.random.fold_in, (0, None))
        draw_keys = jax.vmap(lambda row: of_row(update_keys[critic_steps:], row))(groups["row"][0])
        draw_keys = draw_keys.reshape(-1)

        def critic_update(carry: Any, xs: Any) -> tuple[Any, Any]:
            params, judge_state, opt_state = carry
            rows, (latent_keys, real_keys, penalty_keys) = xs
            x = checked_real(real(rows, real_keys))
            # A `real` that divides by an example's size may have made NaN of padding's zeros.
            x = jnp.where(per_example(rows["weight"] == 0, x), 0, x)
            fake = checked_generated(generate(*fakes_by, latent_keys, rows, True)).examples
            if fake.shape != x.shape:
                raise ValueError(
                    f"generated examples have shape {fake.shape}, but real ones {x.shape}"
                )

            def objective(params: Any) -> tuple[dict[str, jax.Array], Any]:
                used, new_state = judge.effective(params, judge_state)
                of_real, of_fake = scores(used, x, rows), scores(used, fake, rows)
                values = {"critic_real": of_real, "critic_fake": of_fake}
                values["loss"] = critic_loss(of_real, of_fake, played)
                if judge.penalty is not None:
                    given = condition(rows)
                    values["penalty"] = judge.penalty(used, penalty_keys, x, fake, *given)
                    if values["penalty"].shape != x.shape[:1]:
                        raise ValueError(
                            f"the penalty must be one number per example, shape {x.shape[:1]}, "
                            f"got {values['penalty'].shape}"
                        )
                    values["loss"] = values["loss"] + values["penalty"]
                return values, new_state

            grads, means, judge_state = gradient(params, objective, rows)
            updates, opt_state = changes("critic", grads, opt_state, params, means["loss"])
            params = optax.apply_updates(params, updates)
            if judge.project is not None:
                params = judge.project(params)
            return (params, judge_state, opt_state), (means, nonfinite_leaves(grads))

        critic = params["critic"], model_state["critic"], opt_state["critic"]
        turns = (groups, critic_keys)
        if unroll:  # not by scan: it leaves a loop around a single turn, slow on a CPU
            new, each = critic, []
            for k in range(critic_steps):
                new, out = critic_update(new, jax.tree.map(lambda x, k=k: x[k], turns))
                each.append(out)
            critic_means, critic_bad = jax.tree.map(lambda *x: jnp.stack(x), *each)
        else:
            new, (critic_means, critic_bad) = jax.lax.scan(critic_update, critic, turns)
        critic_params, judge_state, critic_opt = new

        rows = jax.tree.map(lambda x: jnp.repeat(x[0], generator_draws, axis=0), groups)
        used, _ = judge.effective(critic_params, judge_state)

        def generator_objective(params: Any) -> tuple[dict[str, jax.Array], Any]:
            out = generate(params, fakes_by[1], draw_keys, rows, True)
            values = {"loss": generator_loss(scores(used, out.examples, rows), played)}
            return values, out.model_state

        grads, means, made_state = gradient(fakes_by[0], generator_objective, rows)

        # All or nothing. The old critic had to wait for this; the generator is left in place.
        bad = first_at_fault(critic_bad, nonfinite_leaves(grads))
        skip = jnp.any(bad)
        new_critic = critic_params, judge_state, critic_opt
        new_critic = jax.tree.map(lambda old, new: choose(skip, old, new), critic, new_critic)
        updates, generator_opt = update_unless(
            skip,
            lambda: changes("generator", grads, opt_state["generator"], fakes_by[0], means["loss"]),
            opt_state["generator"],
        )
        generator_params = optax.apply_updates(fakes_by[0], updates)
        generator_state = fakes_by[1]
        if made_state is not None:
            new = {**generator_state, **unfreeze(made_state)}
            check_same(new, generator_state, "new model state", "model state")
            if axis_name is not None:
                new = jax.tree.map(over_devices_mean, new)
            generator_state = jax.tree.map(
                lambda old, new: choose(skip, old, kept_dtype(new, old)), generator_state, new
            )
        ema = state.ema
        if ema_decay is not None:
            rate = 1 - ema_decay_with_warmup(ema_decay, state.step)
            target = {"params": generator_params, "model_state": generator_state}
            ema = jax.tree.map(lambda e, p: towards(e, p, rate, skip), ema, target)
        skipped = jnp.where(skip, optax.safe_increment(state.skipped), state.skipped)
        new_state = AdversarialState(
            step=state.step + 1,
            skipped=skipped,
            params={"critic": new_critic[0], "generator": generator_params},
            model_state={"critic": new_critic[1], "generator": generator_state},
            opt_state={"critic": new_critic[2], "generator": generator_opt},
            ema=ema,
        )

        critic_means = {name: jnp.mean(x) for name, x in critic_means.items()}
        norms = {f"{name}_param_norm": global_norm(new_state.params[name]) for name in PLAYERS}
        # An optimiser can overflow on finite gradients; then the state is lost, and must be seen.
        lost = jnp.logical_not(jnp.isfinite(sum(norms.values())))
        metrics: Metrics = {
            **{name: x for name, x in critic_means.items() if name != "grad_norm"},
            **norms,
            "critic_grad_norm": critic_means["grad_norm"],
            "generator_loss": means["loss"],
            "generator_grad_norm": means["grad_norm"],
            "skipped": skipped,
            "nonfinite": NonfiniteLeaves(
                flags=jnp.append(bad, lost),
                recoverable=jnp.logical_not(lost),
                paths=(*leaf_paths(params), PARAMETERS),
            ),
        }
        return new_state, metrics

    def evaluate_sums(state: AdversarialState, batch: Batch, key: Key) -> Sums:
        assert evaluate is not None
        values = evaluate(state, batch, key)
        weight = batch["weight"]
        return over_devices(
            {name: (masked_sum(v, weight), jnp.sum(weight)) for name, v in values.items()}
        )

    return Task(
        init=init_state,
        step=step,
        evaluate=None if evaluate is None else evaluate_sums,
        render=render,
        axis_name=axis_name,
    )
