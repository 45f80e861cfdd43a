"""Ways to run a model in which a quantized layer would give wrong numbers: refused with a clear error."""

from __future__ import annotations

import torch
from torch import nn

from fqtstats.errors import InputError, UnsupportedError

__all__ = ["check", "check_model"]

_COMPILED = (
    "quantized layers cannot run under torch.compile: the compiler would freeze the random streams; "
    "run the model eagerly (for measuring, pass the module that was compiled: compiled._orig_mod)"
)
_REPLICATED = (
    "quantized layers cannot run under nn.DataParallel: its replicas would share random numbers; "
    "use one process per device (DistributedDataParallel), which gives every rank its own"
)


def _in_compiled_code() -> bool:
    # While the compiler traces, the first answer is a constant. It may then give up (a graph break) and run the code
    # eagerly; its frame evaluation callback stays set for the whole of the compiled call.
    return torch.compiler.is_compiling() or callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


def check(layer: nn.Module) -> None:
    """Refuse a call from compiled code or from a data-parallel replica.

    Raises:
        UnsupportedError: says what to do instead.
    """
    if _in_compiled_code():
        raise UnsupportedError(_COMPILED)
    if getattr(layer, "_is_replica", False):
        raise UnsupportedError(_REPLICATED)


def check_model(model: nn.Module) -> None:
    """Refuse a model that is compiled, scripted or data-parallel.

    Raises:
        UnsupportedError: says what to do instead.
        InputError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a model (nn.Module), got {type(model).__name__}; model comes first, then the batch")
    for module in model.modules():
        if hasattr(module, "_orig_mod"):
            raise UnsupportedError(_COMPILED)
        if isinstance(module, nn.DataParallel):
            raise UnsupportedError(_REPLICATED)
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError("quantized layers cannot be swapped into a TorchScript module; pass the eager model")
