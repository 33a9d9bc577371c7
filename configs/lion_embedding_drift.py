"""Rows of an embedding that drift under sign updates: a Zipf table, and words of Python source.

Command:   python -m experiments.lion_embedding_drift --config=configs/lion_embedding_drift.py
           --workdir=runs/lion_embedding_drift
Hardware:  two CPU cores, about a minute. `:full` runs three seeds, `:smoke` takes seconds.
Expected:  see docs/results/lion_embedding_drift/result.json; that of the table resembles a trial
           made before: largest entry .22 (AdamW), 3.65 (Lion), .20 (lazy rows), mean error of the
           rarer half .0068, .346, .012.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "default") -> ConfigDict:
    config = ConfigDict()
    # Rows asked for with Zipf frequencies, each to become a vector of its own.
    config.table = ConfigDict(
        {
            "rows": 2000,
            "width": 16,
            "exponent": 1.0,
            "target_std": 0.05,
            "batch_size": 32,
            "steps": 20_000,
            "learning_rate": 1e-3,
            "weight_decay": 0.01,
            "min_age": 1000,  # steps since the last visit, for comparison with the closed form
        }
    )
    # Lion's rates are AdamW's divided and multiplied by `ratio`.
    config.words = ConfigDict(
        {
            "max_bytes": 16_000_000,  # of each split
            "vocabulary": 8192,
            "classes": 512,
            "context": 2,
            "width": 16,
            "hidden": 64,
            "init_std": 0.05,
            "batch_size": 64,
            "steps": 5000,
            "adamw_rate": 1e-2,
            "adamw_decay": 0.1,
            "ratio": 10.0,
            "tiger_rate": 2e-3,
            "rare": 10,  # read at most so often
            "common": 1000,  # read at least so often
        }
    )
    config.train = ConfigDict(
        {"seeds": (0,), "log_every": 100, "save_seconds": 10.0, "on_nonfinite": "stop"}
    )
    config.judge = True

    if variant == "full":
        config.train.seeds = (0, 1, 2)
    elif variant == "smoke":
        config.table.update(rows=40, width=2, batch_size=8, steps=30, min_age=5)
        config.words.update(
            max_bytes=20_000, vocabulary=64, classes=8, width=2, hidden=4, batch_size=8, steps=10,
            rare=2, common=5,
        )  # fmt: skip
        config.train.log_every = 5
        config.judge = False
    elif variant != "default":
        raise ValueError(f"unknown variant {variant!r}; there are default, full, smoke")
    return config
