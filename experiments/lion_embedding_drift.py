"""S01: embedding rows of rare words drift towards 1/weight_decay under Lion and Tiger.

Post: https://kexue.fm/archives/9736
Claims: a sign does not die out with the momentum below it, so a row that is rarely asked for is
  moved by the learning rate in every step until weight decay holds it at +-1/weight_decay; AdamW
  does not do so; the model as a whole looks normal, what follows rare words is predicted worse;
  to update only rows that have a gradient ("lazy" rows), or Adam for the embedding, cures it.
Two embeddings:
  `table`  2000 rows of 16 numbers, asked for with Zipf frequencies in batches of 32 and pulled to
           targets of standard deviation .05 by least squares, from zeros, 20000 steps. AdamW, Lion,
           and Lion with lazy rows, all with rate 1e-3 and decay .01.
  `words`  8192 words of the standard library's source; the next one (512 classes) is predicted from
           two by a hidden layer of 64, 5000 steps of 64 contexts. AdamW with rate 1e-2 and decay
           .1; Lion with a tenth and ten times of these, alone, with lazy rows, and with AdamW for
           the embedding ("hybrid"); Tiger.
Differences from the post: it saw +-100, with decay .01 and a language model of 7 billion
  parameters. A row that is never asked for again ends at (1 - (1 - lr wd)^n) / wd after n steps,
  so lr wd n must be 5 to come within 1% of the limit: with `words` it is, hence decay 1 and the
  limit 1. With `table` it is .2, and a row turns round at its next visit: there rows drift towards
  the limit, here 100, and never get near it. AdamW's rate is not the best one for `words`, but the
  one from which Lion's follows by `from_adamw`. Tied embeddings, the post's other cure, are left
  out.
"""

import pathlib
from typing import Any

import numpy as np

from blogjax.train import mesh as meshes
from experiments.launch.configs import config_errors
from experiments.launch.result import Claim, Result, judge
from experiments.optimisers import table, words
from experiments.optimisers.arms import check_train, ratio, run_arm

POST = "https://kexue.fm/archives/9736"
NAMES = {
    "adamw": "AdamW",
    "lion": "Lion",
    "tiger": "Tiger",
    "lazy": "Lion, lazy rows",
    "hybrid": "Lion, AdamW for the embedding",
}
COLOURS = {"adamw": "C0", "lion": "C3", "tiger": "C1", "lazy": "C2", "hybrid": "C4"}


def check(config: Any) -> None:
    """Refuses a config that cannot be run, before anything is.

    Raises:
      ValueError: naming the field.
    """
    check_train(
        config.train, {"table.steps": config.table.steps, "words.steps": config.words.steps}
    )
    table.check(config.table)
    words.check(config.words)
    mesh = meshes.make_mesh()
    for group in (config.table, config.words):
        meshes.check_batch_size(group.batch_size, mesh)


def claims(measured: list[Any], decay: float, judged: bool) -> list[Claim]:
    """The post's statements about what was measured, one entry of `measured` per seed.

    The intervals were committed before the judged runs. Those on the table leave a factor of two or
    more around what a trial of it found (module docstring of the config); the post has no figures
    but the limit, so the others ask for the sign of an effect, or 5% of a loss.

    Args:
      measured: one per seed.
      decay: Lion's on the words.
      judged: as in `judge`.
    """

    def of(part: str, *path: str) -> list[float]:
        values: Any = [m[part] for m in measured]
        for key in path:
            values = [v[key] for v in values]
        return [float("nan") if v is None else v for v in values]

    def ratios(part: str, above: str, below: str, *path: str) -> list[float]:
        pairs = zip(of(part, above, *path), of(part, below, *path), strict=True)
        return [ratio(a, b) for a, b in pairs]

    def rare_to_common(arm: str) -> np.ndarray:
        rare, common = (of("words", arm, "rms", name) for name in ("rare", "common"))
        return np.array([ratio(a, b) for a, b in zip(rare, common, strict=True)])

    signs = np.minimum(rare_to_common("lion"), rare_to_common("tiger"))
    others = np.max([rare_to_common(arm) for arm in ("adamw", "lazy", "hybrid")], axis=0)
    cures = [ratios("words", arm, "adamw", "loss", "rare") for arm in ("lazy", "hybrid")]
    return [
        judge(
            "table: Lion's largest entry is far beyond AdamW's: ratio",
            POST, "ratio of the largest absolute entries of the table, Lion to AdamW",
            ratios("table", "lion", "adamw", "max"), low=5.0, near=2.0, judged=judged,
        ),
        judge(
            "table: the rarer half of the rows is worse under Lion: ratio of errors to AdamW's",
            POST, "ratio of mean absolute errors of the rarer half of the rows, Lion to AdamW",
            ratios("table", "lion", "adamw", "tail_error"), low=10.0, near=5.0, judged=judged,
        ),
        judge(
            "table: between two visits a row moves as the closed form says: largest deviation",
            POST, "largest deviation of an entry, relative to the distance it was to move",
            of("table", "lion", "closed_form"), high=0.01, near=0.001, judged=judged,
        ),
        judge(
            "table: lazy rows cure the size: largest entry to AdamW's",
            POST, "ratio of the largest absolute entries of the table, lazy Lion to AdamW",
            ratios("table", "lazy", "adamw", "max"), high=1.5, near=0.1, judged=judged,
        ),
        judge(
            "table: and the error of the rarer half: ratio to AdamW's",
            POST, "ratio of mean absolute errors of the rarer half of the rows, lazy Lion to AdamW",
            ratios("table", "lazy", "adamw", "tail_error"), high=3.0, near=0.3, judged=judged,
        ),
        judge(
            "table: at no cost to the commonest tenth: ratio of errors to AdamW's",
            POST, "ratio of mean absolute errors of the commonest tenth, lazy Lion to AdamW",
            ratios("table", "lazy", "adamw", "head_error"), high=1.0, near=0.2, judged=judged,
        ),
        judge(
            "words: rows of rare words reach 1/weight_decay under Lion: largest entry x decay",
            POST, "largest absolute entry of a rare word's row times Lion's decay",
            [decay * m for m in of("words", "lion", "max_rare")], low=0.9, high=1.01, near=0.002,
            judged=judged,
        ),
        judge(
            "words: rows of rare words are larger than those of common ones, under Lion and Tiger: "
            "smaller of the two ratios",
            POST, "ratio of the RMS of rare rows to that of common ones",
            signs.tolist(), low=1.0, near=0.1, judged=judged,
        ),
        judge(
            "words: not so under AdamW, lazy rows or AdamW for the embedding: largest ratio",
            POST, "ratio of the RMS of rare rows to that of common ones",
            others.tolist(), high=1.0, near=0.1, judged=judged,
        ),
        judge(
            "words: as a whole the model looks normal: validation loss, Lion to AdamW",
            POST, "ratio of validation losses",
            ratios("words", "lion", "adamw", "loss", "all"), low=0.95, high=1.05, near=0.01,
            judged=judged,
        ),
        judge(
            "words: after rare words it is worse: validation loss there, Lion to AdamW",
            POST, "ratio of validation losses over contexts with a rare word",
            ratios("words", "lion", "adamw", "loss", "rare"), low=1.05, near=0.03, judged=judged,
        ),
        judge(
            "words: lazy rows and AdamW for the embedding cure that: larger of their losses there, "
            "to AdamW's",
            POST, "ratio of validation losses over contexts with a rare word",
            np.max(cures, axis=0).tolist(), high=1.05, near=0.02, judged=judged,
        ),
    ]  # fmt: skip


def draw(path: pathlib.Path, config: Any, measured: list[Any]) -> None:
    """Rows by frequency and by age, rows and losses by how often a word was read."""
    from experiments.optimisers.pictures import Line, Panel, draw_panels

    def mean(part: str, arm: str, name: str) -> np.ndarray:
        """Over the seeds that have a value in a bin; NaN where none has."""
        values = np.array([m[part][arm][name] for m in measured], np.float64)
        some = ~np.isnan(values).all(axis=0)
        means = np.full(values.shape[1], np.nan)
        means[some] = np.nanmean(values[:, some], axis=0)
        return means

    def line(arm: str, values: np.ndarray, edges: list[int]) -> Line:
        lower, upper = np.array(edges[:-1]), np.array(edges[1:])
        middle = np.sqrt(lower * np.maximum(upper - 1, lower))  # of the whole numbers of a bin
        some = ~np.isnan(values)
        return Line(NAMES[arm], middle[some], values[some], COLOURS[arm])

    def lines(part: str, name: str, edges: list[int]) -> list[Line]:
        return [line(arm, mean(part, arm, name), edges) for arm in measured[0][part]]

    bins, counts = table.edges(config.table), words.count_edges()
    losses = {arm: mean("words", arm, "loss_by_count") for arm in measured[0]["words"]}
    rate, decay = config.table.learning_rate, config.table.weight_decay
    ages = np.geomspace(1, config.table.steps, 100)
    from_rest = table.closed_form(0.0, -1.0, ages, rate, decay)
    limit = words.lion_decay(config.words)
    draw_panels(
        path,
        [
            Panel(
                "table: error by frequency", "rank of the row, 1 = commonest",
                "mean |E - target|", lines("table", "error_by_rank", bins.rank), log_y=True,
            ),
            Panel(
                "table: distance moved since the last visit", "steps since the last visit",
                "mean |E - E before it|", lines("table", "moved_by_age", bins.age), log_y=True,
                curves={"(1 - (1 - lr wd)^n) / wd": (ages, from_rest)},
            ),
            Panel(
                "words: size of the rows", "how often the word was read", "RMS of the row",
                lines("words", "rms_by_count", counts),
                levels={f"1 / wd of Lion = {1 / limit:g}": 1 / limit},
            ),
            Panel(
                "words: validation loss above AdamW's",
                "how often the rarest word of the context was read", "nats",
                [line(arm, loss - losses["adamw"], counts) for arm, loss in losses.items()],
            ),
        ],
    )  # fmt: skip


def run(config: Any, workdir: pathlib.Path) -> Result:
    """Trains and measures every arm of every seed, and judges them; finished arms are read back."""
    with config_errors():
        check(config)
        corpus = words.read(config.words)
        seeds = list(config.train.seeds)
        counts = {seed: words.times_read(corpus, config.words, seed) for seed in seeds}
    measured = []
    for seed in seeds:
        folder = workdir / f"seed{seed}" if len(seeds) > 1 else workdir
        measured.append({"table": {}, "words": {}})
        for arm, tx in table.optimisers(config.table).items():
            measured[-1]["table"][arm] = run_arm(
                folder / "table" / arm,
                table.make_task(config.table, tx, seed),
                table.ZipfRows(
                    config.table.rows, config.table.exponent, config.table.batch_size, seed
                ),
                config.table.steps,
                config.train,
                seed,
                lambda state, seed=seed: table.measure(config.table, state, seed),
            )
        for arm, tx in words.optimisers(config.words).items():
            measured[-1]["words"][arm] = run_arm(
                folder / "words" / arm,
                words.make_task(config.words, tx),
                words.make_batches(corpus, config.words, seed),
                config.words.steps,
                config.train,
                seed,
                lambda state, seed=seed: words.measure(config.words, state, corpus, counts[seed]),
            )
    draw(workdir / "drift.png", config, measured)
    return Result(
        claims=claims(measured, words.lion_decay(config.words), config.judge),
        seeds=seeds,
        measured={"by_seed": measured},
        pictures=["drift.png"],
    )


if __name__ == "__main__":
    from experiments.launch.main import main

    main(run)
