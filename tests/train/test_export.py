"""Files in the safetensors format: read here as the format says, written by its own package."""

import json
import os
import struct
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from blogjax.train import mesh as meshes
from blogjax.train.export import export_safetensors, import_safetensors

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(64, 128)).astype(np.float32)


def parsed(path):
    """Length of the header, header, data: `{name: (kind, shape, bytes)}` and the metadata."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__", None)
    return {
        name: (x["dtype"], x["shape"], data[slice(*x["data_offsets"])])
        for name, x in header.items()
    }, metadata


class Layer(NamedTuple):
    kernel: object
    bias: object


def test_the_file_is_what_the_format_says(tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    half = jnp.asarray([1.0, -2.5, 3e38, np.nan], jnp.bfloat16)
    params = {
        "dense": Layer(jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), half),
        "blocks": [{"scale": np.float32(7)}, {"scale": np.array([2, 3], ">i4")}],
        "mask": jnp.asarray([True, False]),
        "none": None,
        "empty": np.zeros((0, 3), np.float16),
    }
    assert export_safetensors(path, params, {"format": "flax", "post": "9119"}) is None
    found, metadata = parsed(path)
    assert metadata == {"format": "flax", "post": "9119"}
    # bfloat16 is the upper half of a float32, here of numbers that have nothing in the lower one.
    assert found == {
        "dense.kernel": ("F32", [2, 2], struct.pack("<4f", 1, 2, 3, 4)),
        "dense.bias": ("BF16", [4], b"\x80\x3f\x20\xc0\x62\x7f\xc0\x7f"),
        "blocks.0.scale": ("F32", [], struct.pack("<f", 7)),
        "blocks.1.scale": ("I32", [2], struct.pack("<2i", 2, 3)),
        "mask": ("BOOL", [2], b"\x01\x00"),
        "empty": ("F16", [0, 3], b""),
    }
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_arrays_are_written_as_they_read_and_not_as_they_lie(tmp_path):
    path = tmp_path / "x"
    export_safetensors(path, {"t": KERNEL.T, "s": KERNEL[::2, 1::3]})
    read = import_safetensors(path)
    np.testing.assert_array_equal(read["t"], KERNEL.T)
    np.testing.assert_array_equal(read["s"], KERNEL[::2, 1::3])


KINDS = [
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "bfloat16",
    "float16", "float32", "float64", "complex64",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_bit_for_bit(tmp_path, kind):
    dtype = jnp.dtype(kind)
    bits = RNG.integers(0, 2 if kind == "bool" else 256, 48 * dtype.itemsize, np.uint8)
    given = {"a": bits.view(dtype).reshape(6, 8), "b": bits.view(dtype)[3].reshape(())}
    export_safetensors(tmp_path / "x", given)
    with jax.enable_x64(True):
        like = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, given))
        read = import_safetensors(tmp_path / "x"), import_safetensors(tmp_path / "x", like)
    for tree in read:
        assert tree.keys() == given.keys()
        for name, array in given.items():
            assert tree[name].dtype == dtype and tree[name].shape == array.shape
            assert np.asarray(tree[name]).tobytes() == array.tobytes()
    assert isinstance(read[0]["a"], np.ndarray) and isinstance(read[1]["a"], jax.Array)


def on_mesh(name):
    data, fsdp = {"1": (1, 1), "8": (8, 1), "2x4": (2, 4)}[name]
    mesh = meshes.make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
    params = {"layers": [Layer(jnp.asarray(KERNEL), jnp.ones(3))]}
    return jax.device_put(params, meshes.state_shardings(params, mesh))


@pytest.mark.parametrize(("first", "then"), [("2x4", "1"), ("1", "2x4"), ("2x4", "8")])
def test_from_any_mesh_to_any_mesh(tmp_path, first, then):
    export_safetensors(tmp_path / "x", on_mesh(first))
    assert parsed(tmp_path / "x")[0]["layers.0.kernel"][2] == KERNEL.tobytes()
    like = on_mesh(then)
    zeros = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape), x.sharding), like)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    for asked in (zeros, shapes):
        got = import_safetensors(tmp_path / "x", asked)
        assert isinstance(got["layers"][0], Layer)
        kernel, bias = got["layers"][0]
        np.testing.assert_array_equal(kernel, KERNEL)
        np.testing.assert_array_equal(bias, np.ones(3))
        assert kernel.sharding == like["layers"][0].kernel.sharding
        assert kernel.sharding.spec == (P(None, "fsdp") if then == "2x4" else P())
        # A step that donates what was read must find memory that is nobody else's.
        doubled = jax.jit(lambda x: 2 * x, donate_argnums=0)(kernel)
        np.testing.assert_array_equal(doubled, 2 * KERNEL)


def test_a_file_by_others(tmp_path):
    arrays = {"encoder.layer.0.weight": KERNEL, "encoder.layer.10.weight": KERNEL[0], "b": KERNEL}
    save_file(arrays, tmp_path / "x", {"format": "pt"})
    tree = import_safetensors(tmp_path / "x")
    layers = tree["encoder"]["layer"]
    assert [*tree] == ["b", "encoder"] and [*layers] == ["0", "10"]
    np.testing.assert_array_equal(layers["10"]["weight"], KERNEL[0])
    save_file({"a": KERNEL, "a-b": KERNEL, "a.b.c": KERNEL}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"x has a and a\.b\.c: no tree has both"):
        import_safetensors(tmp_path / "x")


def test_what_differs_is_named_on_both_sides(tmp_path):
    path = tmp_path / "x"
    export_safetensors(path, {"head": {"kernel": np.zeros((8, 3), np.float32)}, "old": np.ones(2)})
    like = {"head": {"kernel": np.zeros((8, 4), np.float32)}, "new": np.ones(2)}
    with pytest.raises(ValueError, match=r"x does not fit the tree:") as told:
        import_safetensors(path, like)
    assert str(told.value).splitlines()[1:] == [
        "  head.kernel: float32[8, 3] in the file, float32[8, 4] in the tree",
        "  new: absent in the file, float64[2] in the tree",
        "  old: float64[2] in the file, absent in the tree",
    ]
    export_safetensors(path, {"w": np.zeros(3, np.float16)})
    with pytest.raises(ValueError, match=r"w: float16\[3\] in the file, bfloat16\[3\] in the tree"):
        import_safetensors(path, {"w": jnp.zeros(3, jnp.bfloat16)})
    export_safetensors(path, {"w": np.zeros(3)})
    with pytest.raises(ValueError, match=r"w is float64, which needs jax\.config.jax_enable_x64"):
        import_safetensors(path, {"w": np.zeros(3)})


@pytest.mark.parametrize("part", [0, 5, 60, -1])
def test_what_is_not_whole_is_refused(tmp_path, part):
    path = tmp_path / "x"
    export_safetensors(path, {"w": KERNEL})
    path.write_bytes(path.read_bytes()[:part])
    for like in (None, {"w": KERNEL}):
        with pytest.raises(ValueError, match=r"x is no whole safetensors file: "):
            import_safetensors(path, like)


def test_no_file_a_folder_and_a_kind_that_numpy_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        import_safetensors(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a folder, not a safetensors file"):
        import_safetensors(tmp_path)
    save_file({"w": np.zeros(3, jnp.float8_e4m3fn)}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"w in .*x is F8_E4M3, which numpy does not have"):
        import_safetensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("params", "metadata", "message"),
    [
        ({}, None, "params has no leaves"),
        (KERNEL, None, r"got \[\] in params"),
        ({"a.b": KERNEL}, None, r"without dots; got \['a.b'\]"),
        ({"a": {"": KERNEL}}, None, r"not empty .* got \['a', ''\]"),
        ({"__metadata__": KERNEL}, None, "a name that the format keeps"),
        ({"a": {"b": 1.0}}, None, "a.b in params is no array but float"),
        ({"a": jax.ShapeDtypeStruct((2,), "float32")}, None, "no array but ShapeDtypeStruct"),
        ({"a": jax.random.key(0)}, None, r"a is key<fry>, which the file cannot hold"),
        ({"a": jnp.zeros(2, jnp.float8_e5m2)}, None, "a is float8_e5m2, which"),
        ({"a": np.zeros(2, complex)}, None, "a is complex128, which"),
        ({"a": KERNEL}, {"step": 3}, "texts to texts, got 'step': 3"),
    ],
)
def test_what_cannot_be_written_is_refused_before(tmp_path, params, metadata, message):
    with pytest.raises(ValueError, match=message):
        export_safetensors(tmp_path / "x", params, metadata)
    assert list(tmp_path.iterdir()) == []


def test_two_leaves_of_one_name(tmp_path):
    class Twins:
        pass

    key = jax.tree_util.DictKey("same")
    jax.tree_util.register_pytree_with_keys(
        Twins, lambda x: ([(key, KERNEL), (key, KERNEL)], None), lambda aux, children: Twins()
    )
    with pytest.raises(ValueError, match=r"two leaves of params have the name a\.same"):
        export_safetensors(tmp_path / "x", {"a": Twins()})


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    export_safetensors(path, {"w": KERNEL})
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # readable to whom other files are
    before = path.read_bytes()
    seen = []

    def replace(source, target):
        seen.append((path.read_bytes() == before, parsed(source)[0]["w"][1]))
        raise OSError("the machine went away")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="went away"):
            export_safetensors(path, {"w": np.zeros(2)})
    assert seen == [(True, [2])] and path.read_bytes() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        export_safetensors(tmp_path / "folder", {"w": KERNEL})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "plain", "x"]
    export_safetensors(path, {"w": np.zeros(2)})
    np.testing.assert_array_equal(import_safetensors(path)["w"], np.zeros(2))


def test_a_full_disk_is_told_by_the_files_name(tmp_path, monkeypatch):
    import safetensors.numpy

    def full(*_):
        raise safetensors.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*/x: I/O error: No space left"):
        export_safetensors(tmp_path / "x", {"w": KERNEL})
    assert list(tmp_path.iterdir()) == []
