"""Character-level text: the source of the running Python's own standard library."""

from __future__ import annotations

import importlib.util
from importlib.abc import InspectLoader

import torch

from fqtstats.data.base import InMemory
from fqtstats.errors import InputError

__all__ = ["MODULES", "text"]

LENGTH = 64
MAX_BYTES = 2_000_000

# Pure-Python top-level modules, sorted; the text is their source in this order, read without importing them. One that
# a Python version lacks is left out.
MODULES = (
    *("argparse", "ast", "calendar", "cmd", "configparser", "contextlib", "copy", "csv", "dataclasses"),
    *("difflib", "dis", "doctest", "enum", "fileinput", "fractions", "ftplib", "functools", "getopt", "gettext"),
    *("gzip", "heapq", "imaplib", "inspect", "ipaddress", "locale", "mailbox", "mimetypes", "optparse", "pdb"),
    *("pickle", "pickletools", "platform", "plistlib", "poplib", "pprint", "profile", "pyclbr", "random", "sched"),
    *("selectors", "shelve", "shlex", "shutil", "smtplib", "socket", "socketserver", "ssl", "statistics", "subprocess"),
    *("tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace", "traceback", "turtle", "types"),
    *("typing", "uuid", "warnings", "weakref", "webbrowser"),
)

# Bytes to symbols: 0 = anything else, 1 = newline, 2..96 = the printable ASCII characters. A fixed table, so that a
# model's vocabulary does not depend on the Python version.
NUM_SYMBOLS = 97
_TABLE = bytes(1 if b == 10 else b - 30 if 32 <= b <= 126 else 0 for b in range(256))


def text() -> InMemory:
    """Sequences of 64 characters [T] with the next characters as targets; the last tenth of the text is the test split.

    Raises:
        InputError: this Python comes without the source of its standard library.
    """
    raw = "".join(source for name in MODULES if (source := _source(name)) is not None).encode()[:MAX_BYTES]
    if len(raw) < 100 * LENGTH:
        raise InputError(
            f"data 'text' expected the standard library's source, found {len(raw)} bytes of it; "
            "use a Python that ships its .py files"
        )
    symbols = torch.frombuffer(bytearray(raw.translate(_TABLE)), dtype=torch.uint8)
    n = (len(symbols) - 1) // LENGTH
    inputs, targets = symbols[: n * LENGTH].view(n, LENGTH), symbols[1 : n * LENGTH + 1].view(n, LENGTH)
    cut = n - n // 10
    return InMemory(
        name="text",
        kind="tokens",
        num_classes=NUM_SYMBOLS,
        inputs={"train": inputs[:cut], "test": inputs[cut:]},
        targets={"train": targets[:cut], "test": targets[cut:]},
        transform=torch.Tensor.long,
    )


def _source(name: str) -> str | None:
    spec = importlib.util.find_spec(name)
    loader = None if spec is None else spec.loader
    try:
        return loader.get_source(name) if isinstance(loader, InspectLoader) else None
    except OSError:
        return None
