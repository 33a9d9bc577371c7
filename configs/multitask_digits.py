"""Three tasks on scikit-learn's digits, one of them with its loss multiplied by 1000.

Command:   python -m experiments.multitask_digits --config=configs/multitask_digits.py
           --workdir=runs/multitask_digits
Hardware:  two CPU cores, about a minute. `:full` runs three seeds, `:smoke` takes seconds.
Expected:  see docs/results/multitask_digits/result.json. The posts have no figures.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "default") -> ConfigDict:
    config = ConfigDict()
    config.data = ConfigDict({"batch_size": 64})
    config.model = ConfigDict({"hidden": (128, 64)})
    config.scale = 1000.0  # what the ink's loss is multiplied by in the second run of each method
    config.optim = ConfigDict(
        {
            "learning_rate": 0.1,  # at the start; it falls to 0 by a cosine
            "momentum": 0.9,
            "clip": 1.0,
            "adam_rate": 1e-2,
        }
    )
    config.train = ConfigDict(
        {
            "seeds": (0,),
            "steps": 500,
            "log_every": 20,
            "save_seconds": 10.0,
            "on_nonfinite": "stop",
        }
    )
    config.judge = True

    if variant == "full":
        config.train.seeds = (0, 1, 2)
    elif variant == "smoke":
        config.data.batch_size = 8
        config.model.hidden = (8,)
        config.train.update(steps=3, log_every=1)
        config.judge = False
    elif variant != "default":
        raise ValueError(f"unknown variant {variant!r}; there are default, full, smoke")
    return config
