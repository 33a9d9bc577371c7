"""The combiners that the conformance suite runs; a new one is one entry of `CASES`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

from blogjax.multitask.cagrad import cagrad_weights
from blogjax.multitask.combiner import Combiner
from blogjax.multitask.gradient_normalized import gradient_normalized_weights
from blogjax.multitask.min_norm import min_norm_weights
from blogjax.multitask.mixed import mixed_weights
from blogjax.multitask.pcgrad import pcgrad_weights
from blogjax.multitask.primary_auxiliary import primary_auxiliary_weights
from blogjax.multitask.upgrad import upgrad_weights


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A combiner, and what it promises.

    `make(tasks)`: the combiner where position j holds task number `tasks[j]`; only those that treat
    tasks differently look at it. `one`: its weight for a single task of norm 2 and loss 3.
    `same`: the sum of its weights for three such tasks. `apart`: its weights for orthogonal
    gradients of norms 1, 2, 4 and losses 0.5, 1, 2. All by hand. `degree`: multiplying all losses
    by s multiplies the combined gradient by `s ** degree`. `indifferent`: tasks, of three, whose
    own unit makes no difference. `total`: the sum of the weights that it falls back on.
    `fails`: rows of the table that it does not pass, with the reason; the suite insists that it
    fails them, so that the reason cannot become untrue.
    """

    make: Callable[[Sequence[int]], Combiner]
    one: float
    same: float
    apart: tuple[float, float, float]
    degree: int = 1
    indifferent: tuple[int, ...] = ()
    total: float = 1.0
    fails: Mapping[str, str] = dataclasses.field(default_factory=dict)


def plain(combiner: Combiner) -> Callable[[Sequence[int]], Combiner]:
    return lambda tasks: combiner


@functools.cache
def primary_first(position: int) -> Combiner:
    return functools.partial(primary_auxiliary_weights, primary=position)


@functools.cache
def mixed(is_primary: tuple[bool, ...]) -> Combiner:
    return functools.partial(mixed_weights, is_primary=is_primary)


def min_norm(**options) -> Callable[[Sequence[int]], Combiner]:
    return plain(functools.partial(min_norm_weights, **options))


STOPS = {"zero_task": "a gradient of zero is the shortest of all: the step is zero"}
GOES_ON = "no step is good for all here, and it takes one"

CASES = {
    "min norm": Case(min_norm(), 1, 1, (16 / 21, 4 / 21, 1 / 21), fails=STOPS),
    "min norm, zeros dropped": Case(
        min_norm(drop_zero=True), 1, 1, (16 / 21, 4 / 21, 1 / 21)
    ),
    "min norm, l2": Case(
        min_norm(normalize="l2"), 1 / 2, 1 / 2, (1 / 3, 1 / 6, 1 / 12), 0, (0, 1, 2), fails=STOPS
    ),
    "min norm, loss": Case(
        min_norm(normalize="loss"), 1 / 3, 1 / 3, (2 / 3, 1 / 3, 1 / 6), 0, (0, 1, 2), fails=STOPS
    ),
    "min norm, loss+": Case(
        min_norm(normalize="loss+"), 1 / 6, 1 / 6, (2 / 21,) * 3, -1, fails=STOPS
    ),
    "gradient norms": Case(
        plain(gradient_normalized_weights), 1 / 2, 3 / 2, (1, 1 / 2, 1 / 4), 0, (0, 1, 2),
        fails={"stationary": GOES_ON, "descends[3]": "the sum of three units may oppose one"},
    ),
    "primary and auxiliary": Case(
        lambda tasks: primary_first(tasks.index(0)), 1, 1, (1, 0, 0), indifferent=(1, 2),
    ),
    "mixed, two primary": Case(
        lambda tasks: mixed(tuple(task < 2 for task in tasks)), 1, 1, (4 / 5, 1 / 5, 0),
        indifferent=(2,),
    ),
    "pcgrad": Case(
        plain(pcgrad_weights), 1, 3, (1, 1, 1), total=3,
        fails={
            "permutation": "depends on the order of the projections",
            "stationary": GOES_ON,
            "descends[3]": "a projection may undo an earlier one",
        },
    ),
    "cagrad": Case(
        plain(cagrad_weights), 3 / 2, 3 / 2,
        (1 / 3 + math.sqrt(21) / 6, 1 / 3, 1 / 3),
        fails={
            "stationary": GOES_ON,
            "zero_task": "the task without a gradient is the worst off whatever is done",
            "descends[2]": "it does not leave the ball around the mean",
            "descends[3]": "it does not leave the ball around the mean",
        },
    ),
    "upgrad": Case(plain(upgrad_weights), 1, 1, (1 / 3, 1 / 3, 1 / 3)),
}  # fmt: skip
