import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blogjax.nn.resampling import Downsample, Upsample, depth_to_space, space_to_depth

SIZE = st.integers(1, 4)


@given(SIZE, SIZE, SIZE, SIZE, st.integers(1, 3))
def test_space_to_depth_by_index_and_its_inverse(b, h, w, c, block):
    x = np.arange(b * h * w * c * block**2, dtype=np.int32).reshape(b, h * block, w * block, c)
    deep = np.asarray(space_to_depth(x, block))
    assert deep.shape == (b, h, w, block * block * c)
    for p in range(block):
        for q in range(block):
            first = (p * block + q) * c
            np.testing.assert_array_equal(deep[..., first : first + c], x[:, p::block, q::block])
    np.testing.assert_array_equal(depth_to_space(deep, block), x)
    np.testing.assert_array_equal(space_to_depth(depth_to_space(deep, block), block), deep)


def test_refusals():
    x = jnp.zeros((1, 4, 6, 3))
    for function in (space_to_depth, depth_to_space):
        with pytest.raises(ValueError, match=r"\(4, 6, 3\)"):
            function(x[0])
        with pytest.raises(ValueError, match="0"):
            function(x, 0)
    with pytest.raises(ValueError, match=r"4 and 6.* of 4"):
        space_to_depth(x, 4)
    with pytest.raises(ValueError, match=r"3 channels.* of 2 x 2"):
        depth_to_space(x)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="5 and 6"):
        Downsample(method="strided").init(key, jnp.zeros((1, 5, 6, 3)))
    with pytest.raises(ValueError, match=r"\(4, 6, 3\)"):
        Upsample().init(key, x[0])
    for module in (Downsample, Upsample):
        with pytest.raises(ValueError, match="'nearest'"):
            module(method="nearest").init(key, x)


def conv3x3(x, kernel, stride, before):
    """A loop over output pixels in float64; `before` rows and columns of zeros come first."""
    b, h, w, _ = x.shape
    padded = np.zeros((b, h + 3, w + 3, x.shape[-1]))
    padded[:, before : before + h, before : before + w] = x
    out = np.zeros((b, h // stride, w // stride, kernel.shape[-1]))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            window = padded[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[:, i, j] = np.tensordot(window, kernel, axes=3)
    return out


@pytest.mark.parametrize("module", [Downsample, Upsample])
@pytest.mark.parametrize("method", ["space_to_depth", "strided"])
def test_modules_against_loops(key, module, method):
    k1, k2 = jax.random.split(key)
    x = jax.random.normal(k1, (2, 4, 6, 3))
    resample = module(5, method)
    out, variables = jax.jit(resample.init_with_output)(k2, x)
    (layer,) = variables["params"].values()
    kernel = np.asarray(layer["kernel"], np.float64)
    pixels = np.asarray(x, np.float64)
    if method == "strided" and module is Downsample:
        expected = conv3x3(pixels, kernel, stride=2, before=0)
    elif method == "strided":
        expected = conv3x3(pixels.repeat(2, axis=1).repeat(2, axis=2), kernel, 1, before=1)
    elif module is Downsample:
        corners = [pixels[:, p::2, q::2] for p in range(2) for q in range(2)]
        expected = np.concatenate(corners, axis=-1) @ kernel
    else:
        expected = np.zeros((2, 8, 12, 5))
        for p in range(2):
            for q in range(2):
                first = (2 * p + q) * 5
                expected[:, p::2, q::2] = pixels @ kernel[:, first : first + 5]
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("module", [Downsample, Upsample])
@pytest.mark.parametrize("method", ["space_to_depth", "strided"])
def test_default_width_and_dtypes(key, module, method):
    x = jnp.zeros((2, 4, 6, 3))
    resample = module(method=method, dtype=jnp.bfloat16)
    out, variables = jax.eval_shape(resample.init_with_output, key, x)
    chex.assert_shape(out, (2, 2, 3, 3) if module is Downsample else (2, 8, 12, 3))
    chex.assert_type(out, jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
