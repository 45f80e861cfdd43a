"""Auditor of the random streams: are any random numbers used for two things?

:func:`recording` notes every request for random numbers that this process makes, in Python and by the native encoder,
and what it was for; :meth:`Audit.report` lists what was used twice. :func:`plan` looks at keys that have not been used
yet: all those of a prepared model over steps, draws, calls and replicas.

Two requests *overlap* if they read a common word of the generator: the same Philox key and counter words, and ranges of
elements that share a tile. (A range starts on a tile boundary and fills tiles in order, so sharing a tile is sharing
its first word, whatever the numbers of bits.) Overlapping requests are a reuse in these cases:

* ``"collision"``: their streams have different keys. The key is broken, or 128 bits of hash collide.
* ``"another model"``: both are for quantizers of models that were prepared separately (or are in different processes),
  say two models with the same layer names and seed.
* ``"another use"``: they are for different uses of a quantizer: another layer, place in the policy, step, call, draw or
  replica, as the layer knows them, whatever key the quantizer then made. A quantizer that ignores the draw, say.
* ``"another input"``: layer, place, step, call, draw and replica are the same, but the quantizer acts on another
  tensor. A step that is not advanced, say, or an evaluation between two training steps whose forward quantizers are
  stochastic: calls without gradients do not count, so all of them have index 0.
* ``"twice in one use"``: one call of a quantizer asks twice for the same numbers. A forgotten child stream, say.

Not reuses, but the contract that a stream asked twice gives the same numbers:

* the same use on the same tensor (compared by value): a call that a checkpoint recomputes, a draw that is repeated;
* the same use in draws with different sites (:meth:`fqtstats.capture.Session.draw`): they share the other sites' noise
  by design, on inputs that may differ;
* requests that are not made by a quantizer in a layer (data order, sketches) and share their whole key: what they are
  for is what their key says.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Literal

import torch

from fqtstats.errors import InputError
from fqtstats.layers.state import Call, LayerState
from fqtstats.layers.swap import Handle
from fqtstats.listening import LISTENERS
from fqtstats.policy import PLACES
from fqtstats.random import Stream, key_words

__all__ = ["Audit", "Plan", "Purpose", "Report", "Request", "Reuse", "Use", "plan", "recording", "report"]

Kind = Literal["collision", "another model", "another use", "another input", "twice in one use"]
Words = tuple[int, int, int, int]

_END = 2**64
"""Past the last tile of every stream."""

_LISTED = 20
"""Most reuses that a report spells out."""


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a layer wants random numbers for; two uses with the same purpose are the same use.

    Attributes:
        process: index of the record, where records of several processes are reported together.
        model: number of the prepared model, in the order of their first uses.
        layer: its name.
        instance: number of the layer, in the order of first uses: tells layers of one name apart.
        site: place in the policy.
        step, call, draw, replica: as the layer knows them.
    """

    process: int
    model: int
    layer: str
    instance: int
    site: str
    step: int
    call: int
    draw: int
    replica: int


@dataclass(frozen=True, slots=True)
class Use:
    """One call of a quantizer by a layer.

    Attributes:
        number: counts the uses of a process.
        purpose: what for.
        drawn: the sites that the current draw quantizes.
        digest: of the tensor's dtype and elements.
    """

    number: int
    purpose: Purpose
    drawn: frozenset[str]
    digest: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """Random numbers that were asked for.

    Attributes:
        words: Philox key and upper counter words.
        stream: the whole key they stem from.
        first, end: range of tiles of 16 blocks, ``end`` not included.
        n: bits per element.
        use: what for, or None outside of the layers' quantizers.
    """

    words: Words
    stream: Stream
    first: int
    end: int
    n: int
    use: Use | None


@dataclass(frozen=True, slots=True)
class Reuse:
    """Two requests that read the same numbers.

    Attributes:
        kind: see the module.
        differing: the parts of the purposes that differ; of the streams' keys in a collision.
        first, second: the requests, in the order they were made.
    """

    kind: Kind
    differing: tuple[str, ...]
    first: Request
    second: Request

    def __str__(self) -> str:
        what = f"{self.kind} ({', '.join(self.differing)})" if self.differing else self.kind
        return f"{what}: {_described(self.first)} and {_described(self.second)}"


@dataclass(frozen=True, slots=True)
class Report:
    """What an audit found.

    Attributes:
        requests: number of requests.
        uses: number of calls of quantizers that drew.
        streams: number of distinct streams.
        repetitions: number of requests that repeat an earlier one, as they may.
        reuses: one for every use of a stream that an earlier, different use overlaps.
    """

    requests: int
    uses: int
    streams: int
    repetitions: int
    reuses: tuple[Reuse, ...]

    def __str__(self) -> str:
        counts = Counter(reuse.kind for reuse in self.reuses)
        found = ", ".join(f"{n} of {kind}" for kind, n in counts.items()) or "none"
        head = f"{self.requests} requests in {self.uses} uses of {self.streams} streams, {self.repetitions} repeated; "
        lines = [f"{head}reuses: {found}", *(str(reuse) for reuse in self.reuses[:_LISTED])]
        more = len(self.reuses) - _LISTED
        return "\n".join([*lines, f"and {more} more"] if more > 0 else lines)


@dataclass
class Audit:
    """A record of requests.

    Attributes:
        requests: in the order they were made; can be pickled.
    """

    requests: list[Request] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _uses: int = 0
    _numbers: dict[int, tuple[int, object]] = field(default_factory=dict)
    _current: ContextVar[Use | None] = field(default_factory=lambda: ContextVar("use", default=None))

    def report(self) -> Report:
        """What was used twice so far."""
        return report([self.requests])

    def asked(self, stream: Stream, start: int, numel: int | None, n: int) -> None:
        """Note a request; see :class:`fqtstats.listening.Listener`."""
        if numel == 0:
            return
        tile = 64 if n > 16 else 128
        end = _END if numel is None else -(-(start + numel) // tile)
        request = Request(key_words(stream), stream, start // tile, end, n, self._current.get())
        with self._lock:
            self.requests.append(request)

    @contextmanager
    def quantizing(self, call: Call, place: str, x: torch.Tensor, draw: int) -> Iterator[None]:
        """Note what the requests within are for; see :class:`fqtstats.listening.Listener`."""
        layer = call.layer
        digest = _digest(x)
        with self._lock:
            model, instance = self._number(layer.shared), self._number(layer)
            purpose = Purpose(0, model, layer.name, instance, place, call.step, call.index, draw, layer.shared.replica)
            use = Use(self._uses, purpose, layer.shared.draw.sites, digest)
            self._uses += 1
        token = self._current.set(use)
        try:
            yield
        finally:
            self._current.reset(token)

    def _number(self, thing: object) -> int:
        # Kept alive, so that its id stays its own.
        return self._numbers.setdefault(id(thing), (len(self._numbers), thing))[0]


@contextmanager
def recording() -> Iterator[Audit]:
    """Record every request for random numbers of this process (all threads) within the ``with`` block.

    Every tensor that a layer quantizes is hashed meanwhile. May be nested.
    """
    audit = Audit()
    LISTENERS.append(audit)
    try:
        yield audit
    finally:
        LISTENERS[:] = [listener for listener in LISTENERS if listener is not audit]


def report(records: Iterable[Sequence[Request]]) -> Report:
    """What was used twice, within or across records.

    Args:
        records: :attr:`Audit.requests`, one for each process (data-parallel rank).
    """
    requests = [
        request if process == 0 else _of_process(request, process)
        for process, record in enumerate(records)
        for request in record
    ]
    by_words: dict[Words, list[Request]] = defaultdict(list)
    for request in requests:
        by_words[request.words].append(request)
    reuses: list[Reuse] = []
    repetitions = 0
    for same in by_words.values():
        found, repeated = _reuses(same)
        reuses += found
        repetitions += repeated
    uses = {(r.use.purpose.process, r.use.number) for r in requests if r.use is not None}
    return Report(len(requests), len(uses), len(by_words), repetitions, tuple(reuses))


def _of_process(request: Request, process: int) -> Request:
    if request.use is None:
        return request
    return replace(request, use=replace(request.use, purpose=replace(request.use.purpose, process=process)))


_Range = tuple[int, int]


def _reuses(requests: list[Request]) -> tuple[list[Reuse], int]:
    """The reuses among requests with the same words, and how many repeat an earlier one."""
    found: list[Reuse] = []
    repeated = 0
    # What is equal in everything that tells uses apart is looked at once.
    classes: dict[object, dict[_Range, Request]] = {}
    within: dict[int, list[Request]] = defaultdict(list)
    forgetful: set[Purpose] = set()
    for request in requests:
        use = request.use
        own = (request.stream,) if use is None else (request.stream, use.purpose, use.drawn, use.digest)
        known = classes.setdefault(own, {})
        if (request.first, request.end) in known:
            repeated += 1
        known.setdefault((request.first, request.end), request)
        if use is not None:
            earlier = next((r for r in within[use.number] if r.use == use and _overlap(r, request)), None)
            within[use.number].append(request)
            if earlier is not None and use.purpose not in forgetful:
                forgetful.add(use.purpose)
                found.append(Reuse("twice in one use", (), earlier, request))
    groups = [list(known.values()) for known in classes.values()]
    for later in range(1, len(groups)):
        reuse = next((r for earlier in range(later) if (r := _between(groups[earlier], groups[later]))), None)
        if reuse is not None:
            found.append(reuse)
    return found, repeated


def _between(a: list[Request], b: list[Request]) -> Reuse | None:
    told = _told_apart(a[0], b[0])
    if told is None:
        return None
    pair = next(((one, other) for one in a for other in b if _overlap(one, other)), None)
    return None if pair is None else Reuse(*told, *pair)


def _told_apart(a: Request, b: Request) -> tuple[Kind, tuple[str, ...]] | None:
    """Why two requests must not overlap; None if they may."""
    if a.stream != b.stream:
        return "collision", _differing(a.stream, b.stream)
    if a.use is None or b.use is None:
        return None
    one, other = a.use.purpose, b.use.purpose
    differing = _differing(one, other)
    if (one.process, one.model) != (other.process, other.model):
        return "another model", tuple(name for name in differing if name != "instance")
    if differing:
        return "another use", differing
    if a.use.digest != b.use.digest and a.use.drawn == b.use.drawn:
        return "another input", ()
    return None


def _differing(a: Stream | Purpose, b: Stream | Purpose) -> tuple[str, ...]:
    return tuple(f.name for f in fields(a) if getattr(a, f.name) != getattr(b, f.name))


def _overlap(a: Request, b: Request) -> bool:
    return a.first < b.end and b.first < a.end


def _described(request: Request) -> str:
    s, use = request.stream, request.use
    path = "".join(f"/{name}" for name in s.path)
    key = f"{s.layer!r} {s.site}{path} step {s.step} call {s.call} draw {s.draw} replica {s.replica} seed {s.seed}"
    if use is None:
        return f"[{key}]"
    p = use.purpose
    for_ = f"model {p.model} {p.layer!r} {p.site} step {p.step} call {p.call} draw {p.draw} replica {p.replica}"
    return f"[{key}] for [{for_}]"


def _digest(x: torch.Tensor) -> bytes:
    """Of dtype and elements in logical order; views as images of height 1 count as the same."""
    flat = x.detach().reshape(-1).cpu().contiguous()
    h = hashlib.blake2b(str(flat.dtype).encode(), digest_size=16)
    h.update(flat.view(torch.uint8).numpy().data)
    return h.digest()


@dataclass(frozen=True, slots=True)
class Plan:
    """The keys that a prepared model will use.

    Attributes:
        uses: number of uses.
        streams: number of distinct streams among them.
        clashes: pairs of uses (model, layer, site, step, draw, call, replica) with the same stream.
    """

    uses: int
    streams: int
    clashes: tuple[tuple[tuple[object, ...], tuple[object, ...]], ...]


def plan(
    handles: Handle | Sequence[Handle],
    *,
    steps: Iterable[int] = range(1),
    draws: Iterable[int] = range(1),
    calls: Iterable[int] = range(1),
    replicas: Iterable[int] = range(1),
    stream_of: Callable[[Call, str, int], Stream] = Call.stream,
) -> Plan:
    """Make the streams of every stochastic quantizer of prepared models, and look for two that are the same.

    Nothing is run. A stream is taken apart from another by its 128 bits of key words; of equal words every element
    is shared. Takes about 10 microseconds per use.

    Args:
        handles: of the models. They count as different, so that models with the same names and seed clash.
        steps: training steps.
        draws: indices of draws, for the gradient's quantizers (those of the forward pass are drawn once).
        calls: indices of a layer's calls within a step.
        replicas: data-parallel ranks.
        stream_of: what makes the stream of a call, a site and a draw.

    Raises:
        InputError: there is nothing to look at.
    """
    models = [handles] if isinstance(handles, Handle) else list(handles)
    steps, draws, calls, replicas = list(steps), list(draws), list(calls), list(replicas)
    seen: dict[Words, tuple[object, ...]] = {}
    clashes = []
    uses = 0
    for model, handle in enumerate(models):
        for name, replica in product(handle.layers, replicas):
            own = handle.layers[name].fqt_state
            assert isinstance(own, LayerState)
            layer = replace(own, shared=replace(own.shared, replica=replica))
            for site, step, call in product(_stochastic_places(layer), steps, calls):
                for draw in draws if site.startswith("grad") else [0]:
                    use = (model, name, site, step, draw, call, replica)
                    before = seen.setdefault(key_words(stream_of(Call(layer, step, call), site, draw)), use)
                    uses += 1
                    if before is not use:
                        clashes.append((before, use))
    if not uses:
        raise InputError("expected models with stochastic quantizers and at least one step, draw, call and replica")
    return Plan(uses, len(seen), tuple(clashes))


def _stochastic_places(layer: LayerState) -> list[str]:
    """Where in a layer's policy random numbers may be drawn."""
    quantizers = {place: getattr(layer.policy, place) for place in PLACES}
    return [place for place, q in quantizers.items() if q is not None and getattr(q, "role", "gradient") != "forward"]
