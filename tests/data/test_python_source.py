import ast
import hashlib
import os
import pathlib
import platform
import re
import subprocess
import sys
import sysconfig
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blogjax.data import python_source
from blogjax.data.batches import Batches

SPLITS = ["train", "validation", "test"]
TREE = {
    "zeta.py": b"z = 1\n",
    "pkg/__init__.py": b"",  # empty
    "pkg/one.py": "name = 'Äther'\n".encode(),
    "pkg/deep/two.py": b"two = 2\n",
    "pkg-more.py": b"not importable\n",
    "pkg_more.py": b"pkg_more = 3\n",
    "Upper.py": b"UPPER = 4\r\n",
    "latin.py": "# -*- coding: latin-1 -*-\nname = 'Äther'\n".encode("latin-1"),
    "null.py": b"a\0b\n",
    "data.txt": b"text\n",
    "stub.pyi": b"x: int\n",
    "old.py.orig": b"x = 0\n",
    "two.dots.py": b"x = 0\n",
    ".#lock.py": b"x = 0\n",
    "happy": b"x = 0\n",
    "test/test_it.py": b"x = 0\n",
    "pkg/tests/test_it.py": b"x = 0\n",
    "pkg/idle_test/test_it.py": b"x = 0\n",
    "pkg/testing.py": b"testing = 5\n",
    "site-packages/other/__init__.py": b"x = 0\n",
    "dist-packages/other.py": b"x = 0\n",
    "__pycache__/zeta.py": b"x = 0\n",
    "config-3.11-x86_64-linux-gnu/config.py": b"x = 0\n",
    "_sysconfigdata__darwin_darwin.py": b"x = 0\n",
    "sitecustomize.py": b"x = 0\n",
    "encodings/cp037.py": b"x = 0\n",
    "pydoc_data/topics.py": b"x = 0\n",
}
TAKEN = ["Upper.py", "pkg/deep/two.py", "pkg/one.py", "pkg/testing.py", "pkg_more.py", "zeta.py"]


def _write(root, tree):
    for path, content in tree.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def _all(root):
    return {path: split for split in SPLITS for path in python_source.files(split, root)}


def test_the_files_of_a_tree(tmp_path):
    _write(tmp_path, TREE)
    found = {split: python_source.files(split, tmp_path) for split in SPLITS}
    assert sorted(path for files in found.values() for path in files) == TAKEN
    for files in found.values():
        assert list(files) == sorted(files)
        assert all(content == TREE[path] for path, content in files.items())
    assert python_source.files("train", str(tmp_path)) == found["train"]


def test_the_order_is_that_of_whole_paths_whatever_the_disk_says(tmp_path, monkeypatch):
    names = ["a/z.py", "a0.py", "a/b/c.py", "a_.py", "B.py", "a.py"]
    _write(tmp_path, {name: name.encode() for name in names})
    walk = os.walk

    def shuffled(*args, **options):
        for folder, below, files in walk(*args, **options):
            below.reverse()
            yield folder, below, sorted(files, key=lambda name: name[::-1], reverse=True)

    monkeypatch.setattr(os, "walk", shuffled)
    monkeypatch.setattr(python_source, "_split_of", lambda path: "test")
    expected = ["B.py", "a.py", "a/b/c.py", "a/z.py", "a0.py", "a_.py"]
    assert list(python_source.files("test", tmp_path)) == expected


# From `printf %s <path> | sha256sum`, the digits reduced modulo 20 one by one.
KNOWN = {
    "ast.py": "train",
    "json/decoder.py": "train",
    "e.py": "validation",
    "xml/dom/minidom.py": "validation",
    "w.py": "test",
    "asyncio/unix_events.py": "test",
}


def test_splits_are_those_of_the_documented_hash(tmp_path):
    _write(tmp_path, {path: b"1\n" for path in KNOWN})
    assert _all(tmp_path) == KNOWN


@pytest.mark.slow  # seconds of compiling
@given(st.sets(st.from_regex(r"\A[a-z]{1,6}(/[a-z]{1,6})?\Z"), min_size=1, max_size=12), st.data())
def test_a_file_that_is_added_moves_no_other(tmp_path_factory, names, data):
    root = tmp_path_factory.mktemp("tree")
    sources = {f"{name}.py": name.encode() for name in names if "test" not in name}
    first = data.draw(st.sets(st.sampled_from(sorted(sources)), min_size=1)) if sources else set()
    _write(root, {path: sources[path] for path in first})
    before = _all(root) if first else {}
    assert set(before) == first
    _write(root, sources)
    after = _all(root) if sources else {}
    assert set(after) == set(sources)
    assert {path: after[path] for path in first} == before


def test_about_one_file_in_twenty_is_for_validation_and_one_for_the_test(tmp_path):
    _write(tmp_path, {f"m{i}/f{j}.py": b"1\n" for i in range(10) for j in range(80)})
    split = list(_all(tmp_path).values())
    for name in ("validation", "test"):  # 40 expected, with a deviation of 6
        assert abs(split.count(name) - 40) < 20
    assert len(split) == 800


def test_files_are_separated_by_one_zero(tmp_path, monkeypatch):
    monkeypatch.setattr(python_source, "_split_of", lambda path: "train")
    _write(tmp_path, TREE)
    corpus = python_source.load("train", tmp_path)
    assert corpus.dtype == np.uint8 and corpus.ndim == 1
    assert python_source.SEPARATOR == 0
    assert corpus.tobytes().split(b"\0") == [TREE[path] for path in TAKEN]
    assert not corpus.flags.writeable
    assert python_source.load("test", tmp_path).shape == (0,)


def test_the_fingerprint_names_version_content_and_splits(tmp_path, monkeypatch):
    _write(tmp_path, TREE)
    content = b"".join(
        f"{s} {len(c)}\n".encode() + c
        for s in SPLITS
        for c in [b"\0".join(TREE[path] for path in TAKEN if _all(tmp_path)[path] == s)]
    )
    expected = f"{platform.python_version()}-{hashlib.sha256(content).hexdigest()}"
    assert python_source.fingerprint(tmp_path) == expected
    (tmp_path / "data.txt").write_bytes(b"else\n")
    assert python_source.fingerprint(tmp_path) == expected
    (tmp_path / "zeta.py").write_bytes(b"z = 2\n")
    changed = python_source.fingerprint(tmp_path)
    monkeypatch.setattr(python_source, "_split_of", lambda path: "train")
    assert len({expected, changed, python_source.fingerprint(tmp_path)}) == 3


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'valid'.*train, validation, test"):
        python_source.files("valid")
    for name in SPLITS:
        with pytest.raises(FileNotFoundError, match=re.escape(f"no Python source in {tmp_path}/x")):
            python_source.load(name, tmp_path / "x")
    _write(tmp_path, {"site-packages/a.py": b"a", "zeta.pyc": b"z"})
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}$"):
        python_source.fingerprint(tmp_path)
    archive = tmp_path / "python311.zip"
    archive.write_bytes(b"PK")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(archive)}.__getitem__)
    with pytest.raises(FileNotFoundError, match=r"python311.zip: .*packed or stripped"):
        python_source.load("train")


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    _write(tmp_path, TREE)
    scandir = os.scandir

    def guarded(path):
        if pathlib.Path(path).name == "deep":
            raise PermissionError(13, "closed", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError, match="deep"):
        python_source.files("train", tmp_path)


@pytest.fixture(scope="module")
def library():
    return {split: python_source.files(split) for split in SPLITS}


def test_the_standard_library(library):
    paths = [path for files in library.values() for path in files]
    assert len(paths) == len(set(paths)) > 500
    share = [len(library[split]) / len(paths) for split in SPLITS]
    np.testing.assert_allclose(share, [0.9, 0.05, 0.05], atol=0.03)
    for expected in ("ast.py", "json/decoder.py", "unittest/mock.py", "doctest.py"):
        assert expected in paths
    folder = pathlib.Path(ast.__file__).parent
    for path in ("ast.py", "functools.py", "socket.py", "json/decoder.py"):
        content = next(files[path] for files in library.values() if path in files)
        assert content == (folder / path).read_bytes()
        assert ast.parse(content).body
    others = ("site-packages", "test", "tests", "encodings", "pydoc_data", "__pycache__")
    assert not any(part in others for path in paths for part in path.split("/"))
    assert not any(path.startswith(("_sysconfigdata", "sitecustomize")) for path in paths)


@pytest.mark.parametrize("split", SPLITS)
def test_the_corpus_is_files_that_parse(library, split):
    corpus = python_source.load(split)
    sources = bytes(corpus).split(b"\0")
    assert sources == list(library[split].values())
    assert len(corpus) > 300_000
    for source in sources[:10]:
        ast.parse(source.decode())
    bytes(corpus).decode()


def test_the_sizes_in_the_documentation(library):
    (start,) = re.findall(r"`([\d.]+-[0-9a-f]{8})`", python_source.__doc__)
    if not python_source.fingerprint().startswith(start):
        pytest.skip(f"sizes are documented for {start}")
    row = re.compile(r"^    (\w+) +(\d+) files, +([\d ]+) bytes$", re.M)
    got = {split: [len(library[split]), len(python_source.load(split))] for split in SPLITS}
    for split, *numbers in row.findall(python_source.__doc__):
        assert got.pop(split) == [int(number.replace(" ", "")) for number in numbers]
    assert not got


def test_another_process_reads_the_same():
    program = "from blogjax.data import python_source as p; print(p.fingerprint())"
    environment = os.environ | {"PYTHONHASHSEED": "123", "LC_ALL": "C"}
    shown = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == python_source.fingerprint()


@given(st.binary(min_size=1, max_size=60), st.data())
def test_windows_are_pieces_of_the_corpus(content, data):
    length = data.draw(st.integers(1, len(content)))
    stride = data.draw(st.none() | st.integers(1, 70))
    corpus = np.frombuffer(content, np.uint8)
    got = python_source.windows(corpus, length, stride)
    step = length if stride is None else stride
    expected = []
    start = 0
    while start + length <= len(content):
        expected.append(list(content[start : start + length]))
        start += step
    assert got.tolist() == expected
    assert got.dtype == np.uint8 and np.shares_memory(got, corpus)


def test_each_byte_is_a_target_once():
    corpus = np.arange(1000, dtype=np.uint16)
    rows = python_source.windows(corpus, 64 + 1, stride=64)
    inputs, targets = rows[:, :-1], rows[:, 1:]
    np.testing.assert_array_equal(inputs + 1, targets)
    np.testing.assert_array_equal(targets.ravel(), np.arange(1, 1 + len(rows) * 64))
    assert len(rows) == 15


def test_windows_cost_no_memory_and_feed_batches():
    corpus = np.arange(10**6, dtype=np.uint32).astype(np.uint8)
    tracemalloc.start()
    rows = python_source.windows(corpus, 513, stride=1)
    batches = Batches({"tokens": rows}, 4, seed=0)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows.shape == (10**6 - 512, 513)
    assert held < 100_000
    assert not rows.flags.writeable
    tokens = batches(3)["tokens"]
    assert tokens.shape == (4, 513) and tokens.dtype == np.uint8
    order = np.random.default_rng([0, 0]).permutation(len(rows))[12:16]
    for row, start in zip(tokens, order, strict=True):
        np.testing.assert_array_equal(row, corpus[start : start + 513])


WRONG = [
    ((np.zeros((4, 2), np.uint8), 2), r"\(4, 2\).*\[m\]"),
    ((np.zeros(9, np.uint8), 0), "length 0 and stride 0"),
    ((np.zeros(9, np.uint8), -1, 2), "length -1 and stride 2"),
    ((np.zeros(9, np.uint8), 3, 0), "length 3 and stride 0"),
    ((np.zeros(9, np.uint8), 3, -1), "length 3 and stride -1"),
    ((np.zeros(9, np.uint8), 10), "9 bytes.*length 10"),
    ((np.zeros(0, np.uint8), 1), "0 bytes.*length 1"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[m for _, m in WRONG])
def test_windows_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        python_source.windows(*arguments)
