"""The page: everything that a report says, put into its template."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import fqtstats
from fqtstats.report import fitted
from fqtstats.report.bounds import notes
from fqtstats.report.html import drawing, tables
from fqtstats.report.html.drawing import Drawing
from fqtstats.report.html.findings import RULES, Finding, findings, of_profile, overall
from fqtstats.report.html.reading import Run, Subject, command, subjects
from fqtstats.report.html.tables import Table
from fqtstats.report.numbers import plain
from fqtstats.results import Result

__all__ = ["is_report", "render"]

_MARK = b'<!doctype html>\n<html lang="en" data-made-by="fqtstats report">'
"""How every report begins."""

_UNFOLDED = 4
"""With more configurations, verdicts are a table, and their details and the tables of layers but one are folded."""

_HALF = 540
"""Half the width of the page, in pixels."""


@dataclass(frozen=True)
class _Figures:
    """A heading and what is drawn below it; ``without`` is what is said where there is nothing to draw."""

    name: str
    title: str
    drawings: Sequence[Drawing]
    without: str = ""

    @property
    def narrow(self) -> bool:
        """Whether two like it fit beside each other."""
        return len(self.drawings) == 1 and self.drawings[0].width <= _HALF


@dataclass(frozen=True)
class _Section:
    """What the page says about one model and minibatch."""

    name: str
    title: str
    about: Sequence[tuple[str, str]]
    overall: Sequence[Finding]
    verdicts: Sequence[tuple[str, dict[str, Finding]]]
    blamed: Sequence[tuple[str, Sequence[Finding]]]
    warnings: Sequence[str]
    notes: Sequence[str]
    summary: Table | None
    layers: Sequence[Table]
    compact: bool
    unfolded: int
    sources: Sequence[Table]
    figures: Sequence[_Figures]
    legend: Sequence[tables.Head]


def is_report(data: bytes) -> bool:
    """Whether a file that begins with ``data`` is a report of this kind."""
    return data.startswith(_MARK)


def render(runs: Sequence[Run]) -> bytes:
    """The report about some runs; the same runs give the same bytes.

    The page loads nothing, and runs no script but its own: its content security policy names that script's SHA-256.
    """
    environment = Environment(
        loader=PackageLoader("fqtstats.report.html", "parts"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["breakable"] = _breakable
    environment.filters["folded"] = _folded
    script = _part("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    groups = subjects(runs)
    sections = [_section(subject, index, len(groups)) for index, subject in enumerate(groups, start=1)]
    page: str = environment.get_template("page.html").render(
        version=fqtstats.__version__,
        title=_title(groups),
        sections=sections,
        runs=[_provenance(run) for run in runs],
        rules=RULES,
        style=Markup(_part("page.css")),
        script=Markup(script),
        script_digest=digest,
    )
    return page.encode()


def _breakable(name: str) -> Markup:
    """A qualified name that a line may end in after each dot."""
    return Markup(".<wbr>").join(name.split("."))


def _folded(unit: str) -> Markup:
    """A unit with a line per factor, so that it is hardly wider than its numbers."""
    return Markup("/<br>").join(unit.split("/"))


def _part(name: str) -> str:
    return resources.files("fqtstats.report.html").joinpath("parts", name).read_text(encoding="utf-8")


def _title(groups: Sequence[Subject]) -> str:
    names = list(dict.fromkeys(_model(subject) for subject in groups))
    return f"Quantized gradients of {', '.join(names)}" if any(names) else "Quantized gradients"


def _model(subject: Subject) -> str:
    about = subject.metadata
    arguments = about.get("arguments") or {}
    model = about.get("model") or arguments.get("model")
    data = about.get("data") or arguments.get("data")
    data = data.get("name") if isinstance(data, dict) else data
    if model and data:
        return f"{model} on {data}"
    return str(model) if model else ", ".join(run.name for run in subject.runs)


def _section(subject: Subject, index: int, count: int) -> _Section:
    name = f"s{index}"
    result = subject.result
    configurations = result.configurations if result else ()
    figures: list[_Figures] = []
    if result:
        figures += [
            _Figures(f"{name}-variance", "Variance by layer", drawing.variance(result, f"{name}-variance")),
            _Figures(f"{name}-bits", "Variance against bits", drawing.widths(result, f"{name}-bits")),
        ]
    matrices = [
        drawing.matrix(profile, f"{name}-matrix-{k}") for k, profile in enumerate(subject.profiles.values(), start=1)
    ]
    parts = drawing.shares(result, f"{name}-shares") if result and not matrices else []
    figures.append(_Figures(f"{name}-heat", "Where the variance comes from" if matrices else "Shares of the variance",
                            [*matrices, *parts]))  # fmt: skip
    if result:
        without = "No variance of these runs has a bound."
        figures.append(
            _Figures(f"{name}-bounds", "Variance against its bound", drawing.bounds(result, f"{name}-bounds"), without)
        )
    summary = tables.summary(result, f"{name}-summary") if result else None
    layers = [tables.layers(result, item, f"{name}-layers-{k}") for k, item in enumerate(configurations) if result]
    sources = [tables.sources(profile, f"{name}-sources-{k}") for k, profile in enumerate(subject.profiles.values())]
    every = [*([summary] if summary else []), *layers, *sources]
    legend: dict[str, tables.Head] = {}
    for head in (head for table in every for head in table.heads):
        legend.setdefault(head.title, head)
    return _Section(
        name=name,
        title=_model(subject) if count > 1 else "",
        about=_about(subject),
        overall=overall(result) if result else [],
        verdicts=[(str(item), findings(result, item)) for item in configurations] if result else [],
        blamed=[
            (f"{profile.label} (profile{f' in {run}' if len(subject.profiles) > 1 else ''})", of_profile(profile))
            for run, profile in subject.profiles.items()
        ],
        warnings=[text.plain for text in notes(result)] if result else [],
        notes=[text.plain for text in fitted.unquantized(subject.metadata)],
        summary=summary,
        layers=layers,
        compact=len(layers) > _UNFOLDED,
        unfolded=len(layers) if len(layers) <= _UNFOLDED else 1,
        sources=sources,
        figures=[own for own in figures if own.drawings or own.without],
        legend=list(legend.values()),
    )


def _about(subject: Subject) -> list[tuple[str, str]]:
    """What was measured, as pairs."""
    about = subject.metadata
    result = subject.result
    told: list[tuple[str, str]] = []
    if result:
        told.append(("configurations", ", ".join(str(item) for item in result.configurations)))
        draws = sorted({int(result.total(item)["draws"]) for item in result.configurations})
        told.append(("draws", ", ".join(f"{one}" for one in draws) + " of the quantized gradient per configuration"))
        rows = result.rows(result.configurations[0])
        tensors = f"{len(rows)} tensors, {int(rows['quantized'].sum())} of them in quantized layers"
        told.append(("parameters", f"{int(rows['numel'].sum()):,} in {tensors}"))
    for profile in subject.profiles.values():
        told.append(("profile", f"{profile.label}, {len(profile.sources)} gradient quantizers"))
    data = about.get("data")
    if isinstance(data, dict):
        told.append(("minibatch", f"{data.get('samples')} samples of {data.get('name')}"))
    weights = about.get("weights")
    accuracy = about.get("test_accuracy")
    if weights:
        reached = f" (test accuracy {100 * accuracy:.1f} %)" if isinstance(accuracy, float) else ""
        told.append(("weights", f"{weights}{reached}"))
    first, *_ = about.get("configurations") or [{}]
    loss = about.get("loss", first.get("loss") if isinstance(first, dict) else None)
    if isinstance(loss, float):
        told.append(("loss", plain(loss)))
    if about.get("backend"):
        told.append(("backend", str(about["backend"])))
    return told


def _provenance(run: Run) -> dict[str, Any]:
    """Where a run was made, and how to make it again."""
    about = run.content.metadata
    document = run.document
    arguments = document["arguments"]
    hashes = about.get("hashes")
    data = about.get("data")
    pairs = [
        ("kind", "measurement" if isinstance(run.content, Result) else "profile"),
        ("begun", document.get("created")),
        ("finished", document.get("finished_at")),
        ("seconds", document.get("wall_seconds")),
        ("processor", about.get("cpu")),
        ("processors", about.get("cpu_count")),
        ("machine", about.get("machine")),
        ("system", about.get("platform")),
        ("kernels", about.get("isa")),
    ]
    digests = [
        *((f"{key} (SHA-256)", value) for key, value in (hashes or {}).items()),
        *([("data (SHA-256)", data["sha256"])] if isinstance(data, dict) and "sha256" in data else []),
        *(
            (f"{key.removesuffix('_sha256')}.parquet (SHA-256)", value)
            for key, value in document.items()
            if key.endswith("_sha256")
        ),
    ]
    return {
        "name": run.name,
        "command": command(run),
        "facts": [(key, str(value)) for key, value in pairs if value not in (None, "")],
        "arguments": [(key, _shown(value)) for key, value in arguments.items()],
        "versions": [(key, str(value)) for key, value in (about.get("versions") or {}).items() if value],
        "digests": [(key, str(value)) for key, value in digests],
    }


def _shown(value: object) -> str:
    if value is None:
        return "not given"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value)
