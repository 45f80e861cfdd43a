"""The notebooks are kept without outputs, and their published pages load nothing.

That they run, and that what they assert is true, is what `pytest --nbmake notebooks` shows in CI.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import re
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from PIL import Image

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
FILES = sorted(NOTEBOOKS.glob("*.ipynb"))

FIGURE = """\
#| fig-alt: A line that rises
#| from "left" to right.
from fqtstats.report import style

figure = style.new_figure(2, 1)
figure.subplots().plot([0, 1])
figure"""


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"notebooks_{name}", NOTEBOOKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stripped() -> ModuleType:
    return _script("stripped")


@pytest.fixture(scope="module")
def publish() -> ModuleType:
    return _script("publish")


def _notebook(stripped: ModuleType, *sources: str) -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_markdown_cell("# A title\n\nWhat it is about: see [another](another.ipynb).")]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(cells=cells, metadata=stripped.METADATA)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_notebooks_are_kept_without_outputs(stripped, file) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert stripped.left(notebook) == []


def test_there_are_notebooks_that_check_what_they_say() -> None:
    assert len(FILES) == 5
    for file in FILES:
        code = [cell.source for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
        assert sum(source.count("\nassert ") for source in code) >= 4, file.name


def test_links_between_notebooks_lead_somewhere() -> None:
    for file in FILES:
        for link in re.findall(r"\]\(([^):]+\.ipynb)\)", file.read_text(encoding="utf-8")):
            assert (NOTEBOOKS / link).exists(), f"{link} in {file.name}"


def _with_output(notebook: nbformat.NotebookNode) -> None:
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="2\n")]


def _with_count(notebook: nbformat.NotebookNode) -> None:
    notebook.cells[1].execution_count = 1


def _with_widgets(notebook: nbformat.NotebookNode) -> None:
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}


def _with_kernel(notebook: nbformat.NotebookNode) -> None:
    notebook.metadata["kernelspec"] = {"display_name": "mine", "language": "python", "name": "mine"}


def _with_times(notebook: nbformat.NotebookNode) -> None:
    notebook.cells[1].metadata["execution"] = {"iopub.execute_input": "2025-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_with_output, "cell 2: outputs"),
        (_with_count, "cell 2: execution count"),
        (_with_widgets, "metadata: widgets"),
        (_with_kernel, "metadata: kernelspec"),
        (_with_times, "cell 2: metadata execution"),
    ],
)
def test_what_running_leaves_is_found_and_taken_away(stripped, tmp_path, capsys, change, told) -> None:
    notebook = _notebook(stripped, "1 + 1")
    assert stripped.left(notebook) == []
    change(notebook)
    assert stripped.left(notebook) == [told]
    file = tmp_path / "one.ipynb"
    nbformat.write(notebook, file)
    assert stripped.main([str(file)]) == 1
    assert told in capsys.readouterr().out
    assert stripped.main(["--fix", str(file)]) == 0
    assert stripped.main([str(file)]) == 0


def test_a_page_has_everything_in_it(publish, stripped, tmp_path) -> None:
    file = tmp_path / "one.ipynb"
    nbformat.write(_notebook(stripped, FIGURE, 'print("1 < 2")'), file)
    assert publish.main([str(file), "--out", str(tmp_path / "pages")]) == 0
    text = (tmp_path / "pages" / "one.html").read_text(encoding="utf-8")
    assert publish.loaded(text) == []
    assert "http" not in text
    assert "fig-alt" not in text
    assert 'alt="A line that rises from &quot;left&quot; to right."' in text
    assert "1 &lt; 2" in text
    assert 'href="another.html"' in text
    encoded = re.search(r'src="data:image/png;base64,([^"]+)"', text)
    assert encoded is not None
    assert base64.b64decode(encoded[1]).startswith(b"\x89PNG")
    assert 'href="one.html"' in (tmp_path / "pages" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "part",
    [
        '<script src="https://cdn.example/mathjax.js"></script>',
        "<script>1</script>",
        '<link rel="stylesheet" href="style.css">',
        '<img src="figure.png" alt="">',
        '<p style="background: url(https://example.org/a.png)">',
        '<style>@import "https://example.org/a.css";</style>',
        '<p onclick="go()">',
    ],
)
def test_a_page_that_would_load_or_run_something_is_refused(publish, stripped, part) -> None:
    notebook = _notebook(stripped, "1")
    data = {"text/html": f"<div>{part}</div>", "text/plain": "1"}
    notebook.cells[1].outputs = [nbformat.v4.new_output("display_data", data)]
    with pytest.raises(ValueError, match="would load"):
        publish.page(notebook)


def test_widgets_are_left_out_of_a_page(publish, stripped) -> None:
    notebook = _notebook(stripped, "1")
    data = {"application/vnd.jupyter.widget-view+json": {"model_id": "0"}, "text/plain": "interactive(children=())"}
    notebook.cells[1].outputs = [nbformat.v4.new_output("display_data", data)]
    assert "interactive" not in publish.page(notebook)


def test_a_figure_without_a_text_fails(publish, stripped) -> None:
    notebook = _notebook(stripped, "figure")
    file = io.BytesIO()
    Image.new("RGB", (660, 400)).save(file, "png", dpi=(200, 200))
    png = base64.b64encode(file.getvalue()).decode()
    notebook.cells[1].outputs = [nbformat.v4.new_output("display_data", {"image/png": png})]
    with pytest.raises(ValueError, match="fig-alt"):
        publish.page(notebook)
    notebook.cells[1].source = "#| fig-alt: what it shows\nfigure"
    assert 'alt="what it shows" width="594"' in publish.page(notebook)  # 3.3 inches


def test_a_cell_that_fails_ends_the_command(publish, stripped, tmp_path, capsys) -> None:
    notebook = _notebook(stripped, "1")
    notebook.cells[1].source = "this is no Python"
    file = tmp_path / "bad.ipynb"
    nbformat.write(notebook, file)
    assert publish.main([str(file), "--out", str(tmp_path / "pages")]) == 1
    assert "this is no Python" in capsys.readouterr().err
    assert not (tmp_path / "pages" / "bad.html").exists()
