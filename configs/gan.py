"""GANs with a normalised critic: scikit-learn's handwritten digits, or CIFAR-10 as GN-GAN has it.

Command:   python -m experiments.gan --config=configs/gan.py --workdir=runs/gan
Hardware:  two CPU cores, about a minute. `:full` runs three seeds, `:smoke` takes seconds.
Expected:  see docs/results/gan/result.json.

Command:   python -m experiments.gan --config=configs/gan.py:cifar10 --workdir=runs/gan_cifar10
           python -m experiments.gan --config=configs/gan.py:cifar10_dcgan --workdir=runs/gan_dcgan
Hardware:  one GPU, or one host with several; the batch is split over all devices.
           `--config.model.dtype=bfloat16` computes in bfloat16 and keeps parameters, moments and
           statistics in float32.
Expected:  not measured: no such run has been made yet. Networks and settings are those of
           GN-GAN_CIFAR10_RES.txt and GN-GAN_CIFAR10_CNN.txt in the authors' repository,
           https://github.com/basiclab/GNGAN-PyTorch. Wu et al. 2021 (arXiv:2109.02235) publish FID
           and Inception score for both; the repository does not repeat them, and the paper's
           tables were not at hand here, so no number is quoted.
FID:       needs the weights of an Inception network, which are not part of this project. A run
           leaves 50000 samples, uint8 [n, 32, 32, 3], in samples/*.npy. Of these and of the 50000
           training images: the 2048 features of Inception-v3's last pooling, in the TensorFlow
           weights of 2015 that FIDs are quoted for; means m, m' and covariances C, C' of both; then
           |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), `blogjax.metrics.frechet.frechet_distance`.
Different: the generator's average warms up (the authors' begins with the decay of .9999), and its
           batch statistics move once a step, in its own update (the authors' in those of the critic
           as well). The authors report the best of the checkpoints by FID; here it is the last.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config(variant: str = "default") -> ConfigDict:
    config = ConfigDict()
    config.data = ConfigDict(
        {
            "name": "digits",  # or an image dataset of TFDS
            "dir": "",  # where TFDS keeps it, if not in its usual place
            "splits": ("train", "validation", "test"),
            "serve": "auto",  # from memory, by grain, or auto: memory where it fits
            "batch_size": 128,  # of a step; the critic's updates share it
            "flip": False,
        }
    )
    config.model = ConfigDict(
        {
            "architecture": "dcgan",  # or resnet
            "latent": 32,
            "generator_widths": (48, 24),  # from coarse to fine
            "critic_widths": (24, 48),  # from fine to coarse
            "halvings": 1,  # of height and width in the critic; the DCGAN's has no choice
            "norm": "batch",  # of the generator: batch, group or none
            "dtype": "float32",
            "param_dtype": "float32",
        }
    )
    config.game = ConfigDict(
        {
            "loss": "hinge",  # or wasserstein, non_saturating, least_squares
            "constraint": "gn",  # or none, clip, sn, gp, gran
            "critic_steps": 2,
            "generator_draws": 1,  # images for each row of one of the critic's updates
        }
    )
    config.optim = ConfigDict(
        {
            "name": "adam",  # or sgd, without b1 and b2
            "generator_rate": 1e-3,
            "critic_rate": 1e-3,
            "schedule": "linear",  # to 0; or constant
            "b1": 0.0,
            "b2": 0.9,
            "ema_decay": 0.99,
        }
    )
    config.train = ConfigDict(
        {
            "seeds": (0,),
            "steps": 1000,
            "evaluate_every": 200,
            "render_every": 500,
            "save_seconds": 10.0,
            "log_every": 5,
            "on_nonfinite": "stop",
        }
    )
    config.sample = ConfigDict({"num": 1000, "batch_size": 250})
    config.measure = ConfigDict(
        {
            "lines": 24,  # from held-out images to generated ones
            "parts": 1000,  # of each line
            "directions": 512,  # of sliced distances
        }
    )
    config.mesh = ConfigDict({"fsdp": 1, "view": "jit"})
    config.judge = True

    if variant == "full":
        config.train.seeds = (0, 1, 2)
    elif variant == "smoke":
        config.data.batch_size = 16
        config.model.update(latent=4, generator_widths=(4, 4), critic_widths=(4, 4))
        config.train.update(steps=4, evaluate_every=2, render_every=4, log_every=1)
        config.sample.update(num=40, batch_size=24)
        config.measure.update(lines=2, parts=8, directions=8)
        config.judge = False
    elif variant in ("cifar10", "cifar10_dcgan"):
        _cifar10(config)
        if variant == "cifar10_dcgan":
            _dcgan(config)
    elif variant != "default":
        raise ValueError(
            f"unknown variant {variant!r}; there are default, full, smoke, cifar10, cifar10_dcgan"
        )
    return config


def _cifar10(config: Any) -> None:
    """GN-GAN_CIFAR10_RES.txt: 200000 steps of 5 critic updates of 64 images, then 128 generated."""
    config.data.update(
        name="cifar10", splits=("train", "test[:2000]", "test[2000:]"), batch_size=320, flip=True
    )
    config.model.update(
        architecture="resnet", latent=128, generator_widths=(256, 256, 256, 256),
        critic_widths=(128, 128, 128, 128), halvings=2,
    )  # fmt: skip
    config.game.update(critic_steps=5, generator_draws=2)
    config.optim.update(generator_rate=2e-4, critic_rate=4e-4, ema_decay=0.9999)
    config.train.update(
        steps=200_000, evaluate_every=5000, render_every=5000, save_seconds=600.0, log_every=100
    )
    config.sample.update(num=50_000, batch_size=1000)
    config.measure.parts = 200
    config.judge = False


def _dcgan(config: Any) -> None:
    """GN-GAN_CIFAR10_CNN.txt, where it differs: plain convolutions, another game, no decay."""
    config.data.batch_size = 64
    config.model.update(
        architecture="dcgan", generator_widths=(512, 256, 128, 64),
        critic_widths=(64, 128, 256, 512), halvings=3,
    )  # fmt: skip
    config.game.update(loss="non_saturating", critic_steps=1)
    config.optim.update(critic_rate=2e-4, schedule="constant")
