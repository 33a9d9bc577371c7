"""The two-objective toy of the literature on multi-task learning, and its Pareto front.

Liu et al. 2021, arXiv:2110.14048 (CAGrad); the formula was checked against the authors'
code, github.com/Cranial-XIX/CAGrad, toy.py. Over x = (a, b), with s = +1 for L1 and -1 for L2:

  above:  log max(|u_s|, 5e-6) + 6, u_1 = (-a - 7) / 2 + tanh b, u_2 = (-a + 7) / 2 - tanh b
  below:  q_s = ((a - 7 s)^2 + (b + 8)^2 / 10) / 10 - 20
  L_s = tanh(b / 2)+ (above) + tanh(-b / 2)+ (below), ()+ the positive part

For b > 0 each loss has a deep narrow ditch along a curve of its own, where its gradient is far
larger than the other's; for b < 0 both are smooth, and there the front is.
"""

import jax
import jax.numpy as jnp
import numpy as np

FLOOR = 5e-6
# The five starts of Navon et al. 2022, arXiv:2202.01017 (Nash-MTL), which others took over.
STARTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))


def losses(x: jax.Array) -> jax.Array:
    """Both losses at a point.

    Args:
      x: `[2]`, real.

    Returns:
      `[2]`. Where b = 0 exactly, the derivative is the mean of those from both sides.

    Raises:
      ValueError: if `x` has another shape.

    >>> [round(float(v), 4) for v in losses(jnp.array([7.0, -8.0]))]
    [-19.9866, -0.3997]
    """
    if x.shape != (2,):
        raise ValueError(f"a point of the plane has shape (2,), got {x.shape}")
    a, b = x
    bend = jnp.tanh(b)
    ditches = jnp.stack([-(a + 7) / 2 + bend, (7 - a) / 2 - bend])
    above = jnp.log(jnp.maximum(jnp.abs(ditches), FLOOR)) + 6
    bowls = jnp.square(jnp.stack([a - 7, a + 7])) / 10 + jnp.square(b + 8) / 100 - 20
    slope = jnp.tanh(b / 2)
    return jnp.maximum(slope, 0) * above + jnp.maximum(-slope, 0) * bowls


def front(count: int) -> np.ndarray:
    """Points of the Pareto front, from the least L2 to the least L1.

    Below, L_s = t(b) q_s(a, b) with t = tanh(-b / 2). A convex combination with weights w and
    1 - w is stationary in a for a = 7 (2 w - 1), and the combination of the q_s is there
    m(a, b) = (49 - a^2) / 10 + (b + 8)^2 / 100 - 20. So on the front, by b,
    t'(b) m(a, b) + t(b) (b + 8) / 50 = 0, of which b is found by bisection.

    Args:
      count: how many, evenly spaced in a from -7 to 7.

    Returns:
      float64 `[count, 2]`.

    >>> front(3).round(4).tolist()
    [[-7.0, -8.4345], [0.0, -8.3551], [7.0, -8.4345]]
    """
    a = np.linspace(-7, 7, count)

    def derivative(b: np.ndarray) -> np.ndarray:
        m = (49 - a**2) / 10 + (b + 8) ** 2 / 100 - 20
        return -0.5 / np.cosh(b / 2) ** 2 * m + np.tanh(-b / 2) * (b + 8) / 50

    low, high = np.full(count, -10.0), np.full(count, -8.0)
    for _ in range(60):
        middle = (low + high) / 2
        rising = derivative(middle) > 0
        low, high = np.where(rising, low, middle), np.where(rising, middle, high)
    return np.stack([a, (low + high) / 2], axis=1)


def distance_to_front(points: np.ndarray) -> np.ndarray:
    """Euclidean distance to the nearest point of the front.

    Args:
      points: `[..., 2]`.

    Returns:
      float64 `[...]`, exact to about 1e-6 (the front is taken as 200 straight pieces).

    >>> distance_to_front(np.array([[0.0, -7.3551], [10.0, -8.4345]])).round(3).tolist()
    [1.0, 3.0]
    """
    ends = front(201)
    begin, along = ends[:-1], np.diff(ends, axis=0)
    from_begin = np.asarray(points, np.float64)[..., None, :] - begin
    share = np.sum(from_begin * along, axis=-1) / np.sum(along**2, axis=-1)
    offset = from_begin - np.clip(share, 0, 1)[..., None] * along
    return np.sqrt(np.min(np.sum(offset**2, axis=-1), axis=-1))
