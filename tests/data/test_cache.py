import threading
import time

import pytest

from blogjax.data import cache


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"BLOGJAX_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own/a/b"),
        ({"BLOGJAX_CACHE": "", "XDG_CACHE_HOME": "xdg"}, "xdg/blogjax/a/b"),
        ({"XDG_CACHE_HOME": ""}, "home/.cache/blogjax/a/b"),
        ({}, "home/.cache/blogjax/a/b"),
    ],
)
def test_the_cache_is_where_the_variables_say(tmp_path, monkeypatch, variables, expected):
    for name in ("BLOGJAX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, value in variables.items():
        monkeypatch.setenv(name, value and str(tmp_path / value))
    folder = cache.cache_dir("a", "b")
    assert folder == tmp_path / expected
    assert folder.is_dir()


@pytest.mark.parametrize("parts", [("..",), ("a", "../../b"), ("/elsewhere",)])
def test_parts_cannot_lead_out_of_the_cache(tmp_path, monkeypatch, parts):
    monkeypatch.setenv("BLOGJAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="lead out of the cache"):
        cache.cache_dir(*parts)


def test_a_lock_is_held_by_one_at_a_time(tmp_path):
    inside, most = [], []

    def hold():
        with cache.locked(tmp_path / "lock"):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)
            inside.pop()

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), cache.locked(tmp_path / "lock"):
        raise KeyError
    with cache.locked(tmp_path / "lock"):
        pass
