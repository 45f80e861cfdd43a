"""A run on disk: lock and state to resume from while it is written, then the finished result.

Every file appears under its name only when it is complete (written beside it, synchronised, renamed), so a process
killed at any moment leaves the previous version intact.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, TypeAlias, TypeVar
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pandas as pd

from fqtstats.errors import InputError, RunDirectoryError
from fqtstats.files import read_bytes, reason, write_atomically
from fqtstats.schema import (
    FORMAT_VERSION,
    Column,
    Json,
    check_version,
    json_dict,
    normalised,
    parquet_bytes,
    read_parquet,
)

__all__ = [
    "READERS",
    "Recordable",
    "RunDirectory",
    "Tables",
    "files_of",
    "load",
    "read_document",
    "read_finished",
    "read_tables",
    "save",
    "settle",
]

READERS = {
    "measurement": "fqtstats.load",
    "profile": "fqtstats.load_profile",
    "plan": "fqtstats.load_plan",
    "training": "fqtstats.load_training",
    "comparison": "fqtstats.load_comparison",
}
"""What reads a run, by its kind."""

Tables: TypeAlias = Mapping[str, tuple[str, Sequence[Column]]]
"""By attribute of what a run ends with: the table's file, without the suffix, and its schema."""

R = TypeVar("R", bound="Recordable")

_ANEW = "measure anew in another directory"
_STATE_MAGIC = b"fqtstats-state-1\n"
_DIGEST_SIZE = hashlib.sha256().digest_size


class Recordable(Protocol):
    """What a run ends with: the files of a run directory beside ``run.json``."""

    @property
    def kind(self) -> str:
        """Its key in :data:`READERS`; kept in ``run.json``."""

    @property
    def metadata(self) -> dict[str, Any]:
        """Kept in ``run.json``."""

    def files(self) -> dict[str, bytes]:
        """Files by name; ``run.json`` has the SHA-256 of each Parquet file, which readers check."""

    def figures(self) -> dict[str, bytes]:
        """PNG files by name, without the suffix."""


class _HashingWriter:
    """Passes bytes on to a file and hashes them, so that a large state is not copied in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def digest(self) -> bytes:
        return self._hash.digest()


def _write_state(
    file: BinaryIO, key: str, arrays: Mapping[str, npt.NDArray[np.generic]], info: dict[str, Json]
) -> None:
    """Magic, one line of JSON, the arrays as consecutive .npy blocks, and the SHA-256 of all that."""
    writer = _HashingWriter(file)
    writer.write(_STATE_MAGIC)
    writer.write(json.dumps({"key": key, "info": info, "arrays": list(arrays)}).encode() + b"\n")
    for array in arrays.values():
        np.lib.format.write_array(writer, np.asarray(array), allow_pickle=False)
    file.write(writer.digest())


def _parse_state(data: bytes, key: str) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, Json]]:
    """The inverse of :func:`_write_state`; ValueError on anything that is not exactly such a file."""
    body, digest = data[:-_DIGEST_SIZE], data[-_DIGEST_SIZE:]
    if not body.startswith(_STATE_MAGIC):
        raise ValueError("it is not a state file of this version")
    if hashlib.sha256(body).digest() != digest:
        raise ValueError("its checksum does not match")
    stream = io.BytesIO(body)
    stream.seek(len(_STATE_MAGIC))
    header = json.loads(stream.readline())
    if header["key"] != key:
        raise ValueError(f"it belongs to {header['key']!r}")
    return {name: np.lib.format.read_array(stream, allow_pickle=False) for name in header["arrays"]}, header["info"]


def read_document(directory: Path) -> dict[str, Json]:
    """``run.json``, checked as far as every reader needs it.

    Raises:
        RunDirectoryError: there is none, or it is damaged, foreign or newer.
    """
    path = directory / "run.json"
    if not path.is_file():
        several = sorted(found.parent.name for found in directory.glob("*/run.json"))
        hint = f"name one of the runs in it: {', '.join(several)}" if several else "name the folder of a run"
        raise RunDirectoryError(f"{directory} is not a run directory: it has no run.json; {hint}")
    try:
        document = json.loads(read_bytes(path))
    except ValueError as error:
        raise RunDirectoryError(f"{path} is corrupted: {reason(error)}; {_ANEW}") from error
    if not isinstance(document, dict) or document.get("format") != "fqtstats-run":
        raise RunDirectoryError(f"{path} was not written by fqtstats; choose another directory")
    version = document.get("version")
    if not isinstance(version, int):
        raise RunDirectoryError(f"{path} is corrupted: it has no version; {_ANEW}")
    check_version(version, path)
    if not isinstance(document.get("arguments"), dict) or not isinstance(document.get("finished"), bool):
        raise RunDirectoryError(f'{path} is corrupted: it lacks "arguments" or "finished"; {_ANEW}')
    return document


def read_finished(place: Path, kind: str, names: Sequence[str]) -> tuple[dict[str, bytes], dict[str, Json]]:
    """The contents of some Parquet files of a finished run, checked against ``run.json``, and its metadata.

    Raises:
        RunDirectoryError: it is not a run, of another kind, not finished, or a file is damaged.
    """
    document = read_document(place)
    if not document["finished"]:
        raise RunDirectoryError(f"the run in {place} is not finished; continue it with --resume")
    found = document.get("kind", "measurement")  # runs from before there were others do not say
    if found != kind:
        reader = READERS.get(str(found))
        told = f"read it with {reader}" if reader else "install a newer fqtstats to read it"
        raise RunDirectoryError(f"expected a {kind} in {place}, but the run there is a {found}; {told}")
    files = {}
    for name in names:
        files[name] = read_bytes(place / name)
        if hashlib.sha256(files[name]).hexdigest() != document.get(_digest_key(name)):
            raise RunDirectoryError(f"{place / name} is corrupted: its SHA-256 is not the one in run.json; {_ANEW}")
    metadata = document.get("metadata")
    return files, metadata if isinstance(metadata, dict) else {}


def settle(result: Recordable, tables: Tables, keys: Mapping[str, Sequence[str]] | None = None) -> None:
    """Bring tables and metadata of a frozen dataclass into the form that their schema and JSON have, when it is made.

    Args:
        result: that is made.
        tables: of it.
        keys: columns of which no two rows of a table may have the same values, by the table's name.

    Raises:
        InputError: a table does not follow its schema, two rows have the same key, or the metadata is not JSON.
    """
    for name, (file, columns) in tables.items():
        what = f"table {file!r} of a {result.kind}"
        clean = normalised(getattr(result, name), columns, what)
        key = list((keys or {}).get(name, ()))
        if key and clean.duplicated(key).any():
            raise InputError(f"expected one row per {', '.join(key)} in the {what}")
        object.__setattr__(result, name, clean)
    object.__setattr__(result, "metadata", json_dict(result.metadata, "metadata"))


def files_of(tables: Tables, owner: object) -> dict[str, bytes]:
    """Every table of ``owner`` as Parquet and as CSV: what :meth:`Recordable.files` gives."""
    files = {}
    for name, (file, columns) in tables.items():
        table = getattr(owner, name)
        files[f"{file}.parquet"] = parquet_bytes(table, columns)
        files[f"{file}.csv"] = table.to_csv(index=False, lineterminator="\n").encode()
    return files


def read_tables(
    path: str | os.PathLike[str], kind: str, tables: Tables
) -> tuple[dict[str, pd.DataFrame], dict[str, Json]]:
    """The tables of a finished run, by name, and its metadata.

    Raises:
        RunDirectoryError: nothing there, not a run, a run of another kind, not finished, of a newer format, or damaged.
    """
    place = Path(path)
    if not place.is_dir():
        what = "a file" if place.exists() else "nothing"
        raise RunDirectoryError(f"expected the run directory of a {kind}, found {what} at {place}")
    names = {name: f"{file}.parquet" for name, (file, _) in tables.items()}
    files, metadata = read_finished(place, kind, list(names.values()))
    found = {
        name: read_parquet(files[file], place / file, f"table {tables[name][0]!r} of a {kind}")
        for name, file in names.items()
    }
    return found, metadata


def load(make: Callable[..., R], path: str | os.PathLike[str], kind: str, tables: Tables) -> R:
    """What a finished run ended with, made of its tables, which ``make`` takes by name, and its metadata.

    Raises:
        RunDirectoryError: nothing there, not a run, a run of another kind, not finished, of a newer format, or damaged.
    """
    found, metadata = read_tables(path, kind, tables)
    try:
        return make(**found, metadata=metadata)
    except InputError as error:
        raise RunDirectoryError(f"{os.fspath(path)} holds no valid {kind}: {error}") from error


def _digest_key(name: str) -> str:
    return f"{Path(name).stem}_sha256"


def save(result: Recordable, path: str | os.PathLike[str]) -> None:
    """Write a finished run at ``path``, which must be new or empty.

    Raises:
        RunDirectoryError: ``path`` is in use or cannot be written.
    """
    arguments = result.metadata.get("arguments")
    with RunDirectory.create(path, arguments if isinstance(arguments, dict) else {}) as run:
        run.finish(result)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunDirectory:
    """A run on disk while it is written; make it with :meth:`create` and use it in a ``with`` statement.

    One process at a time holds it, through an advisory lock that the system drops when the process ends, however it
    ends. Concurrent threads may save states under different keys only.

    Attributes:
        path: the directory.
        arguments: the run's arguments, as plain JSON.
        finished: whether the result is there, from this process or from the one that is resumed.
    """

    def __init__(self, path: Path, arguments: dict[str, Json], finished: bool, created: str, lock: int) -> None:
        self.path = path
        self.arguments = arguments
        self.finished = finished
        self._created = created
        self._lock: int | None = lock
        self._began = time.monotonic()
        self._made: list[Path] = []

    @classmethod
    def create(
        cls, path: str | os.PathLike[str], arguments: Mapping[str, object], resume: bool = False
    ) -> RunDirectory:
        """Open ``path`` for a run: a new or empty directory, or, with ``resume``, one that holds the same run.

        Args:
            path: the directory; it and its parents are made.
            arguments: what defines the run, as JSON; a resumed run must have the same ones.
            resume: continue a run that is there. Without one there, a new run starts.

        Raises:
            RunDirectoryError: the place cannot be written, is a file, holds something else or a run (without
                ``resume``), holds a run with other arguments, or is being written by another process.
            InputError: the arguments are not JSON.
        """
        place = Path(path)
        plain = json_dict(arguments, "arguments")
        made = [folder for folder in (place, *place.parents) if not os.path.lexists(folder)]
        try:
            place.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise RunDirectoryError(
                f"cannot make the run directory {place}: a file is in the way; choose another --out"
            ) from error
        except OSError as error:
            raise RunDirectoryError(
                f"cannot make the run directory {place}: {reason(error)}; choose another --out"
            ) from error
        cls._stored(place, plain, resume)  # before the lock file is made: nothing is put into a directory in use
        lock = cls._acquire(place)
        try:
            document = cls._stored(place, plain, resume)
            run = cls(place, plain, bool(document["finished"]), str(document.get("created")), lock)
            run._made = made
            if not run.finished:
                run._make(place / "state")
                run._write_document(finished=False)
            else:
                run._remove_state()
        except BaseException:
            os.close(lock)
            raise
        return run

    @staticmethod
    def _stored(place: Path, arguments: dict[str, Json], resume: bool) -> dict[str, Json]:
        """The run that is in ``place``, or a new one, if these arguments may go there."""
        try:
            entries = {entry.name for entry in place.iterdir()}
        except OSError as error:
            raise RunDirectoryError(f"cannot read {place}: {reason(error)}") from error
        if "run.json" not in entries:
            # What a process killed right at the start may leave behind is not a run.
            if entries - {".lock", "run.json.tmp", "state"}:
                raise RunDirectoryError(f"{place} is not empty and not a run; choose another directory (--out)")
            return {"finished": False, "created": _now()}
        if not resume:
            raise RunDirectoryError(
                f"{place} already holds a run; choose another directory (--out) or continue this one with --resume"
            )
        document = read_document(place)
        stored = document["arguments"]
        assert isinstance(stored, dict)  # read_document has checked it
        # Two commands differ in most arguments, which would only hide that they do.
        before, now = (one.get("command") for one in (stored, arguments))
        if before != now and before is not None and now is not None:
            raise RunDirectoryError(f"{place} holds a run of {before!r}, expected one of {now!r}; choose another --out")
        names = sorted(
            name for name in stored.keys() | arguments.keys() if stored.get(name, ...) != arguments.get(name, ...)
        )
        if names:
            differences = ", ".join(
                f"{name} was {_shown(stored, name)} and is now {_shown(arguments, name)}" for name in names
            )
            raise RunDirectoryError(
                f"{place} holds a run with other arguments ({differences}); give the same ones or choose another --out"
            )
        return document

    @staticmethod
    def _acquire(place: Path) -> int:
        """The file descriptor that holds the lock. The file stays: the lock is on it, not in it."""
        try:
            descriptor = os.open(place / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise RunDirectoryError(f"cannot write in {place}: {reason(error)}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise RunDirectoryError(
                f"another process is writing the run in {place}; wait for it or choose another directory (--out)"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise RunDirectoryError(
                f"cannot lock {place}: {reason(error)}; choose a directory on a local disk (--out)"
            ) from error
        return descriptor

    def close(self) -> None:
        """Give the lock back; the run can be resumed. A second call does nothing."""
        if self._lock is not None:
            if self.finished:
                with suppress(OSError):
                    (self.path / ".lock").unlink()
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def save_state(self, key: str, arrays: Mapping[str, npt.NDArray[np.generic]], info: Mapping[str, object]) -> None:
        """Keep ``arrays`` and ``info`` under ``key``, replacing the previous ones in one step.

        Args:
            key: any name, for instance ``"bhq@5"``.
            arrays: numeric arrays; dtype, shape and bits come back unchanged.
            info: JSON, for instance the number of draws done.

        Raises:
            RunDirectoryError: the disk is full or cannot be written; the previous state is intact.
            InputError: ``info`` is not JSON or an array holds Python objects.
        """
        self._require_open()
        plain = json_dict(info, "info")
        objects = [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]
        if objects:
            raise InputError(f"a state holds numeric arrays only, but {', '.join(objects)} hold Python objects")
        write_atomically(self._state_path(key), lambda file: _write_state(file, key, arrays, plain))

    def load_state(self, key: str) -> tuple[dict[str, npt.NDArray[np.generic]], dict[str, Json]] | None:
        """What was last saved under ``key``; None if nothing was.

        A file that is not exactly what was written is not trusted: a RuntimeWarning says so and the answer is None.

        Raises:
            RunDirectoryError: the file is there but cannot be read.
        """
        path = self._state_path(key)
        if not path.exists():
            return None
        data = read_bytes(path)
        try:
            return _parse_state(data, key)
        except ValueError as error:
            warnings.warn(f"ignoring the state {path}: {reason(error)}; its part starts over", RuntimeWarning, 2)
            return None

    def finish(self, result: Recordable) -> None:
        """Write the files and the figures, then mark the run as finished and drop its state.

        Raises:
            RunDirectoryError: something cannot be written; the run stays unfinished and can be resumed.
        """
        self._require_open()
        files = result.files()
        for name, data in files.items():
            self._write(name, data)
        self._make(self.path / "figures")
        for name, png in result.figures().items():
            self._write(f"figures/{name}.png", png)
        digests: dict[str, Json] = {
            _digest_key(name): hashlib.sha256(data).hexdigest()
            for name, data in files.items()
            if name.endswith(".parquet")
        }
        self._write_document(
            finished=True,
            kind=result.kind,
            finished_at=_now(),
            wall_seconds=round(time.monotonic() - self._began, 3),
            **digests,
            metadata=result.metadata,
        )
        self.finished = True
        self._remove_state()

    def discard(self, *, with_state: bool = False) -> bool:
        """Remove an unfinished run that holds no state, so that its place is free again; call it when the run failed.

        Directories are removed only if :meth:`create` made them and nothing else is in them.

        Args:
            with_state: remove it even if it holds a state: one that there is no use in continuing from.

        Returns:
            Whether it was such a run.
        """
        state = self.path / "state"
        if self.finished or (any(state.glob("*.state")) and not with_state):
            return False
        with suppress(OSError):  # what cannot be removed does no harm
            shutil.rmtree(state, ignore_errors=True)
            for name in ("run.json", ".lock"):
                (self.path / name).unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()
        return True

    def _require_open(self) -> None:
        if self._lock is None:
            raise RunDirectoryError(f"the run in {self.path} was closed; open it again with resume=True")

    def _state_path(self, key: str) -> Path:
        return self.path / "state" / f"{quote(key, safe='')}.state"

    @staticmethod
    def _make(path: Path) -> None:
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise RunDirectoryError(f"cannot write {path}: {reason(error)}") from error

    def _write(self, name: str, data: bytes) -> None:
        write_atomically(self.path / name, lambda file: file.write(data))

    def _remove_state(self) -> None:
        state = self.path / "state"
        if state.exists():
            try:
                shutil.rmtree(state)
            except OSError as error:
                raise RunDirectoryError(f"the run is done, but {state} cannot be removed: {reason(error)}") from error

    def _write_document(self, *, finished: bool, **more: Json) -> None:
        document: dict[str, Json] = {
            "format": "fqtstats-run",
            "version": FORMAT_VERSION,
            "finished": finished,
            "created": self._created,
            "arguments": self.arguments,
            **more,
        }
        text = json.dumps(document, indent=2, allow_nan=False) + "\n"
        write_atomically(self.path / "run.json", lambda file: file.write(text.encode()))


def _shown(arguments: Mapping[str, Json], name: str) -> str:
    return repr(arguments[name]) if name in arguments else "not given"
