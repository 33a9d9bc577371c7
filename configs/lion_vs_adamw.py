"""Lion against AdamW on scikit-learn's digits: best rates, and what the batch size does.

Command:   python -m experiments.lion_vs_adamw --config=configs/lion_vs_adamw.py
           --workdir=runs/lion_vs_adamw
Hardware:  two CPU cores, about a minute. `:full` runs three seeds, `:smoke` takes seconds.
Expected:  see docs/results/lion_vs_adamw/result.json. In a trial made before, Lion was no better
           than AdamW at any batch size; its authors publish 77.9% against 75.4% for ViT-B/16 on
           ImageNet in batches of 32768 (arXiv:2302.06675).
"""

from ml_collections import ConfigDict


def get_config(variant: str = "default") -> ConfigDict:
    config = ConfigDict()
    config.data = ConfigDict({"batch_sizes": (16, 64, 512)})  # rising
    config.model = ConfigDict({"hidden": (32,)})
    # The same candidates for both optimisers, two to a power of ten.
    config.optim = ConfigDict(
        {
            "rates": tuple(10 ** (k / 2) for k in range(-7, 0)),
            "decays": tuple(10 ** (k / 2) for k in range(-4, 2)),
            "warmup_fraction": 0.1,
            "ratio": 10.0,  # from AdamW's rates to Lion's, for the claim about the rule
        }
    )
    config.train = ConfigDict(
        {
            "seeds": (0,),
            "epochs": 50.0,
            "replicas": 6,  # networks with the same rates, over which losses are averaged
            "log_every": 50,
            "save_seconds": 10.0,
            "on_nonfinite": "stop",
        }
    )
    config.judge = True

    if variant == "full":
        config.train.seeds = (0, 1, 2)
    elif variant == "smoke":
        config.data.batch_sizes = (8, 16)
        config.model.hidden = (4,)
        config.optim.update(rates=(1e-3, 1e-2, 1e-1), decays=(0.1, 1.0))
        config.train.update(epochs=0.05, replicas=2, log_every=2)
        config.judge = False
    elif variant != "default":
        raise ValueError(f"unknown variant {variant!r}; there are default, full, smoke")
    return config
