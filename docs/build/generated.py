"""What the package itself says best: its commands, quantizers, policies and recipes, and the columns of its tables.

A page has ``<!-- generated: NAME -->`` where one of :data:`MADE` goes.
"""

import html
import importlib
import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
MARK = re.compile(r"<!-- generated: ([\w.]+) -->")


def on_page_markdown(markdown, /, **_):
    """Put in what a page asks for."""

    def made(match):
        name = match[1]
        return MADE[name]() if name in MADE else _columns(name)

    return MARK.sub(made, markdown)


def _table(head, rows):
    """An HTML table; cells are text, and names in the first column."""
    first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = ""
    for name, *cells in rows:
        others = "".join(f"<td>{_inline(cell)}</td>" for cell in cells)
        body += f"<tr><td><code>{html.escape(name)}</code></td>{others}</tr>"
    table = f"<table><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="names">{table}</div>\n'


def _inline(text):
    return re.sub(r"``(.+?)``", r"<code>\1</code>", html.escape(text))


def _columns(name):
    """The schema at ``module.NAME``."""
    module, _, own = name.rpartition(".")
    schema = getattr(importlib.import_module(f"fqtstats.{module}"), own)
    rows = [(column.name, "" if column.unit in ("", "1") else column.unit, column.meaning) for column in schema]
    return _table(("column", "unit", "what it is"), rows)


# --- the command line -------------------------------------------------------------------------------------------------


def _commands():
    from typer.main import get_command

    from fqtstats.cli import app

    return "\n".join(_command(name, command) for name, command in get_command(app).commands.items())


def _command(name, command):
    context = command.make_context(f"fqtstats {name}", [], resilient_parsing=True)
    usage = command.get_usage(context).removeprefix("Usage: ")
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and parameter.name != "help":
            rows.append((record[0], parameter.help or "", _default(parameter)))
    table = _table(("option", "what it is", "default"), rows)
    return f"## fqtstats {name} {{#{name}}}\n\n{command.help}\n\n```text\n{usage}\n```\n\n{table}"


def _default(parameter):
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    # By identity: 0 is equal to False, and a default worth showing.
    unset = any(parameter.default is nothing for nothing in (None, False, ...))
    return "" if unset else str(parameter.default)


# --- registries and output -------------------------------------------------------------------------------------------


def _quantizers():
    from fqtstats.quantizers import QUANTIZERS, options_of

    rows = []
    for name, cls in QUANTIZERS.items():
        options = ", ".join(f"{option}={value!r}" for option, value in options_of(cls).items())
        what = " ".join(cls.__doc__.split("\n\n")[0].split())
        widths = f"{min(cls.widths)}" if len(cls.widths) == 1 else f"{min(cls.widths)} to {max(cls.widths)}"
        rows.append((name, what, cls.role, cls().claim, widths, f"``{options}``"))
    return _table(("name", "what it is", "role", "claim", "bits", "options"), rows)


def _policies():
    from fqtstats import policies

    def shown(q):
        return "-" if q is None else f"{q.name}:{q.bits}"

    rows = []
    for name in policies.POLICIES:
        own = policies.get(name)
        rows.append((name, *(shown(q) for q in (own.activation, own.weight, own.grad_input, own.grad_weight))))
    return _table(("name", "activation", "weight", "grad_input", "grad_weight"), rows)


def _recipes():
    from fqtstats.training.recipes import RECIPES

    rows = []
    for name, definition in RECIPES.items():
        bits = ", ".join(map(str, definition.bits))
        told = f"{bits} (default {definition.default}): {definition.means}" if bits else "-"
        rows.append((name, definition.summary, told, definition.source))
    return _table(("recipe", "what it is", "bits", "source"), rows)


def _sources():
    from fqtstats.data import SOURCES

    return _table(("data", "what it is"), [(name, source.summary) for name, source in SOURCES.items()])


def _models():
    from fqtstats.models import MODELS

    rows = [(name, entry.summary, ", ".join(entry.kinds)) for name, entry in MODELS.items()]
    return _table(("model", "what it is", "data"), rows)


def _readme_output():
    """What the first command prints, as README.md has it."""
    return re.search(r"<!-- output:[^\n]*-->\n(.*?)<!-- end of output -->", README.read_text(), re.DOTALL)[1]


MADE = {
    "readme_output": _readme_output,
    "commands": _commands,
    "quantizers": _quantizers,
    "policies": _policies,
    "recipes": _recipes,
    "data": _sources,
    "models": _models,
}
