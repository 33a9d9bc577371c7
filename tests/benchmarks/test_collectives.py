import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from benchmarks.collectives import Collective, collectives, sent_by_kind

HLO = """HloModule step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %gathered = bf16[4,8]{1,0} all-gather(%part), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %out = (s32[], f32[4,8]) tuple(%i, %x)
}

%one (x: f32[16]) -> f32[16] {
  ROOT %cut = f32[2]{0} reduce-scatter(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%other (x: f32[16]) -> f32[16] {
  ROOT %moved = u8[16]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %w = (s32[], f32[4,8]) while(%init), condition=%cond, body=%body, TRIP
  %c = f32[16] conditional(%flag, %x, %x), branch_computations={%one, %other}
  ROOT %s = (f32[5]{0}, pred[3]{0}) all-reduce(%a, %b), replica_groups={}, to_apply=%add
}
"""
TRIP = 'backend_config={"known_trip_count":{"n":"3"}}'


def test_reads_loops_branches_and_groups():
    """By hand: 4 x 8 x 2 bytes; 2 x 4; 16; 5 x 4 + 3."""
    text = HLO.replace("TRIP", TRIP)
    gathered = Collective("all-gather", 64, 4, 3)
    summed = Collective("all-reduce", 23, 8, 1)
    cut = Collective("reduce-scatter", 8, 2, 1)
    assert collectives(text, 8) == [gathered, cut, summed]
    other = collectives(text, 8, branch=1)
    assert [c.kind for c in other] == ["all-gather", "collective-permute", "all-reduce"]
    assert sent_by_kind(collectives(text, 8)) == {
        "all-gather": 3 * 64 * 3 / 4, "reduce-scatter": 8, "all-reduce": 2 * 23 * 7 / 8
    }  # fmt: skip
    assert collectives("HloModule empty\n", 8) == []


def test_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="unknown length"):
        collectives(HLO.replace("TRIP", ""), 8)
    with pytest.raises(ValueError, match="asynchronous"):
        collectives(HLO.replace("TRIP", TRIP).replace("all-reduce(", "all-reduce-start("), 8)


def test_groups_as_axes_of_a_mesh():
    groups = "replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}"
    text = HLO.replace("TRIP", TRIP).replace("replica_groups=[2,4]<=[8]", groups)
    assert collectives(text, 8)[0].group == 4


def test_compiled_collectives_in_a_loop():
    """Of 16 numbers on each of 8 devices, 3 times: sums of 64 bytes, then gathers of 512."""

    @functools.partial(
        jax.shard_map,
        mesh=Mesh(np.array(jax.devices()), ("i",)),
        in_specs=PartitionSpec("i"),
        out_specs=PartitionSpec("i"),
        check_vma=False,
    )
    def exchange(x: jax.Array) -> jax.Array:
        def turn(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.sin(jax.lax.psum(x, "i")), None

        x, _ = jax.lax.scan(turn, x, length=3)
        everything = jax.lax.all_gather(x, "i", tiled=True)
        return jax.lax.psum_scatter(jnp.sin(everything), "i", tiled=True)

    text = jax.jit(exchange).lower(jax.ShapeDtypeStruct((128,), jnp.float32)).compile().as_text()
    assert collectives(text, 8) == [
        Collective("all-reduce", 64, 8, 3),
        Collective("all-gather", 512, 8),
        Collective("reduce-scatter", 64, 8),
    ]
    sent = {"all-reduce": 3 * 2 * 7 * 8, "all-gather": 7 * 64, "reduce-scatter": 7 * 64}
    assert sent_by_kind(collectives(text, 8)) == sent
