"""Docstrings: their references become links, where the thing they name is documented."""

import re

REFERENCE = re.compile(r":(?:func|class|meth|attr|data|mod):<code>~?([\w.]+)</code>")


def on_page_content(page_html: str, /, **_):
    """Replace the references of a page."""

    def link(match: re.Match[str]) -> str:
        name = match[1]
        if "." not in name:
            return f"<code>{name}</code>"
        return f'<autoref identifier="{name}" optional><code>{name}</code></autoref>'

    # Two colons announce a block of code.
    return REFERENCE.sub(link, page_html).replace("::</p>", ":</p>")
