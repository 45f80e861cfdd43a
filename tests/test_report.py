"""Tables and figures: they fit, they say what matters, and they draw every row."""

from __future__ import annotations

import io
import itertools
import json
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.console import Console, RenderableType

from fqtstats.errors import InputError
from fqtstats.report import figures, style, tables
from fqtstats.results import COLUMNS, Configuration, Result

UNQUANTIZED = [
    {"layer": "stem", "type": "Conv2d", "reason": "first layer"},
    {"layer": "head[bold]", "type": "Linear", "reason": "skipped"},
]
FACTOR = {"ptq": 1.0, "psq": 0.3, "bhq": 0.03}


def make_table(quantizer: str, bits: int | None, layers: int) -> pd.DataFrame:
    """Weights over many decades, one unquantized parameter (mostly NaN), and the total; deterministic."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(layers):
        norm = 10 ** generator.uniform(-7, 1)
        variance = norm * 10 ** generator.uniform(-3, -1) * FACTOR.get(quantizer, 0.5) * 4.0 ** (8 - (bits or 6))
        rows.append(
            {
                "layer": f"layer{index // 8 + 1}.{index % 8 // 2}.conv{index % 2 + 1}",
                "parameter": "weight",
                "quantized": True,
                "grad_norm_sq": norm,
                "bias_norm_sq": 0.0,
                "bias_p": 0.5,
                "variance": variance,
                "variance_low": 0.8 * variance,
                "variance_high": 1.3 * variance,
                "variance_weight": 0.25 * variance,
                "variance_input": 0.75 * variance,
                "q_input_variance": variance,
                "q_input_bound": 2 * variance,
                "q_weight_variance": variance / 10,
                "q_weight_bound": variance / 5,
                "q_input_grad_norm_sq": 50 * variance,
                "sampling_variance": norm / 2,
                "snr": norm / variance,
                "sqrt3_margin": math.sqrt(norm / variance / 3),
            }
        )
    total = {**rows[0], "layer": "total", "parameter": "", "q_input_variance": math.nan, "q_input_bound": math.nan}
    norm_layer = {"layer": "bn1", "parameter": "bias", "quantized": False}
    table = pd.DataFrame([*rows, norm_layer, total], columns=[column.name for column in COLUMNS])
    return table.assign(quantizer=quantizer, bits=bits, numel=1234, draws=64)


def make_result(*configurations: tuple[str, int | None], layers: int = 10) -> Result:
    table = pd.concat([make_table(name, bits, layers) for name, bits in configurations])
    return Result(table, {"unquantized": UNQUANTIZED})


def changed(result: Result, layer: str, **values: float) -> Result:
    table = result.table.copy()
    table.loc[table["layer"] == layer, list(values)] = list(values.values())
    return Result(table, result.metadata)


def printed(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def row_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if name in line)


SWEEP = [(name, bits) for name in ("ptq", "psq", "bhq") for bits in (4, 6, 8)]


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_layer_table_fits_and_keeps_the_essentials(width: int) -> None:
    result = changed(make_result(("bhq", 5)), "layer1.1.conv1", bias_p=1e-6)
    text = printed(tables.summary(result), width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert "bhq@5" in text
    assert "64 draws" in text.replace("\n", " ")
    variance = result.total(Configuration("bhq", 5))["variance"]
    assert f"{variance:.2e}" in row_of(text, "total")
    assert "BIASED" in row_of(text, "1.1.conv1")
    assert all(part in " ".join(text.split()) for part in ("1 Conv2d (first layer: stem)", "head[bold]"))
    lines = text.splitlines()
    assert set(lines[lines.index(row_of(text, "total")) - 1].strip()) == {"─"}
    assert "SNR" in text or width < 80
    assert width < 120 or all(header in text for header in ("Q1/Q2", "Q2/bound", "sampling", "margin"))
    assert ("no room for: " in text) == (width < 120)
    # The legend explains what is shown, and only that.
    assert ("Q1/Q2: % of the variance" in " ".join(text.split())) == ("Q1/Q2" in row_of(text, "param"))


def test_many_unquantized_layers_are_counted() -> None:
    norms = [{"layer": f"norm{k}", "type": "BatchNorm2d", "reason": "no quantized counterpart"} for k in range(19)]
    result = Result(make_result(("bhq", 5)).table, {"unquantized": [*norms, *UNQUANTIZED]})
    told = "not quantized: 19 BatchNorm2d (no quantized counterpart); 1 Conv2d (first layer: stem); 1 Linear (skipped"
    assert told in printed(tables.summary(result), 200)
    assert "not quantized" not in printed(tables.summary(Result(result.table)), 200)


def test_numbers_of_the_layer_table() -> None:
    text = printed(tables.layer_table(make_result(("bhq", 5))), 200)
    cells = row_of(text, "layer1.0.conv1").split()
    row = make_result(("bhq", 5)).table.iloc[0]
    expected = [f"{row['grad_norm_sq']:.2e}", "0.500", f"{row['variance']:.2e}", "-20/+30%", "25/75", "0.500"]
    assert cells[3:9] == expected
    assert row_of(text, "bn1").split() == ["bn1", "bias", "1234"]


def test_flags_are_words() -> None:
    result = make_result(("bhq", 5))
    result = changed(result, "layer1.0.conv2", q_input_variance=2.0, q_input_bound=1.0)
    result = changed(result, "layer1.1.conv2", q_weight_variance=2.0, q_weight_bound=1.0)
    result = changed(result, "layer1.2.conv1", sqrt3_margin=0.9)
    text = printed(tables.layer_table(result), 120)
    assert "ABOVE BOUND" in row_of(text, "layer1.0.conv2")
    assert "ABOVE BOUND" in row_of(text, "layer1.1.conv2")
    assert "NOISY" in row_of(text, "layer1.2.conv1")
    assert "noise-dominated: √3 margin below 1" in text
    assert not any(word in row_of(text, "layer1.0.conv1") for word in ("BIASED", "BOUND", "NOISY"))


def test_dependent_rounding_is_an_error() -> None:
    result = changed(make_result(("bhq", 5), ("ptq", 8)), "layer1.0.conv1", own_ratio=1.5, own_ratio_p=1e-9)
    assert "DEPENDENT" in row_of(printed(tables.layer_table(result), 120), "layer1.0.conv1")
    text = printed(tables.summary(result), 120)
    assert "DEPENDENT" in row_of(text, "bhq")
    assert not tables.sound(result)
    assert "error: dependent rounding" in text
    assert "DEPENDENT" not in printed(tables.summary(changed(result, "layer1.0.conv1", own_ratio_p=1e-6)), 120)


def test_without_draws_there_is_what_is_exact() -> None:
    result = make_result(*SWEEP)
    drawn = ["variance", "variance_low", "variance_high", "variance_weight", "variance_input", "bias_p", "snr"]
    result = Result(result.table.assign(draws=0, variance_exact_own=result.table["variance"], **dict.fromkeys(drawn)))
    text = printed(tables.summary(result), 120)
    assert "own Q1" in text
    assert "SNR" not in text
    (lower,) = result.plot_variance_vs_bits().axes
    assert lower.get_ylabel().startswith("exact")
    (dots,) = result.plot_variance(configurations=[Configuration("bhq", 4)]).axes
    assert lines_with(dots, "D") == [11]
    assert "no draws" in dots.get_xlabel()
    assert list(figures.render_all(result)) == ["variance", "variance_vs_bits"]


def test_exact_part_is_marked_in_the_bars() -> None:
    result = make_result(("bhq", 5))
    table = result.table.assign(variance_exact_own=0.25 * result.table["variance"])
    _, bars = Result(table).plot_variance().axes
    assert intervals(bars) == [11]
    assert intervals(result.plot_variance().axes[1]) == [0]


def test_bias_level_counts_the_rows_that_were_tested() -> None:
    result = make_result(("bhq", 5), layers=9)  # 9 weights and the total have a p-value, the bias has none
    level = tables.bias_level(result.table)
    assert level == 0.01 / 10
    row = result.table.iloc[0]
    assert tables.flags(pd.concat([row.drop("bias_p"), pd.Series({"bias_p": level})]), level) == ()
    assert tables.flags(pd.concat([row.drop("bias_p"), pd.Series({"bias_p": level * 0.99})]), level) == (tables.BIASED,)
    assert tables.flags(result.table.iloc[9], level) == ()  # NaN raises no flag


def test_variance_that_meets_its_bound_is_not_above_it() -> None:
    row = make_result(("bhq", 5)).table.iloc[0].copy()
    row["q_input_variance"], row["q_input_bound"] = 0.1 + 0.2, 0.3
    assert tables.flags(row, 0.01) == ()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_comparison_has_one_row_per_configuration(width: int) -> None:
    result = changed(make_result(*SWEEP, ("custom", None)), "layer1.1.conv1", bias_p=1e-6)
    text = printed(tables.summary(result), width)
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("ptq", "psq", "bhq", "custom"))] == (
        ["ptq"] * 3 + ["psq"] * 3 + ["bhq"] * 3 + ["custom"]
    )
    assert text.count("BIASED") == 10 + 1  # a row each, and the legend
    if width == 120:
        assert "Q2 var / ptq@8" in text
        assert "/ sampling" in text
        last = [line for line in text.splitlines() if line.startswith("bhq")][-1]
        assert last.split()[:2] == ["bhq", "8"]
        assert "0.0300" in last


def test_json_is_strict_and_complete() -> None:
    data = tables.to_dict(changed(make_result(("ptq", 8), ("custom", None)), "layer1.0.conv1", bias_p=1e-9))
    text = json.dumps(data, allow_nan=False)
    back = json.loads(text)
    assert [(item["quantizer"], item["bits"]) for item in back["configurations"]] == [("ptq", 8), ("custom", None)]
    first = back["configurations"][0]
    assert list(first["rows"][0]) == [*(column.name for column in COLUMNS), "flags"]
    assert first["rows"][0]["flags"] == ["BIASED"]
    assert first["flags"] == ["BIASED"]
    assert first["rows"][-1]["variance"] is None
    assert first["rows"][-1]["quantized"] is False
    assert first["input_variance_over_reference"] == 1.0
    assert back["reference"] == "ptq@8"
    assert back["metadata"]["unquantized"] == UNQUANTIZED


# --- figures ---------------------------------------------------------------------------------------------------------


def lines_with(ax: Axes, marker: str) -> list[int]:
    """Number of points shown by each line with that marker."""
    return [
        int(np.isfinite(np.asarray(line.get_ydata(), float) + np.asarray(line.get_xdata(), float)).sum())
        for line in ax.get_lines()
        if line.get_marker() == marker
    ]


def intervals(ax: Axes) -> list[int]:
    return [len(item.get_segments()) for item in ax.collections if isinstance(item, LineCollection)]


def assert_labels_apart(figure: Figure, ax: Axes) -> None:
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = sorted((label.get_window_extent(renderer) for label in ax.get_yticklabels()), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 + 1.5 for lower, upper in itertools.pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0


@pytest.mark.parametrize("layers", [1, 22, 64, 150])
def test_every_layer_is_drawn_and_labels_do_not_collide(layers: int) -> None:
    figure = make_result(("bhq", 5), layers=layers).plot_variance()
    dots, bars = figure.axes
    assert lines_with(dots, "D") == [layers + 1]
    assert intervals(dots) == [layers + 1]
    assert lines_with(dots, "x") == lines_with(dots, "o") == [layers + 1]
    assert lines_with(dots, "|") == []  # which in the bars is another thing
    assert len(bars.patches) == 2 * (layers + 1)
    labels = [label.get_text() for label in dots.get_yticklabels()]
    assert labels[0] == "layer1.0.conv1"
    assert labels[-1] == "total (all parameters)"
    assert len(labels) == layers + 1 or layers > 64
    assert_labels_apart(figure, dots)
    width, height = figure.get_size_inches()
    assert width == style.COLUMN_WIDTH
    assert height < 9.5
    top, bottom = dots.transData.transform([(1, 0), (1, layers)])[:, 1]
    assert top > bottom  # the first layer is at the top


def test_axis_labels_do_not_overlap() -> None:
    figure = make_result(("bhq", 5)).plot_variance()
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    left, right = (ax.xaxis.label.get_window_extent(renderer) for ax in figure.axes)
    assert left.x1 < right.x0


def test_missing_and_zero_values_are_left_out() -> None:
    result = changed(make_result(("bhq", 5)), "layer1.0.conv1", variance=0.0, variance_weight=0.0, variance_input=0.0)
    result = changed(result, "layer1.0.conv2", variance_low=math.nan)
    result = changed(result, "layer1.1.conv1", variance_low=-1.0)
    table = result.table.assign(sampling_variance=math.nan)
    figure = Result(table).plot_variance()
    dots, bars = figure.axes
    assert lines_with(dots, "D") == [10]
    assert intervals(dots) == [9]
    assert lines_with(dots, "o") == []
    assert len(bars.patches) == 2 * 10
    assert "sampling" not in " ".join(text.get_text() for text in figure.legends[0].get_texts())
    nothing = table.assign(variance=math.nan, grad_norm_sq=math.nan, variance_low=math.nan, variance_high=math.nan)
    assert style.png(Result(nothing).plot_variance()).startswith(b"\x89PNG")


def test_many_configurations_are_reduced_to_one_width() -> None:
    few = make_result(("ptq", 8), ("bhq", 5), ("bhq", 4)).plot_variance().axes[0]
    assert [len(lines_with(few, marker)) for marker in "sD"] == [1, 2]
    legend = make_result(*SWEEP, ("luq", 4)).plot_variance().legends[0]
    names = [text.get_text() for text in legend.get_texts() if text.get_text().startswith("variance, ")]
    assert names == ["variance, ptq@4", "variance, psq@4", "variance, bhq@4", "variance, luq@4"]
    chosen = (Configuration("bhq", 4), Configuration("bhq", 8))
    figure = make_result(*SWEEP).plot_variance(configurations=chosen)
    markers = [line for line in figure.axes[0].get_lines() if line.get_marker() == "D"]
    assert len(markers) == 2
    assert markers[0].get_color() != markers[1].get_color()
    with pytest.raises(InputError, match="no configuration"):
        make_result(("bhq", 5)).plot_variance(configurations=[Configuration("bhq", 9)])
    with pytest.raises(InputError, match="at least one"):
        make_result(("bhq", 5)).plot_variance(configurations=[])


def test_without_quantized_layers_all_are_drawn() -> None:
    result = Result(make_result(("bhq", 5)).table.assign(quantized=False))
    assert [label.get_text() for label in result.plot_variance().axes[0].get_yticklabels()][-2:] == [
        "bn1",
        "total (all parameters)",
    ]


def test_variance_against_bits() -> None:
    figure = make_result(*SWEEP, ("custom", None)).plot_variance_vs_bits()
    upper, lower = figure.axes
    for ax in (upper, lower):
        assert [lines_with(ax, marker) for marker in "soD"] == [[3], [3], [3]]
        assert ax.get_yscale() == "log"
    assert intervals(upper) == [3, 3, 3, 0]
    assert list(lower.get_xticks()) == [4, 6, 8]
    assert [line.get_linestyle() for line in upper.get_lines()].count("-.") == 1  # sampling variance
    guides = [line for line in lower.get_lines() if line.get_linestyle() == "--"]
    assert [float(np.asarray(line.get_ydata())[0]) for line in guides] == [1.0]
    ptq = next(line for line in lower.get_lines() if line.get_marker() == "s")
    np.testing.assert_allclose(np.asarray(ptq.get_ydata(), float), [256, 16, 1])


def test_without_ptq_at_8_bits_there_is_no_guide() -> None:
    lower = make_result(("bhq", 4), ("bhq", 5)).plot_variance_vs_bits().axes[1]
    assert not [line for line in lower.get_lines() if line.get_linestyle() == "--"]
    assert "PTQ" not in lower.get_ylabel()


def test_quantizers_at_one_width_stand_side_by_side() -> None:
    figure = make_result(("ptq", 5), ("bhq", 5), ("psq", 5)).plot_variance_vs_bits()
    upper, lower = figure.axes
    assert [label.get_text() for label in lower.get_xticklabels()] == ["ptq", "bhq", "psq"]
    assert lower.get_xlabel() == "quantizer (5 bits)"
    assert intervals(upper) == intervals(lower) == [1, 1, 1]
    with pytest.raises(InputError, match="at least two configurations"):
        make_result(("bhq", 5)).plot_variance_vs_bits()


def test_own_axes_are_used() -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    first, second = figure.subplots(1, 2)
    result = make_result(("ptq", 5), ("bhq", 4))
    assert result.plot_variance(ax=first) is figure
    assert result.plot_variance_vs_bits(ax=second) is figure
    assert len(figure.axes) == 2
    assert first.get_legend() is not None
    assert second.get_legend() is not None
    figure.canvas.draw()


def test_rendered_files() -> None:
    assert list(figures.render_all(make_result(("bhq", 5)))) == ["variance"]
    drawn = figures.render_all(make_result(*SWEEP))
    assert list(drawn) == ["variance", "variance_vs_bits"]
    assert all(data.startswith(b"\x89PNG") for data in drawn.values())
    assert make_result(("bhq", 5)).plot_variance()._repr_png_() == style.png(  # type: ignore[attr-defined]
        make_result(("bhq", 5)).plot_variance()
    )


def test_a_quantizer_looks_the_same_everywhere() -> None:
    alone, together = style.marks(["bhq"]), style.marks(["mine", "ptq", "bhq", "yours"])
    assert alone["bhq"] == together["bhq"]
    assert len({(mark.color, mark.marker) for mark in together.values()}) == 4
