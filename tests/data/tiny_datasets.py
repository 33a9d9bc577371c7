"""Small TFDS data sets, made on the spot. Import it once: TFDS refuses two builders of one name."""

import numpy as np
import tensorflow_datasets as tfds

SIZES = {"train": 60, "test": 20}


def arrays(split):
    """What a split of `TinyImages` holds, in the order of its `number`."""
    rng = np.random.default_rng([7, len(split)])
    n = SIZES[split]
    image = rng.integers(0, 256, size=(n, 8, 8, 3), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, 5, size=n), "number": np.arange(n)}


class _Generated(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Examples from the method `examples`, the same for each split but for their number."""

    VERSION = tfds.core.Version("1.0.0")
    FEATURES = None

    def _info(self):
        features = tfds.features.FeaturesDict(self.features())
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, dl_manager) for split in SIZES}

    def _generate_examples(self, split, dl_manager):
        yield from enumerate(self.examples(split))


class TinyImages(_Generated):
    """Images stored as a tensor, or as PNG."""

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("tensor", "png")]
    prepared = 0

    def features(self):
        png = self.builder_config.name == "png"
        image = tfds.features.Image if png else tfds.features.Tensor
        return {
            "image": image(shape=(8, 8, 3), dtype=np.uint8),
            "label": tfds.features.ClassLabel(num_classes=5),
            "number": np.int64,
        }

    def _split_generators(self, dl_manager):
        type(self).prepared += 1
        return super()._split_generators(dl_manager)

    def examples(self, split):
        import PIL.Image

        for image, label, number in zip(*arrays(split).values(), strict=True):
            if self.builder_config.name == "png":
                image = PIL.Image.fromarray(image)
            yield {"image": image, "label": int(label), "number": number}


class TinyRagged(_Generated):
    """Nothing here has the same shape in all examples, but for one class and one picture."""

    def features(self):
        return {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "boxes": tfds.features.Sequence(tfds.features.BBoxFeature()),
            "words": tfds.features.Text(),
            "nested": {"a": np.float32, "b": tfds.features.Tensor(shape=(2,), dtype=np.int16)},
            "flag": np.bool_,
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
            "alike": tfds.features.Image(shape=(None, None, 1)),
        }

    def examples(self, split):
        import PIL.Image

        for i in range(SIZES[split]):
            yield {
                "image": PIL.Image.fromarray(np.full((3 + i % 2, 5, 3), i, np.uint8)),
                "boxes": [tfds.features.BBox(0.0, 0.0, 0.5, 1.0)] * (i % 3),
                "words": "w" * i,
                "nested": {"a": i / 2, "b": [i, -i]},
                "flag": i % 2 == 1,
                "label": "yes" if i % 2 else "no",
                "alike": PIL.Image.fromarray(np.full((4, 4), i, np.uint8)),
            }


class TinyDownload(_Generated):
    """One number per byte of the files that are downloaded; tests set `urls` and `url_infos`."""

    urls = ("http://data.invalid/numbers.bin",)
    url_infos = None

    def features(self):
        return {"image": tfds.features.Tensor(shape=(1,), dtype=np.uint8), "label": np.int32}

    def _generate_examples(self, split, dl_manager):
        files = dl_manager.download(list(self.urls))
        for i, byte in enumerate(b"".join(file.read_bytes() for file in files)):
            yield i, {"image": [byte], "label": i}


class TinyByHand(_Generated):
    """One number per byte of a file that the user has to fetch."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Register at the lab of numbers.
    Put numbers.bin into the folder.
    """

    def features(self):
        return {"label": np.int32}

    def _generate_examples(self, split, dl_manager):
        for i, byte in enumerate((dl_manager.manual_dir / "numbers.bin").read_bytes()):
            yield i, {"label": byte}


class TinyTensorflow(_Generated):
    """Calls of TensorFlow what most builders call, and with the second config what few do."""

    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("files", "strings")]

    def features(self):
        from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf

        return {
            "image": tfds.features.Image(shape=(8, 8, 3)),
            "grey": tfds.features.Image(shape=(8, 8, 1)),
            "label": tf.int32,
            "name": tf.string,
        }

    def examples(self, split):
        from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow as tf

        if self.builder_config.name == "strings":
            tf.strings.upper("a")
        folder = self.data_path.parent / "files"
        tf.io.gfile.makedirs(folder)
        for i, image in enumerate(arrays(split)["image"]):
            path = folder / f"{split}{i}"
            with tf.io.gfile.GFile(path, "wb") as file:
                file.write(image.tobytes())
            with tf.io.gfile.GFile(path, "rb") as file:
                image = np.frombuffer(file.read(), np.uint8).reshape(8, 8, 3)
            assert tf.io.gfile.exists(path) and path.name in tf.io.gfile.listdir(folder)
            name = tf.compat.as_text(str(i).encode())
            yield {"image": image, "grey": image[..., :1], "label": i, "name": name}
