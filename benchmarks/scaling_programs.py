"""The training steps that docs/scaling.md speaks of, compiled for shapes alone; nothing is run."""

import contextlib
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.experimental.compilation_cache import compilation_cache

from benchmarks.collectives import Collective, collectives
from benchmarks.scaling_model import PRECISIONS, Layout, Shape
from blogjax.diffusion.schedules import linear_beta_schedule
from blogjax.models.unet import UNet
from blogjax.optim.lion import lion
from blogjax.optim.majority_vote import distributed_lion
from blogjax.tasks.augmentation import random_horizontal_flip
from blogjax.tasks.denoising import denoising_task
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.train import mesh as meshes
from blogjax.train.compiled import compile_task
from blogjax.train.per_device import AXIS
from blogjax.train.profiling import describe_program
from blogjax.train.state import sizes
from blogjax.train.task import Task
from configs.ddpm import get_config
from experiments.diffusion.model import make_apply, make_init

# Machine code is not run; how good it is changes neither collectives nor buffers.
OPTIONS: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_dump_hlo_as_text": True,
    "xla_dump_hlo_pass_re": "spmd-partitioning",
}
Shapes = Mapping[str, tuple[tuple[int, ...], str]]


class DenseStack(nn.Module):
    """Residual blocks of norm, Dense, gelu, Dense.

    Attributes:
      width: of input and output.
      hidden: between the two matrices of a block.
      blocks: how many.
      dtype: of the arithmetic.
      param_dtype: of the parameters.
    """

    width: int
    hidden: int
    blocks: int
    dtype: Any = "float32"
    param_dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, width]` to float32 `[B, width]`."""
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = x.astype(self.dtype)
        for _ in range(self.blocks):
            h = nn.gelu(nn.Dense(self.hidden, **kinds)(nn.LayerNorm(**kinds)(x)))
            x = x + nn.Dense(self.width, **kinds)(h)
        return x.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and its batch.

    Attributes:
      name: as the document calls it.
      fields: of the network; dtypes are not among them.
      batch: global batch.
      ema_decay: of the average of the parameters; None for no average.
    """

    name: str
    fields: Mapping[str, Any]
    batch: int
    ema_decay: float | None

    @property
    def is_ddpm(self) -> bool:
        """Whether it is the U-Net, not the stack."""
        return "channels" in self.fields

    @property
    def shapes(self) -> Shapes:
        """Shape and dtype of an example."""
        shapes: dict[str, Any] = {"row": ((), "int32"), "weight": ((), "float32")}
        if self.is_ddpm:
            return {**shapes, "image": ((32, 32, 3), "uint8"), "label": ((), "int32")}
        width = self.fields["width"]
        return {**shapes, "x": ((width,), "float32"), "y": ((width,), "float32")}

    def task(self, tx: Any, precision: str, axis_name: str | None, average: bool) -> Task:
        """The training task; `average` tells whether gradients are averaged before `tx`."""
        param_dtype, dtype = PRECISIONS[precision]
        kinds: Any = {**self.fields, "dtype": dtype, "param_dtype": param_dtype}
        around: Any = {
            "ema_decay": self.ema_decay, "axis_name": axis_name, "average_gradients": average
        }  # fmt: skip
        if self.is_ddpm:
            model = UNet(**kinds)
            schedule = linear_beta_schedule(1000)
            flip: Any = random_horizontal_flip
            init = make_init(model, (32, 32, 3))
            return denoising_task(init, make_apply(model), schedule, tx, augment=flip, **around)
        stack = DenseStack(**kinds)

        def loss(params: Any, model_state: Any, batch: Any, key: jax.Array) -> LossOutput:
            del model_state, key
            error = stack.apply({"params": params}, batch["x"]) - batch["y"]
            return LossOutput(jnp.mean(jnp.square(error), axis=-1))

        x = jnp.zeros((1, self.fields["width"]))
        return gradient_task(lambda key: stack.init(key, x), loss, tx, **around)


def _cifar10(channels: int, batch: int, name: str) -> Network:
    config: Any = get_config("cifar10")
    fields = {k: v for k, v in config.model.items() if k not in ("conditional", "dtype")}
    fields = {**fields, "channels": channels, "num_classes": 0}
    fields.pop("param_dtype")
    return Network(name, fields, batch, config.optim.ema_decay)


def _stack(width: int, blocks: int, batch: int, name: str) -> Network:
    return Network(name, {"width": width, "hidden": 4 * width, "blocks": blocks}, batch, None)


FULL = {
    "ddpm": _cifar10(128, 128, "DDPM of `configs/ddpm.py:cifar10`"),
    "stack": _stack(2048, 30, 16384, "30 Dense blocks of width 2048, hidden 8192"),
}
SMALL = {
    "ddpm": _cifar10(32, 64, "the same with 32 channels"),
    "stack": _stack(256, 4, 2048, "4 Dense blocks of width 256, hidden 1024"),
}


def make_optimizer(name: str) -> Any:
    """`adamw` or `lion` on clipped gradients, or `vote`: Lion by majority."""
    if name == "vote":
        return distributed_lion(1e-4, AXIS)
    return optax.chain(
        optax.clip_by_global_norm(1.0), {"adamw": optax.adamw, "lion": lion}[name](1e-4)
    )


def parameter_shapes(network: Network) -> list[Shape]:
    """Shapes of the parameters, one per leaf."""
    task = network.task(optax.identity(), "float32", None, True)
    state = jax.eval_shape(task.init, jax.random.key(0))
    return [x.shape for x in jax.tree.leaves(state.params)]


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """A program from the compilation cache would leave no dump."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or what was found out at the first use would stay
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


class Read(NamedTuple):
    """What XLA says of a compiled step.

    Attributes:
      state: bytes on a device of the fields of the state, by their shapes and shardings.
      memory: of `describe_program`, in bytes per device.
      partitioned: collectives of a step as the partitioner leaves them, in the dtypes of the task.
      compiled: the same at the end of compilation; XLA's CPU compiler widens bfloat16 to float32.
      seconds: of tracing and compilation.
    """

    state: dict[str, int]
    memory: dict[str, float]
    partitioned: list[Collective]
    compiled: list[Collective]
    seconds: float


def compile_step(network: Network, precision: str, optimizer: str, layout: Layout) -> Read:
    """Compiles one step for the first of the devices at hand."""
    votes = optimizer == "vote"
    task = network.task(make_optimizer(optimizer), precision, AXIS if votes else None, not votes)
    mesh = meshes.make_mesh(*layout, devices=jax.devices()[: layout.devices])
    began = time.perf_counter()
    compiled = compile_task(task, mesh, "shard_map" if votes else "jit")
    split = meshes.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((network.batch, *shape), dtype, sharding=split)
        for name, (shape, dtype) in network.shapes.items()
    }
    key = meshes.put_key(jax.random.key(0), mesh)
    lowered = compiled.step.lower(compiled.abstract, batch, key)
    with tempfile.TemporaryDirectory() as folder, _without_cache():
        program = lowered.compile({**OPTIONS, "xla_dump_to": folder})
        partitioned = next(pathlib.Path(folder).glob("*.after_spmd-partitioning.*.txt")).read_text()
    seconds = time.perf_counter() - began
    return Read(
        state={n: s.bytes_per_device for n, s in sizes(compiled.abstract).items()},
        memory=describe_program(program),
        partitioned=collectives(partitioned, mesh.size),
        compiled=collectives(program.as_text(), mesh.size),
        seconds=round(seconds, 1),
    )
