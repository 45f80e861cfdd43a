"""The user's own objects, named on the command line as ``package.module:function``."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable

from fqtstats.errors import InputError

__all__ = ["call", "resolve"]


def resolve(spec: str) -> Callable[..., object]:
    """The callable that ``package.module:function`` names (``function`` may be dotted, for instance ``Class.make``).

    The current directory is put first on ``sys.path`` and stays there, as with ``python -m``: the user's function may
    import its neighbours only when it is called.

    Raises:
        InputError: the spec is malformed, the module is missing or fails to import, it has no such attribute, or the
            attribute is not callable.
    """
    module_name, colon, path = spec.partition(":")
    parts = (*module_name.split("."), *path.split("."))
    if not colon or not all(part.isidentifier() for part in parts):
        raise InputError(f"expected package.module:function, got {spec!r}; name a module, a colon and a function in it")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise InputError(
                f"importing {module_name!r} for {spec!r} failed: it needs {error.name!r}, which is missing; install it"
            ) from error
        raise InputError(
            f"no module named {error.name!r} for {spec!r}; run from the directory that holds it, or install it"
        ) from error
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"importing {module_name!r} for {spec!r} failed with {type(error).__name__}: {reason}; make it importable"
        ) from error
    for name in path.split("."):
        if not hasattr(found, name):
            owner = module_name if inspect.ismodule(found) else getattr(found, "__qualname__", repr(found))
            raise InputError(f"{owner!r} has no attribute {name!r}, wanted by {spec!r}; check the name after the colon")
        found = getattr(found, name)
    if not callable(found):
        raise InputError(f"{spec!r} is a {type(found).__name__}, expected a function; name one that returns the object")
    return found


def call(spec: str) -> object:
    """What the function named by ``package.module:function`` returns when it is called without arguments.

    Raises:
        InputError: as :func:`resolve`, or the function cannot be called without arguments.
    """
    function = resolve(spec)
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise InputError(
            f"{spec!r} must be callable without arguments, but: {error}; give them defaults, or name a function that "
            "takes none and returns it"
        ) from error
    except ValueError:
        pass  # a builtin without a signature: the call itself decides
    return function()
