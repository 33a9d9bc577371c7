import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from blogjax.data import digits
from blogjax.metrics import frechet, neighbours

SIZES = {"train": 1287, "validation": 150, "test": 360}

CHILD = """
import hashlib, json, sys
from blogjax.data import digits
loaded = [digits.load(s) for s in ("train", "validation", "test")]
data = b"".join(d["image"].tobytes() + d["label"].tobytes() for d in loaded)
print(json.dumps({
    "digest": hashlib.sha256(data).hexdigest(),
    "imported": [m for m in ("tensorflow", "jax", "sklearn") if m in sys.modules],
}))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A root prepared by two processes that start at once, and what they said."""
    folder = tmp_path_factory.mktemp("fresh")
    environment = os.environ | {"BLOGJAX_CACHE": str(folder)}
    command = [sys.executable, "-W", "error", "-c", CHILD]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    children = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    return folder / "datasets", said


@pytest.fixture(scope="module")
def prepared(root):
    return root[0]


@pytest.fixture(scope="module")
def loaded(prepared):
    return {split: digits.load(split, prepared) for split in SIZES}


@pytest.fixture
def copied(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    return tmp_path / "copy"


def _digest(loaded):
    data = b"".join(d["image"].tobytes() + d["label"].tobytes() for d in loaded.values())
    return hashlib.sha256(data).hexdigest()


@pytest.mark.slow  # seconds of compiling
def test_two_processes_prepare_one_folder_at_once_and_say_nothing(root, loaded):
    folder, said = root
    for out, err in said:
        assert err == ""
        answer = json.loads(out)  # one line of JSON: nothing else was printed
        assert answer["digest"] == _digest(loaded)
        assert "tensorflow" not in answer["imported"] and "jax" not in answer["imported"]
    assert sorted(p.name for p in folder.iterdir()) == [".digits8.lock", "digits8"]


def test_shapes_types_and_range(loaded):
    for split, size in SIZES.items():
        image, label = loaded[split]["image"], loaded[split]["label"]
        assert image.shape == (size, 8, 8, 1) and image.dtype == np.float32
        assert label.shape == (size,) and label.dtype == np.int32
        assert image.min() == -1 and image.max() == 1
        assert set(label) == set(range(10))


def test_the_splits_together_are_the_data(loaded):
    source = load_digits()

    def rows(images, labels):
        return sorted((*map(int, i.ravel()), int(l)) for i, l in zip(images, labels, strict=True))

    got = []
    for arrays in loaded.values():
        got += rows((arrays["image"] + 1) * 8, arrays["label"])
    # No two of the source's rows are equal, so that equal multisets also mean disjoint splits.
    expected = rows(source["images"], source["target"])
    assert len(set(expected)) == 1797
    assert sorted(got) == expected


def test_every_class_keeps_its_share_and_classes_are_mixed(loaded):
    of_class = np.bincount(load_digits()["target"])
    for split, size in SIZES.items():
        label = loaded[split]["label"]
        assert np.abs(np.bincount(label) - of_class * size / 1797).max() < 1.5
        assert np.mean(label[1:] == label[:-1]) < 0.2


def test_the_content_is_the_same_on_every_machine(loaded):
    assert _digest(loaded).startswith("a05c528eb3690106")


def test_splits_differ_by_no_more_than_chance(loaded):
    # Beforehand, on other stratified cuts of 360: 0.36 to 0.44, and 2.05 to 2.11.
    train, test = loaded["train"]["image"], loaded["test"]["image"]
    assert frechet.frechet_distance_from_samples(train, test) == pytest.approx(0.407, abs=5e-4)
    assert np.median(neighbours.nearest_distances(test, train)) == pytest.approx(2.08, abs=5e-3)
    ordered = load_digits()["images"] / 8 - 1
    assert frechet.frechet_distance_from_samples(ordered[:-360], ordered[-360:]) > 1


def test_prepared_data_is_read_without_scikit_learn_and_without_writing(
    prepared, loaded, monkeypatch, capfd
):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(digits, "_write", None)
    before = {p: p.stat().st_mtime_ns for p in prepared.rglob("*")}
    assert digits.prepare(prepared) == prepared / "digits8" / "1.0.0"
    np.testing.assert_array_equal(digits.load("test", prepared)["image"], loaded["test"]["image"])
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob("*")} == before
    assert capfd.readouterr() == ("", "")


def test_a_read_only_folder_is_enough(copied, loaded, monkeypatch):
    def refuse(path):
        raise PermissionError(path)

    monkeypatch.setattr(digits.cache, "locked", refuse)
    assert digits.prepare(copied).is_dir()
    np.testing.assert_array_equal(digits.load("test", copied)["label"], loaded["test"]["label"])


def _flip_a_byte(file):
    """One in the records: they compress well, so that most of the file is padding nobody reads."""
    content = bytearray(file.read_bytes())
    content[65536 + 2000] ^= 1
    file.write_bytes(content)


def _swap_two_splits(folder):
    train, test = (next(folder.glob(f"*{split}.array_record*")) for split in ("train", "test"))
    train_bytes = train.read_bytes()
    train.write_bytes(test.read_bytes())
    test.write_bytes(train_bytes)


def _forget_the_digests(folder):
    (folder / "metadata.json").write_text("{}")


def _of_split(damage, split="train"):
    return lambda folder: damage(next(folder.glob(f"*-{split}.array_record*")))


DAMAGES = {
    "flipped byte": _of_split(_flip_a_byte),
    "truncated": _of_split(lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])),
    "missing split": _of_split(lambda f: f.unlink(), "validation"),
    "swapped splits": _swap_two_splits,
    "half written": lambda folder: (folder / "dataset_info.json").unlink(),
    "no digests": _forget_the_digests,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found(copied, damage):
    assert digits._is_whole(copied)
    damage(copied / "digits8" / "1.0.0")
    assert not digits._is_whole(copied)


def test_records_of_another_preparation_are_found(copied, tmp_path, monkeypatch):
    # Sound files, the right numbers of examples, every pixel in range: the digest alone can tell.
    arrays = digits._source_arrays()
    arrays["train"] = tuple(array[::-1] for array in arrays["train"])
    monkeypatch.setattr(digits, "_source_arrays", lambda: arrays)
    other = digits.prepare(tmp_path / "other")
    for file in other.glob("*-train.array_record*"):
        shutil.copy(file, copied / "digits8" / "1.0.0")
    assert digits._read(copied, "train") is None
    assert digits._read(copied, "test") is not None


def test_damage_is_repaired_in_one_line(copied, loaded, capfd):
    folder = copied / "digits8" / "1.0.0"
    DAMAGES["half written"](folder)
    (copied / ".digits8-of-a-killed-process").mkdir()
    got = digits.load("train", copied)
    np.testing.assert_array_equal(got["image"], loaded["train"]["image"])
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"blogjax: {folder} is damaged; preparing it anew\n"
    assert digits.prepare(copied) == folder
    assert sorted(p.name for p in copied.iterdir()) == [".digits8.lock", "digits8"]


def test_a_failed_preparation_leaves_nothing_that_looks_prepared(tmp_path, monkeypatch):
    def fail(root):
        (root / "digits8" / "1.0.0").mkdir(parents=True)
        raise OSError("disk full")

    monkeypatch.setattr(digits, "_write", fail)
    with pytest.raises(OSError, match="disk full"):
        digits.prepare(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".digits8.lock"]


def test_unknown_splits_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'valid'.*train, validation, test"):
        digits.load("valid", tmp_path)
    assert not any(tmp_path.iterdir())


def test_tfds_finds_the_data_by_name(prepared):
    import tensorflow_datasets as tfds

    assert digits.builder(prepared).info.splits["validation"].num_examples == 150
    source = tfds.data_source("digits8", split="test[:10]", data_dir=prepared)
    assert len(source) == 10 and source[0]["image"].dtype == np.uint8


@pytest.mark.parametrize("package", ["tensorflow_datasets", "sklearn"])
def test_a_missing_package_is_named_with_its_remedy(
    tmp_path, prepared, monkeypatch, capfd, package
):
    digits._builder_class.cache_clear()
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    try:
        with pytest.raises(ImportError, match=r"pip install blogjax\[train\]"):
            digits.load("train", tmp_path)
        if package == "tensorflow_datasets":
            with pytest.raises(ImportError, match=r"pip install blogjax\[train\]"):
                digits.load("train", prepared)
            assert capfd.readouterr().err == ""  # it is no damage, either
    finally:
        digits._builder_class.cache_clear()
    assert not [p.name for p in tmp_path.iterdir() if p.name != ".digits8.lock"]
