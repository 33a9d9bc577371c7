import contextlib
import functools
import hashlib
import http.server
import importlib.util
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets
import tiny_datasets
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.download.checksums import UrlInfo

from blogjax.data import tfds, tfds_prepare
from blogjax.data.tensorflow_stand_in import tensorflow_stand_in

CONTENT = bytes(range(200, 230))
SHA256 = hashlib.sha256(CONTENT).hexdigest()
LOCAL = {"127.0.0.1", "localhost"}


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    """The hosts that are looked up; none but this machine is found, and nobody outside asked."""
    hosts, look_up, connect = [], socket.getaddrinfo, socket.socket.connect

    def getaddrinfo(host, *arguments, **options):
        hosts.append(host)
        if host in LOCAL:
            return look_up(host, *arguments, **options)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def guarded(self, address):
        assert not isinstance(address, tuple) or address[0] in LOCAL, address
        return connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setattr(downloader, "MAX_RETRIES", 0)  # TFDS would go on for minutes
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return hosts


@pytest.fixture(autouse=True)
def downloads(monkeypatch):
    """Says which URLs the builder `tiny_download` notes, and which it downloads (the first one)."""

    def note(*urls, size=30, checksum=SHA256, download=()):
        info = UrlInfo(tensorflow_datasets.core.units.Size(size), checksum, "numbers.bin")
        infos = dict.fromkeys(urls, info)
        monkeypatch.setattr(tiny_datasets.TinyDownload, "url_infos", infos or None)
        monkeypatch.setattr(tiny_datasets.TinyDownload, "urls", download or urls[:1])

    return note


@pytest.fixture
def server():
    """A server of CONTENT under any address; also takes the requests that a proxy gets."""
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            if "broken" in self.path:
                return
            gone = "gone" in self.path
            self.send_response(404 if gone else 200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        running.requests = requests
        running.place = f"127.0.0.1:{running.server_port}"
        yield running
        running.shutdown()
        thread.join()


def closed_place():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def assert_downloaded(root):
    loaded = tfds.load("tiny_download", "train", root)
    assert sorted(loaded["image"].ravel()) == list(CONTENT)


refused = functools.partial(pytest.raises, tfds.DatasetUnavailableError)


def test_offline_it_fails_at_once_and_says_what_to_do(tmp_path, asked, downloads, capfd):
    downloads("https://data.invalid/a/numbers.bin", "http://data.invalid/b", size=10**9)
    root = tmp_path / "root"
    began = time.monotonic()
    with refused() as caught:
        tfds.load("tiny_download:1.0.0", "train", root)
    assert time.monotonic() - began < 10
    assert set(asked) == {"data.invalid"}
    said = str(caught.value)
    assert f"tiny_download:1.0.0 is not in {root} (no {root}/tiny_download/1.0.0)" in said
    assert "data.invalid:443 ([Errno -2] Name or service not known)" in said
    assert f"copy the folder prepared/tiny_download to {root}/tiny_download" in said
    assert not root.exists() and capfd.readouterr() == ("", "")
    # The command is one that runs: with TFDS alone it prepares what is then found here.
    command = next(line.strip() for line in said.splitlines() if "python -c" in line)
    assert "tfds.builder('tiny_download:1.0.0', data_dir='prepared')" in command


def test_the_command_for_the_other_machine_prepares_what_is_then_found(tmp_path, monkeypatch):
    command = tfds_prepare._command("tiny_images/png", "prepared")
    source = command.removeprefix('python -c "').removesuffix('"')
    path = os.pathsep.join([os.path.dirname(tiny_datasets.__file__), *sys.path])
    subprocess.run(
        [sys.executable, "-c", f"import tiny_datasets; {source}"], check=True, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path}, capture_output=True,
    )  # fmt: skip
    shutil.copytree(tmp_path / "prepared" / "tiny_images", tmp_path / "here" / "tiny_images")
    monkeypatch.setattr(tfds_prepare, "_write", None)
    assert len(tfds.source("tiny_images/png", "train", tmp_path / "here")) == 60


def test_a_host_that_never_answers_is_given_up(tmp_path, downloads, monkeypatch):
    downloads("https://slow.invalid/x", "ftp://slower.invalid:2121/y")
    forever = threading.Event()

    def look_up(*arguments, **options):
        forever.wait(20)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    began = time.monotonic()
    message = r"slow.invalid:443 \(no answer in 0.2 s\), slower.invalid:2121 \(no answer"
    with refused(match=message):
        tfds.prepare("tiny_download", tmp_path, timeout=0.2)
    forever.set()
    assert 0.2 <= time.monotonic() - began < 2


def test_a_host_that_refuses_is_told(tmp_path, downloads):
    place = closed_place()
    downloads(f"http://{place}/x")
    with refused(match=rf"{place} \(.*refused"):
        tfds.prepare("tiny_download", tmp_path)


def test_urls_that_nobody_noted_are_asked_for_before_they_are_downloaded(
    tmp_path, asked, downloads
):
    downloads(download=["https://other.invalid/x"])
    began = time.monotonic()
    with refused(match="other.invalid:443"):
        tfds.prepare("tiny_download", tmp_path)
    assert time.monotonic() - began < 10 and set(asked) == {"other.invalid"}
    assert not list((tmp_path / "tiny_download").glob("*1.0.0*"))


def test_one_host_of_several_is_enough_until_the_other_is_needed(tmp_path, server, downloads):
    here, there = f"http://{server.place}/x", "http://data.invalid/x"
    for needed in ([there], [here, there], [there, here]):
        downloads(there, here, download=needed)
        with refused(match=r"downloaded: data.invalid:80 \("):
            tfds.prepare("tiny_download", tmp_path)
    downloads(there, here, download=[here])
    assert_downloaded(tmp_path)


def test_what_was_fetched_by_hand_is_not_asked_for(tmp_path, asked, downloads):
    downloads("http://data.invalid/numbers.bin")
    folder = tmp_path / "downloads" / "manual"
    folder.mkdir(parents=True)
    (folder / "numbers.bin").write_bytes(CONTENT)
    assert_downloaded(tmp_path)
    assert asked == []


def test_what_is_noted_is_downloaded_and_kept(tmp_path, asked, server, downloads, capfd):
    downloads(f"http://{server.place}/numbers.bin")
    assert_downloaded(tmp_path)
    out, err = capfd.readouterr()
    folder = tmp_path / "tiny_download" / "1.0.0"
    assert out == ""
    assert err == f"blogjax: preparing tiny_download in {folder} (30 bytes to download)\n"
    assert server.requests == ["/numbers.bin"] and set(asked) <= LOCAL
    shutil.rmtree(folder)
    asked.clear()
    assert_downloaded(tmp_path)  # from what was downloaded before
    assert len(server.requests) == 1 and asked == []
    assert capfd.readouterr().err == f"blogjax: preparing tiny_download in {folder}\n"


FAILING = {"gone": "HTTP code: 404", "broken": "ConnectionError", "other": "wrong checksum"}


@pytest.mark.parametrize(("wrong", "message"), FAILING.items())
def test_a_download_that_fails_is_told_with_what_to_do(tmp_path, server, downloads, wrong, message):
    downloads(f"http://{server.place}/{wrong}", checksum="0" * 64)
    with refused(match=rf"prepared in .*{message}[^$]*To prepare it on another"):
        tfds.prepare("tiny_download", tmp_path)
    assert not (tmp_path / "tiny_download" / "1.0.0").exists()


def test_through_a_proxy(tmp_path, asked, server, downloads, monkeypatch):
    downloads("http://data.invalid/numbers.bin")
    place = closed_place()
    for proxy in (f"http://{place}", place):
        monkeypatch.setenv("HTTP_PROXY", proxy)
        with refused(match=rf"the proxy {place} \(for data.invalid\) \(.*refused"):
            tfds.prepare("tiny_download", tmp_path)
    assert "data.invalid" not in asked
    monkeypatch.setenv("HTTP_PROXY", f"http://{server.place}")
    monkeypatch.setenv("NO_PROXY", "data.invalid")
    with refused(match=r"data.invalid:80 \("):
        tfds.prepare("tiny_download", tmp_path)
    monkeypatch.setenv("NO_PROXY", "elsewhere.invalid")
    asked.clear()
    assert_downloaded(tmp_path)
    assert server.requests == ["http://data.invalid/numbers.bin"] and set(asked) <= LOCAL


PROXIES = [
    ({"https_proxy": "https://proxy.invalid"}, "https://a.invalid", ("proxy.invalid", 443)),
    ({"ALL_PROXY": "socks5h://proxy.invalid"}, "https://a.invalid", ("proxy.invalid", 1080)),
    ({"HTTPS_PROXY": "http://proxy.invalid:3128/"}, "https://a.invalid", ("proxy.invalid", 3128)),
    ({"HTTPS_PROXY": "http://user:word@proxy.invalid"}, "https://a.invalid", ("proxy.invalid", 80)),
    ({"HTTP_PROXY": "http://proxy.invalid"}, "https://a.invalid", ("a.invalid", 443)),
    ({}, "https://a.invalid:8443/x", ("a.invalid", 8443)),
    ({}, "ftp://a.invalid/x", ("a.invalid", 21)),
]


@pytest.mark.parametrize(("variables", "url", "place"), PROXIES)
def test_whom_a_download_connects_to(monkeypatch, variables, url, place):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert list(tfds_prepare._hosts([url])) == [place]
    assert tfds_prepare._hosts(["gs://bucket/x", "/a/path", "kaggle"]) == {}


def test_what_needs_no_download_asks_nobody(tmp_path, asked, capfd):
    folder = tfds.prepare("tiny_images", tmp_path)
    assert folder == tmp_path / "tiny_images" / "tensor" / "1.0.0"
    assert capfd.readouterr() == ("", f"blogjax: preparing tiny_images in {folder}\n")
    tfds.load("tiny_images", "train", tmp_path)
    assert capfd.readouterr() == ("", "") and asked == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".tiny_images.lock", "downloads", "tiny_images"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["cifar10", "coco/2017", "glue/mnli"])
def test_data_sets_of_tfds_are_found_without_asking_anybody(tmp_path, asked, name):
    # The second needs TensorFlow's names of dtypes, the third is hidden where h5py is missing.
    assert tfds_prepare.find(name, tmp_path).name == name.split("/")[0]
    assert asked == []
    with refused(match="cannot be downloaded: [a-z]"):
        tfds.prepare(name, tmp_path)
    assert len(set(asked)) >= 1 and not any(tmp_path.iterdir())


UNKNOWN = [
    ("cifar11", "no data set 'cifar11'.*near names: cifar10"),
    ("coco/2016", "no coco/2016.*but .*coco/2017:1.1.0"),
    ("cifar10:9.9.9", "no cifar10:9.9.9.*but cifar10:3.0.2"),
    ("tiny_images/jpeg", "no tiny_images/jpeg.*but tiny_images/png:1.0.0, tiny_images/tensor:1"),
    ("huggingface:mnist", "'huggingface:mnist' names no data set"),
    ("no name", "'no name' names no data set"),
]


@pytest.mark.parametrize(("name", "message"), UNKNOWN)
def test_unknown_names_are_refused_with_the_nearest(tmp_path, asked, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        tfds.load(name, "train", tmp_path)
    assert len(str(caught.value)) < 400
    assert asked == [] and not any(tmp_path.iterdir())


def test_what_has_to_be_downloaded_by_hand(tmp_path, asked):
    folder = tmp_path / "downloads" / "manual"
    for _ in range(2):
        with refused(match=f"by hand into {folder}:\n  Register at the lab of numbers.\n  Put num"):
            tfds.prepare("tiny_by_hand", tmp_path)
        folder.mkdir(parents=True, exist_ok=True)
    (folder / "numbers.bin").write_bytes(CONTENT)
    loaded = tfds.load("tiny_by_hand", "train", tmp_path, features=["label"])
    assert sorted(loaded["label"]) == list(CONTENT) and asked == []


def test_one_prepares_and_the_others_wait(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(tiny_datasets.TinyImages, "prepared", 0)
    original, loaded = tiny_datasets.TinyImages.examples, []

    def slowly(self, split):
        time.sleep(0.1)
        yield from original(self, split)

    monkeypatch.setattr(tiny_datasets.TinyImages, "examples", slowly)
    threads = [
        threading.Thread(target=lambda: loaded.append(tfds.load("tiny_images", "test", tmp_path)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(arrays["label"]) for arrays in loaded] == [20, 20, 20]
    assert tiny_datasets.TinyImages.prepared == 1
    assert capfd.readouterr().err.count("preparing tiny_images") == 1


def test_leftovers_are_in_nobodys_way(tmp_path, capfd):
    (tmp_path / "tiny_ragged" / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)
    folder = tmp_path / "tiny_ragged" / "1.0.0"
    folder.mkdir()
    (folder / "mine").write_text("precious")
    assert tfds.prepare("tiny_ragged", tmp_path) == folder
    (aside,) = (tmp_path / "tiny_ragged").glob("1.0.0.damaged-*")
    assert (aside / "mine").read_text() == "precious"
    assert f"blogjax: {folder} was not whole, and is now {aside}\n" in capfd.readouterr().err
    assert len(tfds.source("tiny_ragged", "test", tmp_path)) == 20
    (folder / "dataset_info.json").write_text("{")
    with refused(match=rf"what {tmp_path}/tiny_ragged holds .* cannot be read .*delete it"):
        tfds.prepare("tiny_ragged", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="needs no stand-in")
def test_what_builders_call_of_tensorflow_is_answered(tmp_path):
    expected = tiny_datasets.arrays("train")["image"]
    names = ("image", "grey", "label", "name")
    for example in tfds.source("tiny_tensorflow", "train", tmp_path, features=names):
        number = int(example["label"])
        assert example["name"] == str(number).encode() and example["label"].dtype == np.int32
        np.testing.assert_array_equal(example["image"], expected[number])
        np.testing.assert_array_equal(example["grey"], expected[number, :, :, :1])
    with refused(match="'strings' is called") as caught:
        tfds.prepare("tiny_tensorflow/strings", tmp_path)
    assert "without TensorFlow" not in str(caught.value)
    assert "tensorflow" not in sys.modules
    lazy = tensorflow_datasets.core.utils.lazy_imports_utils.tensorflow
    with tensorflow_stand_in():
        with tensorflow_stand_in():
            pass
        assert lazy.io.gfile.exists(tmp_path)
    with pytest.raises(ImportError), contextlib.redirect_stdout(None):
        lazy.io.gfile.exists(tmp_path)


def test_no_advice_on_other_packages_is_given(caplog):
    tfds_prepare.import_tfds()
    logging.getLogger("absl").warning("OpenCV is not installed. We recommend")
    logging.getLogger("absl").warning("something else")
    assert caplog.messages == ["something else"]


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "tensorflow_datasets"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install blogjax\[train\]"):
        tfds.load("tiny_images", "train", tmp_path)
