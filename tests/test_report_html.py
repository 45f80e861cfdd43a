"""The HTML report: what it says, that it needs and lets in nothing, and how it behaves in a browser.

The runs are small measurements whose verdicts are looked up in their own tables: nothing here is left to chance.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import math
import re
import shlex
from collections import OrderedDict
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pandas as pd
import pytest
import small
import torch
from commands import Run, run  # noqa: F401  (a fixture)
from rich.console import Console
from torch import nn

import fqtstats
from fqtstats.estimators import intervals
from fqtstats.profiles import Profile
from fqtstats.report import columns, tables
from fqtstats.report import html as pages
from fqtstats.report.html import drawing, findings, reading
from fqtstats.report.html import tables as html_tables
from fqtstats.results import Configuration, Result, load, merge

EVIL = "<script>alert(1)</script>&\"'$x$"
VOID = {"meta", "br", "hr", "img", "input", "link", "path", "use", "rect", "wbr", "stop"}


def measured(model: nn.Module, *widths: int, seed: int = 2, draws: int = 8) -> Result:
    parts = [
        fqtstats.measure(model, small.batch(seed=seed), small.loss, small.psq(bits), draws=draws) for bits in widths
    ]
    found = merge(parts)
    arguments = {
        "command": "measure",
        "quantizers": [f"psq@{bits}" for bits in widths],
        "model": "mlp",
        "data": "digits",
        "draws": draws,
        "bounds": True,
        "skip": None,
        "checkpoint": "a file.pt",
    }
    return Result(found.table, {"arguments": arguments, "model": "mlp", **found.metadata})


def named(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict([("first", nn.Linear(12, 8)), (name, nn.Linear(8, 10))]))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: two measurements and a profile of one model, one of another, one with an evil name."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in (Result, Profile):  # figures in the runs' folders are not looked at here
            patch.setattr(kind, "figures", lambda self: {})
        folder = tmp_path_factory.mktemp("runs")
        measured(small.mlp(), 3, 5).save(folder / "two")
        measured(small.mlp(), 5, 8).save(folder / "again")
        measured(small.mlp(seed=7), 4).save(folder / "other")
        fqtstats.profile(small.mlp(), small.batch(), small.loss, small.psq(5), precision=0.3).save(folder / "noise")
        measured(named(EVIL), 3, 4).save(folder / "evil")
        fqtstats.profile(named(EVIL), small.batch(), small.loss, small.psq(4), precision=0.3).save(folder / "worse")
    return folder


@functools.cache
def rendered(*places: Path) -> str:
    return pages.render(pages.read(places)).decode()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves figures out, which take most of the time."""
    for name in ("variance", "widths", "shares", "bounds"):
        monkeypatch.setattr(drawing, name, lambda *_: [])


class Outline(HTMLParser):
    """Elements with their attributes, the texts of some, and whether the tags fit each other."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)
            self.texts.append((tag, ""))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.texts and self.stack:
            tag, before = self.texts[-1]
            self.texts[-1] = (tag, before + data)

    def headings(self) -> list[str]:
        return [text.strip() for tag, text in self.texts if tag in ("h1", "h2")]


# --- what it says ----------------------------------------------------------------------------------------------------


def test_the_sections_come_in_order_and_verdicts_first(runs: Path) -> None:
    outline = Outline(rendered(runs / "two", runs / "noise"))
    assert not outline.stack
    assert outline.headings() == [
        "Quantized gradients of mlp on digits",
        "Verdicts",
        "Summary",
        "Layers",
        "Sources of the variance",
        "Variance by layer",
        "Variance against bits",
        "Where the variance comes from",
        "Variance against its bound",
        "Provenance",
    ]
    figures = [about for tag, about in outline.elements if tag == "svg"]
    assert len(figures) == 4
    assert all(about["role"] == "img" and len(about["aria-label"] or "") > 40 for about in figures)


def test_a_measurement_alone_shows_its_own_shares(runs: Path) -> None:
    headings = Outline(rendered(runs / "other")).headings()
    assert "Shares of the variance" in headings
    assert not {"Sources of the variance", "Variance against bits"} & set(headings)


def test_a_profile_can_stand_alone(runs: Path) -> None:
    outline = Outline(rendered(runs / "noise"))
    assert outline.headings()[1:] == [
        "Verdicts",
        "Sources of the variance",
        "Where the variance comes from",
        "Provenance",
    ]
    assert "of the variance" in " ".join(text for _, text in outline.texts)


def test_tables_hold_every_row_in_full_precision(runs: Path) -> None:
    result = load(runs / "two")
    outline = Outline(rendered(runs / "two"))
    values = [about.get("data-value") for tag, about in outline.elements if tag == "td"]
    for name in ("variance", "grad_norm_sq", "snr", "bias_p"):
        known = result.table[name].dropna()
        assert {repr(float(value)) for value in known} <= set(values)
    low, high = result.table["variance_low"].iloc[0], result.table["variance_high"].iloc[0]
    assert f"{low:.2e} to {high:.2e}" in [about.get("title") for tag, about in outline.elements if tag == "td"]
    heads = [about for tag, about in outline.elements if tag == "th" and about.get("scope") == "col"]
    assert heads
    assert all(len(about.get("title") or "") > 5 for about in heads)
    names = [text for tag, text in outline.texts if tag == "th"]
    assert names.count("4.weight") == names.count("total") == 2
    described = {text.strip() for tag, text in outline.texts if tag == "dt"}
    titles = {text.strip() for tag, text in outline.texts if tag == "span"} & {"variance", "SNR", "bias p", "flags"}
    assert titles <= described
    assert {"variance", "SNR", "bias p"} <= titles


@pytest.mark.parametrize(
    ("values", "question", "state", "words"),
    [
        ({}, "Bias", "good", "no bias found"),
        ({"bias_p": 1e-9}, "Bias", "bad", "biased"),
        ({"own_ratio_p": 1e-12}, "Independence", "bad", "dependent rounding"),
        ({"own_ratio_p": 0.5}, "Independence", "unknown", "dependence open"),  # 8 draws
        ({"q_input_variance": 2.0, "q_input_bound": 1.0}, "Variance and bounds", "bad", "above a bound"),
        ({"variance_low": 2.0, "bound": 1.0, "bound_ratio": 3.0}, "Variance and bounds", "bad", "above a bound"),
    ],
)
def test_verdicts_follow_the_table(
    runs: Path, tmp_path: Path, values: dict[str, float], question: str, state: str, words: str
) -> None:
    result = load(runs / "other")
    table = result.table.copy()
    if not values:
        table["bias_p"] = 0.5
    table.loc[table["layer"] == "2", list(values)] = list(values.values())
    changed = Result(table, result.metadata)
    found = findings.findings(changed, changed.configurations[0])[question]
    assert (found.state, found.claim) == (state, words)
    assert found.symbol in "✓✗?"
    told = {(one.state, one.claim) for one in findings.overall(changed)}
    assert (state, words) in told
    if "bias_p" in values:
        assert "1.00e-09" in found.detail
        assert "0.01 / 7 = 0.00143" in found.detail


def totals(result: Result, **values: float) -> Result:
    """The result with other numbers of the whole model."""
    table = result.table.copy()
    table.loc[table["layer"] == "total", list(values)] = list(values.values())
    return Result(table, result.metadata)


def test_what_was_not_found_is_not_said_to_be_absent(runs: Path) -> None:
    """A test that does not reject is told with the dependence that it would have found, at what power and level."""
    result = load(runs / "other")
    table = result.table.assign(draws=16, own_ratio_p=result.table["own_ratio_p"].where(lambda p: p.isna(), 0.5))
    sharp = totals(Result(table, result.metadata), own_ratio=1.0, own_ratio_low=0.95, own_ratio_high=1.05)
    found = findings.findings(sharp, sharp.configurations[0])["Independence"]
    assert (found.state, found.claim) == ("good", "no dependence found")
    below, above = findings.detectable_ratio(sharp.total(), 1e-6 / 7)
    assert 0.5 < below < 0.9
    assert 1.1 < above < 1.5
    assert f"With 16 draws and this level, only a ratio of at most {below:.3f} or at least {above:.2f} " in found.detail
    assert "probability 0.99" in found.detail
    assert "the level is 1.43e-07" in found.detail
    blunt = totals(sharp, own_ratio_low=0.5, own_ratio_high=2.0)
    assert findings.findings(blunt, blunt.configurations[0])["Independence"].claim == "dependence open"
    without = totals(sharp, own_ratio_low=float("nan"))
    assert (
        "no ratio would have been found" in findings.findings(without, without.configurations[0])["Independence"].detail
    )


def test_the_detectable_ratio_is_detected() -> None:
    """The test that it is about finds it as often as is said, and its root much less often.

    Of 400 runs with a power of 0.98 (the approximation is good to a per cent), fewer than 372 find it with a
    probability of 1e-8.
    """
    generator, level, draws = np.random.default_rng(0), 1e-6 / 7, 16

    def drawn(ratio: float) -> intervals.MeanRatio:
        return intervals.mean_ratio(ratio * generator.gamma(100, 0.01, draws), np.ones(draws))

    told = [
        findings.detectable_ratio(
            pd.Series({"draws": draws, "own_ratio": found.value, "own_ratio_low": found.low}), level
        )
        for found in (drawn(1.0) for _ in range(200))
    ]
    for end in np.median(told, axis=0):
        assert sum(drawn(end).p_value < level for _ in range(400)) >= 372
        assert sum(drawn(end**0.5).p_value < level for _ in range(400)) < 200


@pytest.mark.parametrize(
    ("low", "high", "state", "claim"),
    [
        (0.2, 0.3, "good", "gradient above its noise"),
        (0.2, 0.5, "unknown", "signal against noise open"),
        (0.4, 0.5, "caution", "noise dominates"),
        (math.nan, math.nan, "unknown", "signal against noise open"),
    ],
)
def test_the_signal_is_judged_by_its_interval(runs: Path, low: float, high: float, state: str, claim: str) -> None:
    values = {"grad_norm_sq": 1.0, "variance": 0.3, "variance_low": low, "variance_high": high}
    result = totals(load(runs / "other"), **values, snr=1 / 0.3, sqrt3_margin=(1 / 0.9) ** 0.5)
    found = findings.findings(result, result.configurations[0])["Signal"]
    assert (found.state, found.claim) == (state, claim)
    assert ("95 %" in found.detail) == math.isfinite(low)
    assert "have none" in found.detail or f"95 %: {1 / high:.2f} to {1 / low:.2f}" in found.detail


def test_a_layer_is_called_a_layer(runs: Path) -> None:
    """Layers of nn.Sequential are called by numbers."""
    detail = findings.findings(load(runs / "other"), Configuration("psq", 4))["Variance and bounds"].detail
    assert re.search(r"\(Q[12] of layer \d\)", detail)
    blamed = findings.of_profile(pages.read([runs / "noise"])[0].content)[0]
    assert re.search(r"Q[12] of layer \d", blamed.detail)


def test_tables_of_pages_and_of_terminals_are_of_one_list(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column has one title, and one format."""
    key = "snr"
    changed = dataclasses.replace(columns.QUANTITIES[key], title="another", text=lambda row: "as always")
    monkeypatch.setitem(columns.QUANTITIES, key, changed)
    result = load(runs / "two")
    item = result.configurations[0]
    for table in (html_tables.layers(result, item, "t"), html_tables.summary(result, "t")):
        place = [head.title for head in table.heads].index("another")
        assert {row[place].text for row in table.rows} == {"as always"}
    console = Console(width=250, file=io.StringIO())
    with console.capture() as capture:
        console.print(tables.layer_table(result, item), tables.comparison_table(result))
    assert capture.get().count("as always") == len(result.select(item)) + len(result.configurations)
    titles = {head.title for head in html_tables.layers(result, item, "t").heads}
    for place in columns.LAYERS:
        shown = columns.QUANTITIES[place.key].title in capture.get()
        assert shown == (columns.QUANTITIES[place.key].title in titles) or place.key in (
            "weight_bound",
            "sampling_ratio",
        )


@pytest.mark.parametrize(("fine", "told"), [(True, ("good", "backends agree")), (False, ("bad", "backends disagree"))])
def test_backends_that_were_compared_are_told(runs: Path, fine: bool, told: tuple[str, str]) -> None:
    result = load(runs / "other")
    assert told not in {(one.state, one.claim) for one in findings.overall(result)}
    entry = {**result.metadata["configurations"][0], "parity": [{"ok": True}, {"ok": fine}]}
    compared = Result(result.table, {**result.metadata, "backend": "native", "configurations": [entry]})
    assert told in {(one.state, one.claim) for one in findings.overall(compared)}


def test_what_was_not_drawn_is_not_tested() -> None:
    exact = fqtstats.measure(small.mlp(), small.batch(), small.loss, small.psq(4), method="exact", draws=0)
    found = findings.findings(exact, exact.configurations[0])
    assert [one.state for one in found.values()] == ["unknown", "good", "unknown", "unknown"]
    page = pages.render([reading.Run("exact", exact, {"arguments": {}, "finished": True})]).decode()
    assert "not tested" in page
    assert "exact variances, no draws" in page


def test_runs_of_one_model_are_compared_and_told_apart(runs: Path) -> None:
    (one,) = reading.subjects(pages.read([runs / "two", runs / "again"]))
    assert one.result is not None
    assert [str(item) for item in one.result.configurations] == ["psq@3", "psq (two)@5", "psq (again)@5", "psq@8"]
    first = one.result.total(Configuration("psq (two)", 5))["variance"]
    assert first == load(runs / "two").total(Configuration("psq", 5))["variance"]
    (named_once,) = reading.subjects(pages.read([runs / "two", runs / "two" / ".." / "two"]))
    assert len(named_once.runs) == 1


def test_runs_of_different_models_are_not_compared(runs: Path, undrawn: None) -> None:
    groups = reading.subjects(pages.read([runs / "two", runs / "other", runs / "noise"]))
    assert [[own.name for own in group.runs] for group in groups] == [["two", "noise"], ["other"]]
    page = pages.render(pages.read([runs / "two", runs / "other"])).decode()
    assert "not comparable" in page
    assert Outline(page).headings().count("Verdicts") == 2
    assert "not comparable" not in rendered(runs / "two")


def test_many_configurations_are_a_table_with_details_folded(runs: Path, undrawn: None) -> None:
    result = load(runs / "other")
    parts = [result.table.assign(quantizer=name, bits=bits) for name in ("a", "b", "c") for bits in (4, 8)]
    many = Result(pd.concat(parts), result.metadata)
    page = pages.render([reading.Run("many", many, {"arguments": {}, "finished": True})]).decode()
    details = [about for tag, about in Outline(page).elements if tag == "details"]
    assert ["open" in about for about in details] == [False, True, *[False] * 5]
    assert page.count('<table class="answers">') == 1


def test_the_command_is_the_one_that_was_given(runs: Path) -> None:
    (found,) = pages.read([runs / "two"])
    words = "fqtstats measure --quantizer psq --bits 3,5 --model mlp --data digits --draws 8 --bounds --checkpoint"
    assert shlex.split(reading.command(found)) == [*words.split(), "a file.pt"]
    assert "'a file.pt'" in reading.command(found)
    (library,) = pages.read([runs / "noise"])
    assert reading.command(library) == ""


# --- what it needs and lets in ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("two", "noise"), ("evil", "worse")])
def test_the_page_needs_nothing_beside_itself(runs: Path, names: tuple[str, str]) -> None:
    page = rendered(*(runs / name for name in names))
    elements = Outline(page).elements
    for tag, about in elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "audio", "video", "form"), tag
        for key in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert (about.get(key) or "#").startswith(("#", "data:image/png;base64")), (tag, key)
        assert not any(key.startswith("on") for key in about), (tag, about)
        assert not re.search(r"url\((?!#)", about.get("style") or "")
    (styles,) = re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL)
    assert not re.search(r"@import|url\(|@font-face", styles)
    assert "http" not in page.replace("http-equiv", "")
    (policy,) = [about["content"] for tag, about in elements if about.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    identities = [about["id"] for _, about in elements if "id" in about]
    assert len(identities) == len(set(identities))
    referred = {about["href"] for _, about in elements if (about.get("href") or "").startswith("#")}
    assert referred <= {f"#{own}" for own in identities}


def test_names_are_shown_and_never_obeyed(runs: Path) -> None:
    page = rendered(runs / "evil", runs / "worse")
    outline = Outline(page)
    assert [tag for tag, _ in outline.elements].count("script") == 1
    assert "alert(1)</script>" not in page
    assert (f"{EVIL}.weight") in [text for tag, text in outline.texts if tag == "th"]
    assert any(EVIL[-9:] in text for tag, text in outline.texts if tag == "text")  # as it is, not as a formula


def test_control_characters_in_names_do_no_harm() -> None:
    result = fqtstats.measure(named("\x01\x0b]]>"), small.batch(), small.loss, small.psq(4), draws=4)
    page = pages.render([reading.Run("\x02", result, {"arguments": {}, "finished": True})]).decode()
    assert not Outline(page).stack


def test_the_same_runs_give_the_same_bytes(runs: Path, run: Run, tmp_path: Path) -> None:  # noqa: F811
    first = rendered(runs / "two", runs / "noise")  # maybe made long ago
    done = run("report", str(runs / "two"), str(runs / "noise"), "--html", "--out", "mine.html")
    assert (done.status, done.out) == (0, "saved in mine.html\n"), done.err
    assert (tmp_path / "mine.html").read_text() == first
    assert str(runs) not in first


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_report_stands_beside_the_first_run_and_is_replaced(runs: Path, run: Run, undrawn: None) -> None:  # noqa: F811
    place = runs / "other" / "report.html"
    assert run("report", str(runs / "other")).status == 0
    before = place.read_bytes()
    place.write_bytes(before + b"<!-- older -->")
    assert run("report", str(runs / "other"), "--html").status == 0
    assert place.read_bytes() == before
    assert load(runs / "other").table.shape  # it is still a run
    place.unlink()


@pytest.mark.parametrize("kind", ["text", "folder", "nowhere", "empty"])
def test_nothing_but_a_report_is_overwritten(runs: Path, run: Run, tmp_path: Path, kind: str) -> None:  # noqa: F811
    place = tmp_path / "kept"
    if kind == "text":
        place.write_text("<!doctype html>\nmine")
    elif kind == "folder":
        place.mkdir()
    elif kind == "nowhere":
        place = tmp_path / "none" / "kept"
    done = run("report", str(runs / "other"), "--html", "--out", "" if kind == "empty" else str(place))
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert "fqtstats: error: " in done.err
    assert kind != "text" or place.read_text() == "<!doctype html>\nmine"
    assert not list(tmp_path.glob("*.tmp"))


def broken(kind: str, runs: Path, tmp_path: Path) -> Path:
    place = tmp_path / "run"
    if kind == "nothing":
        return place
    if kind == "a file":
        place.write_text("")
        return place
    place.mkdir()
    if kind == "not a run":
        return place
    for name in ("run.json", "results.parquet"):
        (place / name).write_bytes((runs / "other" / name).read_bytes())
    document = json.loads((place / "run.json").read_text())
    if kind == "not finished":
        document["finished"] = False
    elif kind == "a training":
        document["kind"] = "training"
    elif kind == "newer":
        document["version"] = 99
    elif kind == "damaged":
        (place / "results.parquet").write_bytes(b"PAR1")
    (place / "run.json").write_text("{" if kind == "no JSON" else json.dumps(document))
    return place


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("nothing", "expected the folder of a run, found nothing"),
        ("a file", "expected the folder of a run, found a file"),
        ("not a run", "is not a run directory"),
        ("not finished", "is not finished; continue it with --resume"),
        ("a training", "made of runs of fqtstats measure and fqtstats profile, but the run in"),
        ("newer", "version 99"),
        ("damaged", "is corrupted"),
        ("no JSON", "is corrupted"),
    ],
)
def test_what_cannot_be_reported(runs: Path, run: Run, tmp_path: Path, kind: str, told: str) -> None:  # noqa: F811
    done = run("report", str(runs / "two"), str(broken(kind, runs, tmp_path)), "--html", "--out", "out.html")
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert told in done.err
    assert not (tmp_path / "out.html").exists()


def test_a_run_is_needed(run: Run) -> None:  # noqa: F811
    done = run("report", "--html")
    assert done.status == 2
    assert "RUN..." in done.err


# --- in a browser ----------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(
    browser.executable() is None, reason="NOT TESTED in a browser: no chromium here (apt-get install chromium)"
)

COLUMN = """(name) => {
  const table = document.querySelector("table.sortable[id*=layers]");
  const index = [...table.tHead.rows[0].cells].findIndex((cell) => cell.firstElementChild.textContent === name);
  return [...table.tBodies[0].rows].map((row) => index === 0 || !row.cells[index].dataset.value
    ? row.cells[index].textContent : Number(row.cells[index].dataset.value));
}"""
HEAD = "table.sortable[id*=layers] th:nth-child({}) [role=button]"


@pytest.fixture(scope="module")
def opened_browser(tmp_path_factory: pytest.TempPathFactory):
    with browser.opened(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(params=[("two", "noise")], ids=" ".join)
def page(opened_browser: browser.Browser, runs: Path, tmp_path: Path, request: pytest.FixtureRequest):
    """A page with a report."""
    place = tmp_path / "report.html"
    place.write_text(rendered(*(runs / name for name in request.param)))
    found = opened_browser.page()
    found.resize(1200, 900)
    found.open(place)
    return found


@needs_browser
@pytest.mark.parametrize("page", [("evil", "worse"), ("two", "noise")], indirect=True, ids=" ".join)
def test_the_page_opens_without_complaints_or_requests(page: browser.Page) -> None:
    assert page.evaluate("document.title").startswith("Quantized gradients")
    assert page.complaints == []
    assert len([address for address in page.requested if not address.startswith("data:image/png")]) == 1
    # The policy holds, and it would be noticed if it did not: a script that is put in later does not run.
    page.evaluate(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)"
    )
    assert page.evaluate("window.ran === undefined")
    assert any("Content Security Policy" in text for text in page.complaints)
    # Text is drawn large enough and inside its figure (the box of a formula is larger than what is drawn).
    outside = """[...document.querySelectorAll("svg")].flatMap((svg) => {
      const box = svg.getBoundingClientRect(), room = 12;
      return [...svg.querySelectorAll("text")].filter((text) => {
        const own = text.getBoundingClientRect();
        return own.left < box.left - room || own.right > box.right + room || Math.max(own.height, own.width) < 7;
      }).map((text) => text.textContent);
    })"""
    assert page.evaluate(outside) == []


@needs_browser
def test_a_click_sorts_by_number_and_back(page: browser.Page) -> None:
    def column(name: str) -> list[float | str]:
        return page.evaluate(f"({COLUMN})({json.dumps(name)})")

    def state(index: int) -> str | None:
        return page.evaluate(f"document.querySelector('{HEAD.format(index)}').parentElement.getAttribute('aria-sort')")

    network, variances = column("parameter"), column("variance")
    assert sorted(variances) != variances
    assert sorted(map(str, variances)) != sorted(variances, key=float)
    page.click(HEAD.format(5))
    assert column("variance") == sorted(variances)
    assert state(5) == "ascending"
    page.click(HEAD.format(5))
    assert column("variance") == sorted(variances, reverse=True)
    assert state(5) == "descending"
    page.click(HEAD.format(5))
    assert column("parameter") == network
    assert state(5) is None
    # With the keyboard, and in another column: what has no number stays last.
    page.evaluate(f"document.querySelector('{HEAD.format(2)}').focus()")
    page.press("Enter", 13)
    assert column("numel") == sorted(column("numel"))
    assert (state(2), state(5)) == ("ascending", None)
    page.press(" ", 32)
    assert state(2) == "descending"
    page.click(HEAD.format(1))
    assert column("parameter") == sorted(column("parameter"))
    assert page.evaluate("document.querySelector('table[id*=layers] tfoot th').textContent") == "total"


@needs_browser
def test_a_phone_scrolls_tables_in_their_own_box(page: browser.Page) -> None:
    page.resize(360, 780, 2, mobile=True)
    assert page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]") == [360, 360]
    wide, box = page.evaluate(
        "(() => { const t = document.querySelector('table[id*=layers]'); const b = t.parentElement;"
        "b.scrollLeft = 200; const f = t.tBodies[0].rows[0].cells[0].getBoundingClientRect();"
        "return [[t.scrollWidth, f.left], [b.clientWidth, b.getBoundingClientRect().left]]; })()"
    )
    assert wide[0] > box[0]
    assert wide[1] == pytest.approx(box[1], abs=1.5)  # the first column stays


@needs_browser
def test_flags_come_second_and_all_columns_fit_a_common_screen(
    opened_browser: browser.Browser, runs: Path, tmp_path: Path, undrawn: None
) -> None:
    """With every column there is, long names, numbers with exponents, and every flag."""
    result = load(runs / "other")
    table = result.table.copy()
    numbers = ["bias_p", "snr", "q_input_bound", "q_weight_bound", "sampling_variance", "own_ratio", "bound_ratio"]
    table.loc[:, numbers] = 1.23e-5
    table.loc[:, ["bound", "own_ratio_p", "sqrt3_margin"]] = 1e-20
    rows = table["layer"] != "total"
    table.loc[rows, "layer"] = "stages.2.0.shortcut." + table.loc[rows, "layer"]
    changed = Result(table, result.metadata)
    place = tmp_path / "flagged.html"
    place.write_bytes(pages.render([reading.Run("flagged", changed, {"arguments": {}, "finished": True})]))
    found = opened_browser.page()
    found.resize(1280, 900)
    found.open(place)
    heads = "[...table.tHead.rows[0].cells].map((cell) => cell.firstElementChild.textContent)"
    every = "[...document.querySelectorAll('table.sortable')]"
    for titles in found.evaluate(f"{every}.map((table) => {heads})"):
        assert titles[1] == "flags"
        assert len(titles) >= 12
    words = found.evaluate(f"{every}.map((table) => table.tBodies[0].rows[0].cells[1].textContent)")
    assert all({"BIASED", "DEPENDENT", "NOISY"} <= set(text.split(", ")) for text in words)
    assert all(found.evaluate(f"{every}.map((table) => table.scrollWidth <= table.parentElement.clientWidth)"))


@needs_browser
def test_it_prints_unfolded(page: browser.Page) -> None:
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = false")
    folded = page.pdf()
    assert folded.startswith(b"%PDF")
    pages_ = len(re.findall(rb"/Type\s*/Page\b", folded))
    page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    assert pages_ == len(re.findall(rb"/Type\s*/Page\b", page.pdf()))
    assert 3 <= pages_ <= 30
