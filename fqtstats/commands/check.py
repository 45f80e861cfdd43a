"""``fqtstats check``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fqtstats.commands import experiments
from fqtstats.commands.console import check_counts, check_writable, out, progress, separated
from fqtstats.errors import InputError

if TYPE_CHECKING:
    from fqtstats.verdicts.claims import Subject
    from fqtstats.verdicts.products import ProductsReport

__all__ = ["check"]

_PANEL = "With --products"
_PRODUCTS = {"model": "preact_resnet20", "data": "digits", "batch_size": 32, "draws": 128}
"""Options that only --products has, and what they are where they are not given."""


def check(
    quantizer: Annotated[
        str | None,
        typer.Option(help="Registered ones, separated by commas, or all.", show_default="all; with --products, bhq"),
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="Their bits, separated by commas.", show_default="8,4,2; with --products, 5")
    ] = None,
    module: Annotated[
        str | None, typer.Option(help="package.module:function that returns your own, called as f(x, stream).")
    ] = None,
    alpha: Annotated[float, typer.Option(help="False-alarm rate of the whole check.")] = 1e-6,
    seed: Annotated[int, typer.Option(help="Gives the same verdicts again.")] = 0,
    json_file: Annotated[
        str | None, typer.Option("--json", help="Also write the verdicts to this file.", metavar="FILE")
    ] = None,
    junit: Annotated[str | None, typer.Option(help="Also write JUnit XML to this file.", metavar="FILE")] = None,
    products: Annotated[
        bool,
        typer.Option(
            "--products",
            help="Check the backward products of a model's layers in place of the quantizers alone: their variance "
            "shows noise that elements share.",
            rich_help_panel=_PANEL,
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="A built-in model or package.module:function.",
            show_default=str(_PRODUCTS["model"]),
            rich_help_panel=_PANEL,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Built-in data or package.module:function.",
            show_default=str(_PRODUCTS["data"]),
            rich_help_panel=_PANEL,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples in the minibatch.", show_default=str(_PRODUCTS["batch_size"]), rich_help_panel=_PANEL
        ),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            help="Draws of every quantized gradient.", show_default=str(_PRODUCTS["draws"]), rich_help_panel=_PANEL
        ),
    ] = None,
) -> None:
    """Is each quantizer what it claims, unbiased or not? Exit status 1 if one is not."""
    from fqtstats import imports
    from fqtstats.quantizers import QUANTIZERS
    from fqtstats.verdicts import claims

    if not 0 < alpha < 1:
        raise InputError(f"--alpha must be a probability between 0 and 1, got {alpha}")
    given = {"model": model, "data": data, "batch_size": batch_size, "draws": draws}
    for name, value in given.items():
        if value is not None and not products:
            raise InputError(f"--{name.replace('_', '-')} belongs to --products; add that, or leave it out")
    paths = [Path(name) for name in (json_file, junit) if name is not None]
    for path in paths:
        check_writable(path)
    wanted_bits = bits if bits is not None else "5" if products else "8,4,2"
    widths = []
    for text in separated(wanted_bits, "--bits"):
        if not text.isdecimal():
            raise InputError(f"expected --bits as whole numbers separated by commas, got {bits!r}")
        widths.append(int(text))
    subjects = []
    if quantizer is not None or module is None:
        known = [name for name, cls in QUANTIZERS.items() if not products or cls.role == "gradient"]
        wanted = quantizer if quantizer is not None else "bhq" if products else "all"
        names = known if wanted == "all" else separated(wanted, "--quantizer")
        subjects += claims.subjects(names, widths, suitable=wanted == "all")
        if products and not set(names) <= set(known):
            raise InputError(f"--products takes gradient quantizers, got {wanted!r}; known: {', '.join(known)}")
    if module is not None:
        subjects.append(claims.subject(module, imports.call(module)))
    if products:
        options = _PRODUCTS | {name: value for name, value in given.items() if value is not None}
        _check_products(subjects, options, alpha, seed, json_file, junit)
    else:
        _check_claims(subjects, alpha, seed, json_file, junit)


def _check_claims(
    subjects: Sequence[Subject], alpha: float, seed: int, json_file: str | None, junit: str | None
) -> None:
    from fqtstats.report.verdicts import show
    from fqtstats.verdicts import claims

    with progress() as bars:
        task = bars.add_task("checking", total=len(subjects))
        checked = claims.check_all(
            subjects,
            alpha,
            seed=seed,
            report=lambda done, total, title: bars.update(task, completed=done, total=total, description=title),
        )
    show(checked, alpha, out)
    if json_file is not None:
        content = {"alpha": alpha, "seed": seed, "checked": [one.as_dict() for one in checked]}
        _write(json_file, json.dumps(content, indent=2) + "\n")
    if junit is not None:
        _write(junit, claims.as_junit(checked))
    if not all(one.holds for one in checked):
        raise typer.Exit(1)


def _check_products(
    subjects: Sequence[Subject],
    options: dict[str, object],
    alpha: float,
    seed: int,
    json_file: str | None,
    junit: str | None,
) -> None:
    from fqtstats import experiment, policies
    from fqtstats.quantizers import Quantizer
    from fqtstats.report.verdicts import show_products
    from fqtstats.verdicts import probe, products

    model, data, batch_size, draws = (options[name] for name in ("model", "data", "batch_size", "draws"))
    assert isinstance(batch_size, int)
    assert isinstance(draws, int)
    check_counts(batch_size=(batch_size, 1), draws=(draws, 2))
    if draws % 2:
        raise InputError(f"--draws must be even, because they are compared in pairs; got {draws}")
    reports: dict[str, ProductsReport] = {}
    with progress() as bars:
        setup = experiment.prepare(
            str(model),
            str(data),
            batch_size=batch_size,
            further=0,
            seed=seed,
            progress=experiments.TrainingBar(bars, f"training {model}"),
        )
        for subject in subjects:
            reports[subject.name] = products.check_products(
                setup.model,
                setup.batch,
                setup.loss,
                policies.with_gradients(
                    subject.f if isinstance(subject.f, Quantizer) else partial(probe.attempt, subject.f)
                ),
                draws=draws,
                false_alarm=alpha / len(subjects),
                seed=seed,
                progress=experiments.MeasuringBar(bars, f"checking {subject.name}"),
            )
    show_products(reports, alpha, out)
    if json_file is not None:
        checked = [{"name": name, **report.as_dict()} for name, report in reports.items()]
        _write(json_file, json.dumps({"alpha": alpha, "seed": seed, "products": checked}, indent=2) + "\n")
    if junit is not None:
        _write(junit, products.as_junit(reports))
    if not all(report.ok for report in reports.values()):
        raise typer.Exit(1)


def _write(name: str, text: str) -> None:
    try:
        Path(name).write_text(text)
    except OSError as error:
        raise InputError(f"cannot write {name!r}: {error.strerror}; choose another place") from error
