"""What the tests compare with: float64 numpy, written from the definitions alone."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from blogjax.diffusion.schedules import Schedule

BETAS = {
    "post": 0.02 * np.arange(1, 1001) / 1000,
    "linear": np.linspace(1e-4, 0.02, 1000),
}


class Table(NamedTuple):
    """Float64; index t, with t = 0 in front."""

    A: np.ndarray
    B: np.ndarray
    a: np.ndarray
    b: np.ndarray


def table(betas) -> Table:
    beta = np.concatenate([[0.0], betas])
    # 1 - A^2 without the subtraction: B_t^2 = a_t^2 B_{t-1}^2 + b_t^2.
    squares = [0.0]
    for value in beta[1:]:
        squares.append((1 - value) * squares[-1] + value)
    return Table(np.sqrt(np.cumprod(1 - beta)), np.sqrt(squares), np.sqrt(1 - beta), np.sqrt(beta))


def standard_normal_denoiser(schedule: Schedule):
    """E[e | x_t] = B_t x_t for data N(0, I)."""
    return lambda x, t: schedule.noise(t).reshape(-1, *[1] * (x.ndim - 1)) * x


def point_denoiser(schedule: Schedule, point):
    def denoise(x, t):
        a, b = schedule.signal(t)[:, None], schedule.noise(t)[:, None]
        return (x - a * jnp.broadcast_to(point, x.shape)) / b

    return denoise


def gaussian_denoiser(schedule: Schedule, mean, covariance):
    """E[e | x_t] = B (A^2 S + B^2 I)^-1 (x_t - A m) for data N(m, S), in S's eigenbasis."""
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = jnp.asarray(values, jnp.float32), jnp.asarray(vectors, jnp.float32)
    mean = jnp.asarray(mean, jnp.float32)[None]

    def denoise(x, t):
        a, b = schedule.signal(t)[:, None], schedule.noise(t)[:, None]
        rotated = jnp.matmul(x - a * mean, vectors, precision="highest")
        scaled = b * rotated / (a**2 * values[None] + b**2)
        return jnp.matmul(scaled, vectors.T, precision="highest")

    return denoise


def gaussian_eps_matrix(A: float, B: float, covariance: np.ndarray) -> np.ndarray:
    return B * np.linalg.inv(A**2 * covariance + B**2 * np.eye(len(covariance)))


def ddim_scale(tab: Table, times) -> float:
    """DDIM on N(0, I) turns (A, B) by an angle at each step: the product of the cosines."""
    theta = np.arctan2(tab.B, tab.A)[np.asarray(times)]
    return float(np.prod(np.cos(theta[:-1] - theta[1:])))
