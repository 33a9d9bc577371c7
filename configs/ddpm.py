"""DDPM and DDIM on scikit-learn's handwritten digits, conditioned on the class.

Command:   make train
           python -m experiments.ddpm --config=configs/ddpm.py --workdir=runs/ddpm
Hardware:  two CPU cores, about a minute. `:full` runs three seeds, `:smoke` takes seconds.
Expected:  see docs/results/ddpm/result.json and the table in README.md.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "default") -> ConfigDict:
    config = ConfigDict()
    config.data = ConfigDict({"batch_size": 64})
    config.model = ConfigDict(
        {
            "channels": 24,
            "multipliers": (1, 2),
            "num_blocks": 1,
            "attention_resolutions": (),
            "num_heads": 1,
            "dropout": 0.0,
            "resample": "space_to_depth",
            "dtype": "float32",
            "param_dtype": "float32",
        }
    )
    config.diffusion = ConfigDict(
        {"schedule": "cosine", "num_steps": 1000, "prediction": "v", "weighting": "simple"}
    )
    config.optim = ConfigDict(
        {
            "learning_rate": 4e-3,
            "warmup_fraction": 0.05,
            "b1": 0.9,
            "b2": 0.99,
            "clip_norm": 1.0,
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
    # Claims are measured on `num` samples at each number of `steps`, fewest first.
    config.sample = ConfigDict(
        {"num": 1000, "batch_size": 250, "steps": (5, 10, 20, 50), "clip": True}
    )
    config.mesh = ConfigDict({"fsdp": 1})
    config.judge = True

    if variant == "full":
        config.train.seeds = (0, 1, 2)
    elif variant == "smoke":
        config.model.channels = 8
        config.data.batch_size = 8
        config.train.steps = 6
        config.train.evaluate_every = 3
        config.train.render_every = 6
        config.train.log_every = 1
        config.sample.num = 40
        config.sample.batch_size = 40
        config.sample.steps = (2, 4)
        config.judge = False
    elif variant != "default":
        raise ValueError(f"unknown variant {variant!r}; there are default, full and smoke")
    return config
