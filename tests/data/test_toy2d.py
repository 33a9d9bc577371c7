import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, special, stats
from sklearn.datasets import make_moons

from blogjax.data import toy2d

NAMES = ["rings", "moons", "spirals", "gaussian_ring", "gaussian_grid"]
SMALL = 100_000  # points of a sample


def _moons(component, u, radius=1.5):
    return (-1) ** component * radius * (np.exp(1j * np.pi * u) - 0.5 - 0.25j)


def _spirals(component, u, inner=0.25, outer=2.0, turns=1.5):
    r = (inner**2 * (1 - u) + outer**2 * u) ** 0.5
    turned = turns * (r - inner) / (outer - inner) + component / 2
    return r * np.exp(2j * np.pi * turned)


CURVES = {"moons": _moons, "spirals": _spirals}  # in the complex plane


def _integral(function):
    """Over u in [0, 1] and both components, each of weight 1/2; functions may be sharp peaks."""
    panels = np.linspace(0, 1, 101)
    parts = [
        integrate.quad(function, a, b, args=(k,), epsabs=0, epsrel=1e-11)[0]
        for k in (0, 1)
        for a, b in itertools.pairwise(panels)
    ]
    return sum(parts) / 2


def _cells(toy):
    """Edges of square cells of twice the noise, and the probability of each by quadrature."""
    half = toy.extent + 0.25
    edges = np.linspace(-half, half, int(np.ceil(half / 0.1)) + 1)
    node, weight = np.polynomial.legendre.leggauss(6)
    width = edges[1] - edges[0]
    line = (edges[:-1, None] + width * (node + 1) / 2).ravel()
    x, y = np.meshgrid(line, line, indexing="ij")
    density = np.exp(toy.log_density(np.stack([x.ravel(), y.ravel()], axis=1)))
    density = density.reshape(len(edges) - 1, 6, len(edges) - 1, 6)
    return edges, np.einsum("iajb,a,b->ij", density, weight, weight) * width**2 / 4


@pytest.mark.parametrize("name", NAMES)
def test_the_density_integrates_to_one_and_samples_follow_it(name):
    toy = toy2d.get(name)
    edges, probability = _cells(toy)
    np.testing.assert_allclose(probability.sum(), 1, rtol=0, atol=1e-7)
    points = toy.sample(SMALL, seed=3)
    counts = np.histogram2d(points[:, 0], points[:, 1], bins=[edges, edges])[0]
    expected = SMALL * probability
    often = expected >= 5
    observed = np.append(counts[often], SMALL - counts[often].sum())
    expected = np.append(expected[often], SMALL - expected[often].sum())
    assert often.sum() > 60
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@given(
    hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.just(2)), elements=st.floats(-3, 3)),
    st.floats(0.02, 3),
    hnp.arrays(np.float64, (5, 2), elements=st.floats(-6, 6)),
)
def test_the_density_of_gaussians_is_scipys(centres, noise, x):
    each = [stats.multivariate_normal(c, noise**2 * np.eye(2)).logpdf(x) for c in centres]
    expected = special.logsumexp(each, axis=0) - np.log(len(centres))
    toy = toy2d.gaussians(centres, noise)
    np.testing.assert_allclose(toy.log_density(x), expected, rtol=1e-10, atol=1e-10)


@given(
    st.lists(st.floats(0.1, 3), min_size=1, max_size=4),
    st.floats(0.02, 3),
    hnp.arrays(np.float64, (5,), elements=st.floats(0.01, 6)),
    st.floats(0, 7),
)
def test_the_density_of_rings_is_that_of_a_folded_normal_radius(radii, noise, distance, angle):
    radial = np.mean([stats.foldnorm.pdf(distance, r / noise, scale=noise) for r in radii], axis=0)
    x = distance[:, None] * np.array([np.cos(angle), np.sin(angle)])
    got = np.exp(toy2d.rings(radii, noise).log_density(x))
    np.testing.assert_allclose(got, radial / (2 * np.pi * distance), rtol=1e-8, atol=1e-300)


def test_rings_as_wide_as_their_radius():
    toy = toy2d.rings([0.5, 1.5], noise=0.6)
    x, y = toy.sample(SMALL, seed=0).astype(np.float64).T
    folded = [stats.foldnorm(r / 0.6, scale=0.6) for r in (0.5, 1.5)]
    radius = np.hypot(x, y)
    assert stats.kstest(radius, lambda d: sum(f.cdf(d) for f in folded) / 2).pvalue > 1e-3
    turned = np.arctan2(y, x) / (2 * np.pi) % 1
    assert stats.kstest(turned, stats.uniform.cdf).pvalue > 1e-3
    assert toy.log_density(np.zeros((1, 2))) == np.inf


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("noise", [0.05, 0.1, 0.7, 3])
@pytest.mark.parametrize("widths", [0, 3, 10])
def test_the_density_around_curves_is_the_integral(name, noise, widths):
    toy = toy2d.DATASETS[name](noise=noise)
    rng = np.random.default_rng(0)
    z = [CURVES[name](k, u) for k, u in [(0, 0.0), (0, 1.0), (1, 0.02), (1, 0.6)]]
    z = np.array(z) + widths * noise * np.exp(2j * np.pi * rng.random(4))
    got = toy.log_density(np.stack([z.real, z.imag], axis=1))
    for at, value in zip(z, got, strict=True):

        def relative(u, k, at=at, value=value):
            square = abs(at - CURVES[name](k, u)) ** 2
            return np.exp(-square / (2 * noise**2) - value) / (2 * np.pi * noise**2)

        np.testing.assert_allclose(_integral(relative), 1, rtol=0, atol=1e-10)


def test_moons_are_scikit_learns():
    theirs, label = make_moons(SMALL, noise=0.2 / 3, random_state=0)
    theirs = 3 * (theirs - [0.5, 0.25])
    ours, component = toy2d.moons(radius=3, noise=0.2).sample_labelled(SMALL, seed=0)
    for k in (0, 1):
        for direction in ([1, 0], [0, 1], [1, 1], [1, -1]):
            one, other = theirs[label == k] @ direction, ours[component == k] @ direction
            assert stats.ks_2samp(one, other).pvalue > 1e-3


def _curve_moments(name, noise, **sizes):
    z = CURVES[name]
    mean = [_integral(lambda u, k, f=f: f(z(k, u, **sizes))) for f in (np.real, np.imag)]
    second = [
        [_integral(lambda u, k, f=f, g=g: f(z(k, u, **sizes)) * g(z(k, u, **sizes))) for f in parts]
        for parts in [(np.real, np.imag)]
        for g in parts
    ]
    return mean, np.array(second) + noise**2 * np.eye(2)


MOMENTS = [
    (toy2d.rings([0.5, 1, 3], 0.2), np.eye(2) * ((0.25 + 1 + 9) / 3 + 0.04) / 2),
    (toy2d.gaussian_ring(8, 2, 0.1), np.eye(2) * (4 / 2 + 0.01)),
    (toy2d.gaussian_ring(3, 1.5, 0.2), np.eye(2) * (2.25 / 2 + 0.04)),
    (toy2d.gaussian_grid(5, 2, 0.05), np.eye(2) * (4 * 24 / 12 + 0.0025)),
    (toy2d.gaussian_grid(2, 1, 0.3), np.eye(2) * (0.25 + 0.09)),
    (
        toy2d.moons(2, 0.3),
        4 * np.array([[0.75, 1 / 8 - 1 / np.pi], [1 / 8 - 1 / np.pi, 9 / 16 - 1 / np.pi]])
        + 0.09 * np.eye(2),
    ),
    (toy2d.moons(), _curve_moments("moons", 0.1)[1]),
    (toy2d.spirals(), _curve_moments("spirals", 0.1)[1]),
    (
        toy2d.spirals(0.5, 1.5, 2, 0.02),
        _curve_moments("spirals", 0.02, inner=0.5, outer=1.5, turns=2)[1],
    ),
]


@pytest.mark.parametrize(("toy", "cov"), MOMENTS)
def test_mean_and_covariance(toy, cov):
    np.testing.assert_allclose(toy.mean, 0, atol=1e-13)
    np.testing.assert_allclose(toy.cov, cov, rtol=1e-9, atol=1e-13)
    points = toy.sample(SMALL, seed=1).astype(np.float64)
    assert np.all(np.abs(points.mean(axis=0)) < 4.5 * points.std(axis=0) / SMALL**0.5)
    products = points[:, :, None] * points[:, None, :]
    error = products.std(axis=0) / SMALL**0.5
    assert np.all(np.abs(products.mean(axis=0) - cov) < 4.5 * error)


def test_moments_of_gaussians_off_the_middle():
    toy = toy2d.gaussians([[1, 1], [1, 3], [4, 2]], noise=0.5)
    np.testing.assert_allclose(toy.mean, [2, 2])
    np.testing.assert_allclose(toy.cov, [[2.25, 0], [0, 2 / 3 + 0.25]])


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_float32_finite_and_the_start_of_a_longer_one(name):
    toy = toy2d.get(name)
    points, component = toy.sample_labelled(1000, seed=7)
    assert points.dtype == np.float32 and points.shape == (1000, 2) and np.isfinite(points).all()
    assert component.dtype == np.int32 and component.shape == (1000,)
    np.testing.assert_array_equal(toy.sample(1000, seed=7), points)
    for fewer in (0, 1, 257):
        start, its_component = toy2d.get(name).sample_labelled(fewer, seed=np.int64(7))
        np.testing.assert_array_equal(start, points[:fewer])
        np.testing.assert_array_equal(its_component, component[:fewer])
    others = np.concatenate([toy.sample(1000, seed=s) for s in (0, 6, 8, 2**32 + 7)])
    assert len(np.unique([*points, *others], axis=0)) == 5000


@pytest.mark.parametrize("name", NAMES)
def test_components_are_what_points_belong_to_and_equally_likely(name):
    toy = toy2d.get(name)
    points, component = toy.sample_labelled(SMALL, seed=0)
    counts = np.bincount(component)
    assert len(counts) == toy.components
    assert stats.chisquare(counts).pvalue > 1e-3
    z = points[:, 0] + 1j * points[:, 1]
    if name in CURVES:
        place = np.linspace(0, 1, 200)
        skeletons = [CURVES[name](k, place) for k in (0, 1)]
        off = [np.abs(z[:2000, None] - skeleton).min(axis=1) for skeleton in skeletons]
    elif name == "rings":
        off = [np.abs(np.abs(z) - r) for r in (1, 2)]
    else:
        off = [np.hypot(*(points - mode).T) for mode in toy.modes]
    off = np.array(off)
    own = component[: off.shape[1]]
    assert np.mean(np.argmin(off, axis=0) == own) > 0.995
    assert 0.05 < np.take_along_axis(off, own[None], axis=0).mean() < 0.15


def test_places_are_even_along_a_curve():
    points, component = toy2d.spirals(noise=1e-4).sample_labelled(SMALL, seed=0)
    square = np.sum(points.astype(np.float64) ** 2, axis=1)
    area = stats.uniform(0.25**2, 4 - 0.25**2)
    for k in (0, 1):
        assert stats.kstest(square[component == k], area.cdf).pvalue > 1e-3


def test_one_seed_gives_independent_samples_of_two_distributions():
    moons, one = toy2d.moons().sample_labelled(SMALL, seed=0)
    spirals, other = toy2d.spirals().sample_labelled(SMALL, seed=0)
    together = np.corrcoef(np.column_stack([moons, one, spirals, other]).T)[:3, 3:]
    assert np.abs(together).max() < 4.5 / SMALL**0.5
    grids = [toy2d.gaussian_grid(noise=s).sample_labelled(100, seed=0) for s in (0.1, 0.2)]
    np.testing.assert_array_equal(grids[0][1], grids[1][1])


def test_the_modes_are_the_centres():
    grid = toy2d.gaussian_grid(3, 0.5, 0.1).modes
    assert grid.tolist() == [[x, y] for x in (-0.5, 0, 0.5) for y in (-0.5, 0, 0.5)]
    ring = toy2d.gaussian_ring(6, 1.5).modes
    np.testing.assert_allclose(ring @ [1, 1j], 1.5 * np.exp(1j * np.pi / 3 * np.arange(6)))
    assert [toy2d.get(name).modes is None for name in NAMES] == [True] * 3 + [False] * 2
    toy = toy2d.gaussians(centres := np.eye(2), noise=0.1)
    centres[:], toy.modes[:] = 9, 8  # whose array it is makes no difference
    np.testing.assert_allclose(toy.log_density([[1, 0]]), np.log(1 / (0.04 * np.pi)))


def test_the_table_in_the_documentation():
    row = re.compile(r"^    (\w+) .*  (\d\.\d\d), (\d\.\d\d) +(\d[\d.]*)$", re.M)
    table = {name: numbers for name, *numbers in row.findall(toy2d.__doc__)}
    assert list(table) == NAMES == list(toy2d.DATASETS)
    for name, numbers in table.items():
        toy = toy2d.get(name)
        points = toy.sample(SMALL, seed=5)
        assert toy.name == name
        x, y, extent = map(float, numbers)
        np.testing.assert_allclose(np.std(points, axis=0), [x, y], atol=0.015)
        assert toy.extent == pytest.approx(extent)
        inside = np.abs(points).max(axis=1) < extent
        assert inside.mean() > 0.9988
        assert np.abs(points).max() > extent - 0.25


@pytest.mark.parametrize("name", NAMES)
def test_far_points_infinity_nan_and_nothing(name):
    toy = toy2d.get(name)
    near = toy.log_density([[0.3, -0.4]])
    got = toy.log_density(
        np.array(
            [[300, -400], [np.inf, 0], [-np.inf, np.inf], [1, np.nan], [1e200, 0], [0.3, -0.4]]
        )
    )
    # The nearest part of the distribution is 500 - 3 to 500 away, and its noise is 0.1.
    assert -0.5 * 5000**2 - 20 < got[0] < -0.5 * 4970**2
    np.testing.assert_array_equal(got[1:5], [-np.inf, -np.inf, np.nan, -np.inf])
    np.testing.assert_array_equal(got[5:], near)
    assert toy.log_density(np.zeros((0, 2), np.float32)).shape == (0,)
    assert got.dtype == np.float64


@pytest.mark.parametrize("name", ["moons", "gaussian_grid"])
def test_blocks_of_any_size_give_the_same_densities(monkeypatch, name):
    toy = toy2d.get(name)
    points = toy.sample(50, seed=0)
    whole = toy.log_density(points)
    for elements in (1, 700, 10_000):
        monkeypatch.setattr(toy2d, "_CHUNK", elements)
        np.testing.assert_allclose(toy.log_density(points), whole, rtol=1e-13)


WRONG = [
    (lambda: toy2d.rings([]), r"radii \[\]"),
    (lambda: toy2d.rings([[1.0]]), r"radii \[\[1.0\]\]"),
    (lambda: toy2d.rings([1, -1]), r"radii is \[ 1. -1.\]"),
    (lambda: toy2d.rings([1, np.inf]), "radii is"),
    (lambda: toy2d.rings(noise=0), "noise is 0,"),
    (lambda: toy2d.moons(radius=-2), "radius is -2,"),
    (lambda: toy2d.moons(noise=float("nan")), "noise is nan"),
    (lambda: toy2d.spirals(inner=0), "inner is 0,"),
    (lambda: toy2d.spirals(inner=2, outer=2), "2 to 2"),
    (lambda: toy2d.spirals(outer=np.inf), "outer is inf"),
    (lambda: toy2d.spirals(turns=0), "turns is 0,"),
    (lambda: toy2d.spirals(noise=-1), "noise is -1,"),
    (lambda: toy2d.gaussians(np.zeros((3, 3)), 1), r"\(3, 3\).*\[k, 2\]"),
    (lambda: toy2d.gaussians(np.zeros(2), 1), r"\(2,\)"),
    (lambda: toy2d.gaussians(np.zeros((0, 2)), 1), r"\(0, 2\)"),
    (lambda: toy2d.gaussians([[0, np.nan]], 1), "finite"),
    (lambda: toy2d.gaussians([[0, 0]], 0), "noise is 0,"),
    (lambda: toy2d.gaussian_ring(0), "count is 0,"),
    (lambda: toy2d.gaussian_ring(radius=0), "radius is 0,"),
    (lambda: toy2d.gaussian_grid(-1), "side is -1,"),
    (lambda: toy2d.gaussian_grid(spacing=np.nan), "spacing is nan"),
    (lambda: toy2d.moons().sample(-1, 0), "points -1 and the seed 0"),
    (lambda: toy2d.moons().sample(1, -3), "points 1 and the seed -3"),
    (lambda: toy2d.moons().log_density([1.0, 2.0]), r"\(2,\).*\[n, 2\]"),
    (lambda: toy2d.moons().log_density(np.zeros((2, 3))), r"\(2, 3\)"),
    (lambda: toy2d.get("moon"), r"'moon': did you mean moons\? there are rings, moons, .*_grid$"),
    (lambda: toy2d.get("8gaussians"), "did you mean .*gaussian_ring"),
    (lambda: toy2d.get("xyz"), "no data set 'xyz': there are rings, "),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_arguments_are_refused_with_the_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call()
