"""Formulas: LaTeX becomes MathML when the pages are built, so that readers need neither a script nor a network."""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

WORD = re.compile(r"<mo>([A-Za-z]{2,})</mo>")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\(|\\\[)(.*?)(?:\\\)|\\\])</\1>', re.DOTALL)


def on_page_content(page_html: str, /, page, **_):
    """Replace the formulas of a page."""

    def mathml(match: re.Match[str]) -> str:
        latex = html.unescape(match[2]).strip()
        try:
            found = convert(latex, display="block" if match[1] == "div" else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: the formula {latex!r} is not LaTeX: {error!r}") from error
        # As an operator, the name of a function would stand apart from its argument.
        found = WORD.sub(r"<mi>\1</mi>", found)
        # A command that the converter does not know stays as it is.
        if "\\" in re.sub(r"<[^>]*>", "", found):
            raise PluginError(f"{page.file.src_uri}: the formula {latex!r} has a command that cannot be converted")
        return f'<div class="formula">{found}</div>' if match[1] == "div" else found

    return FORMULA.sub(mathml, page_html)
