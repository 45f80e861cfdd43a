"""How much less memory does a training step keep for its backward pass, by recipe and backend?

Two measures beside those of the plain model in float32: ``operands``, the inputs of the quantized layers as they are
kept, with what their quantizers' surrogates keep (``Handle.kept``), and ``graph``, every tensor that autograd holds for
the backward pass, but for parameters, each storage once (``torch.autograd.graph.saved_tensors_hooks``): outputs before
batch normalization and what layers in full precision keep are in it, and so are codes of weights.

The simulated backend multiplies float32 numbers and keeps them as such: it has no saving to show. A chain keeps what
comes before its normalizations once, in float32, and computes everything between from it again.

Bytes are counted, not estimated: they depend on shapes alone, so there are no intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

import fqtstats
from analysis.axes import ratio_axis
from analysis.known import Known
from analysis.study import Claim, Parts, Row, Study, Tables, main
from fqtstats.benchmarks.step import MODELS as STEPS
from fqtstats.determinism import seeded
from fqtstats.layers import fuse_
from fqtstats.layers.state import Kept
from fqtstats.layers.swap import Handle
from fqtstats.models.preact_resnet import PreActResNet
from fqtstats.report import style
from fqtstats.schema import Column
from fqtstats.training import recipes

MODELS: Known[Callable[[], nn.Module]] = Known("network", {**STEPS, "preact_resnet20": lambda: PreActResNet(3, 10, 3)})
BACKENDS = ("simulated", "native", "native, fused")
MIB = 2**20

COLUMNS = (
    Column("model", "str", "", "network"),
    Column("recipe", "str", "", "and its bits"),
    Column("backend", "str", "", "that multiplies, and whether its chains are fused"),
    Column("operands_MiB", "float64", "MiB", "inputs of the quantized layers, as they are kept"),
    Column("operands_float32_MiB", "float64", "MiB", "the same in float32"),
    Column("graph_MiB", "float64", "MiB", "all tensors that autograd holds for the backward pass, but for parameters"),
    Column("graph_float32_MiB", "float64", "MiB", "the same of the plain model in float32"),
)


@dataclass(frozen=True)
class Settings:
    """Of the study; recipes are ``name`` or ``name@bits``, images have three channels."""

    models: tuple[str, ...] = tuple(MODELS)
    recipes: tuple[str, ...] = ("statquant-psq@8", "lsq@4", "lsq@2", "luq", "1bit-agp-sgd@4")
    batch: int = 64
    size: int = 32


def measure(settings: Settings, parts: Parts) -> Tables:
    """A row per network, recipe and backend."""

    def of_model(model: str) -> Iterator[Row]:
        shape = (settings.batch, 3, settings.size, settings.size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with seeded(0):
            whole = _graph(MODELS[model](), images)[0]
        for recipe in settings.recipes:
            for backend in BACKENDS:
                graph, kept = _quantized(model, recipe, backend, images)
                yield {
                    "recipe": recipe.replace("-sgd", "").replace("@", " "),
                    "backend": backend,
                    "operands_MiB": sum(one.activation for one in kept) / MIB,
                    "operands_float32_MiB": sum(one.activation_float32 for one in kept) / MIB,
                    "graph_MiB": graph / MIB,
                    "graph_float32_MiB": whole / MIB,
                }

    return {"memory": parts.every("models", [{"model": name} for name in settings.models], of_model)}


def _quantized(model: str, recipe: str, backend: str, images: torch.Tensor) -> tuple[int, list[Kept]]:
    """As :func:`_graph`, of a network in the last stage of a recipe."""
    name, _, bits = recipe.partition("@")
    with seeded(0):
        built = MODELS[model]()
    chosen = recipes.get(name, int(bits) if bits else None)
    policy = chosen.for_model(built, images[:2], pretrained=True).stages[-1].policy
    handle = fqtstats.prepare_(built, policy, backend=backend.partition(",")[0])
    if backend.endswith("fused"):
        fuse_(built, handle)
    return _graph(built, images, handle)


def _graph(model: nn.Module, images: torch.Tensor, handle: Handle | None = None) -> tuple[int, list[Kept]]:
    """Bytes that autograd holds after a forward pass, but for parameters, and what layers say that they keep."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() > 0 and storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor.detach()  # an operation that keeps its own result would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)
    kept = [] if handle is None else list(handle.kept.values())
    del out
    return sum(storage.nbytes() for storage in held.values()), kept


# --- what is said of it -----------------------------------------------------------------------------------------------


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with how many times less is kept than in float32: ``operands`` and ``graph``."""
    return rows.assign(
        operands=rows["operands_float32_MiB"] / rows["operands_MiB"],
        graph=rows["graph_float32_MiB"] / rows["graph_MiB"],
    )


def read(tables: Tables) -> pd.DataFrame:
    """A row per network, recipe and backend."""
    return pd.DataFrame(
        {
            "model": row.model,
            "recipe": row.recipe,
            "backend": row.backend,
            "operands, MiB": f"{row.operands_MiB:.1f}",
            "float32 / operands": f"{row.operands:.2f}",
            "graph, MiB": f"{row.graph_MiB:.1f}",
            "float32 / graph": f"{row.graph:.2f}",
        }
        for row in ratios(tables["memory"]).itertuples()
    )


def claims(tables: Tables) -> list[Claim]:
    """Per network."""
    told = []
    for model, own in ratios(tables["memory"]).groupby("model", sort=False):
        simulated, native, fused = (own[own["backend"] == backend] for backend in BACKENDS)
        told += [
            Claim(
                f"{model}: float32 keeps {_range(native['operands'])} times what the native backend keeps of the "
                f"inputs of quantized layers, by recipe{_except(native, 'operands')}; "
                f"{_range(simulated['operands'])} times what the simulated one does (counted, no uncertainty).",
                bool((native["operands"] > 1).all()),
                _because_of_operands(native),
            ),
            Claim(
                f"{model}: the whole graph of the plain model in float32, {fused['graph_float32_MiB'].iloc[0]:.0f} "
                f"MiB, is {_range(fused['graph'])} times that of quantized training with fused chains"
                f"{_except(fused, 'graph')}, and {_range(native['graph'])} times that without fusion (counted).",
                bool((fused["graph"] > 1).all()),
                _because_of_fusion(native, fused),
            ),
        ]
    return told


def _because_of_operands(native: pd.DataFrame) -> str:
    more = native.loc[native["operands"] <= 1, "recipe"]
    if more.empty:
        return ""
    if more.str.startswith("lsq").all():
        return "for the gradient of its step LSQ keeps its input in float32, beside the codes"
    return "not examined"


def _because_of_fusion(native: pd.DataFrame, fused: pd.DataFrame) -> str:
    if (fused["graph"] > 1).all():
        return ""
    if np.allclose(fused["graph_MiB"], native["graph_MiB"], rtol=1e-4, atol=0):
        return (
            "nothing is fused in it, both keep the same bytes within 0.01 %, and without fusion codes are kept beside "
            "the float32 numbers of normalization and ReLU"
        )
    return "not examined"


def _except(rows: pd.DataFrame, measure: str) -> str:
    """The recipes that keep more than float32, if there are any."""
    more = list(rows.loc[rows[measure] <= 1, "recipe"])
    return f" (not less with {', '.join(more)})" if more else ""


def _range(values: pd.Series) -> str:
    low, high = f"{values.min():.2f}", f"{values.max():.2f}"
    return low if low == high else f"{low} to {high}"


def draw(tables: Tables) -> dict[str, Figure]:
    """A panel per network: how many times less is kept, of the operands of quantized layers and of the whole graph."""
    rows = ratios(tables["memory"])
    models = list(dict.fromkeys(rows["model"]))
    recipes_ = list(dict.fromkeys(rows["recipe"]))
    figure = style.new_figure(style.COLUMN_WIDTH, 0.8 + (0.3 + 0.14 * len(recipes_)) * len(models))
    panels = figure.subplots(len(models), 1, sharex=True, squeeze=False)[:, 0]
    for ax, model in zip(panels, models, strict=True):
        own = rows[rows["model"] == model]
        native, fused = (own[own["backend"] == backend] for backend in BACKENDS[1:])
        ax.axvline(1, color=style.GREY, linewidth=0.6)
        for values, shift, color, marker, label in (
            (native["operands"], -0.2, style.BLUE, "o", "inputs of quantized layers"),
            (native["graph"], 0.0, style.ORANGE, "s", "whole graph"),
            (fused["graph"], 0.2, style.GREEN, "D", "whole graph, fused"),
        ):
            ax.plot(values, np.arange(len(values)) + shift, marker, color=color, label=label)
        ax.set(title=model, ylim=(len(recipes_) - 0.5, -0.5))
        ax.set_yticks(range(len(recipes_)), recipes_)
        ax.grid(axis="y")
    panels[-1].set_xlabel("kept in float32 / kept here")
    for ax in panels:
        ratio_axis(ax)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return {"memory": figure}


STUDY = Study(
    name="memory",
    question="How much less memory does a training step keep for its backward pass, by recipe and backend?",
    full=Settings(),
    quick=Settings(("preact_resnet20",), ("statquant-psq@8", "lsq@2"), batch=8),
    columns={"memory": COLUMNS},
    measure=measure,
    draw=draw,
    read=read,
    claims=claims,
    legend="Operands: inputs of the quantized layers as they are kept for the backward pass. Graph: all that autograd "
    "holds for it, but for parameters. float32 / ...: how many times as much float32 keeps, of the graph the plain "
    "model. Bytes are counted: there is no uncertainty.",
)

if __name__ == "__main__":
    main(STUDY)
