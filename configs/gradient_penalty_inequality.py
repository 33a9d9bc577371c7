"""Input against parameter gradients on scikit-learn's digits, along training.

Command:   python -m experiments.gradient_penalty_inequality
           --config=configs/gradient_penalty_inequality.py
           --workdir=runs/gradient_penalty_inequality
Hardware:  two CPU cores, about 20 seconds. `:full` runs three seeds, `:smoke` takes seconds.
Expected:  see docs/results/gradient_penalty_inequality/result.json. The inequality is a theorem,
           so its ratio is at most 1; the post has no figures.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "default") -> ConfigDict:
    config = ConfigDict()
    config.data = ConfigDict({"batch_size": 64})
    config.model = ConfigDict({"hidden": (32, 32)})
    config.optim = ConfigDict({"learning_rate": 0.1})
    config.measure = ConfigDict(
        {
            "steps": (1, 10, 100, 300, 1000),  # rising; training ends at the last
            "images": 256,
            "batch_sizes": (4, 16, 64),  # rising; each divides the images
        }
    )
    config.train = ConfigDict(
        {
            "seeds": (0,),
            "log_every": 50,
            "save_seconds": 10.0,
            "on_nonfinite": "stop",
        }
    )
    config.judge = True

    if variant == "full":
        config.train.seeds = (0, 1, 2)
    elif variant == "smoke":
        config.data.batch_size = 8
        config.model.hidden = (4, 3)
        config.measure.update(steps=(1, 3), images=16, batch_sizes=(2, 8))
        config.train.log_every = 1
        config.judge = False
    elif variant != "default":
        raise ValueError(f"unknown variant {variant!r}; there are default, full, smoke")
    return config
