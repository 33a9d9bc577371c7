"""Distributions in the plane whose densities are known: how far a model is off can be computed.

    name            components               deviation of x and y   extent
    rings           2 circles                1.12, 1.12             2.35
    moons           2 half circles           1.30, 0.75             2.6
    spirals         2 arms                   1.03, 1.00             2.35
    gaussian_ring   8 Gaussians              1.42, 1.42             2.35
    gaussian_grid   25 Gaussians, 5 x 5      1.42, 1.42             2.35

Those are the defaults, which `get` returns by name; the functions of the same names take other
sizes. All have mean 0 and a scale near 1, so that a standard normal is a fair start, and at least
99.9% of each lies in the square [-extent, extent]^2. Every component is equally likely, and each
point draws its own: n points of k components have about n / k of each, not exactly.
"""

import dataclasses
import difflib
import functools
import operator
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

_DEVIATIONS = 3.5  # a normal deviate is beyond with probability 4.7e-4
_PANEL = 2.0  # length of a quadrature panel in units of the noise
_ORDER = 16  # Gauss-Legendre nodes per panel
_LEAST_PANELS = 8  # for noise as wide as the curve is long
_CHUNK = 2**20  # elements of the largest temporary array

_Nodes = tuple[np.ndarray, np.ndarray]  # points [m, 2] and their weights [m], which add up to 1


@dataclasses.dataclass(frozen=True, eq=False)
class Toy2D:
    """A distribution in the plane; made by the functions of this module.

    Attributes:
      name: what `get` knows it by.
      components: how many circles, arms or Gaussians it is made of.
      mean: float64 `[2]`, exact to rounding.
      cov: float64 `[2, 2]`, exact to rounding.
      extent: half the side of a square around 0 that holds at least 99.9% of the mass.
      place: component `[n]`, place in [0, 1) `[n]` and normal deviates `[n, 2]` -> points `[n, 2]`.
      log_density_at: finite points, float64 `[n, 2]` -> log densities, float64 `[n]`.
      modes: float64 `[components, 2]`, the centres of a mixture of Gaussians; None for the others.

    >>> ring = get("gaussian_ring")
    >>> ring.sample(1000, seed=0).shape, ring.modes.shape
    ((1000, 2), (8, 2))
    """

    name: str
    components: int
    mean: np.ndarray
    cov: np.ndarray
    extent: float
    place: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
    log_density_at: Callable[[np.ndarray], np.ndarray]
    modes: np.ndarray | None = None

    def sample(self, n: int, seed: int) -> np.ndarray:
        """Returns points: float32 `[n, 2]`; arguments and errors as in `sample_labelled`."""
        return self.sample_labelled(n, seed)[0]

    def sample_labelled(self, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns points and the components that they were drawn from.

        Fewer points are the first ones of more: `sample(10, seed)` equals `sample(20, seed)[:10]`.
        Distributions of different names are independent under one seed; those of one name and
        other sizes share their random numbers.

        Args:
          n: number of points, at least 0.
          seed: an integer of at least 0.

        Returns:
          Points, float32 `[n, 2]` (computed in float64), and components, int32 `[n]`.

        Raises:
          ValueError: if `n` or the seed is negative.

        >>> points, component = get("moons").sample_labelled(6, seed=0)
        >>> component
        array([0, 1, 1, 1, 1, 1], dtype=int32)
        """
        n, seed = operator.index(n), operator.index(seed)
        if n < 0 or seed < 0:
            raise ValueError(f"the number of points {n} and the seed {seed} must be at least 0")
        # A stream for each quantity, so that more points draw the same ones first.
        name = zlib.crc32(self.name.encode())
        keys = [np.random.SeedSequence(seed, spawn_key=(name, i)) for i in range(3)]
        which, where, around = map(np.random.default_rng, keys)
        label = which.integers(self.components, size=n)
        points = self.place(label, where.random(n), around.standard_normal((n, 2)))
        return points.astype(np.float32), label.astype(np.int32)

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Natural logarithm of the density.

        In float64 and in log space, so finite far out, too. Exact to rounding for Gaussians and
        rings. For moons and spirals it is an integral along the curves, by Gauss and Legendre's
        rule with 16 nodes for two widths of the noise. Within 10 widths of a curve the density has
        a relative error below 1e-10 (tested against adaptive integration); much farther out, where
        it is of no weight, a larger one. Time and memory go with 1 / noise.

        Args:
          x: `[n, 2]`, of any real dtype.

        Returns:
          float64 `[n]`. -inf at infinity, NaN at NaN.

        Raises:
          ValueError: if `x` has another shape.

        >>> float(get("gaussian_grid").log_density(np.zeros((1, 2)))[0])  # log(4 / (2 pi)), nearly
        -0.451582705...
        """
        x = np.asarray(x, np.float64)
        if x.ndim != 2 or x.shape[1] != 2:
            raise ValueError(f"points have shape {x.shape}, but in the plane they are [n, 2]")
        out = np.where(np.isnan(x).any(axis=1), np.nan, -np.inf)
        finite = np.isfinite(x).all(axis=1)
        with np.errstate(over="ignore"):  # a square may be infinite, and the density 0
            out[finite] = self.log_density_at(x[finite])
        return out


def rings(radii: Sequence[float] = (1.0, 2.0), noise: float = 0.1) -> Toy2D:
    """Circles around 0 whose radius is noisy: `x = (r_k + noise e) (cos a, sin a)`, `a` uniform.

    At the distance `d = |x|` from 0 the density of component `k` is
    `(N(d; r_k, noise^2) + N(-d; r_k, noise^2)) / (2 pi d)`: a negative radius is the opposite
    point. It is infinite at 0, though of little mass around it while the radii are many `noise`.

    Args:
      radii: of the circles; positive.
      noise: standard deviation of the radius; positive.

    Raises:
      ValueError: if there is no radius, or a radius or the noise is not positive and finite.

    >>> np.diag(rings().cov)
    array([1.255, 1.255])
    """
    r = np.array(radii, np.float64)
    if r.ndim != 1 or not len(r):
        raise ValueError(f"the radii {radii} should be a list of at least one number")
    _check_positive(radii=r, noise=noise)

    def place(label: np.ndarray, along: np.ndarray, deviate: np.ndarray) -> np.ndarray:
        return (r[label] + noise * deviate[:, 0])[:, None] * _direction(2 * np.pi * along)

    def log_density(x: np.ndarray) -> np.ndarray:
        d = np.hypot(x[:, 0], x[:, 1])
        off = np.concatenate([d[:, None] - r, d[:, None] + r], axis=1) / noise
        with np.errstate(divide="ignore"):  # the density at 0 is infinite
            log_area = np.log(len(r) * noise * (2 * np.pi) ** 1.5 * d)
        return _logsumexp(-0.5 * off**2) - log_area

    return Toy2D(
        name="rings",
        components=len(r),
        mean=np.zeros(2),
        cov=np.eye(2) * (np.mean(r**2) + noise**2) / 2,
        extent=float(r.max() + _DEVIATIONS * noise),
        place=place,
        log_density_at=log_density,
    )


def moons(radius: float = 1.5, noise: float = 0.1) -> Toy2D:
    """Two half circles, each of which ends near the middle of the other, with isotropic noise.

    `x = s radius (cos a - 1/2, sin a - 1/4) + noise e` with `a` uniform in [0, pi], and `s` 1 for
    component 0 and -1 for component 1; `e` is a standard normal of the plane.

    Args:
      radius: of the half circles; positive.
      noise: standard deviation of each coordinate around the curve; positive.

    Raises:
      ValueError: if the radius or the noise is not positive and finite.

    >>> moons().extent
    2.6
    """
    _check_positive(radius=radius, noise=noise)

    def curve(label: np.ndarray, along: np.ndarray) -> np.ndarray:
        return (radius * (1 - 2 * label))[:, None] * (_direction(np.pi * along) - [0.5, 0.25])

    return _around_curves("moons", curve, 2, noise)


def spirals(
    inner: float = 0.25, outer: float = 2.0, turns: float = 1.5, noise: float = 0.1
) -> Toy2D:
    """Two arms of an Archimedean spiral, one the other turned by half, with isotropic noise.

    `x = s r (cos a, sin a) + noise e`, where `r^2` is uniform in [inner^2, outer^2],
    `a = 2 pi turns (r - inner) / (outer - inner)`, and `s` is 1 for component 0 and -1 for 1. The
    density is nearly even along an arm, and the arms are `(outer - inner) / (2 turns)` apart.

    Args:
      inner: distance from 0 at which the arms start; positive.
      outer: distance at which they end; above `inner`.
      turns: how often each goes round; positive.
      noise: standard deviation of each coordinate around the curve; positive.

    Raises:
      ValueError: if an argument is not positive and finite, or `outer` not above `inner`.

    >>> spirals().components
    2
    """
    _check_positive(inner=inner, outer=outer, turns=turns, noise=noise)
    if outer <= inner:
        raise ValueError(f"the arms must end farther out than they start: {inner} to {outer}")

    def curve(label: np.ndarray, along: np.ndarray) -> np.ndarray:
        r = np.sqrt(inner**2 + along * (outer**2 - inner**2))
        angle = 2 * np.pi * turns * (r - inner) / (outer - inner)
        return ((1 - 2 * label) * r)[:, None] * _direction(angle)

    return _around_curves("spirals", curve, 2, noise)


def gaussians(centres: npt.ArrayLike, noise: float, name: str = "gaussians") -> Toy2D:
    """A mixture of isotropic Gaussians of equal weight and width.

    Args:
      centres: `[k, 2]`.
      noise: standard deviation of each coordinate; positive.
      name: of the result.

    Raises:
      ValueError: if the centres are none, not finite or of another shape, or the noise is not
        positive and finite.

    >>> gaussians([[-1, 0], [1, 0]], noise=0.5).cov
    array([[1.25, 0.  ],
           [0.  , 0.25]])
    """
    modes = np.array(centres, np.float64)
    if modes.ndim != 2 or modes.shape[1] != 2 or not len(modes):
        raise ValueError(f"centres have shape {modes.shape}, but should be [k, 2] with k > 0")
    if not np.isfinite(modes).all():
        raise ValueError("not all centres are finite")
    _check_positive(noise=noise)
    nodes = modes, np.full(len(modes), 1 / len(modes))
    mean, cov = _moments(nodes, noise)
    return Toy2D(
        name=name,
        components=len(modes),
        mean=mean,
        cov=cov,
        extent=float(np.abs(modes).max() + _DEVIATIONS * noise),
        place=lambda label, along, deviate: modes[label] + noise * deviate,
        log_density_at=lambda x: _log_mixture(x, nodes, noise),
        modes=modes.copy(),
    )


def gaussian_ring(count: int = 8, radius: float = 2.0, noise: float = 0.1) -> Toy2D:
    """Gaussians whose centres are evenly spaced on a circle around 0, the first on the x axis.

    Args:
      count: number of Gaussians, at least 1.
      radius: of the circle; positive.
      noise: standard deviation of each coordinate; positive.

    Raises:
      ValueError: if an argument is out of range.

    >>> gaussian_ring(4).modes.round(3)[1]
    array([0., 2.])
    """
    count = operator.index(count)
    _check_positive(count=count, radius=radius)
    centres = radius * _direction(2 * np.pi * np.arange(count) / count)
    return gaussians(centres, noise, "gaussian_ring")


def gaussian_grid(side: int = 5, spacing: float = 1.0, noise: float = 0.1) -> Toy2D:
    """Gaussians whose centres form a square grid around 0; component `i side + j` is at (x_i, y_j).

    Args:
      side: centres in each direction, at least 1.
      spacing: distance of neighbours; positive.
      noise: standard deviation of each coordinate; positive.

    Raises:
      ValueError: if an argument is out of range.

    >>> gaussian_grid(2).modes
    array([[-0.5, -0.5],
           [-0.5,  0.5],
           [ 0.5, -0.5],
           [ 0.5,  0.5]])
    """
    side = operator.index(side)
    _check_positive(side=side, spacing=spacing)
    line = spacing * (np.arange(side) - (side - 1) / 2)
    centres = np.stack(np.meshgrid(line, line, indexing="ij"), axis=-1).reshape(-1, 2)
    return gaussians(centres, noise, "gaussian_grid")


DATASETS: dict[str, Callable[[], Toy2D]] = {
    make.__name__: make for make in (rings, moons, spirals, gaussian_ring, gaussian_grid)
}


def get(name: str) -> Toy2D:
    """Returns a data set by its name, in its default sizes.

    Raises:
      ValueError: if there is none of that name; it says which are, and which are nearly called so.

    >>> get("spirals").name
    'spirals'
    """
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"no data set {name!r}: {hint}there are {', '.join(DATASETS)}")
    return DATASETS[name]()


def _check_positive(**values: float | np.ndarray) -> None:
    for name, value in values.items():
        if not (np.isfinite(value).all() and np.all(np.asarray(value) > 0)):
            raise ValueError(f"{name} is {value}, and must be positive and finite")


def _direction(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _around_curves(
    name: str, curve: Callable[[np.ndarray, np.ndarray], np.ndarray], count: int, noise: float
) -> Toy2D:
    """Isotropic noise around curves: `curve(component [n], place along it [n]) -> points [n, 2]`.

    Under a quadrature rule it is a mixture of Gaussians at the nodes, which gives the density. The
    moments have a rule of their own, which need not resolve the noise.
    """

    def rule(panels: int) -> _Nodes:
        node, weight = np.polynomial.legendre.leggauss(_ORDER)
        along = ((np.arange(panels)[:, None] + (node + 1) / 2) / panels).ravel()
        points = curve(np.repeat(np.arange(count), len(along)), np.tile(along, count))
        return points, np.tile(weight / 2, count * panels) / (count * panels)

    even = np.linspace(0, 1, 4097)
    drawn = np.stack([curve(np.full(len(even), k), even) for k in range(count)])
    length = np.hypot(*np.moveaxis(np.diff(drawn, axis=1), -1, 0)).max() * (len(even) - 1)
    panels = max(int(np.ceil(length / (_PANEL * noise))), _LEAST_PANELS)
    resolved = functools.cache(lambda: rule(panels))
    mean, cov = _moments(rule(64), noise)
    return Toy2D(
        name=name,
        components=count,
        mean=mean,
        cov=cov,
        extent=float(np.abs(drawn).max() + _DEVIATIONS * noise),
        place=lambda label, along, deviate: curve(label, along) + noise * deviate,
        log_density_at=lambda x: _log_mixture(x, resolved(), noise),
    )


def _moments(nodes: _Nodes, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of a mixture of isotropic Gaussians."""
    points, weights = nodes
    mean = weights @ points
    off = points - mean
    return mean, (weights[:, None] * off).T @ off + noise**2 * np.eye(2)


def _log_mixture(x: np.ndarray, nodes: _Nodes, noise: float) -> np.ndarray:
    """Log density of a mixture of isotropic Gaussians at `[n, 2]`, a block of points at a time."""
    centres, weights = nodes
    log_scale = np.log(weights) - np.log(2 * np.pi * noise**2)
    block = max(_CHUNK // len(centres), 1)
    out = np.empty(len(x))
    for start in range(0, len(x), block):
        part = x[start : start + block, :, None]
        square = (part[:, 0] - centres[:, 0]) ** 2 + (part[:, 1] - centres[:, 1]) ** 2
        out[start : start + block] = _logsumexp(log_scale - square / (2 * noise**2))
    return out


def _logsumexp(x: np.ndarray) -> np.ndarray:
    """Over the last axis, -inf where all elements are."""
    top = x.max(axis=-1, keepdims=True)
    top[np.isneginf(top)] = 0
    with np.errstate(divide="ignore"):
        return np.log(np.exp(x - top).sum(axis=-1)) + top[..., 0]
