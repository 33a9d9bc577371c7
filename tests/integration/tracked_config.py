"""A config that notes which of its fields were read."""

from typing import Any

from ml_collections import ConfigDict


class Tracked:
    """Behaves like the ConfigDict it wraps; `read` collects dotted names of leaves."""

    def __init__(self, config: ConfigDict, prefix: str = "", read: set[str] | None = None):
        self._config, self._prefix = config, prefix
        self.read: set[str] = set() if read is None else read

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def __getitem__(self, name: str) -> Any:
        value = self._config[name]
        if isinstance(value, ConfigDict):
            return Tracked(value, f"{self._prefix}{name}.", self.read)
        self.read.add(self._prefix + name)
        return value

    def keys(self):
        return self._config.keys()
