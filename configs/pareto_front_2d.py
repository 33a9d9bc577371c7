"""All combiners of two gradients on the two-objective toy of the multi-task literature.

Command:   python -m experiments.pareto_front_2d --config=configs/pareto_front_2d.py
           --workdir=runs/pareto_front_2d
Hardware:  two CPU cores, under a minute. `:full` runs three seeds, `:smoke` takes seconds.
Expected:  see docs/results/pareto_front_2d/result.json. Liu et al. 2021 have no numbers, but
           pictures: the mean stays away from the front from two of their three starts, MGDA and
           PCGrad arrive at places that depend on the start, CAGrad at the least mean.

Adam with twice the rate of the paper's code and half its 100 000 steps, which takes half the time.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "default") -> ConfigDict:
    config = ConfigDict()
    # Around each of the five usual starts `around` more are drawn, normal with this deviation.
    config.starts = ConfigDict({"around": 1, "deviation": 0.5})
    config.optim = ConfigDict({"learning_rate": 2e-3, "eps": 1e-8, "cagrad_c": 0.5})
    # Plain steps, from `starts` places of the half where the losses are smooth.
    config.plain = ConfigDict({"starts": 16, "learning_rate": 0.1, "steps": 500})
    config.measure = ConfigDict(
        {
            "points": 500,  # of each path that are kept; divides the steps
            "near": 0.01,  # distance to the front at which a path has arrived
        }
    )
    config.train = ConfigDict({"seeds": (0,), "steps": 50_000})
    config.judge = True

    if variant == "full":
        config.train.seeds = (0, 1, 2)
    elif variant == "smoke":
        config.plain.update(starts=2, steps=4)
        config.measure.update(points=5, near=2.0)
        config.train.steps = 20
        config.judge = False
    elif variant != "default":
        raise ValueError(f"unknown variant {variant!r}; there are default, full, smoke")
    return config
