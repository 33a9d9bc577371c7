"""A dataset of CelebA's name and shape, made where it is asked for."""

import pathlib

import numpy as np

SIZES = {"train": 20, "validation": 8, "test": 13}
SHAPE = (218, 178, 3)


def attribute_names() -> tuple[str, ...]:
    """The forty of TFDS."""
    from tensorflow_datasets.datasets.celeb_a import celeb_a_dataset_builder

    return tuple(celeb_a_dataset_builder.ATTR_HEADINGS)


def labels(split: str) -> np.ndarray:
    """Bool `[n, 40]`, in the order of `attribute_names`."""
    return np.random.default_rng([5, len(split)]).random((SIZES[split], 40)) < 0.3


def prepare(root: pathlib.Path) -> pathlib.Path:
    """Writes it as TFDS would; the images are of one colour each, brighter from one to the next."""
    import PIL.Image
    import tensorflow_datasets as tfds

    class CelebA(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("2.1.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=SHAPE, encoding_format="jpeg"),
                "landmarks": {"nose_x": np.int64},
                "attributes": {name: np.bool_ for name in attribute_names()},
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in SIZES}

        def _generate_examples(self, split):
            for i, row in enumerate(labels(split)):
                yield (
                    i,
                    {
                        "image": PIL.Image.fromarray(np.full(SHAPE, 10 * i, np.uint8)),
                        "landmarks": {"nose_x": i},
                        "attributes": dict(zip(attribute_names(), map(bool, row), strict=True)),
                    },
                )

    tfds.disable_progress_bar()
    CelebA(data_dir=str(root), file_format="array_record").download_and_prepare()
    return root
