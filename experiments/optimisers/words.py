"""A small model of the next word of Python source: an embedding with rows that are rarely read."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from blogjax.data import python_source
from blogjax.data.batches import Batches
from blogjax.optim.lion import from_adamw, lion
from blogjax.optim.sparse_rows import lazy_rows
from blogjax.optim.tiger import tiger
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.train.task import Batch, Task
from experiments.launch.configs import check_ranges
from experiments.optimisers.arms import binned

UNKNOWN = 0
SPARSE = {"embedding": True, "hidden": False, "output": False}
_WORD = re.compile(rb"[^\W\d]\w*|\d+|[^\w\s]")
_INF = float("inf")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Numbered words, 1 for the most frequent one of the training split, 0 for rare ones.

    Attributes:
      train, validation: int32 `[n, context + 1]`, every run of so many words.
    """

    train: np.ndarray
    validation: np.ndarray


def read(words: Any) -> Corpus:
    """Cuts the standard library's source into names, numbers and signs.

    Raises:
      ValueError: if there are fewer different words than `words.vocabulary`.
    """
    found = [
        _WORD.findall(python_source.load(split)[: words.max_bytes].tobytes())
        for split in ("train", "validation")
    ]
    different, counts = np.unique(np.array(found[0], dtype=object), return_counts=True)
    if len(different) < words.vocabulary:
        raise ValueError(
            f"words.vocabulary is {words.vocabulary}, but the training text has but "
            f"{len(different)} different words"
        )
    # By count, then by spelling: the same order everywhere.
    order = np.argsort(-counts, kind="stable")[: words.vocabulary - 1]
    number = {word: i + 1 for i, word in enumerate(different[order])}
    rows = [
        python_source.windows(
            np.array([number.get(word, UNKNOWN) for word in text], np.int32), words.context + 1, 1
        )
        for text in found
    ]
    return Corpus(*rows)


def check(words: Any) -> None:
    """Refuses a `words` group that nothing can be measured on.

    Raises:
      ValueError: naming the field.
    """
    check_ranges(
        words, max_bytes=(10_000, 2**40), vocabulary=(3, 2**24), context=(1, 100),
        width=(1, 2**16), hidden=(1, 2**16), adamw_rate=(1e-12, 10), adamw_decay=(1e-12, 10),
        ratio=(1e-3, 1e3), tiger_rate=(1e-12, 1), init_std=(1e-9, _INF), rare=(1, words.common),
    )  # fmt: skip
    if not 2 <= words.classes <= words.vocabulary:
        raise ValueError(
            f"words.classes must be in [2, words.vocabulary = {words.vocabulary}], "
            f"got {words.classes}"
        )


def times_read(corpus: Corpus, words: Any, seed: int) -> np.ndarray:
    """How often each word stands in a context of the training batches: `[vocabulary]`.

    Raises:
      ValueError: if no word is rare, or none common, in the terms of `words.rare`, `words.common`.
    """
    batches = make_batches(corpus, words, seed)
    counts = np.zeros(words.vocabulary, np.int64)
    for step in range(words.steps):
        counts += np.bincount(contexts(batches(step)["words"]).ravel(), minlength=len(counts))
    for name, chosen in groups(counts, words).items():
        least = least_read(corpus.validation, counts)
        if not chosen.any() or not groups(least, words)[name].any():
            raise ValueError(
                f"no {name} words, by words.rare = {words.rare} and words.common = "
                f"{words.common}, among those read in {words.steps} steps"
            )
    return counts


def groups(counts: np.ndarray, words: Any) -> dict[str, np.ndarray]:
    """Which of the counts are those of rare words, and which of common ones."""
    return {
        "rare": (counts >= 1) & (counts <= words.rare),
        "common": counts >= words.common,
    }


def contexts(rows: np.ndarray) -> np.ndarray:
    """All words of each row but the last, which is to be predicted."""
    return rows[:, :-1]


def least_read(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How often the rarest word of each context was read, 0 for contexts with unknown words."""
    context = contexts(rows)
    return np.where((context == UNKNOWN).any(1), 0, counts[context].min(1))


def make_batches(corpus: Corpus, words: Any, seed: int) -> Batches:
    """Endless shuffled contexts."""
    return Batches({"words": corpus.train}, words.batch_size, seed=seed, **_processes())


def _processes() -> dict[str, int]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def optimisers(words: Any) -> dict[str, optax.GradientTransformation]:
    """The arms; Lion's rates follow from AdamW's."""
    adamw = optax.adamw(words.adamw_rate, weight_decay=words.adamw_decay)
    rates = from_adamw(words.adamw_rate, words.adamw_decay, words.ratio)
    return {
        "adamw": adamw,
        "lion": lion(**rates),
        "tiger": tiger(words.tiger_rate, weight_decay=rates["weight_decay"]),
        "lazy": lazy_rows(lion(**rates), SPARSE),
        "hybrid": optax.partition(
            {"rows": adamw, "dense": lion(**rates)},
            lambda params: {k: "rows" if SPARSE[k] else "dense" for k in params},
        ),
    }


def lion_decay(words: Any) -> float:
    """The decay of every Lion and of Tiger: rows drift towards its inverse."""
    return from_adamw(words.adamw_rate, words.adamw_decay, words.ratio)["weight_decay"]


def make_task(words: Any, tx: optax.GradientTransformation) -> Task:
    """Cross-entropy of the next word, all words from number `classes` on being one."""

    def init(key: jax.Array) -> dict[str, Any]:
        normal = jax.nn.initializers.normal(words.init_std)
        dense = jax.nn.initializers.lecun_normal()
        keys = jax.random.split(key, 3)
        inputs = words.context * words.width
        return {
            "params": {
                "embedding": normal(keys[0], (words.vocabulary, words.width)),
                "hidden": {
                    "kernel": dense(keys[1], (inputs, words.hidden)),
                    "bias": jnp.zeros(words.hidden),
                },
                "output": {
                    "kernel": dense(keys[2], (words.hidden, words.classes)),
                    "bias": jnp.zeros(words.classes),
                },
            }
        }

    def loss(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> LossOutput:
        del model_state, key
        return LossOutput(losses(params, batch["words"]))

    return gradient_task(init, loss, tx)


def losses(params: Any, rows: jax.Array) -> jax.Array:
    """Cross-entropy of the last word of each row, in nats: `[n]`."""
    x = params["embedding"][rows[:, :-1]].reshape(len(rows), -1)
    x = jnp.tanh(_dense(params["hidden"], x))
    logits = _dense(params["output"], x)
    target = jnp.where(rows[:, -1] < logits.shape[-1], rows[:, -1], UNKNOWN)
    return optax.softmax_cross_entropy_with_integer_labels(logits, target)


def _dense(layer: Any, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"][None]


def count_edges() -> list[int]:
    """Bins of the curves, by how often a word was read."""
    return [1, *(2 ** np.arange(1, 21)).tolist()]


def measure(words: Any, state: Any, corpus: Corpus, counts: np.ndarray) -> dict[str, Any]:
    """What the claims rest on, for one arm: sizes of rows, and validation losses in nats."""
    params = jax.device_get(state.params)
    embedding = np.asarray(params["embedding"], np.float64)
    square = np.square(embedding).mean(axis=1)
    compiled = jax.jit(losses)
    # Equal pieces, and a rest, so that two programs are compiled.
    pieces = np.split(corpus.validation, range(4096, len(corpus.validation), 4096))
    loss = np.concatenate([np.asarray(compiled(params, rows), np.float64) for rows in pieces])
    least = least_read(corpus.validation, counts)
    counts = np.where(np.arange(len(counts)) == UNKNOWN, 0, counts)
    by_words, by_contexts = groups(counts, words), groups(least, words)
    bins = count_edges()
    size = [None if s is None else s**0.5 for s in binned(counts, square, bins)]
    return {
        "max": float(np.abs(embedding).max()),
        "max_rare": float(np.abs(embedding[by_words["rare"]]).max()),
        "rms": {name: float(square[rows].mean() ** 0.5) for name, rows in by_words.items()},
        "loss": {
            "all": float(loss.mean()),
            **{name: float(loss[rows].mean()) for name, rows in by_contexts.items()},
        },
        "rare_words": int(by_words["rare"].sum()),
        "rare_share": float(by_contexts["rare"].mean()),
        "rms_by_count": size,
        "loss_by_count": binned(least, loss, bins),
    }
