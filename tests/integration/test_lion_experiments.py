import collections
import re
import types

import jax
import numpy as np
import pytest
import scipy.special

from blogjax.data import python_source
from configs import lion_embedding_drift as drift_config
from configs import lion_vs_adamw as versus_config
from experiments import lion_embedding_drift as drift
from experiments import lion_vs_adamw as versus
from experiments.launch.configs import ConfigError, flatten
from experiments.optimisers import sweep, table, words

EXPERIMENTS = {
    "drift": (drift, drift_config.get_config),
    "versus": (versus, versus_config.get_config),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_variants_differ_in_values_only(name):
    _, get_config = EXPERIMENTS[name]
    assert len({tuple(flatten(get_config(v).to_dict())) for v in ("default", "full", "smoke")}) == 1
    with pytest.raises(ValueError, match="there are default, full, smoke"):
        get_config("huge")


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("drift", "table.steps", 0, r"table.steps must be at least 1"),
        ("drift", "table.rows", 5, r"rows must be in \[20"),
        ("drift", "table.min_age", 30, r"min_age must be in \[1, 30\)"),
        ("drift", "table.weight_decay", 1e3, r"must be below 1, got 0.001 and 1000"),
        ("drift", "table.batch_size", 12, r"batch of 12 does not divide"),
        ("drift", "words.steps", 0, r"words.steps must be at least 1"),
        ("drift", "words.vocabulary", 10**6, r"vocabulary is 1000000, but the training text has"),
        ("drift", "words.classes", 65, r"words.classes must be in \[2, words.vocabulary = 64\]"),
        ("drift", "words.rare", 5, r"rare must be in \[1, 5\)"),
        ("drift", "words.common", 10**6, r"no common words, by words.rare = 2"),
        ("drift", "words.adamw_rate", -1.0, r"adamw_rate must be in"),
        ("drift", "train.seeds", (0, 0), r"train.seeds must be different numbers"),
        ("drift", "train.log_every", 0, r"train.log_every must be at least 1"),
        ("versus", "data.batch_sizes", (16,), r"batch_sizes must be two numbers or more"),
        ("versus", "data.batch_sizes", (16, 8), r"rising: \[16, 8\]"),
        ("versus", "data.batch_sizes", (8, 12), r"batch of 12 does not divide"),
        ("versus", "model.hidden", (4, 0), r"model.hidden needs widths of at least 1"),
        ("versus", "optim.rates", (0.1, 0.01), r"optim.rates must be two positive numbers"),
        ("versus", "optim.decays", (0.1, 20.0), r"0.1, times .* 20, must be below 2"),
        ("versus", "optim.ratio", 0.0, r"ratio must be in"),
        ("versus", "optim.warmup_fraction", 1.0, r"warmup_fraction must be in \[0, 1\)"),
        ("versus", "train.replicas", 0, r"replicas must be in"),
        ("versus", "train.epochs", 0.0, r"epochs must be in"),
        ("versus", "train.on_nonfinite", "ignore", r"stop or skip, got 'ignore'"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(tmp_path, name, field, value, message):
    module, get_config = EXPERIMENTS[name]
    config = get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        module.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_zipf_rows_have_their_frequencies_and_hang_on_the_step_alone():
    batches = table.ZipfRows(5, 1.5, 20_000, seed=3)
    first = batches(7)
    weights = np.array([1, 2, 3, 4, 5.0]) ** -1.5
    expected = 20_000 * weights / weights.sum()
    found = np.bincount(first["index"], minlength=5)
    assert (np.square(found - expected) / expected).sum() < 18.5  # 99.9% of chi-square with 4
    np.testing.assert_array_equal(batches(7)["index"], first["index"])
    assert (batches(8)["index"] != first["index"]).any()
    assert (table.ZipfRows(5, 1.5, 20_000, seed=4)(7)["index"] != first["index"]).any()


def test_the_closed_form_is_the_recurrence():
    row = before = np.array([0.3, -2.0, 0.0])
    sign, rate, decay = np.array([1.0, -1.0, 0.0]), 0.01, 0.7
    for n in range(1, 1001):
        row = row - rate * (sign + decay * row)
        if n in (1, 10, 1000):
            found = table.closed_form(before, sign, n, rate, decay)
            np.testing.assert_allclose(found, row, rtol=1e-10, atol=1e-15)


def test_words_are_numbered_by_frequency_and_counted_as_read():
    config = drift_config.get_config("smoke").words
    corpus = words.read(config)
    text = bytes(python_source.load("train")[: config.max_bytes])
    found = [w.encode() for w in re.findall(r"[A-Za-z_]\w*|\d+|[^\w\s]", text.decode("latin-1"))]
    counts = collections.Counter(found)
    number = {
        word: i + 1 for i, word in enumerate(sorted(counts, key=lambda w: (-counts[w], w))[:63])
    }
    expected = [number.get(word, 0) for word in found]
    assert corpus.train.shape == (len(found) - 2, 3)
    np.testing.assert_array_equal(corpus.train[:, 0], expected[:-2])
    np.testing.assert_array_equal(corpus.train[:, 2], expected[2:])

    batches, read = words.make_batches(corpus, config, 1), collections.Counter()
    for step in range(config.steps):
        read.update(batches(step)["words"][:, :2].ravel().tolist())
    counted = words.times_read(corpus, config, 1)
    assert counted.tolist() == [read[i] for i in range(64)]


def test_losses_after_rare_words_are_told_apart():
    config = drift_config.get_config("smoke").words
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 64, (300, 3)).astype(np.int32)
    counts = rng.integers(0, 12, 64)
    counts[0] = 1  # unknown words do not count among the rare ones
    params = {
        "embedding": rng.normal(size=(64, 2)),
        "hidden": {"kernel": rng.normal(size=(4, 4)), "bias": rng.normal(size=4)},
        "output": {"kernel": rng.normal(size=(4, 8)), "bias": rng.normal(size=8)},
    }
    x = params["embedding"][rows[:, :2]].reshape(300, 4)
    x = np.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logp = scipy.special.log_softmax(
        x @ params["output"]["kernel"] + params["output"]["bias"], axis=1
    )
    target = np.where(rows[:, 2] < 8, rows[:, 2], 0)
    loss = -logp[np.arange(300), target]
    known = (rows[:, :2] > 0).all(axis=1)
    least = counts[rows[:, :2]].min(axis=1)
    rare, common = (known & (least >= 1) & (least <= 2)), known & (least >= 5)

    state = types.SimpleNamespace(params=jax.tree.map(np.float32, params))
    found = words.measure(config, state, words.Corpus(rows, rows), counts)
    expected = {"all": loss.mean(), "rare": loss[rare].mean(), "common": loss[common].mean()}
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["loss_by_count"][0] == pytest.approx(loss[known & (least == 1)].mean(), rel=1e-5)
    assert found["rare_share"] == pytest.approx(rare.mean())
    some = [i for i in range(1, 64) if 1 <= counts[i] <= 2]
    assert found["rare_words"] == len(some)
    rms = np.sqrt(np.square(params["embedding"][some]).mean())
    assert found["rms"]["rare"] == pytest.approx(rms, rel=1e-5)
    assert found["max_rare"] == pytest.approx(abs(params["embedding"][some]).max(), rel=1e-5)


@pytest.mark.slow  # seconds of compiling
def test_what_each_arm_does_to_rows_and_to_the_rest():
    """After a step with a gradient in row 0, one without any: who still moves?"""
    config = drift_config.get_config("smoke").words
    params = {
        "embedding": np.ones((2, 1), np.float32),
        **{k: {"kernel": np.ones((1, 1), np.float32)} for k in ("hidden", "output")},
    }
    nothing = jax.tree.map(np.zeros_like, params)
    grads = {**nothing, "embedding": np.array([[1.0], [0.0]], np.float32)}
    found = {}
    for name, tx in words.optimisers(config).items():
        _, state = tx.update(grads, tx.init(params), params)
        updates, _ = tx.update(nothing, state, params)
        found[name] = (
            *updates["embedding"].ravel().tolist(),
            float(updates["hidden"]["kernel"][0, 0]),
        )
    # Lion: -1e-3 (sign + 1); AdamW: -1e-2 (m / sqrt(v) + .1) with both corrected for their start.
    adam = (0.09 / 0.19) / (0.000999 / 0.001999) ** 0.5
    adamw, decayed = -1e-2 * (adam + 0.1), -1e-3
    expected = {
        "adamw": (adamw, decayed, decayed), "lion": (-2e-3, decayed, decayed),
        "tiger": (-4e-3, -2e-3, -2e-3), "lazy": (0, 0, decayed),
        "hybrid": (adamw, decayed, decayed),
    }  # fmt: skip
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-12, err_msg=name)


def test_figures_of_a_sweep_are_means_over_the_replicas():
    config = versus_config.get_config("smoke")
    rng = np.random.default_rng(0)
    layers = [
        {"kernel": rng.normal(size=(12, 64, 4)), "bias": rng.normal(size=(12, 4))},
        {"kernel": rng.normal(size=(12, 4, 10)), "bias": rng.normal(size=(12, 10))},
    ]
    data = {"pixels": rng.normal(size=(9, 64)), "label": rng.integers(0, 10, 9)}

    state = types.SimpleNamespace(params=jax.tree.map(np.float32, layers))
    found = sweep.measure(config, state, {"a": data})["a"]
    for i, j in [(0, 1), (2, 0)]:
        losses, hits = [], []
        for n in (4 * i + 2 * j, 4 * i + 2 * j + 1):
            x = data["pixels"] @ layers[0]["kernel"][n] + layers[0]["bias"][n]
            logits = np.maximum(x, 0) @ layers[1]["kernel"][n] + layers[1]["bias"][n]
            losses.extend(-scipy.special.log_softmax(logits, 1)[np.arange(9), data["label"]])
            hits.extend(logits.argmax(1) == data["label"])
        assert found["loss"][i][j] == pytest.approx(np.mean(losses), rel=1e-4)
        assert found["accuracy"][i][j] == pytest.approx(np.mean(hits), abs=1e-5)


@pytest.mark.slow  # seconds of compiling
@pytest.mark.parametrize("optimiser", ["adamw", "lion"])
def test_networks_of_a_sweep_train_as_if_alone(optimiser):
    """Each against one network, its optimiser and schedule written out in numpy."""
    config = versus_config.get_config("smoke")
    steps, data = 6, sweep.load("validation")
    task, batches = sweep.make_task(config, optimiser, steps), sweep.make_batches(data, 8, 0)
    state = jax.jit(task.init)(jax.random.key(0))
    first, step_once = jax.device_get(state.params), jax.jit(task.step)
    for step in range(steps):
        state, _ = step_once(state, batches(step), jax.random.key(1))

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        x = jax.nn.relu(batch["pixels"] @ params[0]["kernel"] + params[0]["bias"][None])
        logits = x @ params[1]["kernel"] + params[1]["bias"][None]
        return -jax.nn.log_softmax(logits)[np.arange(8), batch["label"]].mean()

    replicas = config.train.replicas
    pairs = [(r, d) for r in config.optim.rates for d in config.optim.decays]
    assert len(first[0]["kernel"]) == replicas * len(pairs)
    for network in (0, 3, 7, 10):
        rate, decay = pairs[network // replicas]
        tree = jax.tree.map(lambda x, n=network: x[n].astype(np.float64), first)
        leaves, structure = jax.tree.flatten(tree)
        m, v = [0.0] * len(leaves), [0.0] * len(leaves)
        for step in range(steps):
            # Warm-up over round(.1 steps) = 1 step from 0, then half a cosine over the other 5.
            rise = 0.0 if step == 0 else (1 + np.cos(np.pi * (step - 1) / 5)) / 2
            tree = jax.tree.unflatten(structure, [x.astype(np.float32) for x in leaves])
            grads = jax.tree.leaves(jax.device_get(gradient(tree, batches(step))))
            for i, g in enumerate(np.asarray(g, np.float64) for g in grads):
                if optimiser == "lion":
                    u = np.sign(0.9 * m[i] + 0.1 * g)
                    m[i] = 0.99 * m[i] + 0.01 * g
                else:
                    m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g * g
                    n = step + 1
                    u = m[i] / (1 - 0.9**n) / (np.sqrt(v[i] / (1 - 0.999**n)) + 1e-8)
                leaves[i] = leaves[i] - rise * rate * (u + decay * leaves[i])
        mine = jax.tree.leaves(jax.tree.map(lambda x, n=network: x[n], state.params))
        for a, b in zip(mine, leaves, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-3 * rate)
    for leaf in jax.tree.leaves(first):
        np.testing.assert_array_equal(leaf[1], leaf[1 + replicas])  # one start for all rates
    assert (first[0]["kernel"][0] != first[0]["kernel"][1]).any()


def test_rates_are_chosen_on_validation_and_judged_on_test():
    config = versus_config.get_config("smoke")  # rates 1e-3, 1e-2, 1e-1; decays .1, 1
    ones = np.ones((3, 2))

    def made(validation, test, accuracy):
        # `validation` and `test` name the pair where that split's loss is least.
        split = {"validation": ones.copy(), "test": 2 * ones}
        split["validation"][validation] = 0.5
        split["test"][test] = 0.1
        split["test"][validation] = 0.7 if accuracy > 0.9 else 1.4
        return {k: {"loss": v.tolist(), "accuracy": (accuracy * ones).tolist()}
                for k, v in split.items()}  # fmt: skip

    measured = {"adamw": made((2, 0), (0, 0), 0.95), "lion": made((1, 1), (0, 1), 0.85)}
    found = versus.compare(config, measured)
    assert (found["adamw"]["rate"], found["adamw"]["decay"]) == (0.1, 0.1)
    assert (found["lion"]["rate"], found["lion"]["decay"]) == (0.01, 1.0)
    assert (found["adamw"]["test_loss"], found["lion"]["test_loss"]) == (0.7, 1.4)
    assert found["lion_at_adamw_rates"]["test_loss"] == 2.0
    assert found["lion_by_rule"]["test_loss"] == 1.4  # a tenth of .1, ten times .1
    config.judge = True
    other = {**found, "lion": {**found["lion"], "test_loss": 0.35, "test_accuracy": 0.96}}
    claims = versus.claims(config, [{8: found, 16: other}])
    values = [10.0, 10.0, 2 / 1.4, 2.0, 0.5, 1.0, 4.0]
    np.testing.assert_allclose([c.value for c in claims], values, rtol=1e-6)


def test_the_drifts_ratios_by_hand():
    def arm(rare, common, loss, **more):
        return {"rms": {"rare": rare, "common": common}, "loss": {"all": 3.0, "rare": loss},
                "max_rare": 0.5, **more}  # fmt: skip

    def row(high, head, tail):
        return {"max": high, "head_error": head, "tail_error": tail, "closed_form": None}

    measured = {
        "table": {"adamw": row(2, 4, 1), "lion": row(20, 4, 30), "lazy": row(3, 2, 2)},
        "words": {
            "adamw": arm(1, 4, 2.0), "lion": arm(6, 2, 2.2), "tiger": arm(4, 2, 9.0),
            "lazy": arm(2, 4, 1.8), "hybrid": arm(6, 8, 2.04),
        },
    }  # fmt: skip
    values = [c.value for c in drift.claims([measured], 2.0, True)]
    expected = [10, 30, np.nan, 1.5, 2, 0.5, 1.0, 2, 0.75, 1, 1.1, 1.02]
    np.testing.assert_allclose(values, expected)
