"""docs/ says what is true: its Python runs, its commands parse, and what they name exists.

That its pages build without a warning, with every link and formula, is a stage of .ci/run of its own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import browser
import pytest
from typer.main import get_command

# Imported here, because the session inside this one forgets what it has imported, and torch cannot be imported anew.
import fqtstats.verdicts.claims
from fqtstats.cli import app
from fqtstats.data import SOURCES
from fqtstats.models import MODELS
from fqtstats.quantizers import QUANTIZERS
from fqtstats.training import recipes, runs
from fqtstats.verdicts import pytest_plugin

pytest_plugins = ["pytester"]

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {page.relative_to(DOCS).as_posix(): page.read_text() for page in sorted(DOCS.rglob("*.md"))}
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
OTHERS = {"--version", "--resume", "--fqt-alpha", "--fqt-seed", "--quick", "--again", "--strict"}
"""Options that are not of one command: of the program, of pytest, of studies."""


def blocks(text: str, language: str) -> list[tuple[str, str]]:
    """Name of the file, or "", and content of the blocks in one language."""
    return [(name, code) for found, name, code in FENCE.findall(text) if found == language]


def commands(text: str) -> list[str]:
    """The command lines of fqtstats in a text."""
    lines = [line.split("&&")[-1].strip() for _, block in blocks(text, "bash") for line in block.splitlines()]
    lines += [line for _, block in blocks(text, "yaml") for line in re.findall(r"- run: (fqtstats .+)", block)]
    lines += [" ".join(span.split()) for span in re.findall(r"`(fqtstats [^`]+)`", FENCE.sub("", text))]
    return [line for line in lines if line.startswith("fqtstats ")]


def parsed(line: str) -> dict[str, object]:
    """The values of a command line's options, as the program would get them."""
    _, name, *arguments = shlex.split(line)
    if name == "--version":
        return {}
    values: dict[str, object] = COMMANDS[name].make_context(name, arguments).params
    return values


def execute(text: str, page: str) -> dict[str, object]:
    """Run the Python of a page, top to bottom; blocks with a name become files in the current directory."""
    names: dict[str, object] = {}
    for file, code in blocks(text, "python"):
        if file:
            Path(file).write_text(code)
        else:
            exec(compile(code, page, "exec"), names)
    return names


def known_names(values: dict[str, object]) -> None:
    """What a command line names exists."""

    def each(option: str) -> list[str]:
        value = values.get(option)
        return value.split(",") if isinstance(value, str) else []

    for name in each("quantizer"):
        assert name in {*QUANTIZERS, "all"}
    for name in each("recipe"):
        assert name in recipes.RECIPES or runs.run(name)
    for option, table in (("model", MODELS), ("data", SOURCES)):
        for name in each(option):
            assert name in table or ":" in name


@pytest.mark.parametrize("page", [page for page, text in PAGES.items() if blocks(text, "python")])
def test_python_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    execute(PAGES[page], page)


def test_python_that_fails_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        execute("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", "page.md")


def test_the_users_own_module_gives_model_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [code for name, code in blocks(PAGES["how-to/model.md"], "python") if name == "mine.py"]
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    mine = importlib.import_module("mine")
    inputs, targets = mine.data()
    assert mine.model()(inputs).shape == (len(targets), 5)
    monkeypatch.delitem(sys.modules, "mine")


def test_the_tests_of_quantizers_pass(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    ((_, code),) = [block for block in blocks(PAGES["how-to/ci.md"], "python") if block[0] == "test_mine.py"]
    pytester.makepyfile(test_mine=code)
    plugins = importlib.metadata.entry_points(group="pytest11")
    load = () if any(e.value == pytest_plugin.__name__ for e in plugins) else ("-p", pytest_plugin.__name__)
    pytester.runpytest_inprocess(*load, "-p", "no:cacheprovider", "--strict-markers").assert_outcomes(passed=3)


def test_every_command_parses() -> None:
    lines = [line for text in PAGES.values() for line in commands(text)]
    assert len(lines) >= 30
    for line in lines:
        known_names(parsed(line))


@pytest.mark.parametrize(
    "line",
    [
        "fqtstats measure --quantiser bhq",
        "fqtstats measures",
        "fqtstats measure --draws many",
        "fqtstats measure --quantizer bqh",
        "fqtstats train --recipe statquant-bhq/cifar11",
    ],
)
def test_a_command_that_is_wrong_is_noticed(line: str) -> None:
    (found,) = commands(f"```bash\n{line}\n```\n")
    with pytest.raises(Exception, match=r"quantiser|measures|integer|bqh|cifar11"):
        known_names(parsed(found))


def test_every_option_exists() -> None:
    known = OTHERS | {option for command in COMMANDS.values() for p in command.params for option in p.opts}
    for page, text in PAGES.items():
        for span in re.findall(r"`([^`\n]+)`", FENCE.sub("", text)):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
                assert option in known, f"{page}: {option}"


def test_every_documented_name_exists() -> None:
    for page, text in PAGES.items():
        names = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE) + re.findall(r"\]\[(fqtstats[\w.]*)\]", text)
        for name in names:
            module, _, own = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), own), f"{page}: {name}"


def test_the_public_names_are_documented() -> None:
    reference = "\n".join(text for page, text in PAGES.items() if page.startswith("reference/"))
    documented = set(re.findall(r"^::: fqtstats\.(\w+)", reference, re.MULTILINE))
    assert set(fqtstats.__all__) - {"QUANTIZERS"} <= documented
    assert "<!-- generated: quantizers -->" in reference


def test_the_job_checks_every_quantizer_and_runs_pytest():
    ((_, job),) = blocks(PAGES["how-to/ci.md"], "yaml")
    runs_of_job = re.findall(r"- run: (.+)", job)
    assert runs_of_job[1:] == ["fqtstats check --quantizer all --junit report.xml", "pytest"]


# --- what the build makes --------------------------------------------------------------------------------------------


def hook(name: str) -> ModuleType:
    """A module of docs/build."""
    spec = importlib.util.spec_from_file_location(f"docs_build_{name}", DOCS / "build" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_default_of_zero_is_shown() -> None:
    rows = re.findall(r"<tr><td><code>(.*?)</code></td><td>.*?</td><td>(.*?)</td></tr>", hook("generated")._commands())
    defaults = {option.split()[0]: default for option, default in rows}
    assert defaults["--seed"] == "0"
    assert defaults["--resume"] == defaults["--checkpoint"] == ""


def test_the_table_of_a_study_has_its_question_as_title(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="of the extra `docs`; the build itself refuses two pages of one title")
    collected = hook("collected")
    place = tmp_path / "table.md"
    place.write_text("| a |\n| --- |\n| 1 |\n")
    assert collected._titled(place) == place.read_text()
    (tmp_path / "study.json").write_text(json.dumps({"study": "one_two", "question": "Is it so?"}))
    lines = collected._titled(place).splitlines()
    assert "# Is it so?" in lines
    assert "[What was found](../../README.md#one-two)" in lines
    assert lines.index("| a |") > lines.index('<div class="study" markdown="1">')


@pytest.mark.skipif(browser.executable() is None, reason="NOT TESTED in a browser: no chromium here")
def test_the_search_has_a_worker_where_pages_are_read_from_the_disk(tmp_path: Path) -> None:
    settings = (DOCS.parent / "mkdocs.yml").read_text()
    (polyfill,) = re.findall(r"^  polyfills:.*\n    - (\S+)$", settings, re.MULTILINE)
    assert "\n  - offline" in settings
    (tmp_path / "worker.js").write_text("addEventListener('message', (event) => postMessage(2 * event.data));")
    ask = """new Promise((resolve) => {
      const worker = new Worker("worker.js");
      worker.addEventListener("message", (event) => resolve(event.data));
      worker.postMessage(21);
      setTimeout(resolve, 3000, "no answer");
    })"""
    polyfilled = f"<script>{(DOCS / polyfill).read_text()}</script>"
    with browser.opened(tmp_path / "profile") as opened:
        for script, answer in (("", "refused"), (polyfilled, 42)):
            (tmp_path / "page.html").write_text(f"<!doctype html><title>a page</title>{script}<body></body>")
            page = opened.page()
            page.open(tmp_path / "page.html")
            assert page.evaluate(f"{ask}.catch(() => 'refused')") == answer
