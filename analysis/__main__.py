"""Makes ``analysis/README.md``, the index of the studies, of the results that are saved: ``python -m analysis``.

A test checks that the file in the repository is what this gives.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from analysis import STUDIES
from analysis.study import RESULTS, Claim, Saved, Study, as_json, load
from fqtstats.errors import InputError

INDEX = Path(__file__).parent / "README.md"

_SHOWN = 7
"""Claims of a section, before the others are folded."""

_HEAD = """# Studies

One question each, answered by measuring with fqtstats. Every number below comes from a saved result, with its 95 %
interval; `python -m analysis` writes this page. A study is run by

```bash
fqtstats study NAME          # or python -m analysis.NAME; in a clone of the repository
fqtstats study NAME --quick  # the same about less, in seconds
```

Its folder has the measurements (Parquet), the figures (PNG and PDF), a table, and where and how they were made
(`study.json`).
"""


def main() -> None:
    """Write the index."""
    INDEX.write_text(index())


def studies() -> list[Study]:
    """All of them, in the order of the index."""
    return [importlib.import_module(f"analysis.{name}").STUDY for name in STUDIES]


def index() -> str:
    """Its text."""
    known = studies()
    for study in known:
        if load(study, RESULTS / study.name).about["settings"] != as_json(study.full):
            raise InputError(f"the results of the study {study.name!r} are not those of its full form")
    contents = "".join(f"- [{study.question}](#{study.name.replace('_', '-')})\n" for study in known)
    return "\n".join([_HEAD, contents, *(_section(study, load(study, RESULTS / study.name)) for study in known)])


def _section(study: Study, saved: Saved) -> str:
    folder = f"results/{study.name}"
    told, rest = _divided(saved.claims)
    first, *others = saved.about["figures"]
    more = "".join(f", [{name}]({folder}/{name}.png)" for name in others)
    return (
        f'<a id="{study.name.replace("_", "-")}"></a>\n\n'
        f"## {study.question}\n\n"
        f"`fqtstats study {study.name}`: {_made(saved)}.\n\n"
        f"{_listed(told)}\n"
        f"{_folded(rest)}"
        f"![{study.question}]({folder}/{first}.png)\n\n"
        f"[table]({folder}/table.md){more}\n"
    )


def _divided(claims: list[Claim]) -> tuple[list[Claim], list[Claim]]:
    """What is read at once, and what is folded: a section shows its first claims, and all that are not as expected."""
    shown = [claim for index, claim in enumerate(claims) if index < _SHOWN or claim.holds is False]
    rest = [claim for claim in claims if claim not in shown]
    return (shown, rest) if len(rest) > 2 else (claims, [])


def _listed(claims: list[Claim]) -> str:
    return "".join(f"- {_told(claim)}\n" for claim in claims)


def _folded(claims: list[Claim]) -> str:
    if not claims:
        return ""
    return f"<details>\n<summary>{len(claims)} more</summary>\n\n{_listed(claims)}\n</details>\n\n"


def _told(claim: Claim) -> str:
    if claim.holds is not False:
        return claim.text
    return f"**Not as expected.** {claim.text}{f' Why: {claim.because}' if claim.because else ''}"


def _made(saved: Saved) -> str:
    """When, how and of what the tables were made: of some results not all is known."""
    seconds, about = saved.about["cpu_seconds"], saved.about["provenance"] or {}
    told = {
        "time": None if seconds is None else f"{_duration(seconds)} of processor time",
        "processor": about.get("cpu"),
        "versions": f"torch {about['versions']['torch']}" if about.get("versions") else None,
        "commit": " and ".join(filter(None, about.get("commits", []))),
        "date": about.get("date"),
    }
    others = about.get("uses", {})
    source = [f"from the tables of {' and '.join(others)}"] if others else []
    known = [text for text in told.values() if text]
    missing = ", ".join(what for what, text in told.items() if not text)
    return ", ".join([*source, *known, *([f"{missing} not recorded"] if missing else [])])


def _duration(seconds: float) -> str:
    return f"{round(seconds)} s" if seconds < 100 else f"{round(seconds / 60)} min"


if __name__ == "__main__":
    main()
