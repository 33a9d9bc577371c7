"""The launcher's side of several processes: flags, start, and how to leave together.

    --coordinator_address=HOST:PORT --num_processes=N --process_id=I [--heartbeat_seconds=100]

Without them the environment is asked: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
`JAX_PROCESS_ID` (or a Kubernetes Job's `JOB_COMPLETION_INDEX`), a SLURM step, Open MPI, a Cloud
TPU. `--num_processes=1` runs a process on its own wherever it is. All processes need the same
command and a `--workdir` that they share.
"""

import os
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from ml_collections import ConfigDict

from blogjax.train import distributed
from blogjax.train.interrupt import STOP_SIGNALS
from experiments.launch import configs
from experiments.launch.configs import ConfigError

# So that another process that fails for the same reason can say so before the first one, which
# keeps them all together, is gone.
_LAST_WORDS_SECONDS = 2.0
# After so long without the others, what is being waited for is worth a line: after five minutes jax
# ends the process with SIGABRT and its own words, of a task that has died.
_PATIENCE_SECONDS = 30.0
FLAGS = ("coordinator_address", "num_processes", "process_id", "heartbeat_seconds")


def define_flags(flags: Any, values: Any) -> None:
    """Adds the flags to those of the launcher."""
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many there are", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which one this is", flag_values=values)
    flags.DEFINE_integer(
        "heartbeat_seconds", 100, "silence after which a process is dead", 1, flag_values=values
    )


def start(values: Any) -> None:
    """Joins the other processes, if there are any; the first one speaks for all.

    Raises:
      ConfigError: if the flags or the environment are at odds, or the cluster that the environment
        speaks of does not say what jax needs.
      ConnectionError: if jax says that they do not find each other: one may come later. As a rule
        it ends the process instead, after five minutes and with SIGABRT.
    """
    import jax

    try:
        found = distributed.detect(
            values.coordinator_address, values.num_processes, values.process_id
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if found is None:
        return
    why = f"looked for because of {found.source}; --num_processes=1 runs one on its own"
    where = f" at {found.coordinator_address}" if found.coordinator_address else ""
    text = f"still waiting for the other processes{where}, {why}; after five minutes jax gives up"
    how = {"file": sys.stderr, "flush": True}
    waiting = threading.Timer(_PATIENCE_SECONDS, print, (text,), how)
    waiting.daemon = True
    waiting.start()
    try:
        distributed.start(found, heartbeat_seconds=values.heartbeat_seconds)
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(f"the processes did not find each other: {error}; {why}") from error
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"the processes cannot find each other: {error}; {why}") from error
    finally:
        waiting.cancel()
    if not distributed.is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  to the end of the process


def check_same(config: ConfigDict, name: str, workdir: Any) -> None:
    """Refuses processes that were started with different configs or folders.

    Raises:
      ConfigError: on all processes; those that differ from the first one name what does.
    """
    mine = {"config": name, "workdir": str(workdir), **configs.to_json(config)}
    first = distributed.on_first(lambda: mine)
    different = configs.differences(first, mine)
    (anywhere,) = distributed.any_process(bool(different))
    if different:
        lines = "\n".join(f"  {line}" for line in different)
        raise ConfigError(f"this process differs from process 0 (there):\n{lines}")
    if anywhere:
        raise ConfigError("another process was started with another config or folder, and says so")


def alone() -> bool:
    """Whether this is the only process.

    >>> alone()
    True
    """
    import jax

    # Without the first condition a bad flag would be told of only after devices were looked for.
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def everywhere() -> str:
    """What to add to a command that all processes need.

    >>> everywhere()
    ''
    """
    return "" if alone() else ", on all processes,"


def leave(code: int, connected: bool = True) -> NoReturn:
    """Ends this process; one of several does so without waiting for the others.

    At an orderly exit jax waits for all processes, which would be for minutes where one of them has
    failed and the others wait for it in the middle of a step.

    Args:
      code: the exit code; no signal changes it any more.
      connected: False where the processes have not found each other, and jax can say nothing.
    """
    if connected and (code == 0 or alone()):
        sys.exit(code)
    # What starts the processes may end all as soon as it has seen one of them fail.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.flush()
    sys.stderr.flush()
    if connected and distributed.is_first():
        time.sleep(_LAST_WORDS_SECONDS)
    os._exit(code)


def tell_why(error: BaseException, command: str) -> bool:
    """Prints an error that nobody has foreseen, and what it may mean for one of several processes.

    Returns:
      Whether it is most likely the loss of another process, after which all can go on.
    """
    import jax

    traceback.print_exception(error)
    lost = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
    if lost:
        print(
            "\nerror: the step failed; where nothing above tells of this process, another one "
            "has ended. Start all of them again, and they go on from the last checkpoint:\n"
            f"  {command}",
            file=sys.stderr,
            flush=True,
        )
    return lost
