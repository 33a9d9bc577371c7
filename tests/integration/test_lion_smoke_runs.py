"""Both of Lion's experiments, shrunk: what a run promises, and its figures written out by hand."""

import json

import jax
import numpy as np
import pytest
from tracked_config import Tracked

from blogjax.train import mesh as meshes
from configs import lion_embedding_drift as drift_config
from configs import lion_vs_adamw as versus_config
from experiments import lion_embedding_drift as drift
from experiments import lion_vs_adamw as versus
from experiments.launch.configs import flatten
from experiments.optimisers import arms, table

pytestmark = pytest.mark.slow  # twelve tasks to compile

EXPERIMENTS = {
    "drift": (drift, drift_config.get_config, "drift.png", 12),
    "versus": (versus, versus_config.get_config, "rates.png", 7),
}


def run(name, config, folder):
    """On one device: twelve tasks take twice as long to compile for eight."""
    one = meshes.make_mesh(devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meshes, "make_mesh", lambda: one)
        return EXPERIMENTS[name][0].run(config, folder)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Both experiments, shrunk; one run of each for all tests here."""
    runs = {}

    def once(name):
        if name not in runs:
            folder, config = tmp_path_factory.mktemp(name), EXPERIMENTS[name][1]("smoke").lock()
            tracked = Tracked(config)
            runs[name] = folder, config, tracked, run(name, tracked, folder)
        return runs[name]

    return once


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_field_of_the_config_is_read(smoke, name):
    _, config, tracked, _ = smoke(name)
    assert set(flatten(config.to_dict())) == tracked.read


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_folder_holds_what_a_run_promises(smoke, name):
    folder, _, _, result = smoke(name)
    _, _, picture, count = EXPERIMENTS[name]
    assert result.pictures == [picture]
    assert 10_000 < (folder / picture).stat().st_size < 400_000
    assert [c.verdict for c in result.claims] == ["not judged"] * count
    assert all(c.statement and c.source.startswith("https://") for c in result.claims)
    assert len({(c.metric, c.statement) for c in result.claims}) == count
    stored = sorted(folder.glob("*/*/measured.json"))
    assert len(stored) == {"drift": 8, "versus": 4}[name]
    for path in stored:
        assert (path.parent / "metrics.jsonl").stat().st_size > 0
        assert list((path.parent / "checkpoints").glob("[0-9]*"))
    json.dumps(result.measured)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_finished_arms_are_read_back_and_an_interrupted_one_goes_on(smoke, name, monkeypatch):
    folder, config, _, result = smoke(name)
    arm = {"drift": "table/lion", "versus": "batch16/lion"}[name]
    before = (folder / arm / "measured.json").read_text()
    (folder / arm / "measured.json").unlink()  # as after a kill between training and measuring
    trained = []

    def fit(*args, workdir, **kwargs):
        trained.append(workdir)
        return original(*args, workdir=workdir, **kwargs)

    original = arms.fit
    monkeypatch.setattr(arms, "fit", fit)
    again = run(name, config, folder)
    assert trained == [folder / arm]
    assert (folder / arm / "measured.json").read_text() == before
    np.testing.assert_equal([c.value for c in again.claims], [c.value for c in result.claims])


def test_the_tables_figures_are_those_of_a_plain_loop(smoke):
    """Lion and lazy Lion written out in numpy, on the rows of the smoke config."""
    folder, config, _, _ = smoke("drift")
    t, seed = config.table, config.train.seeds[0]
    wanted = table.targets(t, seed).astype(np.float64)
    batches = table.ZipfRows(t.rows, t.exponent, t.batch_size, seed)
    for arm in ("lion", "lazy"):
        row, m, before = (np.zeros_like(wanted) for _ in range(3))
        last = np.full(t.rows, -1)
        for step in range(t.steps):
            index = batches(step)["index"]
            g = np.zeros_like(row)
            np.add.at(g, index, (row - wanted)[index] / t.batch_size)
            before[index], last[index] = row[index], step
            move = np.sign(0.9 * m + 0.1 * g) + t.weight_decay * row
            seen = np.isin(np.arange(t.rows), index)[:, None] | (arm == "lion")
            row = np.where(seen, row - t.learning_rate * move, row)
            m = np.where(seen, 0.99 * m + 0.01 * g, m)
        found = json.loads((folder / "table" / arm / "measured.json").read_text())
        error = np.abs(row - wanted).mean(axis=1)
        np.testing.assert_allclose(
            [found["max"], found["head_error"], found["tail_error"], found["max_target"]],
            [abs(row).max(), error[:4].mean(), error[20:].mean(), abs(wanted).max()], rtol=1e-5,
        )  # fmt: skip
        np.testing.assert_allclose(found["error_by_rank"][0], error[0], rtol=1e-5)
        ages, bins = t.steps - 1 - last, table.edges(t).age
        moved = abs(row - before).mean(axis=1)
        for low, high, value in zip(bins[:-1], bins[1:], found["moved_by_age"], strict=True):
            chosen = moved[(last >= 0) & (ages >= low) & (ages < high)]
            assert (value is None) == (chosen.size == 0)
            if chosen.size:
                np.testing.assert_allclose(value, chosen.mean(), rtol=1e-5)
        long = (last >= 0) & (ages >= t.min_age)
        left = (1 - t.learning_rate * t.weight_decay) ** (ages + 1.0)[long, None]
        end = left * before[long] - np.sign(m[long]) * (1 - left) / t.weight_decay
        apart = (abs(row[long] - end) / abs(end - before[long])).max()
        np.testing.assert_allclose(found["closed_form"], apart, rtol=1e-2)
