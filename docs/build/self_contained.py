"""The site works without a network: nothing in it is loaded from elsewhere."""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError

LOADED = re.compile(
    r"""<(?:script|img|iframe)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|@import\s+(?:url\()?["']?(?:https?:)?//[^"')\s]+""",
    re.IGNORECASE,
)


def on_post_build(config, **_):
    """Look through all pages and style sheets."""
    for file in sorted(Path(config.site_dir).rglob("*")):
        if file.suffix in (".html", ".css"):
            found = LOADED.search(file.read_text())
            if found:
                raise PluginError(f"{file} loads something from elsewhere: {found[0]}")
