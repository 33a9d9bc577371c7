"""One of two processes: prints what it is told by the other. Arguments: address, index, file."""

import json
import pathlib
import sys

import jax
import numpy as np

from blogjax.train import distributed
from blogjax.train.checkpoint import CheckpointError, Checkpoints
from blogjax.train.export import export_safetensors, import_safetensors
from blogjax.train.partial_restore import restore_partial


class TwoPartsError(Exception):
    """Does not survive pickling: made from two arguments, told by one."""

    def __init__(self, left: str, right: str):
        super().__init__(f"{left} {right}")


def raised(error: Exception) -> list[str]:
    def fail():
        raise error

    try:
        distributed.on_first(fail)
    except Exception as told:
        return [type(told).__name__, str(told)]
    return []


def local(index: int):
    if index == 1:
        raise AssertionError("asked the second process")
    return {"index": index, "text": "x" * 5000}


def exported(path: str, parts: jax.Array) -> list[list[float]]:
    export_safetensors(path, {"x": parts})
    like = {"x": jax.ShapeDtypeStruct(parts.shape, parts.dtype, sharding=parts.sharding)}
    read = import_safetensors(path, like)["x"]
    assert read.sharding == parts.sharding
    return [shard.data.tolist() for shard in read.addressable_shards]


def restored(folder: pathlib.Path, sharding: jax.sharding.Sharding) -> dict[str, object]:
    """Whole and in part; then with the part of the second process damaged, which alone reads it."""
    numbers = np.random.default_rng(0).normal(size=8192).astype(np.float32)
    parts = jax.make_array_from_callback((8192,), sharding, lambda i: numbers[i])
    checkpoints = Checkpoints(folder, warn=lambda text: None)
    for step in (1, 2):
        checkpoints.save(step, {"x": parts * step})
    checkpoints.wait()
    like = {"x": jax.ShapeDtypeStruct(parts.shape, parts.dtype, sharding=sharding)}

    def whole():
        found = checkpoints.restore(like)
        assert found is not None
        step, state = found
        return step, bool((distributed.fetch(state)["x"] == step * numbers).all())

    def part():
        try:
            state, report = restore_partial(folder, {"x": parts, "new": parts})
            return report.step, bool((distributed.fetch(state)["x"] == 2 * numbers).all())
        except CheckpointError as error:
            return str(error).partition(" is damaged: ")[2]

    sound = [whole(), part()]
    distributed.barrier("read")
    if distributed.is_first():
        for path in (folder / "2" / "state").glob("ocdbt.process_1/d/*"):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    distributed.barrier("damaged")
    return {"sound": sound, "part": part(), "whole": whole()}


def main(address: str, index: int, path: str) -> None:
    distributed.start(distributed.detect(address, 2, index), heartbeat_seconds=20)
    mesh = jax.make_mesh((4,), ("data",))
    whole = np.arange(8, dtype=np.float32)
    parts = jax.make_array_from_callback(
        (8,), jax.NamedSharding(mesh, jax.P("data")), lambda i: whole[i]
    )
    told = {
        "first": distributed.is_first(),
        "value": distributed.on_first(lambda: local(index)),
        "nothing": distributed.on_first(lambda: None),
        "error": raised(ValueError("two sides")),
        "told": raised(TwoPartsError("a", "b")),
        "any": distributed.any_process(index == 1, False, index == 0),
        "addressable": parts.is_fully_addressable,
        "parts": distributed.fetch({"x": parts})["x"].tolist(),
        "own_parts": exported(path, parts),
        "restored": restored(pathlib.Path(path).with_name("checkpoints"), parts.sharding),
    }
    distributed.barrier("end")
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
