import json

from blogjax.train.reporting import keep_until


def test_cut_back_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [("train", 1), ("train", 2), ("evaluate", 2), ("train", 3), ("evaluate", 1)]
    lines = [json.dumps({"kind": kind, "step": step}) + "\n" for kind, step in records]
    path.write_text("".join(lines) + '{"kind": "train", "st')
    keep_until(path, 2)
    kept = [tuple(json.loads(line).values()) for line in path.read_text().splitlines()]
    assert kept == [("train", 1), ("train", 2), ("evaluate", 1)]
