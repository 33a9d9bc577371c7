"""Forty attributes of the faces of CelebA, by the gradient of least norm.

Command:   python -m experiments.multitask_images --config=configs/multitask_images.py:celeb_a
           --workdir=runs/celeb_a
Hardware:  one GPU, or one host with several; the batch is split over all devices. A step takes a
           backward pass and a directional derivative for each of 40 tasks. The images take 2 GB of
           memory once decoded; `--config.data.serve=grain` reads them while training.
           `--config.model.dtype=bfloat16` computes in bfloat16 and keeps parameters and moments in
           float32; the inner products of the gradients have then bfloat16's accuracy.
Data:      `celeb_a` of TFDS, whose files lie on a host that often refuses downloads. Then prepare
           it elsewhere as array_record and copy the folder to `--config.data.dir`.
           `:smoke` takes seconds, on any dataset of that name, cut down for instance.
Expected:  not measured: no such run has been made yet. Sener and Koltun 2018 (arXiv:1810.04650)
           publish these mean test errors, with a ResNet-18 at 64 x 64: single tasks 8.77%, uniform
           scaling 9.62%, min-norm by parameters 8.33%, by shared features 8.25%. Network, optimiser
           and crop differ here. `--config.multitask.method=mean` is uniform scaling.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "celeb_a") -> ConfigDict:
    config = ConfigDict()
    config.data = ConfigDict(
        {
            "name": "celeb_a",  # or a dataset of TFDS with `image` and a dict of bools `attributes`
            "dir": "",  # where TFDS keeps it, if not in its usual place
            "splits": ("train", "validation", "test"),
            "serve": "auto",  # from memory, by grain, or auto: memory where it fits
            "batch_size": 256,
            "crop": 178,  # side of the square cut out of the middle
            "size": 64,  # to which it is made smaller
            "flip": True,
        }
    )
    config.model = ConfigDict(
        {
            "channels": 32,
            "multipliers": (1, 2, 4, 8),
            "num_blocks": 1,
            "resample": "space_to_depth",  # or strided
            "dtype": "float32",
            "param_dtype": "float32",
        }
    )
    config.multitask = ConfigDict(
        {
            "method": "min_norm",  # or gradient_normalized, another combiner, or mean
            "mode": "scan",  # one gradient at a time; jacrev holds all
        }
    )
    config.optim = ConfigDict(
        {
            "name": "adamw",  # or sgd, with the same decay
            "learning_rate": 1e-3,
            "warmup_fraction": 0.02,
            "weight_decay": 1e-4,
        }
    )
    config.train = ConfigDict(
        {
            "seeds": (0,),
            "steps": 12_720,  # 20 epochs
            "evaluate_every": 636,
            "save_seconds": 600.0,
            "log_every": 20,
            "on_nonfinite": "stop",
        }
    )
    config.mesh = ConfigDict({"fsdp": 1, "view": "jit"})
    config.judge = False

    if variant == "smoke":
        config.data.update(batch_size=8, crop=32, size=8)
        config.model.update(channels=4, multipliers=(1, 2))
        config.train.update(steps=3, evaluate_every=2, log_every=1)
    elif variant != "celeb_a":
        raise ValueError(f"unknown variant {variant!r}; there are celeb_a, smoke")
    return config
