"""Typed errors. Every message says what was expected, what arrived and what to do about it."""

from __future__ import annotations


class InputError(ValueError):
    """The caller's input cannot be used. The command line prints it on one line and exits with status 2."""


class NonFiniteError(InputError):
    """A tensor that is to be quantized holds NaN or Inf.

    Attributes:
        count: number of non-finite elements.
        numel: number of elements looked at.
    """

    def __init__(self, message: str, *, count: int, numel: int) -> None:
        super().__init__(message)
        self.count = count
        self.numel = numel


class UnsupportedError(InputError, RuntimeError):
    """The model or the way it is run is outside what can be measured correctly (for instance ``torch.compile``)."""


class UnreachableError(InputError):
    """What is asked for cannot be reached, which was found by measuring; the message says what can be."""


class RunDirectoryError(InputError):
    """A run directory cannot be written, is already used, or does not match the arguments."""


class TrainingDiverged(RuntimeError):  # noqa: N818  (an outcome)
    """A training run came to NaN, Inf, or a loss that stays far above its start.

    Attributes:
        diagnosis: where it showed, as JSON: see :func:`fqtstats.training.divergence.diagnose`.
        partial_result: :class:`fqtstats.Training` of what was done before, with the last good weights.
    """

    def __init__(self, message: str, diagnosis: dict[str, object], partial_result: object) -> None:
        super().__init__(message)
        self.diagnosis = diagnosis
        self.partial_result = partial_result


class NotExact(Exception):  # noqa: N818  (a condition that callers handle)
    """An expectation cannot be computed by probing: the message says why. Sampling is the remedy.

    Attributes:
        shared: several elements take the same random number.
    """

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class BiasDetected(AssertionError):  # noqa: N818  (a verdict)
    """A quantizer failed the test that it is unbiased; ``verdict`` has the evidence.

    Attributes:
        verdict: :class:`fqtstats.verdicts.Verdict`.
    """

    def __init__(self, message: str, verdict: object) -> None:
        super().__init__(message)
        self.verdict = verdict
