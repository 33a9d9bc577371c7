"""Whole runs under jit, pmap and shard_map: the same losses, stopped on the way or not."""

import os
import signal

import numpy as np
import pytest
from tiny_celeb_a import prepare

import configs.ddpm
import configs.gan
import configs.multitask_images
from blogjax.train.interrupt import Interrupted
from blogjax.train.reporting import read_metrics
from experiments import ddpm, gan, multitask_images

pytestmark = pytest.mark.slow  # nine programs for eight devices

CHANGES = {
    "ddpm": {"optim.name": "sgd", "optim.learning_rate": 1e-3},
    "gan": {"optim.name": "sgd", "optim.generator_rate": 1e-2, "optim.critic_rate": 1e-2},
    "multitask_images": {"optim.name": "sgd", "optim.learning_rate": 1e-2, "data.batch_size": 16},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """`small(name, view)` is the experiment and its smoke config."""
    faces = prepare(tmp_path_factory.mktemp("tfds"))

    def make(name, view):
        module = {"ddpm": ddpm, "gan": gan, "multitask_images": multitask_images}[name]
        config = getattr(configs, name).get_config("smoke")
        config.update_from_flattened_dict(CHANGES[name] | {"mesh.view": view, "train.log_every": 1})
        if name == "multitask_images":
            config.data.dir = str(faces)
        return module, config

    return make


def losses(folder):
    """All losses of all steps and evaluations."""
    records = [read_metrics(folder / "metrics.jsonl", kind) for kind in ("train", "evaluate")]
    return np.concatenate([r[n] for r in records for n in sorted(r) if "loss" in n])


@pytest.fixture(scope="module")
def under_jit(small, tmp_path_factory):
    done = {}

    def once(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            module, config = small(name, "jit")
            done[name] = (module.run(config, folder), losses(folder))
        return done[name]

    return once


@pytest.mark.parametrize("view", ["pmap", "shard_map"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_the_same_under_every_view(small, under_jit, tmp_path, monkeypatch, name, view):
    expected, numbers = under_jit(name)
    module, config = small(name, view)
    trained, asked = module.fit, []

    class Stopping:
        """Evaluation batches during the first of which a signal arrives."""

        def __init__(self, batches):
            self.batches, self.batch_size = batches, batches.batch_size

        def __len__(self):
            return len(self.batches)

        def __call__(self, index):
            if not asked:  # a second one would end all
                asked.append(index)
                os.kill(os.getpid(), signal.SIGTERM)
            return self.batches(index)

    def stopped_on_the_way(*args, evaluation, **kwargs):
        return trained(*args, evaluation=Stopping(evaluation), **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", stopped_on_the_way)
        with pytest.raises(Interrupted, match="at step"):
            module.run(config, tmp_path)
    assert len(list(tmp_path.glob("**/checkpoints/[0-9]*"))) == 1
    found = module.run(config, tmp_path)
    assert len(numbers) >= 8 and np.isfinite(numbers).all() and np.ptp(numbers) > 0
    np.testing.assert_allclose(losses(tmp_path), numbers, rtol=1e-6, atol=1e-7)
    for ours, theirs in zip(found.claims, expected.claims, strict=True):
        np.testing.assert_allclose(ours.value, theirs.value, rtol=1e-3, atol=1e-6)
