"""The strict environment that every test runs in. Must be imported before any backend starts."""

import os
import pathlib

# Tests compile far more than they compute: without optimisation the suite takes half the time.
if "BLOGJAX_TEST_OPT" not in os.environ:
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
    ).strip()

import jax
import pytest
from hypothesis import settings

ROOT = pathlib.Path(__file__).resolve().parents[1]

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

settings.register_profile("blogjax", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("blogjax")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Float64 for the length of one test; never process-wide."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
    return ROOT
