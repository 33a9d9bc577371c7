"""Distributed Lion: every device votes on the sign of each entry, one bit there and one bit back.

What: `majority_vote` replaces averaging over devices for updates of which only the sign counts;
  `distributed_lion` is Lion with a momentum per device and that vote.
Post: https://kexue.fm/archives/9473
Papers: Liu et al. 2024 (arXiv 2404.00438); Bernstein et al. 2019 (arXiv 1810.05291) for the vote;
  Ishikawa et al. 2024 (arXiv 2411.16462) on when fewer bytes are a faster step
Equations: d_i = sign(b1 m_i + (1 - b1) g_i); m_i <- b2 m_i + (1 - b2) g_i;
  D = sign(sum_i d_i); theta <- theta - lr (D + wd theta), i over the devices.
Differences from the post: the post trains on one device. Differences from the papers: a device
  abstains where its d_i is 0, so that what nobody touched stays; a tie is decided by a device that
  changes in turn, since sign(0) = 0 would be a third answer and take more than the bit sent back.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from blogjax.optim.checks import check_at_least, check_floating
from blogjax.optim.lion import scale_by_lion
from blogjax.optim.per_device_state import per_device_state

_WORD = 32
# Entries that vote together. Tables of which most rows are untouched do not slow down the others.
_BUCKET = 2**22


def pack(bits: jax.Array) -> jax.Array:
    """Packs bool `[n]` into uint32 `[n / 32]`; n must be a multiple of 32.

    >>> pack(jnp.arange(64) % 32 == 0).shape
    (2,)
    """
    octets = jnp.packbits(bits).reshape(-1, 4)
    return jax.lax.bitcast_convert_type(octets, jnp.uint32)


def unpack(words: jax.Array) -> jax.Array:
    """The inverse of `pack`: uint32 `[n]` to bool `[32 n]`.

    >>> bool((unpack(pack(jnp.arange(64) < 3)) == (jnp.arange(64) < 3)).all())
    True
    """
    octets = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)
    return jnp.unpackbits(octets).astype(jnp.bool_)


def majority(
    signs: jax.Array, present: jax.Array | None, first: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Counts votes bit by bit, 32 entries at a time.

    A voter says of an entry: yes (sign 1, present 1), no (0, 1), nothing (0, 0) or NaN (1, 0).

    Args:
      signs: uint32 `[W, n]`, one row per voter.
      present: likewise; None where everybody votes everywhere.
      first: int `[]`; of equally many yes and no, the vote of voter `first` decides, or of the
        next one in cyclic order that has one.

    Returns:
      Sign and presence of the outcome, uint32 `[n]`, in the same code: nothing where nobody votes,
      NaN where anybody says NaN.

    >>> votes = jnp.array([[1], [1], [0]], jnp.uint32)
    >>> majority(votes, None, 0)[0].tolist()
    [1]
    """
    voters, n = signs.shape
    zero = jnp.zeros((n,), jnp.uint32)
    # Bit b of entry k of plane j is bit j of a count: adders of one bit, 32 side by side.
    planes = (zero,) * voters.bit_length()

    def count(planes: tuple[jax.Array, ...], carry: jax.Array) -> tuple[jax.Array, ...]:
        out = []
        for plane in planes:
            out.append(plane ^ carry)
            carry = plane & carry
        return tuple(out)

    def hear(carry: Any, i: jax.Array) -> tuple[Any, None]:
        yes, no, decisive, anybody, nan = carry
        # Heard in reverse, so that the vote that stays is the first one in the order of `first`.
        voter = jnp.mod(first - 1 - i, voters)
        sign = jax.lax.dynamic_index_in_dim(signs, voter, keepdims=False)
        if present is None:
            return (count(yes, sign), count(no, ~sign), sign, anybody, nan), None
        here = jax.lax.dynamic_index_in_dim(present, voter, keepdims=False)
        yes, no = count(yes, sign & here), count(no, ~sign & here)
        decisive = (sign & here) | (decisive & ~here)
        return (yes, no, decisive, anybody | here, nan | (sign & ~here)), None

    everybody = ~zero if present is None else zero
    (yes, no, decisive, anybody, nan), _ = jax.lax.scan(
        hear, (planes, planes, zero, everybody, zero), jnp.arange(voters), unroll=min(voters, 8)
    )
    more, equal = zero, ~zero
    for a, b in zip(reversed(yes), reversed(no), strict=True):
        more |= equal & a & ~b
        equal &= ~(a ^ b)
    return more | (equal & decisive) | nan, anybody & ~nan


class MajorityVoteState(NamedTuple):
    """State of `majority_vote`.

    Attributes:
      votes: int32 `[]`, votes so far; decides whose vote breaks ties.
    """

    votes: jax.Array


def majority_vote(axis_name: str | tuple[str, ...]) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates by the sign that most devices give them: `D = sign(sum_i sign(u_i))`.

    Every update entry is one bit. The entries are dealt out over the W devices (`all_to_all`), each
    counts its part and sends the outcome to all (`all_gather`): for N entries 2 (W - 1) / W N / 8
    bytes leave a device, 32 times fewer than a ring all-reduce of float32 sends.

    A device abstains where its update is 0, and entries on which all abstain become 0. Abstentions
    need a second bit, which is sent only in those steps, and for those parts of the tree (leaves
    are grouped up to 4 million entries), where anybody abstains: 16 times fewer bytes. Packing and
    counting take time too: what is gained depends on how slow the network is.

    Ties, in which as many say yes as no: the vote of device `votes mod W` decides, or of the next
    one that has voted. No direction is preferred, nothing is drawn, and all devices agree.

    Numerics: the outcome is exact, the updates' dtypes are kept, and a NaN on any device is NaN
    everywhere. To be used in `jax.pmap` or in `jax.shard_map(..., check_vma=False)`, on updates
    of local gradients; `tasks.gradient.gradient_task(average_gradients=False)` gives such. A guard
    against NaN must decide alike on all devices: `skip_nonfinite(tx, axis_name=...)`. Under nested
    `vmap`s one axis name only.

    Args:
      axis_name: the mapped axis, or axes, whose devices vote.

    Returns:
      A transformation whose state is a `MajorityVoteState`.

    Raises:
      TypeError: at an integer or complex leaf, and if `axis_name` is no name.
      ValueError: under `jax.shard_map(..., check_vma=True)`, which cannot know that the outcome is
        the same on all devices.
      NameError: by JAX, if no such axis is mapped.

    >>> import jax, jax.numpy as jnp
    >>> tx = majority_vote("workers")
    >>> update = lambda u: tx.update(u, tx.init(u))[0]
    >>> votes = jnp.array([[2.0, 0.0, -1.0], [-0.1, 0.0, -1.0], [0.1, 0.0, 0.0]])
    >>> jax.vmap(update, axis_name="workers")(votes)[0].tolist()
    [1.0, 0.0, -1.0]
    """
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not (isinstance(names, tuple) and names and all(isinstance(n, str) for n in names)):
        raise TypeError(f"axis_name must be a name or a tuple of names, got {axis_name!r}")

    def init_fn(params: optax.Params) -> MajorityVoteState:
        check_floating(params)
        return MajorityVoteState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, MajorityVoteState]:
        del params, extra_args
        check_floating(updates, "update")
        leaves, structure = jax.tree.flatten(updates)
        if leaves:
            if _checks_varying(axis_name):
                raise ValueError("majority_vote needs jax.shard_map(..., check_vma=False)")
            first = state.votes % jax.lax.axis_size(axis_name)
            buckets = _buckets(leaves)
            abstain = jnp.stack([jnp.any(jnp.stack([*map(_abstains, b)])) for b in buckets])
            abstain = jax.lax.pmax(abstain.astype(jnp.int32), axis_name) > 0
            leaves = []
            for bucket, flag in zip(buckets, abstain, strict=True):
                leaves += _vote(bucket, flag, first, axis_name)
        votes = jnp.asarray(optax.safe_increment(state.votes))
        return jax.tree.unflatten(structure, leaves), MajorityVoteState(votes)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _checks_varying(axis_name: Any) -> bool:
    """Whether JAX keeps track of what varies over the axis, as `check_vma=True` makes it."""
    kind: Any = jax.typeof(jax.lax.axis_index(axis_name))
    # The name of this attribute changes between versions of JAX.
    varying = getattr(kind, "vma", None) or getattr(
        getattr(kind, "manual_axis_type", None), "varying", None
    )
    return bool(varying)


def _abstains(x: jax.Array) -> jax.Array:
    """Whether any entry has no sign; NaN, which is told like an abstention, has none."""
    return ~jnp.all((x > 0) | (x < 0))


def _buckets(leaves: list[jax.Array]) -> list[list[jax.Array]]:
    """Groups leaves that follow each other, up to `_BUCKET` entries or a single larger leaf."""
    buckets: list[list[jax.Array]] = [[]]
    full = 0
    for x in leaves:
        if full and full + x.size > _BUCKET:
            buckets.append([])
            full = 0
        buckets[-1].append(x)
        full += x.size
    return buckets


def _vote(
    leaves: list[jax.Array], abstain: jax.Array, first: jax.Array, axis_name: Any
) -> list[jax.Array]:
    """The outcome for a bucket; `abstain`, alike on all devices, tells if anybody abstains."""
    voters = jax.lax.axis_size(axis_name)
    sizes = [-(-x.size // _WORD) * _WORD for x in leaves]
    words = sum(sizes) // _WORD

    def ballot(mark: Any, fill: bool) -> jax.Array:
        parts = [jnp.pad(mark(x.reshape(-1)), (0, n - x.size), constant_values=fill)
                 for x, n in zip(leaves, sizes, strict=True)]  # fmt: skip
        packed = jnp.concatenate([pack(part) for part in parts])
        packed = jnp.pad(packed, (0, -words % voters))
        return jax.lax.all_to_all(packed.reshape(voters, -1), axis_name, 0, 0, tiled=True)

    def tell(outcome: jax.Array) -> jax.Array:
        return jax.lax.all_gather(outcome, axis_name, tiled=True)[:words]

    def one_bit() -> tuple[jax.Array, jax.Array]:
        signs, _ = majority(ballot(lambda x: x > 0, False), None, first)
        return tell(signs), jnp.full((words,), 2**_WORD - 1, jnp.uint32)

    def two_bits() -> tuple[jax.Array, jax.Array]:
        signs = ballot(lambda x: ~(x <= 0), False)
        present = ballot(lambda x: (x > 0) | (x < 0), False)
        signs, present = majority(signs, present, first)
        return tell(signs), tell(present)

    signs, present = jax.lax.cond(abstain, two_bits, one_bit)
    out, begin = [], 0
    for x, n in zip(leaves, sizes, strict=True):
        part = slice(begin // _WORD, (begin + n) // _WORD)
        sign, here = (unpack(w[part])[: x.size].reshape(x.shape) for w in (signs, present))
        voted = jnp.where(sign, 1.0, -1.0)
        nothing = jnp.where(sign, jnp.nan, 0.0)
        out.append(jnp.where(here, voted, nothing).astype(x.dtype))
        begin += n
    return out


def distributed_lion(
    learning_rate: optax.ScalarOrSchedule,
    axis_name: str | tuple[str, ...],
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Lion over the devices of an axis: own gradients, own momenta, a common majority vote.

    `theta <- theta - lr (sign(sum_i sign(c_i)) + wd theta)` with Lion's `c_i` on each device. It is
    `chain(per_device_state(scale_by_lion(...)), majority_vote(axis_name), decay, rate)`; put
    `sparse_rows.lazy_rows` around `scale_by_lion`, or another transformation in its place, in the
    same way. On one device, and on any number of devices with equal gradients, it is `lion`.

    The gradients must not be averaged over the axis before. The vote is not the sign of the mean
    gradient: with noisy gradients the two agree the more often the more devices vote. The momenta
    differ, so a checkpoint holds one for each device and can be resumed on as many devices only.

    To accumulate microbatches, do so on each device before the vote, and let the rest follow every
    k-th time (with `accumulate` around it the sums would differ between devices, unseen):

        optax.chain(
            per_device_state(accumulate(scale_by_lion(), k)),
            emit_every(k, optax.chain(majority_vote(axis_name), optax.scale(-lr))),
        )

    Args:
      learning_rate: as in `lion`.
      axis_name: as in `majority_vote`.
      b1, b2, mu_dtype, weight_decay, mask: as in `lion`.

    Raises:
      ValueError, TypeError: as `lion` and `majority_vote`.

    >>> import jax, jax.numpy as jnp, optax
    >>> from blogjax.core.per_device import partition_specs, spread
    >>> from jax.sharding import Mesh, PartitionSpec as P
    >>> import numpy as np
    >>> tx = distributed_lion(0.1, "devices", weight_decay=0.0)
    >>> mesh = Mesh(np.array(jax.devices()), ("devices",))
    >>> params = {"w": jnp.ones(2)}
    >>> state = spread(tx.init(params), jax.device_count())
    >>> specs = partition_specs(state, "devices")
    >>> def step(params, state, x):
    ...     grads = jax.grad(lambda p: jnp.mean(jnp.square(x @ p["w"])))(params)
    ...     updates, state = tx.update(grads, state, params)
    ...     return optax.apply_updates(params, updates), state
    >>> step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), specs, P("devices")),
    ...                              out_specs=(P(), specs), check_vma=False))
    >>> params, state = step(params, state, jnp.ones((2 * jax.device_count(), 2)))
    >>> params["w"].tolist()
    [0.8999999761581421, 0.8999999761581421]
    """
    check_at_least("weight_decay", weight_decay, 0)
    return optax.chain(
        per_device_state(scale_by_lion(b1, b2, mu_dtype)),
        majority_vote(axis_name),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
