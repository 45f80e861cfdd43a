"""Pages that are made of files elsewhere in the repository: the notebooks, and the index of the studies."""

import base64
import copy
import json
import os
import re
from functools import partial
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
NOTEBOOKS = "notebooks/*.ipynb"
STUDIES = ROOT / "analysis" / "README.md"
PICTURES = {"images/variance_vs_bits.png": ROOT / "analysis/results/compare/figures/variance_vs_bits.png"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
ALT = re.compile(r"^#\| ?(?:fig-alt: )?(.*)\n?", re.MULTILINE)
"""Comments of a cell that tell what its figure shows, as Quarto has them."""
WIDE, PRINTED = 800, 0.6
"""Figures of more pixels have the resolution of print, and are shown smaller."""
IMAGE = re.compile(r"<!-- image: (\S+) (\d+) \| (.+?) -->")
"""Place of a picture that may not be there, width on the screen, and what it shows."""


def notebooks():
    """The notebooks; FQTSTATS_NOTEBOOKS names a folder of executed copies."""
    return sorted(Path(os.environ.get("FQTSTATS_NOTEBOOKS", ROOT / "notebooks")).glob("*.ipynb"))


def on_config(config, **_):
    """Put those notebooks into the navigation that there are."""
    nav = []
    for entry in copy.deepcopy(config.nav):
        if entry == {"Notebooks": NOTEBOOKS}:
            pages = [f"notebooks/{path.stem}.md" for path in notebooks()]
            if pages:
                nav.append({"Notebooks": pages})
        elif "Studies" not in entry or STUDIES.exists():
            nav.append(entry)
    config.nav = nav
    return config


@event_priority(100)
def on_files(files, /, config):
    """Add the pages, and the pictures in them."""
    for path in notebooks():
        for name, content in _notebook(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for name, path in PICTURES.items():
        if path.exists():
            files.append(File.generated(config, name, abs_src_path=str(path)))
    if STUDIES.exists():
        pages, pictures = _with_links(STUDIES)
        for name, content in pages.items():
            files.append(File.generated(config, name, content=content))
        for name, path in pictures.items():
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, /, page, files, **_):
    """Show those pictures that there are; links into the sources of other pages lead to what is made of them."""

    def shown(match):
        picture = (Path(page.file.src_uri).parent / match[1]).as_posix()
        there = files.get_file_from_path(os.path.normpath(picture)) is not None
        return f"![{match[3]}]({match[1]}){{ width={match[2]} }}" if there else ""

    return IMAGE.sub(shown, markdown)


def on_env(env, /, files, **_):
    """Pages of studies are told apart by their titles: in tabs, in bookmarks, and in what a search finds."""
    pages = {}
    for file in files.documentation_pages():
        if file.src_uri.startswith("studies/"):
            pages.setdefault(file.page.title, []).append(file.src_uri)
    for title, same in pages.items():
        if len(same) > 1:
            raise PluginError(f"{', '.join(same)} have one title: {title}")
    return env


# --- notebooks --------------------------------------------------------------------------------------------------------


def _notebook(path):
    """The page of a notebook, and its pictures, by name."""
    made, parts = {}, []
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = _text(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(partial(_neighbour, path), source))
        elif cell["cell_type"] == "code" and source.strip():
            told = " ".join(ALT.findall(source)).translate(str.maketrans("[]", "()"))
            parts.append(f"```python\n{ALT.sub('', source).strip()}\n```")
            for place, output in enumerate(cell.get("outputs", [])):
                parts.append(_output(output, f"{path.stem}-{number}-{place}.png", told, made))
    return {f"{path.stem}.md": "\n\n".join(parts) + "\n", **made}


def _neighbour(path, link):
    """A link of the notebook at ``path``, to another's page; one to anything else in the repository is left as text."""
    _, text, target, place = link.groups()
    other = path.parent / target
    leads = other.suffix == ".ipynb" and other.exists()
    return f"[{text}]({other.stem}.md{place or ''})" if leads else text


def _output(output, picture, told, made):
    """Markdown of what a cell gave; a picture, of which ``told`` says what it shows, goes into ``made`` by its name."""
    if output["output_type"] == "stream":
        # What goes to stderr is progress and warnings.
        return _plain(_text(output["text"])) if output["name"] == "stdout" else ""
    data = output.get("data", {})
    if "image/png" in data:
        made[picture] = base64.b64decode(_text(data["image/png"]))
        width = int.from_bytes(made[picture][16:20])
        return f"![{told}]({picture}){{ width={round(PRINTED * width) if width > WIDE else width} }}"
    if "text/html" in data:
        # A blank line would end the block.
        markup = "\n".join(line for line in _text(data["text/html"]).splitlines() if line.strip())
        return f'<div class="output">\n{markup}\n</div>'
    return _plain(_text(data["text/plain"])) if "text/plain" in data else ""


def _plain(text):
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text.rstrip()}\n{fence}"


def _text(lines):
    return lines if isinstance(lines, str) else "".join(lines)


# --- studies ----------------------------------------------------------------------------------------------------------


def _with_links(index):
    """The index and the pages that it links to, and their pictures; a link to anything else is left as its text."""
    folder = index.parent
    pages, pictures, waiting = {}, {}, [index]
    names = {index: "studies/index.md"}

    def name_of(path):
        return names.setdefault(path, f"studies/{path.relative_to(folder).as_posix()}")

    while waiting:
        path = waiting.pop()

        def link(match, path=path):
            image, text, target, place = match.groups()
            found = (path.parent / target).resolve()
            inside = found.is_relative_to(folder) and found.is_file()
            if inside and found.suffix == ".png":
                pictures[name_of(found)] = found
            elif inside and found.suffix == ".md":
                if name_of(found) not in pages and found not in waiting and found != path:
                    waiting.append(found)
            else:
                return text
            shown = os.path.relpath(name_of(found), Path(name_of(path)).parent)
            return f"{image}[{text}]({shown}{place or ''})"

        pages[name_of(path)] = LINK.sub(link, _titled(path))
    return pages, pictures


def _titled(path):
    """The page at ``path``; the table of a study, which has no heading, under its question in a box that scrolls."""
    text, about = path.read_text(), path.with_name("study.json")
    if path.name != "table.md" or not about.exists():
        return text
    study = json.loads(about.read_text())
    found = f"[What was found](../../{STUDIES.name}#{study['study'].replace('_', '-')})"
    hidden = "---\nhide:\n  - navigation\n  - toc\n---\n\n"
    return f'{hidden}# {study["question"]}\n\n{found}\n\n<div class="study" markdown="1">\n\n{text}\n</div>\n'
