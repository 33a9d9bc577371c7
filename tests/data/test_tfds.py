import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorflow_datasets
import tiny_datasets

from blogjax.data import batches, streaming, tfds, tfds_prepare
from blogjax.tasks.gradient import LossOutput, gradient_task
from blogjax.train.loop import fit

ALL = ("image", "label", "number")
PNG = "tiny_images/png"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("tiny_images", PNG, "tiny_ragged"):
        tfds.prepare(name, folder)
    return folder


@pytest.fixture(autouse=True)
def default_folder(root, monkeypatch):
    """Most tests leave data_dir out."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))


@pytest.fixture
def copied(root, tmp_path, monkeypatch):
    shutil.copytree(root, tmp_path / "copy")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "copy"))
    return tmp_path / "copy"


@pytest.mark.parametrize("name", ["tiny_images", "tiny_images/tensor:1.0.0", PNG])
@pytest.mark.parametrize("split", ["train", "test"])
def test_everything_is_loaded_as_it_was_written(name, split):
    loaded = tfds.load(name, split, features=ALL)
    assert {k: (v.shape[1:], str(v.dtype)) for k, v in loaded.items()} == {
        "image": ((8, 8, 3), "uint8"), "label": ((), "int32"), "number": ((), "int64")
    }  # fmt: skip
    number = loaded["number"]
    assert sorted(number) == list(range(tiny_datasets.SIZES[split]))
    assert list(number) != sorted(number)  # TFDS shuffles what it writes
    for feature, array in tiny_datasets.arrays(split).items():
        np.testing.assert_array_equal(loaded[feature], array[number])


def test_the_order_and_the_slices_are_those_of_tfds(root):
    for split in ("train", "train[:90%]", "train[10:20]", "test[5:]+train[-3:]", "all"):
        theirs = tensorflow_datasets.data_source("tiny_images", split=split, data_dir=root)
        ours = tfds.source("tiny_images", split)
        assert [x["number"] for x in ours] == [x["number"] for x in theirs]
        assert len(ours) == len(theirs) == tfds.describe("tiny_images", split).num_examples
    assert list(tfds.load("tiny_images", "train[:50%]")) == ["image", "label"]
    assert len(tfds.source("tiny_images", "train[:90%]")) == 54


def test_a_source_reads_by_number():
    whole = tfds.load("tiny_images", "test", features=ALL)
    source = tfds.source("tiny_images", "test", features=["number", "image"])
    assert len(source) == 20 and list(source[3]) == ["number", "image"]
    many = source.__getitems__(np.array([7, 3, 7]))
    assert [int(example["number"]) for example in many] == list(whole["number"][[7, 3, 7]])
    np.testing.assert_array_equal(source[19]["image"], whole["image"][19])
    for index in (-1, 20):
        with pytest.raises(IndexError, match=f"{index}.*20"):
            source[index]


def test_features_that_are_no_tensor_are_left_as_tfds_makes_them():
    example = next(x for x in tfds.source("tiny_ragged", "test") if len(x["words"]) == 2)
    assert example["words"] == b"ww"
    assert example["nested"]["a"] == 1 and example["nested"]["b"].tolist() == [2, -2]
    np.testing.assert_array_equal(example["boxes"], np.array([[0, 0, 0.5, 1]] * 2, np.float32))
    assert example["label"].dtype == np.int32 and example["flag"].dtype == np.bool_
    assert example["alike"].shape == (4, 4, 1) and (example["alike"] == 2).all()


VARYING = [
    ("image", r"'image' varies: uint8\[\d, 5, 3\] in example 0, uint8\[\d, 5, 3\] in example"),
    ("boxes", r"'boxes' varies: float32\[.*\] in example 0, float32\[.*, 4\] in example"),
    ("words", "'words' of example 0 .*bytes"),
    ("nested", "'nested' of example 0 .*dict"),
]


@pytest.mark.parametrize(("feature", "message"), VARYING)
def test_features_that_vary_are_named_unless_a_transform_makes_them_alike(feature, message):
    with pytest.raises(ValueError, match=message):
        tfds.load("tiny_ragged", "train", features=["label", feature])
    with pytest.raises(ValueError, match=message):
        tfds.batches("tiny_ragged", "train", 60, seed=0, features=[feature], in_memory=False)(0)

    def count(example):
        return {"size": np.int64(len(example[feature])), "label": example["label"]}

    got = tfds.load("tiny_ragged", "train", features=["label", feature], transform=count)
    sizes = {
        "image": [3, 4] * 30, "boxes": [0, 1, 2] * 20, "words": range(60), "nested": [2] * 60
    }  # fmt: skip
    assert sorted(got["size"]) == sorted(sizes[feature]) and got["label"].sum() == 30
    streamed = tfds.batches(
        "tiny_ragged", "train", 60, seed=0, features=[feature, "label"], transform=count,
        in_memory=False,
    )  # fmt: skip
    assert sorted(streamed(0)["size"]) == sorted(sizes[feature])


def test_what_a_transform_raises_is_raised_with_the_example():
    with pytest.raises(ZeroDivisionError) as caught:
        tfds.load("tiny_images", "test", transform=lambda example: 1 / 0)
    assert any("example 0 of tiny_images/tensor:1.0.0" in n for n in caught.value.__notes__)
    source = tfds.source("tiny_images", "test", transform=lambda example: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        source[7]
    assert any("example 7 of" in note for note in caught.value.__notes__)


def test_features_that_are_alike_without_saying_so_are_loaded():
    assert tfds.describe("tiny_ragged", "train").shapes["alike"] == (None, None, 1)
    loaded = tfds.load("tiny_ragged", "train", features=["alike", "flag"])
    assert loaded["alike"].shape == (60, 4, 4, 1) and loaded["flag"].dtype == bool


def test_descriptions(root):
    said = tfds.describe(PNG, "train[:25%]")
    assert said == tfds.Description(
        name="tiny_images/png:1.0.0", split="train[:25%]", num_examples=15,
        splits={"train": 60, "test": 20},
        shapes={"image": (8, 8, 3), "label": (), "number": ()},
        dtypes={k: np.dtype(v) for k, v in zip(ALL, ("uint8", "int32", "int64"), strict=True)},
        num_classes={"label": 5}, folder=root / "tiny_images" / "png" / "1.0.0",
    )  # fmt: skip
    ragged = tfds.describe("tiny_ragged", "test")
    assert ragged.shapes["boxes"] == (None, 4) and ragged.shapes["nested/b"] == (2,)
    assert ragged.dtypes["nested/b"] == np.int16 and ragged.dtypes["words"].kind == "O"
    assert ragged.num_classes == {"label": 2}


@pytest.mark.parametrize("name", ["tiny_images", PNG])
@pytest.mark.parametrize("place", [(0, 1), (1, 2)])
def test_batches_from_memory_and_streamed_are_the_same(name, place):
    where = dict(process_index=place[0], process_count=place[1])
    loaded = tfds.load(name, "train[:75%]", features=ALL)
    expected = batches.Batches(loaded, 14, seed=3, **where)
    test = batches.EvaluationBatches(tfds.load(name, "test"), 6, *place)
    for in_memory, kinds in [
        (True, (batches.Batches, batches.EvaluationBatches)),
        (False, (streaming.StreamedBatches, streaming.StreamedEvaluationBatches)),
    ]:
        got = tfds.batches(
            name, "train[:75%]", 14, seed=3, features=ALL, in_memory=in_memory, **where,
            threads=2, ahead=3,
        )  # fmt: skip
        evaluation = tfds.evaluation_batches(name, "test", 6, in_memory=in_memory, **where)
        assert (type(got), type(evaluation)) == kinds
        assert len(evaluation) == 4 and got.batch_size == 14
        pairs = [(got(step), expected(step)) for step in (0, 1, 2, 9, 3, 10**9)]
        pairs += [(evaluation(i), test(i)) for i in (0, 1, 2, 3, 0)]
        for ours, theirs in pairs:
            assert list(ours) == list(theirs)
            for feature, array in theirs.items():
                assert ours[feature].dtype == array.dtype
                np.testing.assert_array_equal(ours[feature], array)


def test_memory_is_used_up_to_the_bytes_it_takes():
    size = 60 * (8 * 8 * 3 + 4)
    for kind, max_bytes in [(batches.Batches, size), (streaming.StreamedBatches, size - 1)]:
        got = tfds.batches("tiny_images", "train", 4, seed=0, max_bytes=max_bytes)
        assert type(got) is kind
    for kind, max_bytes in [
        (batches.EvaluationBatches, size // 3), (streaming.StreamedEvaluationBatches, size // 3 - 1)
    ]:  # fmt: skip
        got = tfds.evaluation_batches("tiny_images", "test", 4, max_bytes=max_bytes)
        assert type(got) is kind


def _loss(params, model_state, batch, key):
    x = batch["image"].reshape(len(batch["label"]), -1).astype(jnp.float32) / 255
    return LossOutput(
        optax.softmax_cross_entropy_with_integer_labels(x @ params["w"], batch["label"])
    )


def _train(workdir, steps, name, in_memory):
    task = gradient_task(
        lambda key: {"params": {"w": 0.1 * jax.random.normal(key, (192, 5))}}, _loss,
        optax.adam(0.01), evaluate=lambda *arguments: {"loss": _loss(*arguments).loss},
    )  # fmt: skip
    state = fit(
        task, tfds.batches(name, "train", 16, seed=5, in_memory=in_memory), steps,
        evaluation=tfds.evaluation_batches(name, "test", 8, in_memory=in_memory),
        evaluate_every=3, save_every=3, workdir=workdir,
    )  # fmt: skip
    return np.asarray(state.params["w"]), (workdir / "metrics.jsonl").read_bytes()


@pytest.mark.slow  # seconds of compiling
def test_training_from_memory_and_streamed_is_the_same_to_the_bit(tmp_path):
    weights, metrics = _train(tmp_path / "memory", 10, "tiny_images", True)  # 2.7 epochs
    assert len(metrics.splitlines()) > 10
    streamed = _train(tmp_path / "streamed", 10, PNG, False)
    np.testing.assert_array_equal(streamed[0], weights)
    assert streamed[1] == metrics
    losses = [json.loads(line).get("loss") for line in metrics.splitlines()]
    assert len({loss for loss in losses if loss is not None}) > 5
    # In the middle of the second epoch, from one way to the other and back.
    _train(tmp_path / "resumed", 5, PNG, False)
    _train(tmp_path / "resumed", 7, "tiny_images", True)
    resumed = _train(tmp_path / "resumed", 10, PNG, False)
    np.testing.assert_array_equal(resumed[0], weights)


def test_unknown_splits_and_features_are_refused_with_those_there_are():
    for split in ("valid", "train[:0]", "train[100:]", "train[:9", ""):
        with pytest.raises(ValueError, match=r"tiny_images.*train \(60\), test \(20\)") as caught:
            tfds.source("tiny_images", split)
        assert repr(split) in str(caught.value)
    with pytest.raises(ValueError, match=r"incompatible with 60"):
        tfds.load("tiny_images", "train[100:]")
    with pytest.raises(ValueError, match=r"\['picture'\].*image, label, number"):
        tfds.load("tiny_images", "train", features=["label", "picture"])
    with pytest.raises(ValueError, match="image, label, number"):
        tfds.source("tiny_images", "train", features=[])


def _record_file(folder, split="train"):
    return next((folder / "tiny_images" / "tensor" / "1.0.0").glob(f"*-{split}.*"))


def test_a_damaged_record_is_told_with_its_number_and_folder(copied):
    file, content = _record_file(copied), None
    content = bytearray(file.read_bytes())
    image = tfds.source("tiny_images", "train")[41]["image"]
    # The record holds the pixels as they are, in the bytes of a protocol buffer's numbers.
    digest = b"".join(bytes([v]) if v < 128 else bytes([v & 127 | 128, v >> 7]) for v in image.flat)
    content[content.index(digest[:60])] ^= 1
    file.write_bytes(content)
    source = tfds.source("tiny_images", "train")
    message = "example 41 of tiny_images/tensor:1.0.0 .train. in .*copy/tiny_images/tensor/1.0.0 "
    with pytest.raises(tfds.DatasetUnavailableError, match=message):
        source[41]
    with pytest.raises(tfds.DatasetUnavailableError, match=message):
        tfds.load("tiny_images", "train")
    streamed = tfds.evaluation_batches("tiny_images", "train", 20, in_memory=False)
    with pytest.raises(tfds.DatasetUnavailableError, match=message):
        streamed(2)
    assert streamed(1)["weight"].all()


def test_a_missing_file_is_named(copied):
    file = _record_file(copied)
    file.unlink()
    with pytest.raises(tfds.DatasetUnavailableError, match=f"{file.name} is missing"):
        tfds.source("tiny_images", "train[:5]")
    assert len(tfds.source("tiny_images", "test")) == 20


def _forget(monkeypatch, name):
    registry = tensorflow_datasets.core.registered._DATASET_REGISTRY
    monkeypatch.delitem(registry, name)


def test_what_was_prepared_elsewhere_is_read_without_its_builder(copied, monkeypatch):
    expected = {name: tfds.load(name, "train", features=ALL) for name in ("tiny_images", PNG)}
    _forget(monkeypatch, "tiny_images")
    for name in ("tiny_images", "tiny_images/tensor", "tiny_images/tensor:1.0.0", PNG):
        loaded = tfds.load(name, "train", features=ALL)
        for feature, array in expected[PNG if name == PNG else "tiny_images"].items():
            assert loaded[feature].dtype == array.dtype
            np.testing.assert_array_equal(loaded[feature], array)
    assert tfds.prepare("tiny_images", copied) == copied / "tiny_images" / "tensor" / "1.0.0"
    shutil.rmtree(copied / "tiny_images" / ".config")  # only the folder of a version was copied
    half_written = copied / "tiny_images" / "incomplete.ABCDEF_1.0.0"
    half_written.mkdir()
    (half_written / "dataset_info.json").write_text("{}")
    there = "tiny_images/png:1.0.0, tiny_images/tensor:1.0.0$"
    for name in ("tiny_images", "tiny_images/jpeg", "tiny_images/png:2.0.0"):
        with pytest.raises(ValueError, match=f"no {name} in .*; it holds {there}"):
            tfds.load(name, "train")
    assert len(tfds.source(PNG, "test")) == 20
    with pytest.raises(ValueError, match=r"near names: .*tiny_images"):
        tfds.load("tiny_image", "train")


def test_a_builder_that_needs_a_package_is_not_needed_to_read(copied, monkeypatch):
    def features(self):
        raise ImportError("no package of that kind")

    monkeypatch.setattr(tiny_datasets.TinyRagged, "features", features)
    assert len(tfds.source("tiny_ragged", "test")) == 20
    shutil.rmtree(copied / "tiny_ragged")
    with pytest.raises(
        tfds.DatasetUnavailableError, match=r"no package of that kind.*\n.*pip inst"
    ):
        tfds.source("tiny_ragged", "test")


def test_the_default_of_tfds_is_refused_with_what_to_do(copied):
    folder = copied / "tiny_images" / "tensor" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    with pytest.raises(tfds.DatasetUnavailableError) as caught:
        tfds.load("tiny_images", "train")
    said = str(caught.value)
    assert str(folder) in said and "stored as tfrecord" in said
    assert "download_and_prepare(file_format='array_record', download_dir=" in said


def test_where_the_data_lies(root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = tfds_prepare.root_folder(tmp_path / "given")
    assert given == tfds_prepare.root_folder("~/given") == tmp_path / "given"
    assert tfds_prepare.root_folder(None) == root
    for value in ("", None):
        monkeypatch.setenv("TFDS_DATA_DIR", "") if value == "" else monkeypatch.delenv(
            "TFDS_DATA_DIR"
        )
        assert tfds_prepare.root_folder(None) == tmp_path / "tensorflow_datasets"
    with pytest.raises(ValueError, match=r"gs://bucket/data.*mount or copy"):
        tfds.load("tiny_images", "train", "gs://bucket/data")
