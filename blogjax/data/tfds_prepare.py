"""Gets a data set of TensorFlow Datasets onto the disk, without TensorFlow and without hanging.

TFDS reads without TensorFlow what is stored as array_record. Three things stand in the way before:

  - most builders call TensorFlow while they prepare data; where it is not installed, a stand-in
    answers (`blogjax.data.tensorflow_stand_in`);
  - without a connection TFDS tries for minutes: the hosts are asked first, within seconds;
  - two processes that prepare at once make one of them fail: here one waits for the other.
"""

import contextlib
import functools
import importlib
import io
import json
import logging
import os
import pathlib
import pkgutil
import queue
import re
import socket
import sys
import tempfile
import textwrap
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from blogjax.data import cache
from blogjax.data.tensorflow_stand_in import tensorflow_stand_in

_PORTS = {"http": 80, "https": 443, "ftp": 21, "socks4": 1080, "socks5": 1080, "socks5h": 1080}


class DatasetUnavailableError(RuntimeError):
    """A data set is not on the disk in a form that can be read, and cannot be brought there.

    The message says which one, in which folder, why, and how to prepare it on another machine.
    """


def import_tfds() -> Any:
    """Returns tensorflow_datasets.

    Raises:
      ImportError: with what to install.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "the data is read through tensorflow-datasets, which is not installed: "
            "pip install blogjax[train]"
        ) from error
    logging.getLogger("absl").addFilter(_is_no_advice)  # once, however often it is added
    return tfds


def root_folder(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """The folder that holds the data sets: `data_dir`, `$TFDS_DATA_DIR`, `~/tensorflow_datasets`.

    Raises:
      ValueError: for an address like gs://, which cannot be read without TensorFlow.
    """
    if data_dir is None:
        data_dir = os.environ.get("TFDS_DATA_DIR") or pathlib.Path("~", "tensorflow_datasets")
    if "://" in os.fspath(data_dir):
        raise ValueError(f"data_dir is {data_dir}, and must be a folder: mount or copy the bucket")
    return pathlib.Path(data_dir).expanduser().absolute()


def find(name: str, root: pathlib.Path) -> Any:
    """Returns the TFDS builder of a data set, prepared or not; reaches for no host.

    Raises:
      ValueError: if there is no such data set, configuration or version; names the nearest.
      DatasetUnavailableError: if it can neither be read nor prepared.
    """
    tfds = import_tfds()
    try:
        parsed, options = tfds.core.naming.parse_builder_name_kwargs(name)
    except ValueError:
        parsed, options = None, {}
    if parsed is None or parsed.namespace:
        raise ValueError(
            f"{name!r} names no data set: write 'name', 'name/config' or 'name/config:1.2.3'"
        )
    from google.protobuf import json_format  # TFDS depends on it

    base, missing = parsed.name, tfds.core.registered.DatasetNotFoundError
    for attempt in range(2):
        try:
            with tensorflow_stand_in():
                return tfds.builder(name, data_dir=os.fspath(root), try_gcs=False)
        except missing:
            if attempt == 0:
                _import_builders(tfds)
        except ImportError as error:  # what is prepared can be read without its builder
            with contextlib.suppress(missing):
                return tfds.core.read_only_builder.builder_from_files(
                    base, data_dir=os.fspath(root), **options
                )
            raise DatasetUnavailableError(
                f"the builder of {name} needs what is not installed: {error}. "
                + _elsewhere(name, base, root, without_tensorflow=False)
            ) from error
        except (OSError, json_format.ParseError, json.JSONDecodeError) as error:
            raise DatasetUnavailableError(
                f"what {root / base} holds of {name} cannot be read ({error}). Copy it again, or "
                "delete it to have it prepared anew"
            ) from error
        except (AssertionError, ValueError) as error:  # how TFDS refuses a config or a version
            if not options:
                raise
            code = tfds.builder_cls(base)
            configs = {c.name: c.version or code.VERSION for c in code.BUILDER_CONFIGS}
            known = [f"{base}/{config}:{version}" for config, version in configs.items()]
            known = _near(name, known or [f"{base}:{code.VERSION}"])
            raise ValueError(
                f"no {name} in tensorflow-datasets {tfds.__version__}{_listed(', but ', known)}"
                f"{_listed(f'; {root} holds ', _prepared(root, base))}"
            ) from error
    raise _unknown(name, base, root)


def prepared_builder(name: str, root: pathlib.Path, timeout: float = 3.0) -> Any:
    """Returns the builder of a data set that is on the disk, bringing it there first if need be.

    Raises:
      ValueError: as `find`.
      DatasetUnavailableError: if it is stored in a form without random access; if it has to be
        downloaded by hand; if none of the hosts that its builder has noted answers within
        `timeout` seconds; if downloading or preparing fails.
      OSError: if the folder cannot be written.
    """
    builder = find(name, root)
    if not _is_whole(builder):
        _check_manual(builder, name, root)
        urls = _still_to_download(builder, root)
        ask = functools.partial(
            _check_reachable, builder=builder, name=name, root=root, timeout=timeout
        )
        if len(urls) == len(builder.url_infos or ()):  # else what is left may not be needed
            ask(urls)
        root.mkdir(parents=True, exist_ok=True)
        with cache.locked(root / f".{builder.name}.lock"):
            builder = find(name, root)
            if not _is_whole(builder):  # else another process has just finished
                _ask_before_downloads(builder, ask)
                _write(builder, name, root, sum(urls.values()))
                builder = find(name, root)
    formats = builder.info.available_file_formats()
    if not formats & set(import_tfds().core.file_adapters.FileFormat.with_random_access()):
        raise DatasetUnavailableError(
            f"{name} in {builder.data_dir} is stored as {', '.join(f.value for f in formats)}, "
            "where examples cannot be read one by one. Prepare it in another folder, to give as "
            f"data_dir, from the same downloads:\n  {_command(name, 'FOLDER', root / 'downloads')}"
        )
    return builder


def _is_no_advice(record: logging.LogRecord) -> bool:
    """All but one line: that images would be decoded faster with another package."""
    return "OpenCV is not installed" not in str(record.msg)


def _import_builders(tfds: Any) -> None:
    """Where one group of builders lacks a package, TFDS does not go on to the groups after it."""
    others = {"core", "dataset_collections", "datasets", "proto", "scripts", "testing"}
    groups = {m.name for m in pkgutil.iter_modules(tfds.__path__) if m.ispkg} - others
    for group in [*sorted(groups), "rlds.datasets"]:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{tfds.__name__}.{group}")


def _unknown(name: str, base: str, root: pathlib.Path) -> ValueError:
    tfds = import_tfds()
    found = _prepared(root, base)
    if found:
        return ValueError(f"no {name} in {root}; it holds {', '.join(found)}")
    names = tfds.list_builders(with_community_datasets=False)
    near = _near(base, [*names, *(p.name for p in root.glob("*/") if _prepared(root, p.name))])
    return ValueError(
        f"no data set {name!r}, neither in tensorflow-datasets {tfds.__version__} nor in {root}"
        f"{_listed('; near names: ', near)}. The module of a builder of your own has to be "
        "imported before"
    )


def _near(name: str, names: list[str]) -> list[str]:
    return get_close_matches(name, names, n=5) or (names if len(names) <= 5 else [])


def _listed(before: str, names: list[str]) -> str:
    return before + ", ".join(names) if names else ""


def _prepared(root: pathlib.Path, base: str) -> list[str]:
    """What of a data set lies in a folder, as names to ask for it."""
    found = []
    for pattern in ("*/dataset_info.json", "*/*/dataset_info.json"):
        for file in sorted((root / base).glob(pattern)):
            *config, version = file.parent.relative_to(root / base).parts
            if re.fullmatch(r"\d+\.\d+\.\d+", version):
                found.append("/".join([base, *config]) + f":{version}")
    return found


def _is_whole(builder: Any) -> bool:
    """TFDS renames a data set into place once it is written, this file last."""
    return (builder.data_path / "dataset_info.json").exists() and bool(builder.info.splits)


def _command(name: str, folder: str, downloads: pathlib.Path | None = None) -> str:
    more = f", download_dir='{downloads}'" if downloads else ""
    return (
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
        f"data_dir='{folder}').download_and_prepare(file_format='array_record'{more})\""
    )


def _elsewhere(name: str, base: str, root: pathlib.Path, without_tensorflow: bool = True) -> str:
    own = (
        f"(with blogjax, blogjax.data.tfds.prepare({name!r}, 'prepared') may do it without "
        "TensorFlow), "
    )
    return (
        "To prepare it on another machine, run there\n"
        "  pip install tensorflow-datasets tensorflow importlib_resources\n"
        f"  {_command(name, 'prepared')}\n"
        f"{own if without_tensorflow else ''}and copy the folder prepared/{base} to {root / base}"
    )


def _check_manual(builder: Any, name: str, root: pathlib.Path) -> None:
    folder = root / "downloads" / "manual"
    text = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if text and not (folder.is_dir() and any(folder.iterdir())):
        raise DatasetUnavailableError(
            f"{name} is not in {root}, and has to be downloaded by hand into {folder}:\n"
            f"{textwrap.indent(textwrap.dedent(text).strip(), '  ')}"
        )


def _still_to_download(builder: Any, root: pathlib.Path) -> dict[str, int]:
    """URL -> bytes of what the builder has noted, without what earlier attempts left."""
    resource = import_tfds().core.download.resource
    downloads = root / "downloads"
    missing = {}
    for url, info in (builder.url_infos or {}).items():
        file = resource.get_dl_fname(url, info.checksum)
        places = [downloads / builder.name / file, downloads / file]
        by_hand = bool(info.filename) and (downloads / "manual" / info.filename).exists()
        if not by_hand and not any(map(resource.is_locally_cached, places)):
            missing[url] = int(info.size)
    return missing


def _check_reachable(
    urls: Iterable[str], builder: Any, name: str, root: pathlib.Path, timeout: float
) -> None:
    """All hosts are asked at once, and one is enough: a configuration may not need the others."""
    hosts = _hosts(urls)
    answers: queue.SimpleQueue[tuple[tuple[str, int], Exception | None]] = queue.SimpleQueue()

    def ask(host: tuple[str, int]) -> None:
        try:
            socket.create_connection(host, timeout).close()
        except Exception as error:  # OSError, or what an address that is none raises
            answers.put((host, error))
        else:
            answers.put((host, None))

    # In threads, because looking a name up knows no time limit.
    for host in hosts:
        threading.Thread(target=ask, args=(host,), daemon=True).start()
    deadline = time.monotonic() + timeout
    failed: dict[tuple[str, int], Exception] = {}
    while len(failed) < len(hosts):
        try:
            host, error = answers.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            break
        if error is None:
            return
        failed[host] = error
    if hosts:
        reasons = [f"{hosts[h]} ({failed.get(h, f'no answer in {timeout:g} s')})" for h in hosts]
        raise DatasetUnavailableError(
            f"{name} is not in {root} (no {builder.data_dir}), and cannot be downloaded: "
            f"{', '.join(reasons)} cannot be reached"
            f"{_listed('; what is there: ', _prepared(root, builder.name))}. "
            + _elsewhere(name, builder.name, root)
        )


def _ask_before_downloads(builder: Any, ask: Callable[[list[str]], None]) -> None:
    """Not every builder has noted what it downloads, and one host may fail where others answer."""
    make = builder._make_download_manager

    def make_one_that_asks(**options: Any) -> Any:
        manager = make(**options)
        download, asked = manager._download, set()

        def ask_and_download(resource: Any) -> Any:
            host = urllib.parse.urlsplit(resource.url).netloc
            if host not in asked:
                ask([resource.url])
                asked.add(host)
            return download(resource)

        manager._download = ask_and_download
        return manager

    builder._make_download_manager = make_one_that_asks


def _hosts(urls: Iterable[str]) -> dict[tuple[str, int], str]:
    """Where downloads connect to, the proxy where there is one, and how to call it."""
    proxies = urllib.request.getproxies()
    hosts = {}
    for url in urls:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname
        if host is None or parts.scheme not in _PORTS:
            continue
        proxy = proxies.get(parts.scheme) or proxies.get("all")
        if proxy and not urllib.request.proxy_bypass(host):
            via = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
            if via.hostname:
                place = (via.hostname, via.port or _PORTS.get(via.scheme, 80))
                hosts[place] = f"the proxy {place[0]}:{place[1]} (for {host})"
                continue
        place = (host, parts.port or _PORTS[parts.scheme])
        hosts[place] = f"{place[0]}:{place[1]}"
    return hosts


def _write(builder: Any, name: str, root: pathlib.Path, size: int) -> None:
    tfds = import_tfds()
    folder = pathlib.Path(builder.data_dir)
    much = f" ({tfds.core.units.Size(size)} to download)" if size else ""
    print(f"blogjax: preparing {name} in {folder}{much}", file=sys.stderr, flush=True)
    if folder.exists():  # TFDS would take it for prepared; and it is not for us to delete
        aside = tempfile.mkdtemp(prefix=f"{folder.name}.damaged-", dir=folder.parent)
        folder.rename(aside)
        print(f"blogjax: {folder} was not whole, and is now {aside}", file=sys.stderr)
    import requests  # TFDS depends on it

    failures = (
        ImportError,
        requests.exceptions.RequestException,
        urllib.error.URLError,
        tfds.core.download.util.DownloadError,
        tfds.core.download.download_manager.NonMatchingChecksumError,
        tfds.core.download.extractor.ExtractError,
    )
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    output = io.StringIO()  # TFDS prints and draws progress bars, and has no setting for the former
    try:
        with (
            tensorflow_stand_in(),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            builder.download_and_prepare(download_config=config, file_format="array_record")
    except failures as error:
        raise DatasetUnavailableError(
            f"{name} cannot be prepared in {folder}: {type(error).__name__}: {error}\n"
            + _elsewhere(name, builder.name, root, not isinstance(error, ImportError))
        ) from error
