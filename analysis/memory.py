"""Memory that a training step keeps from its forward pass for its backward pass, by recipe and backend.

``python -m analysis.memory`` (a minute) writes to ``analysis/results/memory/``:

* ``memory.csv``: for each model, recipe and backend, two measures beside those of the plain model in float32:
  ``operands``, the inputs of the quantized layers as they are kept, with what their quantizers' surrogates keep
  (``Handle.kept``), and ``graph``, every tensor that autograd holds for the backward pass, but for parameters, each
  storage once (``torch.autograd.graph.saved_tensors_hooks``): outputs before batch normalization and what layers in
  full precision keep are in it, and so are codes of weights;
* ``memory.png``: how many times less than in float32.

The simulated backend multiplies float32 numbers and keeps them as such: it has no saving to show. A chain keeps what
comes before its normalizations once, in float32, and computes everything between from it again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import fqtstats
from fqtstats.benchmarks.step import MODELS as STEPS
from fqtstats.determinism import seeded
from fqtstats.layers import fuse_
from fqtstats.layers.state import Kept
from fqtstats.layers.swap import Handle
from fqtstats.models.preact_resnet import PreActResNet
from fqtstats.report import style
from fqtstats.training import recipes

FOLDER = Path(__file__).parent / "results" / "memory"
BATCH, SIZE = 64, 32
MODELS: dict[str, Callable[[], nn.Module]] = {**STEPS, "preact_resnet20": lambda: PreActResNet(3, 10, 3)}
RECIPES: tuple[tuple[str, int | None], ...] = (
    ("statquant-psq", 8),
    ("lsq", 4),
    ("lsq", 2),
    ("luq", None),
    ("1bit-agp-sgd", 4),
)
BACKENDS = ("simulated", "native", "native, fused")
MIB = 2**20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results")
    save(measured(), parser.parse_args().out)


def measured(batch: int = BATCH) -> pd.DataFrame:
    """The table, MiB."""
    rows: list[dict[str, object]] = []
    for name, build in MODELS.items():
        images = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
        with seeded(0):
            whole = _graph(build(), images)[0]
        for recipe, bits in RECIPES:
            for backend in BACKENDS:
                with seeded(0):
                    model = build()
                policy = recipes.get(recipe, bits).for_model(model, images[:2], pretrained=True).stages[-1].policy
                handle = fqtstats.prepare_(model, policy, backend=backend.partition(",")[0])
                if backend.endswith("fused"):
                    fuse_(model, handle)
                graph, kept = _graph(model, images, handle)
                operands = sum(one.activation for one in kept)
                plain = sum(one.activation_float32 for one in kept)
                rows.append(
                    {
                        "model": name,
                        "recipe": recipe.removesuffix("-sgd") + ("" if bits is None else f" {bits}"),
                        "backend": backend,
                        "operands_MiB": operands / MIB,
                        "operands_float32_MiB": plain / MIB,
                        "operands_ratio": plain / operands,
                        "graph_MiB": graph / MIB,
                        "graph_float32_MiB": whole / MIB,
                        "graph_ratio": whole / graph,
                    }
                )
    return pd.DataFrame(rows)


def _graph(model: nn.Module, images: torch.Tensor, handle: Handle | None = None) -> tuple[int, list[Kept]]:
    """Bytes that autograd holds after a forward pass, but for parameters, and what layers say that they keep."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}  # alive, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() > 0 and storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(images)
    kept = [] if handle is None else list(handle.kept.values())
    del out
    return sum(storage.nbytes() for storage in held.values()), kept


def save(table: pd.DataFrame, folder: Path) -> None:
    """``memory.csv`` and ``memory.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "memory.csv", index=False, float_format="%.4g")
    (folder / "memory.png").write_bytes(draw(table))
    print(table.to_string(index=False, float_format="%.2f"))


def draw(table: pd.DataFrame) -> bytes:
    """Per model, how many times less is kept: operands of quantized layers, and the whole graph, fused or not."""
    with style.applied():
        figure = style.new_figure(2.1 * style.COLUMN_WIDTH, 2.0)
        axes = figure.subplots(1, table["model"].nunique(), sharey=True)
        for ax, (model, own) in zip(axes, table.groupby("model", sort=False), strict=True):
            native, fused = (own[own["backend"] == backend] for backend in BACKENDS[1:])
            for shift, values, color, label in (
                (-0.27, native["operands_ratio"], "#0072B2", "inputs of quantized layers"),
                (0.0, native["graph_ratio"], "#E69F00", "whole graph"),
                (0.27, fused["graph_ratio"], "#009E73", "whole graph, fused"),
            ):
                places = [i + shift for i in range(len(values))]
                bars = ax.bar(places, values, width=0.25, color=color, label=label)
                ax.bar_label(bars, fmt="%.1f", fontsize=4.5, color=style.INK)
            ax.axhline(1, color=style.GREY, linewidth=0.5)
            ax.set(title=model, yscale="log", yticks=[1, 2, 4, 8, 16, 32])
            ax.set_yticklabels(["1x", "2x", "4x", "8x", "16x", "32x"])
            ax.minorticks_off()
            ax.set_xticks(range(len(native)), list(native["recipe"]), rotation=30, ha="right")
        axes[0].set_ylabel("less than in float32")
        axes[0].legend(loc="upper left")
        return style.png(figure)


if __name__ == "__main__":
    main()
