"""The house: arrows between layers, the catalogue, README, file sizes, imports."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from blogjax import catalog
from experiments.launch import publish

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(p for d in ("blogjax", "experiments", "configs") for p in (ROOT / d).rglob("*.py"))

# What each package of blogjax may import from blogjax besides itself.
METHODS = {"core"}
ALLOWED = {
    "core": set(),
    "nn": {"core"},
    "models": {"core", "nn"},
    "optim": METHODS,
    "gradients": METHODS,
    "losses": METHODS,
    "diffusion": METHODS,
    "metrics": METHODS,
    "multitask": METHODS,
    "data": set(),
    "train": {"core.per_device"},
    "tasks": {
        "core",
        "optim",
        "gradients",
        "multitask",
        "losses",
        "nn",
        "models",
        "diffusion",
        "train.task",
    },
}
USES_FLAX = {"nn", "models", "tasks"}


def imports(path: pathlib.Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import in {path}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / "blogjax" / package).rglob("*.py"))


def test_every_package_has_its_arrows():
    packages = {p.name for p in (ROOT / "blogjax").iterdir() if (p / "__init__.py").exists()}
    assert packages == set(ALLOWED)


@pytest.mark.parametrize("package", ALLOWED)
def test_dependencies_point_one_way(package):
    for path in modules(package):
        for name in imports(path):
            if not name.startswith("blogjax."):
                continue
            inner = name.removeprefix("blogjax.")
            allowed = {package, *ALLOWED[package]}
            assert any(inner == a or inner.startswith(a + ".") for a in allowed), (path, name)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_only_networks_and_tasks_import_flax(package):
    for path in modules(package):
        uses = any(name.split(".")[0] == "flax" for name in imports(path))
        assert not uses or package in USES_FLAX, path


def test_nobody_below_the_experiments_sees_a_config_a_flag_or_an_experiment():
    for path in (ROOT / "blogjax").rglob("*.py"):
        heads = {name.split(".")[0] for name in imports(path)}
        assert not heads & {"ml_collections", "absl", "experiments", "configs"}, path


def test_heavy_packages_are_imported_where_they_are_used():
    heavy = {"orbax", "tensorflow_datasets", "grain", "sklearn", "matplotlib", "tensorboardX",
             "PIL", "rich"}  # fmt: skip
    for path in FILES:
        assert not {n.split(".")[0] for n in imports(path, top_level_only=True)} & heavy, path


LIGHT = """
import sys, time
import jax, flax, optax
began = time.perf_counter()
import blogjax, blogjax.catalog
print(time.perf_counter() - began)
bad = {"tensorflow", "tensorflow_datasets", "orbax.checkpoint", "grain", "sklearn", "matplotlib"}
print(sorted(m for m in bad if m in sys.modules and m not in before))
"""


def test_importing_blogjax_is_light():
    """flax brings orbax in by itself; blogjax must add nothing to what jax, flax, optax load."""
    script = LIGHT.replace("import blogjax, ", "before = set(sys.modules)\nimport blogjax, ")
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, bad = out.stdout.splitlines()
    assert float(seconds) < 0.3
    assert bad == "[]"


def test_no_file_is_longer_than_400_lines_or_has_a_nameless_name():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path
        assert path.stem not in {"utils", "helpers", "common", "misc"}, path


def test_every_path_of_the_catalogue_exists():
    for post in catalog.POSTS:
        for path in (*post.modules, *post.tests, *post.experiments, *post.configs):
            assert (ROOT / path).is_file(), (post.slug, path)
        assert len(post.experiments) == len(post.configs)


def test_every_paper_of_the_catalogue_is_in_the_references():
    keys = set(re.findall(r"^@\w+\{(\w+),", (ROOT / "references.bib").read_text(), re.M))
    for post in catalog.POSTS:
        assert set(post.papers) <= keys, post.slug


def test_every_method_module_is_in_the_catalogue():
    listed = {module for post in catalog.POSTS for module in post.modules}
    supporting = {"diffusion/checks.py", "models/gan_parts.py"}
    for package in ("diffusion", "models"):
        for path in modules(package):
            name = str(path.relative_to(ROOT))
            if path.name != "__init__.py" and name.removeprefix("blogjax/") not in supporting:
                assert name in listed, f"{name} is in no record of blogjax/catalog.py"


def test_no_two_files_of_tests_have_one_name():
    """pytest imports them by their names alone, and collects neither of two."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_every_method_file_opens_with_its_header():
    for post in catalog.POSTS:
        for module in post.modules:
            header = ast.get_docstring(ast.parse((ROOT / module).read_text())) or ""
            for word in ("What:", "Post:", "Differences from the post:"):
                assert word in header, (module, word)


def test_the_readme_table_is_current():
    text = (ROOT / "README.md").read_text()
    assert publish.readme(text, publish.published(ROOT / "docs" / "results")) == text, (
        "run `make readme`"
    )


def test_the_python_of_the_readme_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 5
    for block in blocks:  # each by itself
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    for promised in re.findall(r"print\(.*\)  # (.*)", "".join(blocks)):
        assert promised in printed


def test_links_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


def test_unknown_rows_are_named():
    with pytest.raises(KeyError, match=r"S99.*S30"):
        catalog.find("S99")
