"""Publishes the notebooks: executes them from a clean kernel and writes pages that need nothing else.

    python notebooks/publish.py --out FOLDER [--executed] [NOTEBOOK ...]

writes `FOLDER/<name>.html` for every notebook (by default those beside this script), and `index.html`. Figures are in
the pages themselves, there are no scripts, and nothing is loaded from anywhere. With --executed the notebooks have
their outputs already. A cell that draws a figure tells what is to be seen there, for those who do not see it, in
comments that the page does not show (as in Quarto):

    #| fig-alt: One sentence or two,
    #| which may go on in the next lines.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import nbformat
from markdown_it import MarkdownIt
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

__all__ = ["executed", "index", "loaded", "main", "page"]

HERE = Path(__file__).parent

SECONDS = 300
"""Most that one cell may take."""

CODE = HtmlFormatter(style="friendly", cssclass="code")
MARKDOWN = MarkdownIt("js-default")  # without HTML of its own

ON_SCREEN = 180
"""Pixels on the screen per inch of a figure: its text of 6 points is then as large as the text around it."""

ALT = re.compile(r"^#\| ?(?:fig-alt: )?(.*)\n?", re.MULTILINE)

STYLE = """
body { margin: 2.5rem auto; max-width: 62rem; padding: 0 1rem; color: #222; background: #fff;
  font: 16px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
p, blockquote { max-width: 46rem; }
h1 { line-height: 1.2; }
h2 { margin-top: 2.4rem; }
a { color: #0b5a8f; }
code, pre { font: 13px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
:not(pre) > code { font-size: 0.88em; background: #f3f3f3; padding: 0.1em 0.25em; border-radius: 3px; }
pre { margin: 0; overflow-x: auto; }
.code { background: #f7f7f5; border-left: 3px solid #0072b2; padding: 0.7rem 0.9rem; margin: 1rem 0 0.5rem; }
.output { margin: 0.5rem 0 1.2rem; overflow-x: auto; }
.output pre { padding: 0 0.9rem; white-space: pre-wrap; }
img { display: block; max-width: 100%; height: auto; margin: 0.5rem auto; }
table { border: 0; border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 0.5rem 0; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border: 0; white-space: nowrap; }
thead th { border-bottom: 1px solid #888; }
tbody tr:nth-child(even) { background: #f7f7f7; }
"""


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with the outputs of a new kernel, which runs in an empty folder.

    Raises:
        CellExecutionError: a cell failed; the message has its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        return NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()


def page(notebook: nbformat.NotebookNode) -> str:
    """The notebook as HTML.

    Raises:
        ValueError: a figure has no text that tells what it shows, or the page would load something.
    """
    parts: list[str] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(_markdown(cell.source))
        elif cell.cell_type == "code":
            parts += _code(cell)
    text = _document(_title(notebook), "\n".join(parts))
    if found := loaded(text):
        raise ValueError(f"the page would load {', '.join(found)}: a page must have everything in it")
    return text


def index(pages: Sequence[tuple[str, nbformat.NotebookNode]]) -> str:
    """A page with links to others, by file name, and the first paragraph of each."""
    parts = ["<h1>Notebooks of fqtstats</h1>"]
    for name, notebook in pages:
        first = notebook.cells[0].source.split("\n\n") if notebook.cells else []
        link = f'<h2><a href="{html.escape(name)}">{html.escape(_title(notebook))}</a></h2>'
        parts += [link, _markdown(first[1] if len(first) > 1 else "")]
    return _document("Notebooks of fqtstats", "\n".join(parts))


def loaded(text: str) -> list[str]:
    """What a browser would load, or run, to show an HTML page; links do not count, which wait for the reader."""
    finder = _Finder()
    finder.feed(text)
    return finder.found


class _Finder(HTMLParser):
    _RUNNING = ("script", "link", "iframe", "object", "embed", "base")
    _LOADING = ("src", "srcset", "data", "poster", "background", "xlink:href")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_style = tag == "style"
        if tag in self._RUNNING:
            self.found.append(f"<{tag}>")
        for name, value in attrs:
            if name in self._LOADING and not (value or "").startswith("data:"):
                self.found.append(f"{name}={value}")
            elif name.startswith("on"):
                self.found.append(name)
            elif name == "style":
                self._look_at_css(value or "")

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self._look_at_css(data)

    def _look_at_css(self, text: str) -> None:
        self.found += re.findall(r"@import[^;]*|url\(\s*['\"]?(?!data:)[^)]*\)", text)


def _title(notebook: nbformat.NotebookNode) -> str:
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("# "):
            return cell.source.splitlines()[0][2:].strip()
    return "Notebook"


def _document(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}{CODE.get_style_defs('.code')}</style>\n"
        f"</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _markdown(source: str) -> str:
    """Prose; links to other notebooks lead to their pages."""
    return re.sub(r'(<a href="[^":]*)\.ipynb"', r'\1.html"', MARKDOWN.render(source))


def _code(cell: nbformat.NotebookNode) -> Iterator[str]:
    alt = " ".join(line.strip() for line in ALT.findall(cell.source))
    yield highlight(ALT.sub("", cell.source), PythonLexer(), CODE)
    shown = [part for output in cell.outputs if (part := _output(output, alt))]
    if sum(part.startswith("<img") for part in shown) > 1:
        raise ValueError(f"a cell draws several figures, and one text cannot tell of them: {cell.source[:200]!r}")
    if shown:
        yield '<div class="output">' + "\n".join(shown) + "</div>"


def _output(output: nbformat.NotebookNode, alt: str) -> str:
    """One output, in the richest of its forms that needs no script; empty where there is none (a widget)."""
    if output.output_type == "stream":
        return f"<pre>{html.escape(output.text)}</pre>" if output.name == "stdout" else ""
    if output.output_type == "error":
        return f"<pre>{html.escape(f'{output.ename}: {output.evalue}')}</pre>"
    data = output.data
    if "application/vnd.jupyter.widget-view+json" in data:
        return ""
    if "image/png" in data:
        return _image("".join(data["image/png"].split()), alt)
    if "text/html" in data:
        return str(data["text/html"])
    return f"<pre>{html.escape(data['text/plain'])}</pre>" if "text/plain" in data else ""


def _image(encoded: str, alt: str) -> str:
    if not alt:
        raise ValueError("a figure has no text that tells what it shows: begin its cell with '#| fig-alt: ...'")
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    dots, _ = picture.info.get("dpi", (ON_SCREEN, ON_SCREEN))
    source = f"data:image/png;base64,{encoded}"
    return f'<img src="{source}" alt="{html.escape(alt)}" width="{round(ON_SCREEN * picture.width / dots)}">'


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives the exit status."""
    parser = argparse.ArgumentParser(description="Executes notebooks and writes them as self-contained HTML.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="files or folders of them; default: those beside this")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pages; made if need be")
    parser.add_argument("--executed", action="store_true", help="the notebooks have their outputs already")
    given = parser.parse_args(arguments)
    files = [file for place in given.notebooks or [HERE] for file in (sorted(place.glob("*.ipynb")) or [place])]
    given.out.mkdir(parents=True, exist_ok=True)
    done: list[tuple[str, nbformat.NotebookNode]] = []
    for file in files:
        notebook = nbformat.read(file, as_version=4)
        name = f"{file.stem}.html"
        try:
            (given.out / name).write_text(page(notebook if given.executed else executed(notebook)), encoding="utf-8")
        except (CellExecutionError, ValueError) as error:
            print(f"{file}: {error}", file=sys.stderr)
            return 1
        done.append((name, notebook))
        print(given.out / name)
    (given.out / "index.html").write_text(index(done), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
