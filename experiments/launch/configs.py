"""Configs at the border: loading, early and readable complaints, comparison with an older run."""

import ast
import contextlib
import difflib
import importlib.util
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from blogjax.train import profiling

# Fields that say how a run goes, not what it computes: they may change between two starts.
OPERATIONAL = ("mesh.", "data.serve", "data.dir", "train.on_nonfinite", "train.save_seconds")


class ConfigError(ValueError):
    """The config cannot be run; the message says what to change."""


@contextlib.contextmanager
def config_errors() -> Iterator[None]:
    """Turns the ValueErrors of the layers below, raised while a config is put to use."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def load(path: str) -> ConfigDict:
    """Runs `get_config` of `file.py` or `file.py:variant`.

    Raises:
      ConfigError: if there is no such file or variant.
    """
    name, _, variant = path.partition(":")
    if not pathlib.Path(name).is_file():
        known = sorted(str(p) for p in pathlib.Path("configs").glob("*.py"))
        hint = _nearest(name, known, "found here") or f" in {pathlib.Path.cwd()}"
        raise ConfigError(f"no config file {name}{hint}")
    spec = importlib.util.spec_from_file_location("blogjax_config", name)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(*([variant] if variant else []))
    except (ValueError, SyntaxError, AttributeError, TypeError, ImportError) as error:
        raise ConfigError(f"{path}: {error}") from error


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of all fields.

    >>> flatten({"optim": {"learning_rate": 1.0}, "seed": 0})
    {'optim.learning_rate': 1.0, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            flat[prefix + name] = value
    return flat


def _nearest(name: str, names: Sequence[str], label: str) -> str:
    # A right last part in a wrong group is as near as a misspelt one.
    by_leaf = [n for n in names if n.rpartition(".")[2] == name.rpartition(".")[2]]
    near = [*by_leaf, *difflib.get_close_matches(name, names, n=4, cutoff=0.5)]
    if near:
        return f"; did you mean {', '.join(dict.fromkeys(near))}?"
    return f"; {label}: {', '.join(names)}" if names else ""


def check_overrides(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Refuses `--config.x=...` that names no field or has another type, before anything runs.

    Raises:
      ConfigError: with the nearest names, or with both types.
    """
    fields = flatten(config.to_dict())
    for position, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        flag = flag.lstrip("-")
        negated = flag.startswith("noconfig.")
        if not argument.startswith("-") or not (negated or flag.startswith("config.")):
            continue
        name = flag.removeprefix("no").removeprefix("config.")
        if name not in fields:
            prefix = name + "."
            group = [f for f in fields if f.startswith(prefix)]
            if group:
                raise ConfigError(f"--config.{name} is a group; its fields: {', '.join(group)}")
            group = [f for f in fields if f.startswith(name.rpartition(".")[0] + ".")]
            rest = f"\n  fields of that group: {', '.join(group)}" if group else ""
            hint = _nearest(name, list(fields), "fields")
            raise ConfigError(f"there is no config field {name}{hint}{rest}")
        default = fields[name]
        if negated and not isinstance(default, bool):
            raise ConfigError(f"--no is for booleans, but {name} is of type {_type(default)}")
        if not equals:
            if isinstance(default, bool):
                continue
            value = arguments[position + 1] if position + 1 < len(arguments) else ""
        if not _fits(value, default):
            raise ConfigError(
                f"config field {name} is of type {_type(default)} (its value here is "
                f"{default!r}), but {value!r} is of type {_type(_literal(value))}"
            )


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _type(value: Any) -> str:
    """The type as people say it, with those of a tuple's items."""
    if isinstance(value, tuple | list) and value:
        return f"tuple of {' and '.join(sorted({type(item).__name__ for item in value}))}"
    return type(value).__name__


def _fits(text: str, default: Any) -> bool:
    value = _literal(text)
    if isinstance(default, bool):
        return isinstance(value, bool) or value in (0, 1)
    if isinstance(default, int):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, tuple):
        items = value if isinstance(value, tuple | list) else (value,)
        kinds = {type(item) for item in default} or {int}
        return all(type(item) in kinds for item in items)
    return True


def check_loop(train: Any) -> None:
    """Checks the fields of a `train` group that every experiment has, before any work is done.

    Raises:
      ValueError: naming the field.
    """
    for name in ("steps", "evaluate_every", "render_every", "log_every"):
        if train[name] < 1:
            raise ValueError(f"train.{name} must be at least 1, got {train[name]}")
    if not train.save_seconds >= 0:
        raise ValueError(f"train.save_seconds must not be negative, got {train.save_seconds}")
    if train.on_nonfinite not in ("stop", "skip"):
        raise ValueError(f"train.on_nonfinite must be stop or skip, got {train.on_nonfinite!r}")
    window = profiling.asked_for()
    if window is not None and window[0] >= train.steps:
        raise ValueError(f"--profile={window[0]}:{window[1]} begins after the {train.steps} steps")
    seeds = list(train.seeds)
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= s < 2**32 for s in seeds):
        raise ValueError(f"train.seeds must be different numbers in [0, 2^32), got {seeds}")


def check_ranges(group: Any, **ranges: tuple[float, float]) -> None:
    """Checks `low <= group.name < high` for each `name=(low, high)`.

    Raises:
      ValueError: naming field, range and value.
    """
    for name, (low, high) in ranges.items():
        if not low <= group[name] < high:
            raise ValueError(f"{name} must be in [{low:g}, {high:g}), got {group[name]}")


def to_json(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON has it: tuples are lists."""
    return json.loads(json.dumps(config.to_dict(), sort_keys=True))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The fields that would make `new` another run than `old`, one line each."""
    a, b = flatten(old), flatten(new)
    return [
        f"{name}: {a.get(name, 'absent')!r} there, {b.get(name, 'absent')!r} asked for"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name) and not name.startswith(OPERATIONAL)
    ]
