"""What two real processes tell each other."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest


@pytest.mark.slow  # two interpreters
def test_both_hear_what_the_first_one_says(tmp_path):
    here = pathlib.Path(__file__).parent
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "JAX_"))}
    processes = [
        subprocess.Popen(
            [sys.executable, here / "told_by_the_first.py", address, str(i), tmp_path / "x"],
            cwd=here.parents[1], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**environment, "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(here.parents[1])},
        )
        for i in range(2)
    ]  # fmt: skip
    outputs = [p.communicate(timeout=120) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    # The last line: those before it are of the library that connects the two.
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert first.pop("first") and not second.pop("first")
    # Each reads its own parts of the one file that the first one wrote.
    assert first.pop("own_parts") == [[0, 1], [2, 3]]
    assert second.pop("own_parts") == [[4, 5], [6, 7]]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoints", "damaged_checkpoints", "x"
    ]  # fmt: skip
    for said in (first, second):
        assert said["restored"]["sound"] == [[2, True], [2, True]]
        assert said["restored"]["whole"] == [1, True]
    # None takes a part, and the one that has read the damage says what it is.
    for said, mine in ((first, False), (second, True)):
        told = said.pop("restored")["part"]
        assert told.startswith("another process") != mine and told.endswith("others: [1]")
    assert second == {
        "value": {"index": 0, "text": "x" * 5000},
        "nothing": None,
        "error": ["ValueError", "two sides"],
        "told": ["OtherProcessError", "TwoPartsError: a b"],
        "any": [True, False, True],
        "addressable": False,
        "parts": [0, 1, 2, 3, 4, 5, 6, 7],
    }
    # The first one has the error itself.
    assert first.pop("told") == ["TwoPartsError", "a b"]
    second.pop("told")
    assert first == second
