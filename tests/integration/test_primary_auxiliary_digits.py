import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tracked_config import Tracked

from blogjax.train import mesh as meshes
from configs.primary_auxiliary_digits import get_config
from experiments import primary_auxiliary_digits as digits
from experiments.launch.configs import ConfigError, flatten
from experiments.multitask import first_order, noisy_labels
from experiments.optimisers import arms


def run(config, folder):
    """On one device, for which tasks compile faster than for eight."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda: one)
        return digits.run(config, folder)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("smoke"), get_config("smoke").lock()
    tracked = Tracked(config)
    return folder, config, tracked, run(tracked, folder)


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_every_field_of_the_config_is_read(smoke):
    _, config, tracked, _ = smoke
    assert set(flatten(config.to_dict())) == tracked.read


def test_variants_differ_in_values_only():
    assert len({tuple(flatten(get_config(v).to_dict())) for v in ("default", "full", "smoke")}) == 1
    with pytest.raises(ValueError, match="there are default, full, smoke"):
        get_config("huge")


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_the_folder_holds_what_a_run_promises(smoke):
    folder, _, _, result = smoke
    assert result.pictures == ["guarantee.png"]
    assert 10_000 < (folder / "guarantee.png").stat().st_size < 400_000
    assert [c.verdict for c in result.claims] == ["not judged"] * 14
    assert all(c.statement and c.source.startswith("https://") for c in result.claims)
    (seed,) = result.measured["by_seed"]
    assert set(seed) == set(noisy_labels.METHODS)
    for name, found in seed.items():
        assert (folder / name / "metrics.jsonl").stat().st_size > 0
        assert list((folder / name / "checkpoints").glob("[0-9]*"))
        assert np.shape(found["test"]) == (2, 2, 2)
        assert np.shape(found["negative"]) == (2, 2, 3)
        np.testing.assert_allclose(np.sum(found["cosines"], axis=-1), 1.0)
        assert ("orders" in found) == (name == "primary_auxiliary")
    assert np.shape(result.measured["chosen"][0]["sum"]) == (2,)
    json.dumps(result.measured)


@pytest.mark.slow  # the run of the fixture compiles many programs
def test_finished_arms_are_read_back_and_an_interrupted_one_goes_on(smoke, monkeypatch):
    folder, config, _, result = smoke
    stored = folder / "primary_auxiliary" / "measured.json"
    before = stored.read_text()
    stored.unlink()  # as after a kill between training and measuring
    trained = []

    def fit(*args, workdir, **kwargs):
        trained.append(workdir)
        return original(*args, workdir=workdir, **kwargs)

    original = arms.fit
    monkeypatch.setattr(arms, "fit", fit)
    again = run(config, folder)
    assert trained == [folder / "primary_auxiliary"]
    assert stored.read_text() == before
    assert [c.value for c in again.claims] == [c.value for c in result.claims]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.clean", (20,), r"data.clean must be two numbers or more, rising: \[20\]"),
        ("data.clean", (20, 10), r"data.clean must be two numbers"),
        ("data.clean", (10, 15), r"must be a multiple of 10 in \[10, .*, got 15"),
        ("data.noise", 1.0, r"noise must be in \[0, 1\), got 1.0"),
        ("data.batch_size", 12, r"batch of 12 does not divide"),
        ("model.hidden", (0,), r"model.hidden needs widths of at least 1"),
        ("optim.rates", (0.0, 0.1), r"optim.rates must be positive numbers, rising"),
        ("optim.rates", (0.1, np.nan), r"optim.rates must be positive numbers, rising"),
        ("optim.rates", (0.1, np.inf), r"optim.rates must be positive numbers, rising"),
        ("optim.rates", (0.2, 0.1), r"optim.rates must be positive numbers, rising"),
        ("orders.sizes", (0.1,), r"orders.sizes must be two positive numbers or more, falling"),
        ("orders.sizes", (0.1, np.nan), r"orders.sizes must be two positive numbers"),
        ("orders.sizes", (np.inf, 0.1), r"orders.sizes must be two positive numbers"),
        ("orders.sizes", (0.1, 0.2), r"orders.sizes .* falling: \[0.1, 0.2\]"),
        ("orders.batches", 0, r"batches must be in"),
        ("train.replicas", 0, r"replicas must be in"),
        ("train.steps", 0, r"train.steps must be at least 1"),
    ],
)
def test_a_config_that_cannot_be_run_says_why(tmp_path, field, value, message):
    config = get_config("smoke")
    config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=message):
        digits.run(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_division_has_every_image_once_and_the_noise_asked_for():
    label = np.random.default_rng(0).permutation(np.arange(2000) % 10)
    data = {"pixels": np.arange(2000.0)[:, None], "label": label}
    few, more = (noisy_labels.divide(data, n, 0.6, 3, seed=4) for n in (50, 200))
    for (noisy, clean), count in ((few, 50), (more, 200)):
        for r in range(3):
            images = [part["pixels"][:, r, 0].astype(int) for part in (noisy, clean)]
            np.testing.assert_array_equal(np.sort(np.concatenate(images)), np.arange(2000))
            np.testing.assert_array_equal(clean["label"][:, r], label[images[1]])
            assert np.bincount(clean["label"][:, r]).tolist() == [count // 10] * 10
            # A random label is wrong 9 times in 10; the deviation of their share is below .01.
            wrong = (noisy["label"][:, r] != label[images[0]]).mean()
            assert abs(wrong - 0.54) < 0.03
    for r in range(3):
        assert set(few[1]["pixels"][:, r, 0]) < set(more[1]["pixels"][:, r, 0])
    assert set(few[1]["pixels"][:, 0, 0]) != set(few[1]["pixels"][:, 1, 0])


def test_batches_hold_the_replicas_of_one_division_after_another():
    def part(base, rows):
        pixels = base + np.arange(2 * rows, dtype=float).reshape(rows, 2, 1)
        return {"pixels": pixels, "label": pixels[..., 0].astype(int)}

    divisions = [(part(0, 30), part(100, 10)), (part(200, 20), part(300, 20))]
    batch = noisy_labels.NoisyAndClean(divisions, 8, seed=1)(0)
    assert set(batch) == {
        "noisy_pixels", "noisy_label", "clean_pixels", "clean_label", "row", "weight"
    }  # fmt: skip
    for name, bases in (("noisy", (0, 200)), ("clean", (100, 300))):
        pixels, label = batch[f"{name}_pixels"][..., 0], batch[f"{name}_label"]
        assert pixels.shape == (8, 4)
        np.testing.assert_array_equal(pixels, label)
        for column in range(4):  # even numbers are replica 0's
            assert (pixels[:, column] // 100 * 100 == bases[column // 2]).all()
            assert (pixels[:, column] % 2 == column % 2).all()


def _by_hand(weights, bias, pixels, label):
    """Mean cross-entropy of one layer, and its gradient `[65, 10]`, in float64."""
    z = pixels @ weights + bias
    value = -scipy.special.log_softmax(z, axis=1)[np.arange(len(label)), label].mean()
    error = (scipy.special.softmax(z, axis=1) - np.eye(10)[label]) / len(label)
    return value, np.concatenate([pixels.T @ error, error.sum(0)[None]]), error


def _direction(name, noisy, clean, theta, pixels, errors):
    """What a method is to make of two gradients."""
    product = (noisy * clean).sum()
    if name == "primary_auxiliary":
        return noisy + max(-product, 0) / (clean**2).sum() * clean
    if name == "held":
        return noisy + max(-(noisy * theta).sum(), 0) / (theta**2).sum() * theta
    if name == "masked":
        ones = np.concatenate([pixels, np.ones((len(pixels), 1))], axis=1)
        each = ones[:, :, None] * errors[:, None, :] * len(pixels)
        return each[(each * clean).sum((1, 2)) > 0].mean(0)
    if name == "min_norm":
        a = np.clip(((clean - noisy) * clean).sum() / ((clean - noisy) ** 2).sum(), 0, 1)
        return a * noisy + (1 - a) * clean
    return {"noisy": noisy, "clean": clean, "sum": noisy + clean}[name]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n == "primary_auxiliary" else pytest.mark.slow)
        for n in noisy_labels.METHODS
    ],
)
def test_two_steps_of_every_network_of_one_layer_by_hand(name):
    rates, replicas, rng = (0.5, 2.0), 2, np.random.default_rng(0)
    task = noisy_labels.networks_task(
        noisy_labels.METHODS[name], (64, 10), rates, divisions=2, replicas=replicas, steps=3
    )
    state = jax.jit(task.init)(jax.random.key(0))
    step, conflicts = jax.jit(task.step), 0
    kernels = np.asarray(state.networks.params[0]["kernel"])
    np.testing.assert_array_equal(kernels[:2], kernels[-2:])  # the same first weights everywhere
    assert (kernels[0] != kernels[1]).any()
    for t in range(2):
        batch = {"row": np.arange(8, dtype=np.int32), "weight": np.ones(8, np.float32)}
        for part in ("noisy", "clean"):
            batch[f"{part}_pixels"] = rng.normal(size=(8, 4, 64)).astype(np.float32)
            batch[f"{part}_label"] = rng.integers(0, 10, (8, 4))
        # So that the gradients of every other column disagree.
        batch["clean_pixels"] += batch["noisy_pixels"] * np.float32([1, -1, 1, -1])[None, :, None]
        before = jax.device_get(state.networks.params[0])
        state, metrics = step(state, batch, jax.random.key(1))
        after = jax.device_get(state.networks.params[0])
        totals = []
        for n in range(8):
            column, rate = n // 4 * 2 + n % 2, rates[n // 2 % 2]
            theta, moved = (
                np.concatenate([p["kernel"][n], p["bias"][n][None]]).astype(np.float64)
                for p in (before, after)
            )

            def part(which, at, column=column, batch=batch):
                x, y = (batch[f"{which}_{key}"][:, column] for key in ("pixels", "label"))
                return _by_hand(at[:-1], at[-1], x.astype(np.float64), y)

            (loss, noisy, errors), (aux, clean, _) = part("noisy", theta), part("clean", theta)
            totals.append((loss + aux) / 2)
            conflicts += (noisy * clean).sum() < 0
            pixels = batch["noisy_pixels"][:, column]
            u = _direction(name, noisy, clean, theta, pixels, errors)
            np.testing.assert_allclose(moved, theta - rate * u, atol=2e-5)
            expected = [
                (u * v).sum() / np.linalg.norm(u) / np.linalg.norm(v) for v in (noisy, clean, theta)
            ]
            found = np.asarray(state.trace)[t, n]
            np.testing.assert_allclose(found[:3], expected, atol=1e-5)
            change = part("clean", theta - rate * u)[0] - aux
            np.testing.assert_allclose(found[3], change, rtol=1e-3, atol=1e-5)
        if name != "masked":  # whose loss is that of the agreeing examples
            np.testing.assert_allclose(metrics["loss"], np.mean(totals), rtol=1e-5)
    assert 0 < conflicts < 16  # both cases were seen
    assert int(state.step) == 2 and not np.asarray(state.trace)[2].any()


def test_a_network_that_is_not_finite_is_named_and_others_are_not_lost():
    task = noisy_labels.networks_task(
        noisy_labels.METHODS["primary_auxiliary"], (64, 10), (0.5, 2.0), 2, 2, steps=3
    )
    state = jax.jit(task.init)(jax.random.key(0))
    ones = np.ones((8, 4, 64), np.float32)
    batch = {
        "noisy_pixels": ones.copy(), "clean_pixels": ones, "row": np.arange(8, dtype=np.int32),
        "noisy_label": np.zeros((8, 4), int), "clean_label": np.ones((8, 4), int),
        "weight": np.ones(8, np.float32),
    }  # fmt: skip
    batch["noisy_pixels"][:, 1] = np.nan  # what networks 1 and 3 see
    new, metrics = jax.jit(task.step)(state, batch, jax.random.key(1))
    bad = metrics["nonfinite"]
    named = [path for path, flag in zip(bad.paths, bad.flags, strict=True) if flag]
    assert "task noisy" in named and bool(bad.recoverable) and int(metrics["skipped"]) == 2
    old, kernels = (np.asarray(s.networks.params[0]["kernel"]) for s in (state, new))
    same = [(a == b).all() for a, b in zip(old, kernels, strict=True)]
    assert same == [n in (1, 3) for n in range(8)]


@pytest.mark.slow  # seconds of compiling
def test_orders_of_a_linear_and_a_quadratic_loss_in_closed_form():
    """L_0 = <a, x>, L_1 = <b, x> + |x|^2 at x = 0: the changes are <b, d> + |d|^2, d = -eta u."""
    a, sizes = np.array([[2.0, 0.0], [1.0, 1.0]]), (0.5, 0.25, 0.125)
    b = np.array([[[-1.0, 1.0], [1.0, 0.0]], [[1.0, -2.0], [-2.0, 1.0]]])

    def means(params, batch):
        x = params["x"]
        return jnp.stack([params["a"] @ x, batch["b"] @ x + x @ x])

    def frozen(params, batch):  # a is a constant, though each network has its own
        return means({**params, "a": jax.lax.stop_gradient(params["a"])}, batch)

    params = {"x": np.zeros((2, 2), np.float32), "a": a.astype(np.float32)}
    found = first_order.rises(frozen, params, {"b": b.astype(np.float32)}, sizes)
    expected = {"primary": [], "projected": []}
    for g0, g1 in ((a[n], b[n, i]) for n in range(2) for i in range(2)):
        if g0 @ g1 < 0:
            u = g0 - (g0 @ g1) / (g1 @ g1) * g1
            for name, d in (("primary", g0), ("projected", u)):
                expected[name].append([-s * (g1 @ d) + s * s * (d @ d) for s in sizes])
    assert len(expected["primary"]) == 3
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12)
    assert first_order.slope(sizes, np.abs(found["projected"]).mean(0)) == pytest.approx(2.0)


def test_figures_lie_by_number_of_clean_labels_and_rate():
    config, rng = get_config("smoke"), np.random.default_rng(0)
    w = np.float32(rng.normal(size=(8, 64, 10)))
    x, y = np.float32(rng.normal(size=(20, 64))), rng.integers(0, 10, 20)
    trace = rng.uniform(0.1, 0.9, (3, 8, 4)).astype(np.float32)
    trace[1, 5, 1] = -0.5  # 20 clean labels, the first rate, the second replica
    trace[2, 4, 1] = -5e-7  # what rounding leaves
    trace[:, 6:, 3] = -1.0
    params = [{"kernel": w, "bias": np.zeros((8, 10), np.float32)}]
    state = types.SimpleNamespace(networks=types.SimpleNamespace(params=params), trace=trace)
    splits = {"validation": {"pixels": x[:9], "label": y[:9]}, "test": {"pixels": x, "label": y}}
    found = digits.measure(config, state, splits)
    right = np.array([(x @ own).argmax(1) == y for own in w])
    np.testing.assert_allclose(found["test"], right.mean(1).reshape(2, 2, 2), atol=1e-6)
    np.testing.assert_allclose(
        found["validation"], right[:, :9].mean(1).reshape(2, 2, 2), atol=1e-6
    )
    negative = np.zeros((2, 2, 3))
    negative[1, 0, 1] = 1
    np.testing.assert_array_equal(found["negative"], negative)
    assert found["lowest"][1][0][1] == -0.5 and np.min(found["lowest"][0]) > 0.1
    np.testing.assert_allclose(found["rose"], [[1, 1], [1, 0]])
    cosines = np.array(found["cosines"])
    np.testing.assert_allclose(cosines.sum(-1), 1.0)
    trace[0, 0, :] = np.nan  # no proof that the step was right
    lost = digits.measure(config, state, splits)
    assert lost["negative"][0][0] == [1, 1, 1] and np.isnan(lost["lowest"][0][0]).all()
    assert lost["rose"][0][0] == 1
    np.testing.assert_allclose(np.sum(lost["cosines"], axis=-1), [[5 / 6, 1], [1, 1]])
    middle, half = np.searchsorted(digits.BINS, [0.0, -0.5]) - 1
    assert (cosines[1, 0, middle], cosines[1, 0, half]) == (1 / 6, 1 / 6)
    assert digits.BINS[middle] == pytest.approx(-digits.BINS[middle + 1])


def test_a_cosine_with_a_vector_that_is_no_number_is_none():
    one, zero = jnp.array([3.0, 4.0]), jnp.zeros(2)
    assert first_order.cosine(one, zero) == 0
    assert np.isnan(first_order.cosine(one, jnp.array([jnp.nan, 1.0])))


def _figures(test, validation, negative):
    """Two numbers of clean labels, two rates, one replica."""
    table = np.zeros((2, 2, 3), int)
    table[..., 1], table[..., 2] = negative, 100
    return {
        "test": np.array(test)[..., None].tolist(), "negative": table.tolist(),
        "validation": np.array(validation)[..., None].tolist(),
    }  # fmt: skip


def test_the_claims_by_hand():
    config = get_config()
    config.train.update(steps=200, replicas=1)
    first, mixed = [[0.9, 0.1], [0.9, 0.1]], [[0.9, 0.1], [0.1, 0.9]]
    nothing = [[0, 0], [0, 0]]
    figures = {
        "noisy": _figures([[0.80, 0], [0.80, 0]], first, [[20, 200], [60, 200]]),
        "primary_auxiliary": _figures([[0.85, 0], [0, 0.81]], mixed, nothing),
        "sum": _figures([[0.80, 0], [0.90, 0]], first, nothing),
        "clean": _figures([[0.70, 0.99], [0.82, 0.99]], first, nothing),  # the last tempts
        "held": _figures([[0.80, 0], [0.84, 0]], first, nothing),
    }
    sizes = np.array(config.orders.sizes)
    ours = figures["primary_auxiliary"]
    ours["orders"] = {"primary": (3 * sizes).tolist(), "projected": (7 * sizes**3).tolist()}
    claims = digits.claims(config, [figures])
    expected = [0, 0, 0.2, 1, 3, 5, 1, 5, -9, 15, -1, 400, 0.5, 2]
    np.testing.assert_allclose([c.value for c in claims], expected, atol=1e-9)
    inf = np.inf
    assert [(c.low, c.high) for c in claims] == [
        (-inf, 0), (-inf, 0), (0.05, inf), (0.9, 1.2), (1.8, 2.2), *[(0, inf)] * 6,
        (-inf, 0), (0.05, inf), (-1, inf),
    ]  # fmt: skip
    assert [c.verdict for c in claims] == [
        "holds", "holds", "holds", "holds", "fails", "holds", "undecided", "holds", "fails",
        "holds", "undecided", "fails", "holds", "holds",
    ]  # fmt: skip
    ours["negative"][1][0][1] = 1  # one step of one network, at a rate that was not chosen
    ours["orders"]["projected"] = None
    claims = digits.claims(config, [figures])
    assert (claims[0].value, claims[0].verdict, claims[4].verdict) == (1, "fails", "fails")
    config.judge = False
    assert {c.verdict for c in digits.claims(config, [figures])} == {"not judged"}
