"""The wheel in an environment of its own, where nothing else of this repository can be seen.

Built from a copy of the tracked files, installed with what it requires and no more, in the versions
of `requirements.txt`. Under `make slow`; it needs a package registry, and fails without one.
"""

import itertools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
UV = pathlib.Path(sys.executable).with_name("uv")
pytestmark = pytest.mark.slow

# Neither the tests' settings of XLA and jax, nor anything that leads Python here.
CLEAN = {
    k: v
    for k, v in os.environ.items()
    if not k.startswith(("XLA_", "JAX_", "BLOGJAX_", "PYTHON", "VIRTUAL_ENV"))
}
REGISTRY = (
    "If no package registry can be reached from here, point pip at a mirror or a folder of wheels "
    "(PIP_INDEX_URL or PIP_FIND_LINKS)."
)


def run(*command, cwd, hint="", **environment):
    """What the command prints; where it fails, the test fails with all that it printed."""
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=CLEAN | environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    said = f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{said}\n{hint}"
    return done.stdout


def tracked(folder="."):
    out = subprocess.run(
        ["git", "ls-files", "-z", folder], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [name for name in out.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, folder / "tree", cwd=folder,
        hint=REGISTRY)  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The interpreter of an environment that holds the wheel and what it requires."""
    folder = tmp_path_factory.mktemp("bare")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    what = ["install", "-q", "-c", ROOT / "requirements.txt", wheel]
    pip = [sys.executable, "-m", "pip", "--python", python]
    # uv takes a second where pip takes twenty, but does not read pip's configuration.
    by_uv = [UV, "pip", "install", "--python", python, *what[1:]]
    if not UV.exists() or subprocess.run(by_uv, env=CLEAN, capture_output=True).returncode:
        run(*pip, *what, cwd=folder, hint=REGISTRY)
    run(*pip, "check", cwd=folder)
    return python


def outside(python, *arguments, cwd, **environment):
    """Python without this repository or the user's own packages on its path, strict."""
    return run(python, "-I", "-W", "error", *arguments, cwd=cwd, **environment)


def test_the_wheel_holds_the_library_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert {n for n in names if not n.partition("/")[0].endswith(".dist-info")} == {
        n for n in tracked("blogjax") if n.endswith((".py", "py.typed"))
    }
    assert "blogjax/py.typed" in names
    assert sum(n.endswith("/licenses/LICENSE") for n in names) == 1
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==).*$", metadata, re.M)
    assert sorted(required) == ["flax", "jax", "numpy", "optax", "scipy"]


ABSENT = """
import importlib.util, sys
print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])
"""


def test_no_extra_came_with_it(bare, tmp_path):
    extras = [
        "build", "chex", "diffrax", "grain", "hypothesis", "jinja2", "matplotlib",
        "ml_collections", "pip", "pytest", "ruff", "setuptools", "sklearn", "tensorboardX",
        "tensorflow_datasets", "torch",
    ]  # fmt: skip
    found = outside(bare, "-c", ABSENT, *extras, "configs", "experiments", "tests", cwd=tmp_path)
    assert found.strip() == "[]"


EVERY_MODULE = """
import importlib, pkgutil
import blogjax
print(blogjax.__file__)
for module in pkgutil.walk_packages(blogjax.__path__, "blogjax."):
    importlib.import_module(module.name)
    print(module.name)
"""


def test_every_module_can_be_imported(bare, tmp_path):
    file, *modules = outside(bare, "-c", EVERY_MODULE, cwd=tmp_path).split()
    assert pathlib.Path(file).is_relative_to(bare.parents[1])
    files = (n.removesuffix(".py").removesuffix("/__init__") for n in tracked("blogjax"))
    expected = {n.replace("/", ".") for n in files if not n.endswith("py.typed")}
    assert set(modules) == expected - {"blogjax"}


def test_the_python_of_the_readme_runs(bare, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for i, block in enumerate(blocks):
        script = tmp_path / f"{i}.py"
        script.write_text(block)
        printed = outside(bare, script, cwd=tmp_path)
        assert all(promised in printed for promised in re.findall(r"print\(.*\)  # (.*)", block))


@pytest.fixture(scope="module")
def trained(bare, tmp_path_factory):
    """What `outside/train.py` found there, and the parameters it ended with."""
    folder = tmp_path_factory.mktemp("empty")
    script = pathlib.Path(__file__).with_name("outside") / "train.py"
    out = outside(bare, script, "parameters.npz", cwd=folder, JAX_NUM_CPU_DEVICES="8")
    with np.load(folder / "parameters.npz") as file:
        return json.loads(out), dict(file)


def test_the_loop_ran_on_the_wheel(trained, bare):
    found, parameters = trained
    assert pathlib.Path(found["blogjax"]).is_relative_to(bare.parents[1])
    assert found["devices"] == 8
    assert parameters.keys() == found["after"].keys()
    # Two ways to say the same, and what the others say is something else.
    ends = {name.split()[1]: p for name, p in parameters.items() if name.endswith(" jit")}
    same(ends.pop("masked"), ends["multi_transform"])
    for one, other in itertools.combinations(ends.values(), 2):
        assert np.mean(np.abs(one - other) > 1e-3) > 0.1


def same(a, b):
    """But for the few entries whose sign hung on rounding."""
    assert a.shape == b.shape and a.size > 200
    assert np.mean(np.abs(a - b) > 1e-5) < 0.02


@pytest.mark.parametrize(
    "composition", ["chain", "inject_hyperparams", "multi_transform", "masked", "MultiSteps"]
)
def test_lion_composes_there(trained, composition):
    """Every view learns, to the same parameters, which are those of optax's own Lion."""
    found, parameters = trained
    expected = parameters[f"optax {composition} jit"]
    for view in ("jit", "pmap", "mesh"):
        name = f"blogjax {composition} {view}"
        assert found["after"][name] < 0.6 * found["before"], name
        same(parameters[name], expected)
