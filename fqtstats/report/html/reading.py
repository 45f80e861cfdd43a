"""Finished runs for a report, and which of them are about the same model and minibatch."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fqtstats import results
from fqtstats.errors import InputError
from fqtstats.profiles import Profile, load_profile
from fqtstats.results import Configuration, Result
from fqtstats.run_directory import read_document

__all__ = ["Run", "Subject", "command", "read", "subjects"]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: of its folder; no two runs of a report have the same.
        content: what it ended with.
        document: its ``run.json``.
    """

    name: str
    content: Result | Profile
    document: dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """Runs about the same model and minibatch: their numbers can be compared.

    Attributes:
        runs: all of them, in the order in which they were given.
        result: the configurations of all measurements; None where there is none.
        profiles: by the name of their run.
    """

    runs: tuple[Run, ...]
    result: Result | None
    profiles: dict[str, Profile]

    @property
    def metadata(self) -> dict[str, Any]:
        """What all measurements agree on, or that of the first profile where there is none."""
        return self.result.metadata if self.result else self.runs[0].content.metadata


def read(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """The runs in some folders; a folder that is named twice is read once.

    Raises:
        InputError: no folder, one that is not a run, a run that is not finished or damaged, or one of a kind that a
            report is not made of.
    """
    places = list({Path(path).resolve(): Path(path) for path in paths}.values())
    if not places:
        raise InputError("expected at least one run to report, got none; name the folder of a run")
    found = [_read(place) for place in places]
    names = [run.name for run in found]
    # Folders of the same name are told apart as they were given.
    return [
        replace(run, name=os.fspath(place)) if names.count(run.name) > 1 else run
        for run, place in zip(found, places, strict=True)
    ]


def _read(place: Path) -> Run:
    if not place.is_dir():
        what = "a file" if place.exists() else "nothing"
        raise InputError(f"expected the folder of a run, found {what} at {place}; name the folder that holds run.json")
    document = read_document(place)
    kind = document.get("kind", Result.kind)  # runs from before there were others do not say
    if not document["finished"]:
        raise InputError(f"the run in {place} is not finished; continue it with --resume, then report it")
    if kind not in (Result.kind, Profile.kind):
        raise InputError(
            f"a report is made of runs of fqtstats measure and fqtstats profile, but the run in {place} is a {kind}; "
            "leave it out"
        )
    content = results.load(place) if kind == Result.kind else load_profile(place)
    return Run(place.resolve().name, content, document)


def subjects(runs: Sequence[Run]) -> list[Subject]:
    """The runs by model and minibatch, in the order in which they were given.

    A run that does not say what it measured is a subject of its own.
    """
    groups: dict[str, list[Run]] = {}
    for index, run in enumerate(runs):
        hashes = run.content.metadata.get("hashes")
        key = json.dumps(hashes, sort_keys=True) if hashes else f"run {index}"
        groups.setdefault(key, []).append(run)
    return [_subject(group) for group in groups.values()]


def _subject(runs: Sequence[Run]) -> Subject:
    measured = [(run.name, run.content) for run in runs if isinstance(run.content, Result)]
    every = [item for _, result in measured for item in result.configurations]
    repeated = {item for item in every if every.count(item) > 1}
    parts = [_told_apart(result, name, repeated) for name, result in measured]
    merged = results.merge(parts) if len(parts) > 1 else parts[0] if parts else None
    profiles = {run.name: run.content for run in runs if isinstance(run.content, Profile)}
    return Subject(tuple(runs), merged, profiles)


def _told_apart(result: Result, name: str, repeated: set[Configuration]) -> Result:
    """The result with the run's name in the configurations that another run has, too."""
    mine = [item for item in result.configurations if item in repeated]
    if not mine:
        return result
    table = result.table.copy()
    for item in mine:
        table.loc[result.select(item).index, "quantizer"] = f"{item.quantizer} ({name})"
    entries = [
        {**entry, "quantizer": f"{entry['quantizer']} ({name})"}
        if Configuration(str(entry.get("quantizer")), entry.get("bits")) in mine
        else entry
        for entry in result.metadata.get("configurations") or []
    ]
    return Result(table, {**result.metadata, "configurations": entries})


def command(run: Run) -> str:
    """The command line that repeats a run; "" for one that the command line did not make."""
    arguments = run.document["arguments"]
    if arguments.get("command") not in ("measure", "profile"):
        return ""
    words = ["fqtstats", arguments["command"]]
    labels = arguments.get("quantizers") or [arguments.get("quantizer")]
    pairs = [str(label).rpartition("@")[::2] for label in labels]
    words += ["--quantizer", ",".join(dict.fromkeys(name for name, _ in pairs))]
    words += ["--bits", ",".join(dict.fromkeys(bits for _, bits in pairs))]
    for name, value in arguments.items():
        if name in ("command", "quantizers", "quantizer") or value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return shlex.join(words)
