"""The command line: ``fqtstats measure | profile | plan | train | compare | report | study | check | bench | list``.

Exit status: 0; 1 if a claim fails, a variance exceeds its bound, roundings are dependent, a training diverges, a
benchmark misses its target or the backends disagree; 2 for bad usage or input (one line that says what to do); 130
after Ctrl-C.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, TextIO

import typer

from fqtstats import __version__
from fqtstats.commands.bench import bench
from fqtstats.commands.check import check
from fqtstats.commands.compare import compare
from fqtstats.commands.console import err
from fqtstats.commands.listing import list_
from fqtstats.commands.measure import measure
from fqtstats.commands.plan import plan
from fqtstats.commands.profile import profile
from fqtstats.commands.report import report
from fqtstats.commands.study import study
from fqtstats.commands.train import train
from fqtstats.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"fqtstats {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Bias and variance of quantized gradients: a measuring instrument for fully quantized training."""


app.command()(measure)
app.command()(profile)
app.command()(plan)
app.command()(train)
app.command()(compare)
app.command()(report)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(study)
app.command(name="list")(list_)
app.command()(bench)
app.command()(check)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    told = f"fqtstats: warning: {_one_line(message)}"
    err.print(told, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _one_line(message: object) -> str:
    return " ".join(str(message).split())


def _fail(message: object) -> int:
    told = f"fqtstats: error: {_one_line(message)}"
    err.print(told, style="bold red", highlight=False, markup=False, soft_wrap=True)
    return 2


# What the parser raises, by way of a class that typer exports in every version.
_UsageError: type[Any] = typer.BadParameter.__bases__[0]


def run(arguments: Sequence[str]) -> int:
    """Run one command line.

    Args:
        arguments: without the program's name.

    Returns:
        The exit status. A mistake in what was asked for is one line on stderr and status 2; anything else that is
        raised is a defect, and is not caught.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        given = list(arguments)
        try:
            status = app(given or ["--help"], prog_name="fqtstats", standalone_mode=False, obj=given)
        except InputError as error:
            return _fail(error)
        except _UsageError as error:
            command = getattr(getattr(error, "ctx", None), "command_path", "fqtstats")
            options = getattr(getattr(error, "param", None), "opts", ())
            got = [f", got {value!r}" for option, value in pairwise(given) if option in options]
            return _fail(f"{error.format_message().rstrip('.')}{''.join(got[-1:])}; see {command} --help")
        except RuntimeError as error:
            torch = sys.modules.get("torch")  # not imported for this: --help should be immediate
            if torch is None or not isinstance(error, torch.OutOfMemoryError):
                raise
            return _fail(f"the device is out of memory ({str(error).split('. ')[0]}); lower --batch-size")
        except (KeyboardInterrupt, typer.Abort):
            return 130
    return status if isinstance(status, int) else 0


def main() -> None:
    """Entry point of the ``fqtstats`` command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
