import json
import math
import sys

import pytest

from blogjax.train import profiling
from blogjax.train.interrupt import Interrupted
from blogjax.train.loop import NonfiniteError
from experiments.launch import configs
from experiments.launch import main as launcher
from experiments.launch.result import Result, judge, print_claims

CONFIG = """
from ml_collections import ConfigDict

def get_config(variant="default"):
    if variant not in ("default", "smoke"):
        raise ValueError(f"unknown variant {variant!r}; there are default and smoke")
    return ConfigDict({
        "optim": ConfigDict({"learning_rate": 0.1, "nesterov": False}),
        "model": ConfigDict({"widths": (1, 2), "kind": "mlp"}),
        "train": ConfigDict({"steps": 3, "save_seconds": 5.0}),
        "mesh": ConfigDict({"fsdp": 1}),
        "data": ConfigDict({"serve": "auto", "dir": "", "name": "a"}),
    })
"""


def good_run(config, workdir):
    claim = judge("error is small", "a post", "error", [config.optim.learning_rate],
                  high=1.0, near=0.0)  # fmt: skip
    return Result(claims=[claim], seeds=[0], pictures=["a.png"])


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "_use_compilation_cache", lambda: None)
    monkeypatch.setattr(launcher.signal, "signal", lambda number, handler: None)

    def call(*arguments, run=good_run, base=("--config=config.py", "--workdir=w")):
        monkeypatch.setattr(sys, "argv", ["experiment", *base, *arguments])
        with pytest.raises(SystemExit) as info:
            launcher.main(run)
        out, err = capsys.readouterr()
        return info.value.code, out, err

    return call


def refuse(config, workdir):
    raise AssertionError("must not run")


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.optim.lerning_rate=1", ["optim.lerning_rate", "optim.learning_rate"]),
        ("--config.optm.learning_rate=1", ["optim.learning_rate"]),
        ("--config.learning_rate=1", ["optim.learning_rate"]),
        ("--config.optim=1", ["is a group", "optim.nesterov"]),
        ("--config.train.steps=1e3", ["train.steps", "type int", "'1e3'", "type float"]),
        ("--config.train.steps=many", ["train.steps", "type int", "type str"]),
        ("--config.optim.learning_rate=fast", ["type float", "'fast'", "type str"]),
        ("--config.optim.nesterov=2", ["type bool", "type int"]),
        ("--config.model.widths=(1,'a')", ["tuple of int", "tuple of int and str"]),
        ("--config.model.widths=(1.5,2)", ["tuple of int", "tuple of float and int"]),
        ("--noconfig.optim.learning_rate", ["booleans", "type float"]),
        ("--noconfig.foo", ["no config field foo"]),
        ("--nooverwrite=3", ["overwrite"]),
        ("--cofnig.optim.learning_rate=1", ["cofnig"]),
        ("--profile=10", ["START:STOP", "'10'"]),
        ("--profile=20:10", ["later STOP", "20:10"]),
        ("--profile=a:b", ["START:STOP", "'a:b'"]),
        ("train", ["what is train?"]),
    ],
)
def test_a_bad_flag_is_one_readable_complaint(launch, argument, expected):
    code, out, err = launch(argument, run=refuse)
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    assert len(err.splitlines()) <= 12
    for text in expected:
        assert text in err


def test_a_flag_and_its_value_may_be_two_words(launch):
    code, _, _ = launch(
        "--config.train.steps", "7", base=("--config", "config.py", "--workdir", "w")
    )
    assert code == 0


@pytest.mark.parametrize("text", ["def get_config(:", "x = 1", "def get_config(): return 1 / ''"])
def test_a_broken_config_file_is_one_line(launch, tmp_path, text):
    (tmp_path / "broken.py").write_text(text)
    code, _, err = launch(base=("--config=broken.py", "--workdir=w"), run=refuse)
    assert code == 2
    assert err.startswith("error: broken.py")


def test_help_lists_the_fields(launch):
    code, out, _ = launch("--help", run=refuse)
    assert code == 0
    assert "--config.optim.learning_rate=0.1" in out


def test_a_full_disk_is_one_line_with_the_way_on(launch):
    def run(config, workdir):
        raise OSError(28, "No space left on device", "w/metrics.jsonl")

    code, _, err = launch(run=run)
    assert code == 1
    assert "No space left" in err and "go on with" in err and "Traceback" not in err


def test_damaged_records_are_named(launch, tmp_path):
    launch()
    (tmp_path / "w" / "result.json").write_text("{")
    code, _, err = launch(run=refuse)
    assert code == 1
    assert "result.json is damaged; delete it" in err


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (("--config=nowhere.py", "--workdir=w"), "no config file nowhere.py"),
        (("--config=config.py:huge", "--workdir=w"), "there are default and smoke"),
        (("--workdir=w",), "--config=FILE is missing"),
        (("--config=config.py",), "--workdir=FOLDER is missing"),
    ],
)
def test_missing_pieces(launch, base, expected):
    code, _, err = launch(base=base, run=refuse)
    assert code == 2
    assert expected in err


def test_overrides_reach_the_run(launch):
    seen = {}

    def run(config, workdir):
        seen.update(configs.flatten(config.to_dict()))
        return good_run(config, workdir)

    code, _, _ = launch(
        "--config.optim.learning_rate=3", "--config.model.widths=(4,)", "--config.optim.nesterov",
        run=run,
    )  # fmt: skip
    assert code == 0
    assert seen["optim.learning_rate"] == 3.0
    assert seen["model.widths"] == (4,)
    assert seen["optim.nesterov"] is True


def test_a_profile_is_asked_for_around_the_run(launch):
    seen = []

    def run(config, workdir):
        seen.append(profiling.asked_for())
        return good_run(config, workdir)

    assert launch("--profile=3:5", run=run)[0] == 0
    assert launch("--overwrite", run=run)[0] == 0
    assert seen == [(3, 5), None]


def test_a_finished_run_is_told_and_not_run_again(launch, tmp_path):
    code, out, _ = launch()
    assert code == 0
    assert "holds" in out
    record = json.loads((tmp_path / "w" / "result.json").read_text())
    assert record["claims"][0]["verdict"] == "holds"
    assert record["claims"][0]["low"] is None  # JSON has no infinity
    assert record["config"]["model"]["widths"] == [1, 2]
    assert {"versions", "device", "seconds", "commit", "seeds", "command"} <= set(record)
    code, out, _ = launch(run=refuse)
    assert code == 0
    assert "finished" in out and "holds" in out and "to start afresh" in out


def test_a_run_leaves_a_page_to_read(launch, tmp_path, monkeypatch):
    page = tmp_path / "w" / "report.html"
    code, out, _ = launch()
    assert code == 0
    assert "w: report.html, a.png" in out
    assert "error is small" in page.read_text()
    page.unlink()
    launch(run=refuse)  # a finished run gets it anew
    assert page.exists()

    def full(workdir):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(launcher, "write_report", full)
    code, out, _ = launch("--overwrite")
    assert code == 0  # the result is there, only the page is not
    assert "no report page: OSError" in out and "a.png" in out
    assert (tmp_path / "w" / "result.json").exists()


def test_another_configs_folder_is_refused_unless_set_aside(launch, tmp_path):
    launch()
    code, _, err = launch("--config.optim.learning_rate=0.2", run=refuse)
    assert code == 2
    assert "optim.learning_rate: 0.1 there, 0.2 asked for" in err
    code, out, _ = launch("--config.optim.learning_rate=0.2", "--overwrite")
    assert code == 0
    assert "w.old1" in out
    assert not (tmp_path / "w.old1").joinpath("w").exists()
    assert json.loads((tmp_path / "w.old1" / "result.json").read_text())["claims"]
    assert (tmp_path / "w" / "result.json").exists()


def test_what_does_not_change_the_result_may_change_between_starts(launch):
    launch()
    code, out, _ = launch(
        "--config.mesh.fsdp=2", "--config.train.save_seconds=1", "--config.data.serve=grain",
        "--config.data.dir=/moved", run=refuse,
    )  # fmt: skip
    assert code == 0
    assert "finished" in out
    assert launch("--config.data.name=b", run=refuse)[0] == 2


def test_a_config_that_cannot_be_run_does_not_claim_the_folder(launch, tmp_path):
    def run(config, workdir):
        with configs.config_errors():
            raise ValueError("a batch of 3 does not divide over 2 devices")

    code, _, err = launch(run=run)
    assert code == 2
    assert "batch of 3" in err
    code, _, _ = launch("--config.optim.learning_rate=0.2")
    assert code == 0


def test_an_interrupted_run_says_how_to_go_on(launch, monkeypatch):
    def run(config, workdir):
        raise Interrupted(7)

    code, out, _ = launch("--config.optim.learning_rate=0.2", run=run)
    assert code == 75
    assert "interrupted at step 7" in out
    assert "--config.optim.learning_rate=0.2" in out
    monkeypatch.setenv("BLOGJAX_COMMAND", "make train RUN=w")
    assert "make train RUN=w" in launch("--config.optim.learning_rate=0.2", run=run)[1]


def test_nonfinite_gradients_are_told_with_the_way_on(launch):
    def run(config, workdir):
        raise NonfiniteError(12, ("dense/kernel",), 13)

    code, _, err = launch(run=run)
    assert code == 1
    assert "step 12" in err and "dense/kernel" in err and "on_nonfinite=skip" in err


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(launch, tmp_path):
    (tmp_path / "file").write_text("")
    base = ("--config=config.py", f"--workdir={tmp_path}/file/w")
    code, _, err = launch(base=base, run=refuse)
    assert code == 1
    assert "cannot write to" in err


def test_two_runs_in_one_folder_are_refused(launch, tmp_path):
    def run(config, workdir):
        for flags in ([], ["--overwrite"]):
            code, _, err = launch(*flags, run=refuse)
            assert code == 1
            assert "another process is running" in err
        return good_run(config, workdir)

    assert launch(run=run)[0] == 0


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([0.5], "holds"),
        ([0.95], "undecided"),
        ([1.05], "undecided"),
        ([2.0], "fails"),
        ([0.5, 0.6, 0.7], "holds"),
        ([0.8, 0.9, 1.0], "undecided"),
        ([1.4, 1.5, 1.6], "fails"),
        ([float("nan")], "fails"),
    ],
)
def test_verdicts(values, verdict):
    claim = judge("s", "p", "m", values, high=1.0, near=0.1)
    assert claim.verdict == verdict
    assert judge("s", "p", "m", values, high=1.0, near=0.1, judged=False).verdict == "not judged"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_seed_that_is_not_finite_fails_the_claim_and_not_the_run(bad):
    claim = judge("s", "p", "m", [0.5, bad, 0.5], high=1.0, near=0.1)
    assert claim.verdict == "fails" and math.isnan(claim.spread)


def test_spread_is_the_standard_deviation_between_seeds():
    claim = judge("s", "p", "m", [1.0, 2.0, 3.0], low=0.0, near=0.0)
    assert (claim.value, claim.spread, claim.seeds) == (2.0, 1.0, 3)
    with pytest.raises(ValueError, match="empty"):
        judge("s", "p", "m", [1.0], low=1.0, high=0.0, near=0.0)


def test_the_table_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_claims([judge("a statement " * 12, "p", "m", [0.5], high=1.0, near=0.1)])
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80
