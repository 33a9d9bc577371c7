import base64
import html.parser
import io
import json
import math
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from experiments.launch import axes, report, svg
from experiments.launch.report import write_report

NASTY = "<script>alert('1')</script> & \"two\" {{ 3 }} <b>ü"
VALUES = st.floats(-1e300, 1e300) | st.floats(-10, 10) | st.sampled_from([0.0, 1e-300, 1e300])
VOID = {"meta", "img", "br", "link", "hr", "input", "source", "base", "embed"}


class Page(html.parser.HTMLParser):  # complains about bad nesting
    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(path.read_text())
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "attrs": {k: v or "" for k, v in attrs}, "text": ""})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data
        self.text += data

    def all(self, tag, kind=""):
        found = [e for e in self.elements if e["tag"] == tag]
        return [e for e in found if set(kind.split()) <= set(e["attrs"].get("class", "").split())]


def claim(**fields):
    return {
        "statement": "it works", "source": "https://kexue.fm/archives/9164", "metric": "error",
        "value": 0.5, "spread": None, "seeds": 1, "low": None, "high": 1.0, "verdict": "holds",
    } | fields  # fmt: skip


def make_run(folder, seeds=(0,), steps=60, losses=None, **fields):
    folder.mkdir(exist_ok=True)
    losses = losses or [2.0 + i % 7 / 10 for i in range(steps)]
    for seed in seeds:
        inner = folder / f"seed{seed}" if len(seeds) > 1 else folder
        write_lines(inner / "metrics.jsonl", [
            {"kind": "train", "step": 5 * i + 5, "loss": losses[i], "grad_norm": 0.5, "skipped": 0,
             "update_norm": 0.01 * 0.8**i, "param_norm": 2.0} for i in range(steps)
        ] + [{"kind": "evaluate", "step": 5 * steps, "loss": 2.25, "accuracy": 0.75}])  # fmt: skip
        times = ({"time": 1.7e9 + i, "steps_per_second": 30.0 + i} for i in range(steps))
        write_lines(inner / "timings.jsonl", [{"step": 5 * i + 5} | t for i, t in enumerate(times)])
    record = {
        "experiment": "ddpm", "command": "python -m experiments.ddpm --workdir=w", "seconds": 75.0,
        "claims": [claim()], "measured": {"x": [1, 2]}, "seeds": list(seeds), "config": {},
        "versions": {"jax": "0.10.2"}, "device": "1 x cpu (cpu)", "commit": "0123456789ab-dirty",
    } | fields  # fmt: skip
    (folder / "result.json").write_text(json.dumps(record))
    (folder / "config.json").write_text(json.dumps({"name": "a.py", "config": record["config"]}))
    return folder


def write_lines(path, records):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def picture(path, width=30, height=20):
    noise = np.random.default_rng(0).bytes(3 * width * height)
    Image.frombytes("RGB", (width, height), noise).save(path)
    return path.name


def assert_loads_nothing(page):
    """No element that fetches, no script, no address but `data:` and those of plain links."""
    for element in page.elements:
        assert element["tag"] not in {"script", "link", "iframe", "object", "embed", "base", "form"}
        for name, value in element["attrs"].items():
            assert not name.startswith("on") and name not in {"srcset", "poster", "action"}
            if name == "href":
                assert element["tag"] == "a" and re.match("https?://", value)
            elif name == "src":
                assert value.startswith("data:")
            elif name not in {"alt", "aria-label"}:  # text
                assert "://" not in value and "url(" not in value, (name, value)
    css = page.all("style")[0]["text"]
    assert "url(" not in css and "@import" not in css and "://" not in css
    (policy,) = (e["attrs"]["content"] for e in page.all("meta") if "http-equiv" in e["attrs"])
    rules = dict(rule.strip().partition(" ")[::2] for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'" and rules.pop("img-src") == "data:"
    assert rules.pop("style-src") == "'unsafe-inline'" and set(rules.values()) <= {"'none'"}


def assert_inside(element):
    """Every coordinate of a drawing is a plain number within the view box."""
    _, _, width, height = map(float, element.get("viewBox").split())
    for shape in element.iter():
        points = [point.split(",") for point in (shape.get("points") or "").split()]
        xs = [x for x, _ in points] + [shape.get(n) for n in ("x", "x1", "x2", "cx")]
        ys = [y for _, y in points] + [shape.get(n) for n in ("y", "y1", "y2", "cy")]
        if shape.get("width"):
            xs.append(str(float(shape.get("x")) + float(shape.get("width"))))
        for value, limit in [(x, width) for x in xs if x] + [(y, height) for y in ys if y]:
            assert re.fullmatch(r"\d+(\.\d+)?", value) and float(value) <= limit, shape.attrib


def polylines(text):
    lines = [e.get("points").split() for e in ET.fromstring(text).iter("polyline")]
    return [[tuple(map(float, point.split(","))) for point in line] for line in lines]


def test_every_claim_is_there_with_value_interval_and_verdict(tmp_path):
    rows = [
        (claim(value=0.59812, spread=0.009, seeds=3), "0.598 ± 0.009 3 seeds", "at most 1"),
        (claim(statement=NASTY, value=2.0, verdict="fails"), "2 1 seed", "at most 1"),
        (claim(statement="b", value=1, low=0.9, verdict="undecided"), "1 1 seed", "0.9 to 1"),
        (claim(statement="c", value=None, verdict="fails"), "not finite 1 seed", "at most 1"),
        (claim(low=3.0, high=None, verdict="not judged"), "0.5 1 seed", "at least 3"),
        (claim(statement="e", high=None, source="Ho et al."), "0.5 1 seed", "any"),
    ]  # fmt: skip
    page = Page(write_report(make_run(tmp_path, claims=[row[0] for row in rows])))
    cells = [" ".join(e["text"].split()) for e in page.all("td")]
    for i, (fields, value, wanted) in enumerate(rows):
        statement, measured, interval, verdict = cells[4 * i : 4 * i + 4]
        assert fields["statement"] in statement and "error" in statement
        assert measured == value and interval.startswith(wanted)
        assert re.fullmatch(f". {fields['verdict']}", verdict)
    assert [e["attrs"]["href"] for e in page.all("a")] == ["https://kexue.fm/archives/9164"] * 5
    assert "2 of 6 claims hold, 2 fail, 1 undecided, 1 not judged" in page.text
    drawn = [e["attrs"]["aria-label"] for e in page.all("svg", "numberline")]
    assert len(drawn) == 4 and drawn[-1] == "wanted 3 to infinity, measured 0.5"


def test_the_first_line_tells_the_outcome(tmp_path):
    for verdicts, words in [
        (["holds"], "✓ holds 1 of 1 claim holds"),
        (["undecided", "fails", "holds"], "✗ fails 1 of 3 claims hold, 1 fails, 1 undecided"),
        (["not judged"] * 2, "– not judged 2 claims, not judged"),
        ([], "no claims"),
    ]:
        page = Page(write_report(make_run(tmp_path, claims=[claim(verdict=v) for v in verdicts])))
        assert " ".join(page.all("p", "outcome")[0]["text"].split()) == words


def test_the_page_loads_nothing_and_escapes_everything(tmp_path):
    nasty = make_run(
        tmp_path, experiment=NASTY, command=NASTY, device=NASTY, versions={NASTY: NASTY},
        claims=[claim(statement=NASTY, metric=NASTY, source="javascript:alert(1)"),
                claim(source='https://a.b/"onclick="alert(1)')],
        config={NASTY: {NASTY: NASTY}, "half": "\ud800"}, measured={NASTY: NASTY},
        pictures=[NASTY, picture(tmp_path / "a&b.png")],
    )  # fmt: skip
    write_lines(tmp_path / "x<i>y" / "metrics.jsonl", [{"kind": "train", "step": 1, NASTY: 2.0}])
    page = Page(write_report(nasty))
    assert_loads_nothing(page)
    assert {e["text"] for e in page.all("b")} == {"this run", "x<i>y"}
    assert page.text.count(NASTY) >= 9 and "x<i>y" in page.text
    assert [e["attrs"]["href"] for e in page.all("a")] == ['https://a.b/"onclick="alert(1)']


def test_facts_of_the_run(tmp_path):
    config = {"optim": {"rate": 0.25, "ema": 0.5, "inner": {"rate": 3}}, "judge": True, "rate": 7}
    changed = ["--config.optim.rate=0.25", "--noconfig.judge"]
    run = make_run(tmp_path, seeds=(0, 1), resumed=True, config=config, overrides=changed)
    page = Page(write_report(run))
    groups = ["".join(e["text"].split()) for e in page.all("div", "group")[:3]]
    assert groups == ["judgechangedtruerate7", "optimratechanged0.25ema0.5", "optim.innerrate3"]
    facts = dict(zip(*([e["text"] for e in page.all(t)] for t in ("dt", "dd")), strict=True))
    assert facts == {
        "finished": "2023-11-14 22:14 UTC", "took": "1 min 15 s", "steps": "300", "seeds": "0, 1",
        "steps per second": "59.5, 59.5", "device": "1 x cpu (cpu)",
        "commit": "0123456789, with uncommitted changes",
    }  # fmt: skip
    told = ("interrupted", "0.10.2", "[1, 2]", "python -m experiments.ddpm --workdir=w")
    assert all(text in page.text for text in told)


def test_pictures_are_inside_the_page(tmp_path):
    picture(tmp_path / "secret.png")
    names = ["the_samples.png", "broken.png", "absent.png", "../secret.png"]
    folder = make_run(tmp_path / "run", pictures=names)
    picture(folder / names[0])
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    page = Page(write_report(folder))
    (image,) = (e["attrs"] for e in page.all("img"))
    content = image["src"].removeprefix("data:image/png;base64,")
    assert base64.b64decode(content, validate=True) == (folder / names[0]).read_bytes()
    assert (image["width"], image["height"]) == ("30", "20") and "the samples" in image["alt"]
    assert all(f"the picture {n} is not shown" in page.text for n in names[1:])


@pytest.mark.slow  # seconds of compiling
def test_large_runs_and_pictures_make_no_large_page(tmp_path):
    names = [picture(tmp_path / name, 900, 720) for name in ("big.png", "also.png")]
    assert (tmp_path / "big.png").stat().st_size > report.PICTURE_BYTES
    config = {"group": {f"field{i}": "x" * 5000 for i in range(2000)}}
    losses = [*np.random.default_rng(1).random(1999).tolist(), 1e12]  # a spike
    path = write_report(make_run(tmp_path, range(13), 2000, losses, config=config, pictures=names))
    assert path.stat().st_size < 3e6
    page = Page(path)
    assert re.fullmatch(r"seed 0\s*training 0\.[45]\d*\s*validation.*", page.all("li")[0]["text"])
    (image,) = page.all("img")
    shrunk = base64.b64decode(image["attrs"]["src"].partition(",")[2])
    assert Image.open(io.BytesIO(shrunk)).size == (700, 560)
    told = ("also.png is not shown", "1000 more fields", "13 folders hold", "seed 11")
    assert all(text in page.text for text in told) and "seed 12" not in page.text


def test_curves_of_several_seeds_share_panels_with_a_legend(tmp_path):
    path = write_report(make_run(tmp_path, (0, 2, 10)))
    page = Page(path)
    charts = re.findall(r'<svg viewBox="0 0 340 210".*?</svg>', path.read_text(), re.S)
    assert [e["text"] for e in page.all("h3")][: len(charts)] == [
        "loss", "accuracy", "gradient norm", "update norm / parameter norm", "steps per second"
    ]  # fmt: skip
    assert [e["text"] for e in page.all("b")] == ["seed 0", "seed 2", "seed 10"] * 5
    entry = "".join(page.all("li")[2]["text"].split())
    assert re.fullmatch(r"seed10training2\.\d+validation2\.25", entry)
    for chart in map(ET.fromstring, charts):
        assert_inside(chart)
        assert {e.get("class").split()[1] for e in chart.iter("polyline")} == {"c0", "c1", "c2"}
        assert all(f"seed {s}" in chart.get("aria-label") for s in (0, 2, 10))
    styles = re.findall(r'polyline class="(\w+)', charts[0])
    assert styles == ["raw"] * 3 + ["mean"] * 3 + ["points"] * 3
    # 0.005 * 0.8^i spans more than two decades; of the last three the geometric mean is the second.
    assert "logarithmic" in page.all("figcaption")[3]["text"]
    assert page.all("li")[9]["text"].split()[-1] == f"{0.005 * 0.8**58:.3g}"
    assert "steps left out: always 0" in page.text


def test_missing_and_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    empty = Page(write_report(tmp_path))
    assert all(t in empty.text for t in ("there is no result.json", "unfinished", "no result yet"))
    folder = make_run(tmp_path / "run", seeds=(0, 1, 2), losses=[1.0, None] * 30)
    with (folder / "seed0" / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\x00\n[1]\n"x"\n{"kind": "train"}\n{"kind": "train", "step": "9"}\n')
        file.write(b'{"kind": "train", "step": -1}\n' + b"[" * 100_000 + b"\n\n")
        file.write(b'{"kind": "train", "step": 400, "loss": NaN, "a": "text", "b": [1], "c": 1')
        file.write(b"0" * 400 + b'}\n{"ki')
    again = ((5, 1.0), (10, 2.0), (15, 3.0), (10, 20.0), (15, 30.0))  # two by a later start
    records = [{"kind": "train", "step": s, "loss": v} for s, v in again]
    write_lines(folder / "seed1" / "metrics.jsonl", records)
    (folder / "seed2" / "metrics.jsonl").write_text("")
    (folder / "config.json").write_text("{")
    steps, values = report.read_runs(folder, [])[0]["seed 1"]["train", "loss"]
    assert steps.tolist() == [5, 10, 15] and values.tolist() == [1, 20, 30]
    page = Page(write_report(folder))
    told = ("0/metrics.jsonl: damaged lines left out: 8", "31 not finite, first at step 10",
            "2/metrics.jsonl holds no records", "config.json is da", "c: never finite")  # fmt: skip
    assert all(text in page.text for text in told)
    (folder / "result.json").write_text('["not", "a", "record"]')
    assert "result.json is damaged" in Page(write_report(folder)).text
    odd = {"claims": [None, {"value": "x", "verdict": "?"}, claim()], "seeds": 3, "config": [],
           "pictures": {"a": 1}, "versions": None, "seconds": "long", "commit": None}  # fmt: skip
    (folder / "result.json").write_text(json.dumps(odd))
    assert "1 of 3 claims hold, 2 not judged" in Page(write_report(folder)).text
    with pytest.raises(ValueError, match="nowhere is not the folder of a run"):
        write_report(tmp_path / "nowhere")


def test_the_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    before = write_report(make_run(tmp_path)).read_bytes()
    monkeypatch.setattr(report.os, "replace", None)
    with pytest.raises(TypeError):
        write_report(make_run(tmp_path, experiment="another"))
    assert (tmp_path / "report.html").read_bytes() == before


def test_text_and_curves_stand_out_in_light_and_dark(tmp_path):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    css = Page(write_report(make_run(tmp_path))).all("style")[0]["text"]
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", block))
                   for block in re.findall(r":root \{(.*?)\}", css, re.S))  # fmt: skip
    pairs = [(t, b, 4.5) for t in ("text", "muted", "link") for b in ("bg", "panel")]
    pairs += [(v, f"{v}-bg", 4.5) for v in ("holds", "fails", "undecided", "open")]
    pairs += [(f"c{i}", "bg", 3.0) for i in range(svg.COLOURS)]
    for colours in (light, dark):
        for front, back, least in pairs:
            a, b = sorted((luminance(colours[front]), luminance(colours[back])))
            assert (b + 0.05) / (a + 0.05) >= least, (front, back)
    assert luminance(light["bg"]) > 0.9 and luminance(dark["bg"]) < 0.1


def test_known_points_are_drawn_where_they_belong():
    # Drawn are x from 24 (10 and two characters of 7) to 322 and y from 172 up to 12, which is 10
    # and 4 % of it more: the second point is half way along and 5 / 10.4 of the way up.
    curve = svg.Curve("a", np.array([1000.0, 1001.0, 1002.0]), np.array([0.0, 5.0, 10.0]))
    text, notes = svg.chart("t", [curve])
    assert polylines(text) == [[(24, 172), (173, 95.1), (322, 18.2)]] and notes == []
    labels = [e.text for e in ET.fromstring(text).iter("text")]
    assert labels == [*"02468", "10", "1000", "1001", "1002", "step"]
    # An interval from 0 to 1 and a margin of 0.22 are drawn from 8 to 212.
    lines = ET.fromstring(svg.number_line(0.5, 0.1, 0.0, 1.0)).iter("line")
    ends = [(e.get("x1"), e.get("x2")) for e in lines if "spread" in e.get("class")]
    assert ends == [("81.7", "138.3"), ("95.8", "124.2")]


def test_the_program_is_told_and_a_share_keeps_its_zero(tmp_path):
    folder = make_run(tmp_path)
    (folder / "program.json").write_text(json.dumps({"flops": 2.5e9, "peak": 2**21, "temp": 1.0}))
    shares = [{"step": i, "time": 1.7e9, "data_wait_share": 10.0**-i} for i in range(1, 6)]
    write_lines(folder / "timings.jsonl", shares)
    page = Page(write_report(folder))
    assert "2.5 GFLOP, 2 MiB at its peak" in page.text
    assert "share of time waiting for data" in page.text
    assert page.text.count("logarithmic") == 1  # the norms' ratio, which falls by decades
    panel = next(r for r in report.read_runs(folder, [])[0].values())["timing", "data_wait_share"]
    assert axes.axis_range(panel[1])[2] and not axes.axis_range(panel[1], may_log=False)[2]
    assert axes.axis_range(panel[1], may_log=False)[0] == 0.0
    (folder / "program.json").write_text("{")
    assert "program.json is damaged" in Page(write_report(folder)).text


def test_gaps_spikes_and_lone_points_are_shown():
    y = np.array([1.0, np.nan, 2.0, 3.0] + [2.0, 3.0] * 50 + [1e9, 2.5, np.nan])
    text, notes = svg.chart("t", [svg.Curve("a", np.arange(len(y)) * 1.0, y)])
    pieces = polylines(text)
    assert [len(p) for p in pieces] == [2, 104] and pieces[0][0] == pieces[0][1]  # a dot
    assert notes == ["1 value above the panel, up to 1e+09", "2 not finite, first at step 1"]
    (mark,) = ET.fromstring(text).iter("polygon")
    spike = next(x for x, y in pieces[1] if y == svg.TOP)
    assert abs(float(mark.get("points").split()[1].split(",")[0]) - spike) <= 4
    heights = [y for _, y in pieces[1]]
    assert max(heights) - sorted(heights)[1] > 40  # 2 and 3 are still far from one another


@given(st.lists(st.lists(VALUES | st.just(math.nan), min_size=1, max_size=50), max_size=3),
       VALUES, st.sampled_from(["raw", "line", "points"]))  # fmt: skip
@example([[1e300, -1e300]], 0.0, "line")
@example([[1e-300, 1e300, 1e-300]], 1e300, "points")
def test_whatever_the_data_all_is_drawn_inside(lists, sure, style):
    curves = [svg.Curve("a", np.arange(len(y)) * 7.0, np.array(y), style, i)
              for i, y in enumerate([*lists, [sure]])]  # fmt: skip
    assert_inside(ET.fromstring(svg.chart("t", curves)[0]))


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(-1e6, 1e6), st.floats(0, 1e6) | st.none())
def test_the_dot_is_in_the_band_if_the_value_is_in_the_interval(value, spread, low, width):
    high = math.inf if width is None else low + width
    root = ET.fromstring(svg.number_line(value, spread, low, high))
    assert_inside(root)
    (left, wide), (x,) = ([float(root.find(tag).get(a)) for a in names.split()]
                          for tag, names in (("rect", "x width"), ("circle", "cx")))  # fmt: skip
    inside = left - 0.1 <= x <= left + wide + 0.1
    assert inside if low <= value <= high else not left + 0.1 < x < left + wide - 1.1
    assert svg.number_line(math.nan, None, low, high) == ""
