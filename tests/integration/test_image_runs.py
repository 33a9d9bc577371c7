"""Files of samples and folders of seeds, as all experiments on images have them."""

import numpy as np
import pytest

from experiments.images.samples import in_files
from experiments.images.seeds import by_seed, copy_pictures


def test_samples_are_kept_in_files_and_read_back(tmp_path):
    asked = []

    def draw(first):
        asked.append(first)
        return np.full((2, 1, 1, 1), [-1.0, 1.2, 0.0][first // 2])

    pixels = in_files(tmp_path / "samples", 6, (0, 2, 4), draw)
    assert pixels.dtype == np.uint8 and pixels.shape == (6, 1, 1, 1)
    assert pixels.ravel().tolist() == [0, 0, 255, 255, 128, 128]
    (tmp_path / "samples" / "000002.npy").unlink()
    np.testing.assert_array_equal(in_files(tmp_path / "samples", 6, (0, 2, 4), draw), pixels)
    assert asked == [0, 2, 4, 2]
    with pytest.raises(ValueError, match="holds 6 samples where 7 were asked for"):
        in_files(tmp_path / "samples", 7, (0, 2, 4), draw)


def test_seeds_have_folders_and_are_measured_once(tmp_path):
    asked = []

    def measure(seed, folder):
        asked.append(seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "a.png").write_text(f"picture of {seed}")
        return {"value": 10 * seed}

    for _ in range(2):
        folders, measured = by_seed((2, 1), tmp_path, measure)
        assert measured == [{"value": 20}, {"value": 10}]
    assert asked == [2, 1]
    assert folders == {"seed 2": tmp_path / "seed2", "seed 1": tmp_path / "seed1"}
    copy_pictures(tmp_path, folders, ["a.png"])
    assert (tmp_path / "a.png").read_text() == "picture of 2"
    folders, _ = by_seed((3,), tmp_path / "alone", measure)
    assert folders == {"seed 3": tmp_path / "alone"}
    copy_pictures(tmp_path / "alone", folders, ["a.png"])
