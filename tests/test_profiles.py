"""Variance profiles: what is written comes back, and tables and figures show what is in them."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.console import Console, RenderableType

import fqtstats
from fqtstats.errors import InputError, RunDirectoryError
from fqtstats.profiles import PARAMETERS, SITES, SOURCES, TABLE, Profile, load_profile
from fqtstats.report import profile_tables
from fqtstats.report.profiles import plot_matrix, plot_parameters, plot_sources
from fqtstats.results import COLUMNS, Result

TABLES = ("table", "sources", "parameters")


def make_profile(layers: int = 3, *, sampling: float = 2e-5, **metadata: object) -> Profile:
    """A chain of layers: Q1 reaches its layer's weight, Q2 every weight before it; one layer's Q2 reaches nothing."""
    names = [f"block{index // 4 + 1}.{index % 4 // 2}.conv{index % 2 + 1}" for index in range(layers)]
    pairs = [(names[k], site, names[t]) for k in range(layers) for site in SITES for t in range(k + 1)]
    pairs = [(layer, site, target) for layer, site, target in pairs if (layer == target) == (site == "grad_weight")]
    table = pd.DataFrame(pairs, columns=["source_layer", "source_site", "layer"])
    table = table.assign(parameter="weight", variance=[10.0 ** -(index % 4 + 5) for index in range(len(pairs))])
    table["standard_error"] = table["variance"] / 10
    whole = table["variance"].sum()
    by_source = table.groupby(["source_layer", "source_site"])["variance"].sum()
    sources = pd.DataFrame([(name, site) for name in names for site in SITES], columns=["layer", "site"])
    sources["variance"] = [by_source.get(key, 0.0) for key in sources.itertuples(index=False, name=None)]
    sources = sources.assign(quantizer=["pcq", "bhq"] * layers, bits=[8, 5] * layers)
    sources = sources.assign(standard_error=sources["variance"] / 20, share=sources["variance"] / whole)
    variances = table.groupby("layer")["variance"].sum()[names].tolist()
    parameters = pd.DataFrame(
        {
            "layer": [*names, "total"],
            "parameter": ["weight"] * layers + [""],
            "numel": [100] * layers + [100 * layers],
            "grad_norm_sq": 1e-4,
            "variance": [*variances, whole],
            "standard_error": [value / 30 for value in (*variances, whole)],
            "sampling_variance": sampling,
        }
    )
    about = {"method": "probes", "probes": 64, "precision": 0.05, "converged": True, "policy": {"name": "mine"}}
    return Profile(table, sources, parameters, {**about, **metadata})


def make_result() -> Result:
    values: dict[str, Any] = {column.name: [1.0, 1.0] for column in COLUMNS}
    values |= {"quantizer": "bhq", "bits": 5, "layer": ["a", "total"], "parameter": ["weight", ""], "quantized": True}
    return Result(pd.DataFrame({**values, "numel": 1, "draws": 2}))


def tables(profile: Profile) -> dict[str, pd.DataFrame]:
    return {name: getattr(profile, name) for name in TABLES}


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- the type --------------------------------------------------------------------------------------------------------


def test_every_column_has_a_meaning_and_numbers_a_unit() -> None:
    for schema in (TABLE, SOURCES, PARAMETERS):
        assert len({column.name for column in schema}) == len(schema)
        assert all(column.meaning for column in schema)
        assert all(column.unit for column in schema if column.dtype != "str")


def test_matrix() -> None:
    profile = make_profile(3)
    matrix = profile.matrix()
    assert list(matrix.index[:3]) == [
        "block1.0.conv1 grad_weight",
        "block1.0.conv1 grad_input",
        "block1.0.conv2 grad_weight",
    ]
    assert list(matrix.columns) == ["block1.0.conv1.weight", "block1.0.conv2.weight", "block1.1.conv1.weight"]
    reached = np.isfinite(matrix.to_numpy())
    assert reached.tolist() == [
        [True, False, False], [False, False, False], [False, True, False], [True, False, False],
        [False, False, True], [True, True, False],
    ]  # fmt: skip
    np.testing.assert_allclose(matrix.sum(axis=0), profile.targets["variance"])
    np.testing.assert_allclose(matrix.sum(axis=1), profile.sources["variance"])


def test_names_without_a_layer() -> None:
    """The model itself may be the quantized layer."""
    parts = tables(make_profile(1))
    parts = {name: part.replace("block1.0.conv1", "") for name, part in parts.items()}
    matrix = Profile(**parts).matrix()
    assert (list(matrix.index), list(matrix.columns)) == (["grad_weight", "grad_input"], ["weight"])


def test_label() -> None:
    profile = make_profile()
    assert profile.label == "bhq@5"
    mixed = profile.sources.assign(bits=range(6))
    assert Profile(profile.table, mixed, profile.parameters, profile.metadata).label == "mine"
    assert Profile(profile.table, mixed, profile.parameters).label == "custom"
    unknown = profile.sources.assign(bits=None, quantizer="custom")
    assert Profile(profile.table, unknown, profile.parameters).label == "custom"
    assert repr(profile).startswith("Profile(bhq@5: 6 sources, 3 parameters, total variance ")
    assert "<table" in profile._repr_html_()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("table", lambda t: t.drop(columns="variance"), "table 'profile' of a profile lacks the column(s) variance"),
        ("sources", lambda t: t.assign(bits=4.5), "'bits' must hold Int64"),
        ("sources", lambda t: t.replace("grad_input", "grad"), "to be grad_weight or grad_input, got 'grad'"),
        ("sources", lambda t: pd.concat([t, t]), "got two for layer 'block1.0.conv1', site 'grad_weight'"),
        ("sources", lambda t: t.iloc[1:], "has the source 'block1.0.conv1 grad_weight', its sources do not"),
        ("parameters", lambda t: t.iloc[1:], "has the parameter 'block1.0.conv1.weight', its parameters do not"),
        ("parameters", lambda t: t.iloc[:-1], 'the last row of a profile\'s parameters to have layer "total"'),
        ("parameters", lambda t: t.iloc[::-1], 'the last row of a profile\'s parameters to have layer "total"'),
        ("parameters", lambda t: t.iloc[:0], 'the last row of a profile\'s parameters to have layer "total"'),
    ],
)
def test_tables_that_are_not_a_profile_are_refused(name: str, change: Any, message: str) -> None:
    parts = tables(make_profile())
    with pytest.raises(InputError) as error:
        Profile(**{**parts, name: change(parts[name])})
    assert message in one_line(error)


def test_metadata_must_be_json() -> None:
    with pytest.raises(InputError, match=r"metadata\['a'\] must be plain JSON"):
        make_profile(a={1})


# --- files -----------------------------------------------------------------------------------------------------------


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    profile = make_profile(sampling=math.nan, arguments={"seed": 1})
    profile.save(tmp_path / "run")
    loaded = load_profile(tmp_path / "run")
    for name, table in tables(profile).items():
        pd.testing.assert_frame_equal(getattr(loaded, name), table, check_exact=True)
    assert loaded.metadata == profile.metadata
    found = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    stems = ("profile", "sources", "parameters")
    figures = {f"figures/{name}.png" for name in ("matrix", "parameters", "sources")}
    assert found == {f"{stem}.{kind}" for stem in stems for kind in ("parquet", "csv")} | figures | {"run.json"}
    document = json.loads((tmp_path / "run/run.json").read_text())
    assert (document["kind"], document["finished"], document["arguments"]) == ("profile", True, {"seed": 1})
    for stem in stems:
        parquet = (tmp_path / f"run/{stem}.parquet").read_bytes()
        assert document[f"{stem}_sha256"] == hashlib.sha256(parquet).hexdigest()
    read = pd.read_csv(tmp_path / "run/profile.csv")
    assert read["source_layer"].tolist() == profile.table["source_layer"].tolist()
    np.testing.assert_allclose(read["variance"], profile.table["variance"], rtol=1e-15)


def test_identical_tables_give_identical_bytes() -> None:
    one, two = make_profile(wall_seconds=1), make_profile(wall_seconds=2)
    shuffled = one.table[one.table.columns[::-1]]
    assert one.files() == two.files() == Profile(shuffled, one.sources, one.parameters).files()


def test_load_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Profile, "figures", lambda profile: {})
    run = tmp_path / "run"
    make_profile().save(run)
    good = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}

    def failure(path: Path) -> str:
        with pytest.raises(RunDirectoryError) as error:
            load_profile(path)
        return one_line(error)

    def with_document(**changes: object) -> str:
        (run / "run.json").write_text(json.dumps({**json.loads(good["run.json"]), **changes}))
        return failure(run)

    assert "expected the run directory of a profile, found nothing at" in failure(tmp_path / "missing")
    assert "expected the run directory of a profile, found a file at" in failure(run / "profile.parquet")
    assert "is not a run directory: it has no run.json" in failure(tmp_path)
    assert "not finished; continue it with --resume" in with_document(finished=False)
    assert "has format version 9" in with_document(version=9)
    assert "the run there is a forecast; install a newer fqtstats to read it" in with_document(kind="forecast")
    (run / "run.json").write_bytes(good["run.json"])
    for name in ("profile.parquet", "sources.parquet", "parameters.parquet"):
        flipped = bytearray(good[name])
        flipped[len(flipped) // 2] ^= 1
        (run / name).write_bytes(flipped)
        assert f"{name} is corrupted: its SHA-256 is not the one in run.json" in failure(run)
        (run / name).unlink()
        assert f"cannot read {run / name}" in failure(run)
        (run / name).write_bytes(good[name])
    # Files of another profile, with hashes to match.
    other = make_profile(2).files()["sources.parquet"]
    (run / "sources.parquet").write_bytes(other)
    assert "holds no valid profile" in with_document(sources_sha256=hashlib.sha256(other).hexdigest())
    foreign = b"no Parquet file"
    (run / "sources.parquet").write_bytes(foreign)
    assert "is corrupted or not a Parquet file" in with_document(sources_sha256=hashlib.sha256(foreign).hexdigest())


def test_each_reader_names_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Profile, Result):
        monkeypatch.setattr(kind, "figures", lambda result: {})
    make_profile().save(tmp_path / "profile")
    make_result().save(tmp_path / "result")
    with pytest.raises(RunDirectoryError) as error:
        fqtstats.load(tmp_path / "profile")
    assert "expected a measurement in" in one_line(error)
    assert one_line(error).endswith("the run there is a profile; read it with fqtstats.load_profile")
    with pytest.raises(RunDirectoryError) as error:
        fqtstats.load_profile(tmp_path / "result")
    assert "expected a profile in" in one_line(error)
    assert one_line(error).endswith("the run there is a measurement; read it with fqtstats.load")
    # Runs from before there were profiles do not say what they are.
    document = tmp_path / "result" / "run.json"
    written = json.loads(document.read_text())
    del written["kind"]
    document.write_text(json.dumps(written))
    assert len(fqtstats.load(tmp_path / "result").table) == 2


# --- terminal tables -------------------------------------------------------------------------------------------------


def printed(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


@pytest.mark.parametrize("width", [40, 80, 120])
def test_table_of_sources(width: int) -> None:
    about = {"unquantized": [{"layer": "stem", "type": "Conv2d", "reason": "first layer"}]}
    profile = make_profile(**about)
    text = printed(profile_tables.summary([profile]), width)
    lines = text.splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert "bhq@5: gradient variance by quantizer, 64 probes" in " ".join(text.split())
    rows = [line.split() for line in lines[lines.index(next(x for x in lines if x.startswith("layer"))) + 2 :]][:6]
    assert [row[1] for row in rows] == ["Q1", "Q2"] * 3
    ends = ["0.conv1", "0.conv2", "1.conv1"]  # long names keep their ends
    assert all(row[0].endswith(end) for row, end in zip(rows[::2], ends, strict=True))
    shares = profile.sources["share"].tolist()
    assert [f"{100 * share:.1f}%" in row for share, row in zip(shares, rows, strict=True)] == [True] * 6
    assert f"{profile.total['variance']:.2e}" in next(line for line in lines if line.startswith("total"))
    told = " ".join(text.split())
    first, second = sorted(shares)[:-3:-1]
    assert f"to blame for {100 * (first + second):.0f} % of the variance, 2 of 6 quantizers: " in told
    assert f"Q2 of layer block1.1.conv1 ({100 * first:.1f} %), Q1 of layer block1.0.conv1" in told
    assert "not quantized: 1 Conv2d (first layer: stem)" in told
    assert f"sampling variance: {profile.total['variance'] / 2e-5:#.3g}" in told
    if width >= 80:
        bars = [row[-1] for row in rows if "█" in row[-1]]
        assert max(map(len, bars)) == 10
        assert {"pcq@8", "5.0%"} <= set(rows[0])


def test_table_without_what_is_not_known() -> None:
    profile = make_profile(sampling=math.nan)
    silent = Profile(
        profile.table.assign(standard_error=math.nan),
        profile.sources.assign(standard_error=math.nan, bits=None),
        profile.parameters.assign(standard_error=math.nan),
    )
    text = printed(profile_tables.summary([silent]), 80)
    assert "sampling" not in text
    assert "±" not in text
    assert "nan" not in text.lower()


def test_an_imprecise_profile_says_so() -> None:
    text = printed(profile_tables.summary([make_profile(converged=False, precision_reached=0.123)]), 80)
    assert "precision 0.12 instead of 0.05: raise --most-probes" in text


def test_without_variance_nothing_is_to_blame() -> None:
    profile = make_profile()
    parts = {name: table.assign(variance=0.0, standard_error=0.0) for name, table in tables(profile).items()}
    parts["sources"] = parts["sources"].assign(share=math.nan)
    quiet = Profile(**parts)
    assert "to blame" not in printed(profile_tables.summary([quiet]), 80)
    assert json.loads(json.dumps(profile_tables.to_dict([quiet]), allow_nan=False))
    for plot in (plot_matrix, plot_parameters, plot_sources):
        plot(quiet).canvas.draw()


def test_comparison() -> None:
    one = make_profile()
    other = Profile(one.table, one.sources.replace("bhq", "psq"), one.parameters, one.metadata)
    text = printed(profile_tables.summary([one, other]), 80)
    rows = [line for line in text.splitlines() if line.startswith(("bhq@5", "psq@5"))]
    assert len(rows) == 2
    assert all(f"{one.total['variance']:.2e}" in row and "Q2 of layer block1.1.conv1" in row for row in rows)


def test_json_has_everything() -> None:
    profile = make_profile(sampling=math.nan)
    (told,) = json.loads(json.dumps(profile_tables.to_dict([profile]), allow_nan=False))["profiles"]
    assert told["label"] == "bhq@5"
    assert [list(told[name][0]) for name in TABLES] == [
        [column.name for column in schema] for schema in (TABLE, SOURCES, PARAMETERS)
    ]
    assert told["sources"][1] == {**told["sources"][1], "quantizer": "bhq", "bits": 5, "site": "grad_input"}
    assert told["parameters"][-1]["sampling_variance"] is None


# --- figures ---------------------------------------------------------------------------------------------------------


def assert_labels_apart(figure: Figure, axis: str) -> None:
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    labels = getattr(figure.axes[0], f"get_{axis}ticklabels")()
    boxes = sorted(label.get_window_extent(renderer).get_points()[:, "xy".index(axis)].tolist() for label in labels)
    assert all(low[1] <= high[0] + 1.5 for low, high in itertools.pairwise(boxes))
    assert boxes[0][0] >= 0


def legend(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.legends[0].get_texts())


@pytest.mark.parametrize("layers", [1, 20, 60])
def test_heat_map(layers: int) -> None:
    profile = make_profile(layers)
    figure = plot_matrix(profile)
    (image,) = figure.axes[0].get_images()
    drawn = np.ma.getmaskarray(image.get_array())
    # The first row has every layer's own Q1; the Q2 of the first layer reaches nothing and has no row.
    assert drawn.shape == (layers, layers)
    assert not drawn[0].any()
    assert (~drawn[1:]).tolist() == np.tri(layers - 1, layers, dtype=bool).tolist()
    values = profile.matrix().to_numpy()
    np.testing.assert_array_equal(
        np.asarray(image.get_array())[0], values[::2].max(axis=0, where=values[::2] > 0, initial=0)
    )
    assert figure.get_size_inches()[1] < 10
    assert_labels_apart(figure, "x")
    assert_labels_apart(figure, "y")
    assert image.norm.vmax == pytest.approx(np.nanmax(values))


def test_colours_span_at_most_six_decades() -> None:
    profile = make_profile(4)
    table = profile.table.assign(variance=[10.0**-index for index in range(len(profile.table))])
    figure = plot_matrix(Profile(table, profile.sources, profile.parameters))
    norm = figure.axes[0].get_images()[0].norm
    assert (norm.vmin, norm.vmax) == (1e-6, 1.0)


def test_bars_per_parameter_split_the_variance() -> None:
    profile = make_profile(12)
    figure = plot_parameters(profile)
    bars, dots = figure.axes
    widths = np.array([patch.get_width() for patch in bars.patches]).reshape(5, 13)
    np.testing.assert_allclose(widths.sum(axis=0), 100)
    values = profile.matrix().to_numpy()
    expected = [
        values[0, 0], values[3, 0], np.sum(values[[5, 7], 0]), np.sum(values[[9, 11, 13, 15], 0]),
        np.nansum(values[17::2, 0]),
    ]  # fmt: skip
    np.testing.assert_allclose(widths[:, 0], 100 * np.array(expected) / np.nansum(values[:, 0]))
    np.testing.assert_allclose(widths[0, -1], 100 * np.nansum(values[::2]) / np.nansum(values))
    assert sorted(len(line.get_xdata()) for line in dots.get_lines() if line.get_marker() in ("D", "o")) == [13, 13]
    assert bars.get_yticklabels()[-1].get_text() == "total"
    assert_labels_apart(figure, "y")
    # The legend names only what there is.
    assert "8 or more layers later" in legend(figure)
    few = legend(plot_parameters(make_profile(3, sampling=math.nan)))
    assert "2 or 3 layers later" in few
    assert not any(name in few for name in ("4 to 7", "8 or more", "sampling"))


def test_bars_per_source() -> None:
    profile = make_profile(5)
    (ax,) = plot_sources(profile).axes
    assert ax.get_ylabel() == "layer"
    widths = [patch.get_width() for patch in ax.patches]
    np.testing.assert_allclose(widths[:5], 100 * profile.sources["share"][::2])
    np.testing.assert_allclose(widths[5:], 100 * profile.sources["share"][1::2])
    assert [label.get_text() for label in ax.get_yticklabels()] == profile.sources["layer"].tolist()[::2]


def test_own_axes_are_used() -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    profile = make_profile()
    for ax, name in zip(axes, ("matrix", "parameters", "sources"), strict=True):
        assert getattr(profile, f"plot_{name}")(ax=ax) is figure
    assert not figure.legends
    figure.canvas.draw()
