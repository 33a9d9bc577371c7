"""The launcher of every experiment: `main(run)` at the foot of its script.

    python -m experiments.ddpm --config=configs/ddpm.py[:variant] --workdir=runs/a
        [--config.group.field=value ...] [--overwrite] [--profile=START:STOP]
        [--coordinator_address=HOST:PORT --num_processes=N --process_id=I]

The folder gets the resolved config, all that the run writes, and at the end `result.json` and a
page to read, `report.html`. Started again, an unfinished run goes on and a finished one prints its
table. `--profile` writes a trace of those steps, for TensorBoard or Perfetto, to `profile/` in the
folder of each training run. The flags of the last line make this one of several processes of one
run; `experiments.launch.processes` says what is found out without them. Exit codes: 0 done,
1 error, 2 bad config or flags, 75 interrupted, or broken off because another process was lost or
did not come, and resumable.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NoReturn

from ml_collections import ConfigDict

from blogjax.train.distributed import is_first, on_first
from experiments.launch import configs, folder, processes
from experiments.launch.configs import ConfigError
from experiments.launch.folder import FolderError
from experiments.launch.report import write_report
from experiments.launch.result import Result, claims_of, print_claims, write_json

DONE, ERROR, BAD_CONFIG, INTERRUPTED = 0, 1, 2, 75
Run = Callable[[ConfigDict, pathlib.Path], Result]


def main(run: Run) -> None:
    """Parses the command line, runs, reports, and exits with the code that tells what happened."""
    from blogjax.data.tfds import DatasetUnavailableError
    from blogjax.train.checkpoint import CheckpointError, CheckpointMismatchError
    from blogjax.train.interrupt import Interrupted
    from blogjax.train.loop import NonfiniteError
    from blogjax.train.orbax_logs import leave_out_closed_loops

    try:
        config, name, workdir, values, profile = _parse(sys.argv)
        processes.start(values)
    except ConfigError as error:
        _fail(str(error), BAD_CONFIG)
    except ConnectionError as error:
        print(f"error: {error}; go on, on all of them, with:\n  {_command()}", file=sys.stderr)
        processes.leave(INTERRUPTED, connected=False)
    signal.signal(signal.SIGTERM, _interrupt)
    leave_out_closed_loops()
    try:
        processes.check_same(config, name, workdir)
        with folder.hold(workdir, values.overwrite), profile:
            _launch(run, config, name, workdir)
    except ConfigError as error:
        _fail(str(error), BAD_CONFIG)
    except (Interrupted, KeyboardInterrupt) as error:
        where = f"{error}; " if isinstance(error, Interrupted) else "interrupted; "
        print(f"\n{where}go on{processes.everywhere()} with:\n  {_command()}", flush=True)
        if isinstance(error, Interrupted):
            sys.exit(INTERRUPTED)  # all processes have agreed
        processes.leave(INTERRUPTED)
    except NonfiniteError as error:
        hint = (
            "\ntry a lower learning rate in another folder; or, to leave such steps out here, "
            "go on with --config.train.on_nonfinite=skip"
        )
        _fail(f"{error}{hint}", ERROR)
    except (
        CheckpointError,
        CheckpointMismatchError,
        DatasetUnavailableError,
        FolderError,
    ) as error:
        _fail(str(error), ERROR)
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        processes.leave(ERROR)
    except OSError as error:
        _fail(f"{error}; when that is mended, go on with:\n  {_command()}", ERROR)
    except Exception as error:
        if processes.alone():
            raise
        processes.leave(INTERRUPTED if processes.tell_why(error, _command()) else ERROR)
    sys.exit(DONE)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    processes.leave(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    del number, frame
    raise KeyboardInterrupt


def _parse(
    argv: list[str],
) -> tuple[ConfigDict, str, pathlib.Path, Any, contextlib.AbstractContextManager[None]]:
    """Flags, with every complaint a `ConfigError` of one screen."""
    from absl import flags
    from ml_collections import config_flags

    from blogjax.train.profiling import parse_window, profiling

    argv = _joined(argv)
    paths = [a for a in argv[1:] if a.startswith(("--config=", "-config="))]
    if {"--help", "-h"} & set(argv[1:]):
        print(__doc__)
        for path in paths[-1:]:
            print(f"fields of {path.partition('=')[2]} and their values:")
            fields = configs.flatten(configs.load(path.partition("=")[2]).to_dict())
            print("\n".join(f"  --config.{name}={value!r}" for name, value in fields.items()))
        sys.exit(DONE)
    if not paths:
        raise ConfigError("--config=FILE is missing, for example --config=configs/ddpm.py")
    name = paths[-1].partition("=")[2]
    config = configs.load(name)
    argv = [a for a in argv if a not in paths]
    configs.check_overrides(config, argv[1:])
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "folder of the run", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "set an older run aside", flag_values=values)
    flags.DEFINE_string("profile", None, "START:STOP, steps to trace", flag_values=values)
    processes.define_flags(flags, values)
    try:
        rest = values(argv)[1:]
        window = None if values.profile is None else parse_window(values.profile)
    except (flags.Error, ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    if rest:
        raise ConfigError(f"what is {' '.join(rest)}? Flags begin with --")
    if not values.workdir:
        raise ConfigError("--workdir=FOLDER is missing, for example --workdir=runs/a")
    if "://" in values.workdir:
        raise ConfigError(
            f"--workdir must be a folder, got {values.workdir}; a bucket can be mounted"
        )
    profile = contextlib.nullcontext() if window is None else profiling(*window)
    return config, name, pathlib.Path(values.workdir), values, profile


def _joined(argv: list[str]) -> list[str]:
    """`--config X` as `--config=X`."""
    joined = list(argv)
    for i in reversed(range(len(joined) - 1)):
        if joined[i] in ("--config", "-config"):
            joined[i : i + 2] = [f"{joined[i]}={joined[i + 1]}"]
    return joined


def _command() -> str:
    """The command that starts this very run again."""
    if "BLOGJAX_COMMAND" in os.environ:
        return os.environ["BLOGJAX_COMMAND"]
    return shlex.join([sys.orig_argv[0], *_module(), *_arguments()])


def _module() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    return ["-m", spec.name] if spec is not None else [sys.argv[0]]


def _arguments() -> list[str]:
    """The arguments without what sets an older run aside or tells one process from another."""
    arguments = list(sys.argv[1:])
    while "--overwrite" in arguments:
        i = arguments.index("--overwrite")
        del arguments[i : i + (2 if arguments[i + 1 : i + 2] in (["true"], ["True"]) else 1)]
    left_out = ("overwrite", *processes.FLAGS)
    return [a for a in arguments if a.lstrip("-").partition("=")[0] not in left_out]


def _launch(run: Run, config: ConfigDict, name: str, workdir: pathlib.Path) -> None:
    wanted = configs.to_json(config)
    stored, finished = workdir / "config.json", workdir / "result.json"

    def look() -> tuple[bool, dict[str, Any] | None]:
        """Whether there is something to go on with, and the result if there is one."""
        if stored.exists():
            _check_same_run(workdir, wanted)
        return stored.exists(), folder.read_json(finished) if finished.exists() else None

    resumed, record = on_first(look)
    if record is not None:
        _tell_finished(workdir, record)
        return
    on_first(lambda: write_json(stored, {"name": name, "config": wanted}))
    began = time.time()
    _use_compilation_cache()
    try:
        result = run(config, workdir)
    except BaseException:
        # What came to nothing does not claim the folder for its config.
        if is_first() and not resumed and not any(workdir.glob("**/checkpoints/[0-9]*")):
            stored.unlink()
        raise
    record = {
        "experiment": _module()[-1].rpartition(".")[2],
        "command": shlex.join(["python", *_module(), *_arguments()]),
        "overrides": [
            a for a in sys.argv[1:] if a.lstrip("-").startswith(("config.", "noconfig."))
        ],
        "claims": [dataclasses.asdict(claim) for claim in result.claims],
        "measured": dict(result.measured),
        "pictures": list(result.pictures),
        "seeds": list(result.seeds),
        "config": wanted,
        "seconds": round(time.time() - began, 1),
        "resumed": resumed,
        **_surroundings(),
    }
    on_first(lambda: write_json(finished, record))
    print()
    print_claims(result.claims)
    _tell_files(workdir, result.pictures)


def _check_same_run(workdir: pathlib.Path, wanted: dict[str, Any]) -> None:
    different = configs.differences(
        folder.read_json(workdir / "config.json").get("config", {}), wanted
    )
    if different:
        lines = "\n".join(f"  {line}" for line in different)
        raise ConfigError(
            f"{workdir} holds a run of another config:\n{lines}\n"
            "choose another --workdir, or give --overwrite to set that run aside"
        )


def _tell_finished(workdir: pathlib.Path, record: dict[str, Any]) -> None:
    print(f"{workdir} is finished; nothing to do.\n")
    print_claims(claims_of(record))
    names = (workdir.with_name(letter) for letter in "bcdefghijklmnopqrstuvwxyz")
    free = next((str(path) for path in names if not path.exists()), "runs/another")
    again = os.environ.get("BLOGJAX_AFRESH", "--workdir={}, or --overwrite").format(free)
    _tell_files(workdir, record["pictures"])
    print(f"to start afresh: {again}")


def _tell_files(workdir: pathlib.Path, pictures: Sequence[str]) -> None:
    """Names what to look at; writes the page anew, for it is made of the other files."""
    if not is_first():
        return
    try:
        write_report(workdir)
    except Exception as error:  # the run is done and its result on the disk
        print(f"no report page: {error!r}")
        print(f"\n{workdir}: {', '.join(pictures)}")
    else:
        print(f"\n{workdir}: {', '.join(['report.html', *pictures])}")


def _use_compilation_cache() -> None:
    """Compiled programs are kept between runs; a second start takes seconds less."""
    import jax

    from blogjax.data.cache import cache_dir

    try:
        if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
            jax.config.update("jax_compilation_cache_dir", str(cache_dir("jax")))
    except OSError as error:
        print(f"no compilation cache: {error}; BLOGJAX_CACHE may name a folder for it")
    # The thresholds of jax would leave out nearly everything that a CPU compiles.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _surroundings() -> dict[str, Any]:
    """Versions, device and commit."""
    import jax

    packages = ("blogjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    device = jax.devices()[0]
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform}), "
        f"{os.cpu_count()} host cores",
        "commit": _commit(),
    }


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments],
            cwd=pathlib.Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
