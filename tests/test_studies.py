"""The studies: each in its quick form, and what they share."""

import ast
import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.cells import cell_len

from fqtstats.errors import InputError
from fqtstats.schema import Column

ROOT = Path(__file__).parents[1]


def registered():
    """The names in analysis/__init__.py, which the installed package does not have."""
    for node in ast.parse((ROOT / "analysis" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "STUDIES":
            return ast.literal_eval(node.value)
    raise AssertionError("analysis/__init__.py names no studies")


@pytest.mark.parametrize("name", registered())
def test_the_quick_form_measures_draws_and_tells(name, analysis, tmp_path, monkeypatch):
    study, shared = analysis(name).STUDY, analysis("study")
    assert study.name == name
    assert study.question.endswith("?")
    monkeypatch.chdir(tmp_path)
    saved = shared.command(study, ["--quick", "--out", "out"])
    assert saved.about["settings"] == shared.as_json(study.quick)
    assert saved.claims
    assert all("nan" not in claim.text.lower() for claim in saved.claims)
    assert saved.about["figures"]
    for figure in saved.about["figures"]:
        pixels = np.asarray(Image.open(io.BytesIO((saved.folder / f"{figure}.png").read_bytes())).convert("L"))
        assert pixels.std() > 5  # something is drawn
        assert (saved.folder / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
    header, _, *lines = (saved.folder / "table.md").read_text().splitlines()
    assert header.startswith("| ")
    assert lines
    read = shared.load(study, saved.folder)
    for table, columns in study.columns.items():
        assert [column.name for column in columns] == list(read.tables[table].columns)
        pd.testing.assert_frame_equal(read.tables[table], saved.tables[table])
    # What is saved is drawn and told from what was read back.
    before = {path.name: path.read_bytes() for path in saved.folder.iterdir()}
    unmeasured = dataclasses.replace(study, measure=lambda *_: pytest.fail("measured again"))
    shared.command(unmeasured, ["--quick", "--out", "out"])
    assert {path.name: path.read_bytes() for path in saved.folder.iterdir()} == before


@pytest.mark.parametrize("name", registered())
def test_names_that_a_setting_does_not_know_are_told(name, analysis, tmp_path, monkeypatch):
    study, shared = analysis(name).STUDY, analysis("study")
    monkeypatch.chdir(tmp_path)
    for field in dataclasses.fields(study.full):
        value = getattr(study.full, field.name)
        if isinstance(value[0] if isinstance(value, tuple) else value, str):
            with pytest.raises(InputError) as error:
                shared.command(study, ["--quick", f"--{field.name.replace('_', '-')}", "nosuch"])
            assert "nosuch" in str(error.value)
            assert "\n" not in str(error.value)


# --- what they share --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Settings:
    cases: int = 3
    names: tuple[str, ...] = ("a", "b")


@pytest.fixture
def made(analysis, tmp_path, monkeypatch):
    """A study of nothing, with a list of the cases that it measured, and the module that runs it."""
    shared, style = analysis("study"), analysis("variance_bits").style
    measured = []

    def one(case):
        measured.append(case)
        if case == stop[0]:
            raise KeyboardInterrupt
        return {"value": float(case), "text": "x"}

    def measure(settings, parts):
        return {"values": parts.every("values", [{"case": index} for index in range(settings.cases)], one)}

    def draw(tables):
        figure = style.new_figure(2, 1)
        figure.subplots().plot(tables["values"]["value"])
        return {"figure": figure}

    stop = [None]
    monkeypatch.chdir(tmp_path)
    study = shared.Study(
        name="nothing",
        question="Is this nothing?",
        full=Settings(),
        quick=Settings(cases=1),
        columns={"values": (Column("case", "int64", "1", "of it"), Column("value", "float64", "1", "its value"),
                            Column("text", "str", "", "a text"))},
        measure=measure,
        draw=draw,
        read=lambda tables: tables["values"].astype(str),
        claims=lambda tables: [shared.Claim(f"The sum is {tables['values']['value'].sum():g}.", True)],
    )  # fmt: skip
    return study, shared, measured, stop


def test_an_interrupted_study_continues_with_the_cases_that_are_left(made):
    study, shared, measured, stop = made
    stop[0] = 1
    with pytest.raises(KeyboardInterrupt):
        shared.command(study, ["--out", "out"])
    assert not Path("out", "study.json").exists()
    stop[0] = None
    saved = shared.command(study, ["--out", "out"])
    assert measured == [0, 1, 1, 2]
    assert saved.claims == [shared.Claim("The sum is 3.", True)]
    assert not list(Path("runs").rglob("*.json"))  # nothing is left of the parts


def test_a_repetition_that_was_interrupted_continues(made):
    study, shared, measured, stop = made
    shared.command(study, ["--out", "out"])
    stop[0] = 1
    with pytest.raises(KeyboardInterrupt):
        shared.command(study, ["--out", "out", "--again"])
    before = Path("out", "study.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        shared.command(study, ["--out", "out"])
    assert Path("out", "study.json").read_bytes() == before  # what was there stays until all cases are done
    stop[0] = None
    shared.command(study, ["--out", "out"])
    assert measured == [0, 1, 2, 0, 1, 1, 1, 2]
    shared.command(study, ["--out", "out"])
    assert len(measured) == 8
    # It is begun anew only if that is asked for.
    stop[0] = 1
    with pytest.raises(KeyboardInterrupt):
        shared.command(study, ["--out", "out", "--again"])
    stop[0] = None
    shared.command(study, ["--out", "out", "--again"])
    assert measured[8:] == [0, 1, 0, 1, 2]


def test_processor_time_of_interrupted_runs_counts(made, analysis, monkeypatch):
    study, shared, _, stop = made
    clock = iter(range(0, 100_000, 10))  # every reading is 10 s after the one before
    for module in (shared, analysis("parts")):
        monkeypatch.setattr(module, "cpu_seconds", lambda: float(next(clock)))
    stop[0] = 2
    with pytest.raises(KeyboardInterrupt):
        shared.command(study, ["--out", "out"])
    stop[0] = None
    # Two cases found, 10 s each; and one case between two readings that enclose its own two.
    assert shared.command(study, ["--out", "out"]).about["cpu_seconds"] == 50


def test_other_settings_do_not_take_what_others_measured(made):
    study, shared, measured, stop = made
    stop[0] = 2
    with pytest.raises(KeyboardInterrupt):
        shared.command(study, ["--out", "out"])
    stop[0] = None
    shared.command(study, ["--out", "out", "--names", "c"])
    assert measured == [0, 1, 2, 0, 1, 2]


def test_results_are_kept_until_they_are_replaced(made):
    study, shared, measured, _ = made
    shared.command(study, ["--out", "out", "--cases", "2"])
    with pytest.raises(InputError, match=r"results with the settings .*'cases': 2.* --again"):
        shared.command(study, ["--out", "out"])
    shared.command(study, ["--out", "out", "--cases", "2"])
    assert measured == [0, 1]
    shared.command(study, ["--out", "out", "--cases", "1", "--again"])
    assert measured == [0, 1, 0]
    assert shared.load(study, Path("out")).about["settings"] == {"cases": 1, "names": ["a", "b"]}


def test_a_table_that_was_changed_is_refused(made):
    study, shared, *_ = made
    shared.command(study, ["--out", "out"])
    file = Path("out") / "values.parquet"
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(InputError, match="not what the study 'nothing' wrote"):
        shared.command(study, ["--out", "out"])
    with pytest.raises(SystemExit, match="nothing: error"):
        shared.main(study, ["--out", "out"])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"study": "another"}'])
def test_a_damaged_description_is_refused(made, content):
    study, shared, measured, _ = made
    shared.command(study, ["--out", "out"])
    Path("out", "study.json").write_text(content)
    with pytest.raises(InputError, match=r"study.json is not what the study 'nothing' wrote; run it with --again"):
        shared.command(study, ["--out", "out"])
    shared.command(study, ["--out", "out", "--again"])
    assert len(measured) == 6


def test_results_that_cannot_be_kept_are_not_measured(made):
    study, shared, measured, _ = made
    Path("out").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write to out \(.*\); give another --out"):
        shared.command(study, ["--out", "out"])
    assert not measured


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nosuch"], "unrecognized arguments: --nosuch; python -m analysis.nothing --help tells the options"),
        (["--cases", "x"], "argument --cases: invalid int value: 'x'"),
        (["--cases", "0"], "--cases must be at least 1, got 0"),
        (["--names"], "argument --names: expected at least one argument"),
    ],
)
def test_settings_that_are_none_are_told_in_one_line(made, options, message):
    study, shared, measured, _ = made
    with pytest.raises(InputError) as error:
        shared.command(study, options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not measured


def test_cases_of_two_versions_are_told(made, analysis, monkeypatch):
    study, shared, _, stop = made
    stop[0] = 1
    parts = analysis("parts")
    for version in ("1", "2"):
        for module in (shared, parts):
            monkeypatch.setattr(module, "commit", lambda version=version: version)
        if version == "1":
            with pytest.raises(KeyboardInterrupt):
                shared.command(study, ["--out", "out"])
            stop[0] = None
    saved = shared.command(study, ["--out", "out"])
    assert saved.about["provenance"]["commits"] == ["1", "2"]


def test_tables_of_another_study_are_recorded(made, analysis, monkeypatch, tmp_path):
    study, shared, *_ = made
    monkeypatch.setattr(shared, "RESULTS", tmp_path)
    saved = shared.command(study, ["--out", "nothing"])
    derived = dataclasses.replace(study, measure=lambda _, parts: shared.tables_of(study, parts))
    again = shared.command(derived, ["--out", "derived"])
    assert again.about["provenance"]["uses"] == {"nothing": saved.about["sha256"]}


def test_the_command_line_lists_runs_and_refuses(capfd, tmp_path, monkeypatch, analysis):
    from fqtstats import cli

    monkeypatch.chdir(ROOT)
    assert cli.run(["study"]) == 0
    listed = capfd.readouterr().out
    assert all(name in listed for name in registered())
    assert cli.run(["study", "nothing"]) == 2
    assert "unknown study 'nothing'; known: " in capfd.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert cli.run(["study"]) == 2
    assert "is not in a clone of it" in capfd.readouterr().err


def test_the_index_is_made_of_the_saved_results(analysis):
    assert (ROOT / "analysis" / "README.md").read_text() == analysis("__main__").index()


def test_intervals_of_shares_are_those_of_clopper_and_pearson(analysis):
    """3 of 10 as in the tables of the Pearson family; none and all in closed form, for several together, too."""
    share, told = analysis("shares").share, analysis("shares").told
    assert share(3, 10) == pytest.approx((0.3, 0.0667, 0.6525), abs=1e-4)
    assert share(0, 50) == pytest.approx((0, 0, 1 - 0.025 ** (1 / 50)))
    assert share(50, 50, 5) == pytest.approx((1, 0.005 ** (1 / 50), 1))
    assert told(100, 100) == "1.000 [0.964, 1.000]"


def test_the_index_tells_what_was_not_recorded(analysis):
    made, saved = analysis("__main__")._made, analysis("study").Saved
    about = {"cpu": "a processor", "versions": {"torch": "2.0"}, "commits": ["a", "b+"], "date": "2026-01-02"}
    known = {"cpu_seconds": 100.0, "provenance": about}
    assert made(saved(Path(), {}, known)) == ("2 min of processor time, a processor, torch 2.0, a and b+, 2026-01-02")
    unknown = {"cpu_seconds": None, "provenance": {"cpu": None, "versions": None}}
    assert made(saved(Path(), {}, unknown)) == "time, processor, versions, commit, date not recorded"
    derived = {"cpu_seconds": 0.1, "provenance": {**about, "uses": {"speed": {}, "memory": {}}}}
    assert made(saved(Path(), {}, derived)).startswith("from the tables of speed and memory, 0 s of processor time")


def test_what_is_not_as_expected_is_told_with_its_reason(analysis):
    told, claim = analysis("__main__")._told, analysis("study").Claim
    assert told(claim("A.", True, "never shown")) == "A."
    assert told(claim("A.", None)) == "A."
    assert told(claim("A.", False)) == "**Not as expected.** A."
    assert told(claim("A.", False, "It is so.")) == "**Not as expected.** A. Why: It is so."


ENDS = [(0.97, 1.04), (0.8, 1.3), (0.4, 1.5), (0.9, 25), (0.05, 300), (1e-5, 1e4)]
SHORT = [(0.99, 1.025), (0.998, 1.19), (0.9985, 1.0012), (1.0501, 1.0622), (0.62, 0.85)]


@pytest.mark.parametrize("ends", [*ENDS, *SHORT])
def test_axes_of_ratios_have_a_few_numbers_over_half_of_them(analysis, ends):
    ax = Figure().subplots()
    ax.set_xlim(*ends)
    analysis("axes").ratio_axis(ax)
    ticks = ax.get_xticks()
    assert ax.get_xlim() == ends
    assert 2 <= len(ticks) <= 7
    assert np.log(ticks[-1] / ticks[0]) >= np.log(ends[1] / ends[0]) / 2
    assert [float(label.get_text()) for label in ax.get_xticklabels()] == pytest.approx(ticks)


def test_no_axis_of_ratios_is_without_a_scale(analysis):
    generator = np.random.default_rng(0)
    for middle, width in zip(generator.uniform(-1, 1, 100), generator.uniform(-6, 2, 100), strict=True):
        ax = Figure().subplots()
        ax.set_xlim(np.exp(middle - np.exp(width)), np.exp(middle + np.exp(width)))
        analysis("axes").ratio_axis(ax)
        ticks = ax.get_xticks()
        assert 2 <= len(ticks) <= 7
        assert np.log(ticks[-1] / ticks[0]) >= np.exp(width) / 2


def test_series_stand_beside_each_other_about_their_place(analysis):
    beside = analysis("axes").beside
    assert [beside(index, 3, 0.2) for index in range(3)] == pytest.approx([-0.2, 0, 0.2])
    assert beside(0, 1, 0.2) == 0
    assert sum(beside(index, 8, 0.1) for index in range(8)) == pytest.approx(0)


@pytest.mark.parametrize("name", registered())
def test_tables_of_the_saved_results_fit_the_terminal(name, analysis, capsys, monkeypatch):
    study, shared = analysis(name).STUDY, analysis("study")
    monkeypatch.setenv("COLUMNS", "80")
    saved = shared.load(study, shared.RESULTS / name)
    shared.show(study, saved)
    out = capsys.readouterr().out
    wide = [line for line in out.splitlines() if cell_len(line.rstrip()) > 80]
    assert not wide or name in {"random_bits", "speed"}, wide
    monkeypatch.setenv("COLUMNS", "40")
    shared.show(study, saved)
    narrow = capsys.readouterr().out
    # No word is cut off or broken: there is code to be copied.
    words = {word for _, column in study.read(saved.tables).items() for word in " ".join(map(str, column)).split()}
    assert [word for word in words if word not in out or word not in narrow] in ([], ["nan"], ["<NA>"])


def test_a_table_that_is_too_wide_is_told_in_sections(analysis):
    shared = analysis("study")
    rows = pd.DataFrame(
        {"data": ["digits"] * 4 + ["text"] * 4, "seeds": [6] * 4 + [3] * 4, "p": [".1", ".2", ".3", ".4"] * 2}
    )
    sections = shared._sections(rows)
    assert [heading for heading, _ in sections] == ["data: digits, seeds: 6", "data: text, seeds: 3"]
    assert all(list(part.columns) == ["p"] and len(part) == 4 for _, part in sections)
    # A column that differs within one section stays in all of them; runs of single rows make no sections.
    rows.loc[0, "seeds"] = 5
    assert [list(part.columns) for _, part in shared._sections(rows)] == [["seeds", "p"]] * 2
    ((heading, part),) = shared._sections(rows.assign(data=range(8), unit="nats"))
    assert heading == "unit: nats"
    assert list(part.columns) == ["data", "seeds", "p"]
    # Tables without rows, and of one, keep their columns, or one of them; missing cells are equal.
    assert [len(part.columns) for _, part in shared._sections(rows.iloc[:0])] == [3]
    ((heading, part),) = shared._sections(rows.iloc[:1])
    assert (heading, list(part.columns)) == ("data: digits, seeds: 5", ["p"])
    absent = rows.assign(data=[float("nan")] * 4 + ["text"] * 4, unit=float("nan"))
    assert [list(part.columns) for _, part in shared._sections(absent)] == [["seeds", "p"]] * 2


def test_colours_are_named_in_one_place():
    literal = re.compile(r"""["']#[0-9a-fA-F]{6}["']""")
    assert literal.search((ROOT / "fqtstats" / "report" / "style.py").read_text())
    drawing = [*(ROOT / "analysis").glob("*.py"), *(ROOT / "fqtstats" / "report").glob("*.py")]
    assert [path.name for path in drawing if literal.search(path.read_text())] == ["style.py"]


def test_the_index_folds_what_is_as_expected_behind_the_first_claims(analysis):
    shared, claim = analysis("__main__"), analysis("study").Claim
    several = [claim(f"{index}.", False if index == 11 else None) for index in range(12)]
    shown, rest = shared._divided(several)
    assert [one.text for one in shown] == [*(f"{index}." for index in range(7)), "11."]
    assert [one.text for one in rest] == ["7.", "8.", "9.", "10."]
    assert shared._divided(several[:9]) == (several[:9], [])  # two are not worth it
    assert "4 more" in shared._folded(rest)
    assert shared._folded([]) == ""
