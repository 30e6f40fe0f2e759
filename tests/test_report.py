"""The report's words and its page, on results that were made up for these tests (no training ran)."""

from __future__ import annotations

import copy
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from leantrain.report import write_report
from leantrain.report.charts import MEASURES, evenly, looks, looks_inside
from leantrain.report.words import duration, mean_and_spread, p_text, quantity, signed, verdict
from leantrain.results import differing_settings, summarise, versus_baseline

EVIL = "<script>alert(1)</script>"

# What each made-up run is: final loss, milliseconds per step, optimizer bytes.
MADE_UP = {"adamw": (2.31, 52.0, 9_480_000), "galore": (2.34, 61.0, 3_510_000), "muon": (2.22, 58.5, 6_020_000)}


def made_up_result(name: str, seed: int, *, classifier: bool = False) -> dict[str, Any]:
    """A run result with the shape that training writes, its numbers drawn from thin air."""
    rng = random.Random(f"{name}{seed}")
    final, step_ms, state = MADE_UP[name]
    luck = random.Random(seed).gauss(0, 0.02)  # common to all runs of a seed, as in real pairs
    steps, tokens = range(10, 401, 10), 0 if classifier else 8 * 128

    def loss(step: int) -> float:
        return final + luck + 3.2 * math.exp(-step / 55) + rng.gauss(0, 0.006)

    curve = [[s, s * tokens, s * step_ms / 1e3, loss(s) + rng.gauss(0, 0.06)] for s in steps]
    val = [[s, s * tokens, s * step_ms / 1e3, loss(s)] for s in range(50, 401, 50)]
    last = val[-1][3]
    quality = {"val_accuracy": 0.9 - 0.05 * last} if classifier else {"val_perplexity": math.exp(last)}
    peak = {"parameters": 4_740_000, "gradients": 4_740_000, "optimizer_state": state,
            "activations": 31_200_000, "other": 8_000_000}  # fmt: skip
    return {
        "schema": 1, "name": name, "seed": seed, "status": "finished",
        "steps": 400, "tokens": 400 * tokens, "examples": 3200, "seconds": 0.4 * step_ms, "parameters": 1_185_000,
        "final": {"train_loss": curve[-1][3], "val_loss": last, **quality},
        "curve": {"train": curve, "val": val},
        "ledger": {
            "steps": 400,
            "step_seconds": {"median": step_ms / 1e3, "p99": step_ms / 700, "max": 0.2, "total": 0.4 * step_ms},
            "phase_seconds": {"data": 0.0004, "forward": 0.013, "backward": 0.026, "exchange": 0.0,
                              "update": step_ms / 1e3 - 0.0406, "other": 0.0012},
            "peak_bytes": {**peak, "total": sum(peak.values())},
            "flops": {"per_step": 7_300_000_000, "total": 2_920_000_000_000},
            "bytes_sent": 0, "examples": 3200, "tokens": 400 * tokens,
            "energy_joules": None, "energy_source": "not available: no RAPL counters can be read on this machine",
            "events": {}, "device": "cpu",
        },
        "environment": {}, "recipe": {}, "notes": [],
    }  # fmt: skip


def made_up_results(seeds: tuple[int, ...] = (0, 1, 2), *, classifier: bool = False) -> dict[str, Any]:
    runs: dict[str, Any] = {}
    for name in MADE_UP:
        results = [made_up_result(name, seed, classifier=classifier) for seed in seeds]
        baseline = runs["adamw"]["results"] if runs else results
        runs[name] = {
            "status": "finished", "seeds": list(seeds), "results": results, "summary": summarise(results), "notes": [],
            "versus_baseline": {} if name == "adamw" else versus_baseline(results, baseline),
        }  # fmt: skip
    recipes = {
        name: {"optim": {"class_path": f"some.{name}", "init_args": {"lr": 0.001 * i}}, "steps": 400}
        for i, name in enumerate(MADE_UP, 1)
    }
    grid = [{"value": v, "val_loss": x, "status": "finished"} for v, x in ((0.001, 2.5), (0.003, 2.4), (0.01, 2.45))]
    grid.append({"value": 0.03, "val_loss": None, "status": "diverged"})
    tuned = {"key": "optim.lr", "grid": grid, "best": 0.003, "seconds": 40.0, "seed": 7, "steps": 200, "at_edge": False}
    return {
        "schema": 1, "name": "made-up", "baseline": "adamw", "status": "finished", "created": "2024-05-06 07:08 UTC",
        "budget": {"kind": "steps", "value": 400}, "seeds": list(seeds),
        "tune": {name: copy.deepcopy(tuned) for name in MADE_UP}, "runs": runs,
        "settings": differing_settings(recipes),
        "environment": {"python": "3.11", "torch": "2.x", "cpu": {"name": "some processor", "cores": 2}},
        "cost": {"tuning_seconds": 120.0, "total_seconds": 300.0, "trainings": 21},
        "notes": ["p-values are not corrected for the number of runs."],
        "command": "leantrain compare comparison.yaml", "comparison": "name: made-up\n",
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(made_up_results(), path)
    return path


def with_probes(results: dict[str, Any], places: tuple[str, ...] = ("input", "layers.1", "head")) -> dict[str, Any]:
    """The same results of runs whose hidden layers were looked at four times."""
    for run in results["runs"].values():
        for result in run["results"]:
            result["probes"] = [
                {"step": step, "probe/accuracy": 0.8}
                | {
                    f"probe/{place}/{measure}": None if measure == "scatter" and not depth else depth + step / 1000
                    for depth, place in enumerate(places)
                    for measure in MEASURES
                }
                for step in (0, 100, 200, 400)
            ]
    return results


def words(results: dict[str, Any], name: str) -> str:
    return verdict(results, name).replace("\N{NO-BREAK SPACE}", " ")


def test_the_verdict_is_one_sentence_made_from_the_numbers():
    results = made_up_results()
    against = results["runs"]["galore"]["versus_baseline"]
    against["optimizer_state_bytes"]["ratio"], against["step_seconds"]["ratio"] = 0.37, 1.3
    against["peak_bytes"]["ratio"], against["val_perplexity"]["ratio"] = 1.0, 1.012
    against["val_loss"]["p_value"] = 0.0312
    assert words(results, "galore") == (
        "optimizer memory −63 %, peak memory unchanged, validation perplexity +1.2 % (p = 0.031, 3 seeds), "
        "step time ×1.30."
    )
    against["val_loss"]["p_value"] = 0.41
    assert "+1.2 % (within the noise of the seeds, p = 0.41, 3 seeds)" in words(results, "galore")


@pytest.mark.parametrize(
    ("seeds", "said"),
    [((0,), "one seed: no statement about noise"), ((0, 1), "two seeds: too few for a test")],
)
def test_too_few_seeds_make_no_statement_about_noise(seeds: tuple[int, ...], said: str):
    sentence = words(made_up_results(seeds), "galore")
    assert said in sentence and "p =" not in sentence and "p <" not in sentence


def test_the_baseline_is_described_by_its_own_numbers():
    sentence = words(made_up_results((0,)), "adamw")
    assert sentence.startswith("baseline, validation perplexity ") and "optimizer memory 9.48 MB" in sentence


def test_classifiers_are_judged_by_accuracy_in_points():
    results = made_up_results(classifier=True)
    results["runs"]["muon"]["versus_baseline"]["val_accuracy"]["difference"] = 0.0123
    assert "validation accuracy +1.2 points (p = " in words(results, "muon")


def test_a_run_that_did_not_end_well_says_so_first():
    results = made_up_results()
    run = results["runs"]["muon"]
    run.update(status="failed", summary={}, versus_baseline={})
    run["results"] = [{"seed": s, "status": "failed", "error": "the loss is nan", "notes": []} for s in (0, 1, 2)]
    assert words(results, "muon") == "failed: the loss is nan"
    run.update(status="does not fit", results=[], notes=["with micro-batches of 1 example it needs 9 MB"])
    assert words(results, "muon") == "does not fit: with micro-batches of 1 example it needs 9 MB"


def test_seeds_that_are_missing_are_mentioned():
    results = made_up_results()
    results["runs"]["galore"]["results"][1] = {"seed": 1, "status": "failed", "error": "x", "notes": []}
    assert words(results, "galore").endswith("only 2 of 3 seeds finished.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (quantity(0, "bytes"), "0 B"), (quantity(999, "bytes"), "999 B"), (quantity(3_510_000, "bytes"), "3.51 MB"),
        (quantity(2.92e12, "flops"), "2.92 TFLOP"), (quantity(1500, "joules"), "1.5 kJ"),
        (quantity(409_600, "count"), "409,600"), (quantity(1_185_000, "count"), "1.19 M"),
        (quantity(0.9123, "percent"), "91.23 %"), (quantity(2.34567, "loss"), "2.346"), (quantity(None, "loss"), "–"),
        (duration(0), "0 s"), (duration(2.5e-5), "25 µs"), (duration(0.0615), "61.5 ms"), (duration(119), "119 s"),
        (duration(300), "5 min"), (duration(7200), "2 h"),
        (signed(-63.2), "−63"), (signed(0.0123), "+0.012"), (signed(1.24), "+1.2"), (signed(0), "0"),
        (mean_and_spread({"mean": 10.3712, "std": 0.0234, "n": 3}, "loss"), "10.371 ± 0.023"),
        (mean_and_spread({"mean": 4e6, "std": 0.0, "n": 3}, "bytes"), "4 MB"),
        (mean_and_spread({"mean": 0.052, "std": 0.0012, "n": 3}, "seconds"), "52 ms ± 1.2 ms"),
        (p_text(0.00001), "p < 0.001"), (p_text(0.0312), "p = 0.031"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_people_read_them(text: str, expected: str):
    assert text.replace("\N{NO-BREAK SPACE}", " ") == expected


class Page(HTMLParser):
    """The elements of a page, its visible text, and whether every element is closed where it should be."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_says_what_matters_first(page: Path):
    text = Page(page.read_text()).text.replace("\N{NO-BREAK SPACE}", " ")
    in_order = [
        "made-up", "optimizer memory −63 %", "The runs", "Loss over tokens", "Loss over time", "Peak memory by kind",
        "Time of a step by phase", "What each run used", "no RAPL counters", "Tuning", "diverged",
        "Settings that differ",
        "some.galore",
        "Cost of this comparison", "40 %", "Environment", "some processor", "leantrain compare", "Notes",
    ]  # fmt: skip
    places = [text.find(part) for part in in_order]
    assert -1 not in places and places == sorted(places)


def test_the_page_can_be_read_by_a_screen_reader(page: Path):
    parsed = Page(page.read_text())
    assert parsed.all("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in parsed.all("meta"))
    assert all(cell.get("scope") in ("row", "col") for cell in parsed.all("th")) and parsed.all("th")
    figures = [svg for svg in parsed.all("svg") if not svg.get("aria-hidden")]
    assert len(figures) == 4 and all(svg["role"] == "img" and svg["aria-label"] for svg in figures)
    ids = [attributes["id"] for _, attributes in parsed.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))


def test_the_page_asks_for_nothing_from_anywhere(page: Path):
    html = page.read_text()
    parsed = Page(html)
    assert not parsed.all("script") and not parsed.all("link") and not parsed.all("img")
    for _, attributes in parsed.elements:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", html)


def test_names_and_messages_of_users_are_only_ever_text(tmp_path: Path):
    results = made_up_results()
    results["name"] = results["command"] = results["comparison"] = EVIL
    results["notes"] = [EVIL]
    results["environment"] = {EVIL: EVIL}
    results["settings"] = {EVIL: {"adamw": EVIL, "galore": [EVIL]}}
    for table in ("runs", "tune"):
        results[table][EVIL] = results[table].pop("muon")
    results["tune"][EVIL].update(key=EVIL)
    results["tune"][EVIL]["grid"][0].update(value=EVIL, status=EVIL, val_loss=None)
    for result in results["runs"][EVIL]["results"]:
        result["ledger"]["energy_source"] = EVIL
    results["runs"]["galore"]["results"][0] = {"seed": 0, "status": "failed", "error": EVIL, "notes": [EVIL]}
    write_report(results, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<script" not in html and not Page(html).all("script")
    assert Page(html).text.count(EVIL) > 15


def test_a_dollar_in_a_name_is_no_formula(tmp_path: Path):
    results = made_up_results((0,))
    results["runs"]["$x^2$"] = results["runs"].pop("muon")
    write_report(results, tmp_path / "report.html")
    assert "$x^2$</text>" in (tmp_path / "report.html").read_text()


def test_what_the_layers_do_is_drawn_where_somebody_looked(page: Path, tmp_path: Path):
    assert "What the layers do" not in page.read_text()
    results = with_probes(made_up_results(), ("input", EVIL, "head"))
    write_report(results, tmp_path / "report.html")
    parsed = Page((tmp_path / "report.html").read_text())
    assert all(title in parsed.text for title in ("What the layers do", *MEASURES.values()))
    assert f"Depth: 0 input, 1 {EVIL}, 2 head." in parsed.text and not parsed.all("script")
    assert "mathdefault" not in parsed.text  # a formula where a number should be
    ids = [attributes["id"] for _, attributes in parsed.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    results["runs"]["muon"]["results"] = with_probes(made_up_results(), ("input", "head"))["runs"]["muon"]["results"]
    write_report(results, tmp_path / "report.html")  # another network, whose depths are others
    assert "Depth: " not in (tmp_path / "report.html").read_text()


def test_looks_inside_are_means_over_the_seeds_at_common_steps():
    first = {"step": 5, "probe/layers.1/dead": 0.25, "probe/layers.1/scatter": 3.0, "probe/accuracy": 0.5}
    second = {"step": 5, "probe/layers.1/dead": 0.75, "probe/layers.1/scatter": None, "probe/accuracy": 0.7}
    results = [
        {"status": "finished", "probes": [first, {**first, "step": 9}]},
        {"status": "finished", "probes": [second]},
        {"status": "failed", "probes": []},
    ]
    assert looks_inside(results) == {5: {"layers.1": {"dead": 0.5}}}
    assert looks_inside([{"status": "finished"}]) == looks_inside([]) == {}
    assert [evenly(range(n), 3) for n in (0, 1, 3, 7)] == [[], [0], [0, 1, 2], [0, 3, 6]]


@pytest.mark.parametrize("left", ["nothing", "no ledger", "null losses", "interrupted"])
def test_a_page_is_made_from_whatever_there_is(tmp_path: Path, left: str):
    results = made_up_results()
    for run in results["runs"].values():
        if left == "nothing":
            run.update(results=[], summary={}, versus_baseline={}, status="interrupted")
        for result in run["results"]:
            if left == "no ledger":
                result["ledger"] = None
            if left == "null losses":
                result["curve"] = {name: [[*point[:3], None] for point in c] for name, c in result["curve"].items()}
        run["summary"] = summarise(run["results"])
    if left in ("nothing", "interrupted"):
        results.update(status="interrupted", tune={}, settings={}, environment={})
        results["cost"].update(tuning_seconds=0)
    write_report(results, tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert ("interrupted: this is what was done" in text) == (left in ("nothing", "interrupted"))
    assert "The runs" in text and "nan" not in text.lower().replace("finance", "")


def test_the_same_results_give_the_same_page(page: Path, tmp_path: Path):
    write_report(made_up_results(), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page.read_text()


def test_many_runs_can_be_told_apart():
    drawn = looks([f"run{i}" for i in range(100)])
    assert len(set(drawn.values())) == 100
    first = list(drawn.values())[:4]
    assert len({look.colour for look in first}) == len({look.dash for look in first}) == 4


# In a browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MEASURE = """<!doctype html><body style="margin:0">
<iframe src="report.html" style="border:0;width:{width}px;height:800px"></iframe>
<script>document.querySelector("iframe").onload = event => {{
  const root = event.target.contentDocument.documentElement;
  const font = getComputedStyle(root.querySelector("body")).fontSize;
  document.title = [root.scrollWidth, root.clientWidth, font].join(" ");
}};</script>"""


def in_browser(tmp_path: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--hide-scrollbars",
         "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900", *arguments],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_scrolling_sideways(tmp_path: Path, width: int):
    results = made_up_results()
    long = "a-run-with-a-rather-long-name-such-as-people-give-them-when-they-have-many"
    results["runs"][long] = results["runs"].pop("muon")
    results["environment"]["a path"] = "/" + "long" * 40
    write_report(results, tmp_path / "report.html")
    (tmp_path / "frame.html").write_text(MEASURE.format(width=width))
    dom = in_browser(tmp_path, "--dump-dom", f"file://{tmp_path}/frame.html")
    title = re.search(r"<title>(\d+) (\d+) (\S+)</title>", dom)
    assert title is not None
    assert int(title[1]) <= int(title[2]) == width
    assert title[3] == "16px"  # the style sheet was applied
