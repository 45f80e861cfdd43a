"""Results on disk: what is written comes back, and nothing half-written is ever trusted."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small

import fqtstats
from fqtstats import results
from fqtstats.errors import InputError, RunDirectoryError
from fqtstats.provenance import provenance
from fqtstats.results import COLUMNS, Configuration, Result, load, merge
from fqtstats.run_directory import RunDirectory

PACKAGE_ROOT = str(Path(results.__file__).resolve().parents[1])


def make_table(quantizer: str = "bhq", bits: int | None = 5, scale: float = 1.0) -> pd.DataFrame:
    """Two parameters and the total; the second parameter is not quantized, so most of its values are NaN."""
    columns: dict[str, list[object]] = {column.name: [1.0 * scale, np.nan, 2.0 * scale] for column in COLUMNS}
    columns |= {
        "quantizer": [quantizer] * 3,
        "bits": [bits] * 3,
        "layer": ["conv1", "bn<1>", "total"],
        "parameter": ["weight", "bias", ""],
        "quantized": [True, False, True],
        "numel": [100, 10, 110],
        "draws": [64] * 3,
    }
    return pd.DataFrame(columns)


def make_result(quantizer: str = "bhq", bits: int | None = 5, **metadata: object) -> Result:
    return Result(make_table(quantizer, bits), metadata)


# The package's own __init__ is left out: only this stage and what it imports are loaded.
PRELUDE = f"""
import sys, types
package = types.ModuleType("fqtstats")
package.__path__ = [{PACKAGE_ROOT + "/fqtstats"!r}]
sys.modules["fqtstats"] = package
"""


def run_python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- table -----------------------------------------------------------------------------------------------------------


def test_schema_gives_every_column_a_unit_and_a_meaning() -> None:
    assert len({column.name for column in COLUMNS}) == len(COLUMNS)
    assert all(column.meaning for column in COLUMNS)
    assert all(column.unit for column in COLUMNS if column.dtype not in ("str", "bool"))


def test_table_is_put_in_the_order_and_dtypes_of_the_schema() -> None:
    shuffled = make_table(bits=None)[[column.name for column in reversed(COLUMNS)]].assign(another=1)
    table = Result(shuffled).table
    assert list(table.columns) == [*(column.name for column in COLUMNS), "another"]
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == {
        **{column.name: column.dtype for column in COLUMNS},
        "another": "float64",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns=["snr", "bits"]), "lacks the column(s) bits, snr"),
        (lambda table: table.assign(numel=[1, np.nan, 3]), "'numel' must hold int64"),
        (lambda table: table.assign(bits=[4.5] * 3), "'bits' must hold Int64"),
        (lambda table: table.assign(snr=["a"] * 3), "'snr' must hold float64"),
        (lambda table: table.assign(quantized=["no"] * 3), "'quantized' must hold True or False"),
        (lambda table: table.assign(layer=[1, 2, 3]), "'layer' must hold strings"),
        (lambda table: table.iloc[:2], 'one row with layer "total"'),
        (lambda table: table.iloc[:0], 'one row with layer "total"'),
        (lambda table: pd.concat([table, table]), "two rows for quantizer 'bhq'"),
    ],
)
def test_bad_tables_are_refused(change: object, message: str) -> None:
    with pytest.raises(InputError) as error:
        Result(change(make_table()))  # type: ignore[operator]
    assert message in one_line(error)


def test_metadata_becomes_plain_json() -> None:
    result = make_result(seed=np.int64(3), loss=float("nan"), path=Path("a/b"), shape=(1, 2))
    assert result.metadata == {"seed": 3, "loss": None, "path": "a/b", "shape": [1, 2]}
    with pytest.raises(InputError, match=r"metadata\['a'\]\['b'\] must be plain JSON.*set"):
        make_result(a={"b": {1}})
    with pytest.raises(InputError, match="strings as keys"):
        make_result(a={1: 2})


def test_rows_and_totals_of_configurations() -> None:
    result = merge([make_result("bhq", 5), make_result("custom", None), make_result("ptq", 8)])
    assert [str(item) for item in result.configurations] == ["bhq@5", "custom", "ptq@8"]
    assert result.reference == Configuration("ptq", 8)
    assert make_result().reference == Configuration("bhq", 5)
    assert result.total(Configuration("custom", None))["layer"] == "total"
    assert list(result.rows(Configuration("bhq", 5))["layer"]) == ["conv1", "bn<1>"]
    with pytest.raises(InputError, match="no configuration bhq@4 in this result; it has bhq@5, custom, ptq@8"):
        result.rows(Configuration("bhq", 4))


def test_relative_input_variance_leaves_out_what_has_none() -> None:
    both = Result(pd.concat([make_table("ptq", 8), make_table("bhq", 5, scale=0.25)]))
    np.testing.assert_array_equal(both.relative_input_variance(Configuration("bhq", 5)), [0.25])


def test_merge_keeps_what_agrees_and_lists_what_differs() -> None:
    entry = {"layer": "fc", "type": "Linear", "reason": "last"}
    first = make_result("bhq", 5, seed=0, wall=1.0, unquantized=[entry])
    second = make_result("ptq", 5, seed=0, wall=2.0, unquantized=[entry])
    third = make_result("custom", None, seed=1, wall=2.0)
    merged = merge([merge([first, second]), third])
    assert merged.metadata == {
        "unquantized": [entry],
        "configurations": [
            {"quantizer": "bhq", "bits": 5, "seed": 0, "wall": 1.0},
            {"quantizer": "ptq", "bits": 5, "seed": 0, "wall": 2.0},
            {"quantizer": "custom", "bits": None, "seed": 1, "wall": 2.0},
        ],
    }
    assert merge([first, second]).metadata["seed"] == 0
    with pytest.raises(InputError, match="at least one"):
        merge([])
    with pytest.raises(InputError, match="two rows for quantizer"):
        merge([first, first])
    with pytest.raises(InputError, match="different models or data: their hashes differ"):
        merge([make_result("bhq", 5, hashes={"model": "a"}), make_result("ptq", 5, hashes={"model": "b"})])


def test_html_escapes_names_and_repr_says_what_it_is() -> None:
    result = make_result()
    html = result._repr_html_()
    assert "bn&lt;1&gt;" in html
    assert "bn<1>" not in html
    assert "nan" not in html.lower()
    assert repr(result) == "Result(2 parameters; bhq@5: total variance 2 [2, 2], 64 draws)"


def test_module_needs_no_torch() -> None:
    code = """
        import fqtstats.results, fqtstats.report.tables, fqtstats.report.figures
        assert "torch" not in sys.modules and "matplotlib.pyplot" not in sys.modules
    """
    process = run_python(code)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    result = merge([make_result("bhq", 5, seeds=[1]), make_result("custom", None, seeds=[1])])
    result.save(tmp_path / "a" / "run")
    for place in ("a/run", "a/run/results.parquet"):
        loaded = load(tmp_path / place)
        pd.testing.assert_frame_equal(loaded.table, result.table)
        assert loaded.metadata == result.metadata
    names = sorted(str(path.relative_to(tmp_path / "a/run")) for path in (tmp_path / "a/run").rglob("*"))
    assert names == [
        "figures", "figures/variance.png", "figures/variance_vs_bits.png", "results.parquet", "run.json",
    ]  # fmt: skip


def test_lone_parquet_file_and_its_schema(tmp_path: Path) -> None:
    make_result().save(tmp_path / "run")
    alone = tmp_path / "bits=7" / "table.parquet"  # such a folder name must not add a column
    alone.parent.mkdir()
    (tmp_path / "run" / "results.parquet").rename(alone)
    loaded = load(alone)
    pd.testing.assert_frame_equal(loaded.table, make_result().table)
    assert loaded.metadata == {}
    schema = pq.ParquetFile(alone).schema_arrow
    assert schema.metadata == {b"fqtstats.format": b"1"}
    assert schema.field("variance").metadata[b"unit"] == b"(loss/parameter)^2"


def test_identical_tables_give_identical_bytes(tmp_path: Path) -> None:
    table = make_table()
    other_nan = table.copy()
    other_nan["variance"] = [1.0, np.array([0xFFF8000000000001], np.uint64).view(np.float64)[0], 2.0]
    files = []
    for index, frame in enumerate((table, other_nan)):
        Result(frame, {"wall_seconds": index}).save(tmp_path / str(index))
        files.append((tmp_path / str(index) / "results.parquet").read_bytes())
        time.sleep(0.01)
    assert files[0] == files[1]


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_result().save(run)
    good = {name: (run / name).read_bytes() for name in ("run.json", "results.parquet")}
    document = json.loads(good["run.json"])

    def failure(path: Path) -> str:
        with pytest.raises(RunDirectoryError) as error:
            load(path)
        return one_line(error)

    assert "no run directory or Parquet file at" in failure(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "is not a run directory: it has no run.json" in failure(tmp_path / "empty")
    (tmp_path / "text").write_text("hello\nworld")
    assert "corrupted or not a Parquet file" in failure(tmp_path / "text")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "foreign.parquet")
    assert "not a results table of fqtstats" in failure(tmp_path / "foreign.parquet")
    wrong = pa.table({"a": [1]}).replace_schema_metadata({"fqtstats.format": "1"})
    pq.write_table(wrong, tmp_path / "wrong.parquet")
    assert "not a valid results table" in failure(tmp_path / "wrong.parquet")
    pq.write_table(wrong.replace_schema_metadata({"fqtstats.format": "2"}), tmp_path / "newer.parquet")
    assert "has format version 2, but this fqtstats reads up to 1" in failure(tmp_path / "newer.parquet")

    def with_document(**changes: object) -> str:
        (run / "run.json").write_text(json.dumps({**document, **changes}))
        return failure(run)

    assert "has format version 9" in with_document(version=9)
    assert "it has no version" in with_document(version=None)
    assert "was not written by fqtstats" in with_document(format="other")
    assert 'lacks "arguments" or "finished"' in with_document(arguments=None)
    assert "not finished; continue it with --resume" in with_document(finished=False)
    (run / "run.json").write_bytes(good["run.json"][:50])
    assert "run.json is corrupted" in failure(run)
    (run / "run.json").write_bytes(good["run.json"])
    flipped = bytearray(good["results.parquet"])
    flipped[len(flipped) // 2] ^= 1
    (run / "results.parquet").write_bytes(flipped)
    assert "its SHA-256 is not the one in run.json" in failure(run)
    (run / "results.parquet").unlink()
    assert "cannot read" in failure(run)


# --- run directory ---------------------------------------------------------------------------------------------------


def test_life_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunDirectory.create(path, {"bits": 5}) as run:
        run.save_state("bhq@5/a", {"sum": np.arange(3)}, {"draws": 7})
        assert not run.finished
    with RunDirectory.create(path, {"bits": 5}, resume=True) as run:
        state = run.load_state("bhq@5/a")
        assert state is not None
        assert state[1] == {"draws": 7}
        run.finish(make_result())
        assert run.finished
        assert not (path / "state").exists()
    document = json.loads((path / "run.json").read_text())
    assert document["finished"] is True
    assert document["arguments"] == {"bits": 5}
    assert document["results_sha256"] == hashlib.sha256((path / "results.parquet").read_bytes()).hexdigest()
    before = (path / "run.json").read_bytes()
    (path / "state").mkdir()  # as left by a process that was killed between its last two steps
    with RunDirectory.create(path, {"bits": 5}, resume=True) as run:
        assert run.finished
        assert not (path / "state").exists()
        pd.testing.assert_frame_equal(load(path).table, make_result().table)
    assert (path / "run.json").read_bytes() == before


def test_create_says_what_is_in_the_way(tmp_path: Path) -> None:
    def failure(path: Path, arguments: dict[str, object], resume: bool = False) -> str:
        with pytest.raises(RunDirectoryError) as error:
            RunDirectory.create(path, arguments, resume)
        return one_line(error)

    (tmp_path / "file").write_text("")
    assert "a file is in the way" in failure(tmp_path / "file", {})
    assert "a file is in the way" in failure(tmp_path / "file" / "below", {})
    assert "cannot make the run directory" in failure(Path("/proc/fqtstats-run"), {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    assert "not empty and not a run; choose another directory (--out)" in failure(tmp_path / "other", {}, resume=True)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    (tmp_path / "empty").mkdir()
    RunDirectory.create(tmp_path / "empty", {"bits": 5, "seed": 0}).close()
    assert "choose another directory (--out) or continue this one with --resume" in failure(tmp_path / "empty", {})
    message = failure(tmp_path / "empty", {"bits": 4, "seed": 0, "draws": 8}, resume=True)
    assert "(bits was 5 and is now 4, draws was not given and is now 8)" in message
    (tmp_path / "empty" / "run.json").write_text("{")
    assert "run.json is corrupted" in failure(tmp_path / "empty", {}, resume=True)
    with pytest.raises(InputError, match="arguments"):
        RunDirectory.create(tmp_path / "new", {"a": object()})
    assert not (tmp_path / "new").exists()


def test_unwritable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Simulated, because the superuser, as whom containers run, may write anywhere.
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunDirectoryError, match=r"cannot write in .*: Permission denied"):
        RunDirectory.create(tmp_path / "run", {})


def test_what_a_kill_at_the_start_leaves_is_no_obstacle(tmp_path: Path) -> None:
    for name in (".lock", "run.json.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "state").mkdir()
    RunDirectory.create(tmp_path, {}).close()


def test_one_process_at_a_time_and_no_stale_lock(tmp_path: Path) -> None:
    code = """
        import sys, time
        from fqtstats.run_directory import RunDirectory
        run = RunDirectory.create(sys.argv[1], {})
        print("ready", flush=True)
        time.sleep(60)
    """
    process = run_python(code, str(tmp_path))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(RunDirectoryError, match="another process is writing the run"):
            RunDirectory.create(tmp_path, {}, resume=True)
    finally:
        process.kill()
        process.communicate()
    RunDirectory.create(tmp_path, {}, resume=True).close()


def test_lock_is_given_back_when_create_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _raise_full)
        with pytest.raises(RunDirectoryError, match="No space left"):
            RunDirectory.create(tmp_path, {})
    RunDirectory.create(tmp_path, {}).close()


def test_closed_run_writes_nothing(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, {})
    run.close()
    run.close()
    with pytest.raises(RunDirectoryError, match="was closed"):
        run.save_state("a", {}, {})
    with pytest.raises(RunDirectoryError, match="was closed"):
        run.finish(make_result())


# --- state -----------------------------------------------------------------------------------------------------------


def _raise_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray] = {
        "file": np.array([np.nan, -0.0, 1e-310]),
        "array/with odd name": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "scalar": np.array(2**63, dtype=np.uint64),
        "empty": np.zeros((0, 4), np.float32),
    }
    with RunDirectory.create(tmp_path, {}) as run:
        for key in ("a/b", "..", "bhq@5 é", ".tmp"):
            run.save_state(key, arrays, {"key": key})
        for key in ("a/b", "..", "bhq@5 é", ".tmp"):
            state = run.load_state(key)
            assert state is not None
            assert state[1] == {"key": key}
            assert list(state[0]) == list(arrays)
            for name, array in arrays.items():
                assert (state[0][name].dtype, state[0][name].shape) == (array.dtype, array.shape)
                assert state[0][name].tobytes() == array.tobytes()
        assert run.load_state("never saved") is None
        with pytest.raises(InputError, match="bad hold Python objects"):
            run.save_state("a/b", {"bad": np.array([object()])}, {})
        with pytest.raises(InputError, match="must be plain JSON"):
            run.save_state("a/b", {}, {"x": object()})
        assert run.load_state("a/b") is not None


def test_damaged_state_is_reported_and_not_trusted(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, {}) as run:
        run.save_state("a", {"x": np.arange(100)}, {"draws": 1})
        path = tmp_path / "state" / "a.state"
        good = path.read_bytes()
        flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good), 37)]
        for damaged in (b"", good[:10], good[:-1], good + b"x", *flipped):
            path.write_bytes(damaged)
            with pytest.warns(RuntimeWarning, match="ignoring the state .*starts over"):
                assert run.load_state("a") is None
        (tmp_path / "state" / "b.state").write_bytes(good)
        with pytest.warns(RuntimeWarning, match="it belongs to 'a'"):
            assert run.load_state("b") is None


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_full_disk_leaves_the_previous_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    with RunDirectory.create(tmp_path, {}) as run:
        run.save_state("a", {"x": np.arange(3)}, {"draws": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, function, _raise_full)
            with pytest.raises(RunDirectoryError) as error:
                run.save_state("a", {"x": np.arange(4)}, {"draws": 2})
        message = one_line(error)
        assert "No space left on device" in message
        assert "--resume" in message
        state = run.load_state("a")
        assert state is not None
        assert state[1] == {"draws": 1}
        assert [path.name for path in (tmp_path / "state").iterdir()] == ["a.state"]


def test_write_that_stops_halfway_leaves_the_previous_state(tmp_path: Path) -> None:
    """A real short write: the system refuses files above 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunDirectory.create(tmp_path, {}) as run:
        run.save_state("a", {"x": np.arange(3)}, {"draws": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        try:
            with pytest.raises(RunDirectoryError, match="File too large; what was saved before is intact"):
                run.save_state("a", {"x": np.zeros(1 << 16)}, {"draws": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        state = run.load_state("a")
        assert state is not None
        assert state[1] == {"draws": 1}
        assert [path.name for path in (tmp_path / "state").iterdir()] == ["a.state"]


def test_failure_while_finishing_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunDirectory.create(tmp_path, {}) as run:
        run.save_state("a", {}, {"draws": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", _raise_full)
            with pytest.raises(RunDirectoryError, match="No space left"):
                run.finish(make_result())
    with pytest.raises(RunDirectoryError, match="not finished"):
        load(tmp_path)
    with RunDirectory.create(tmp_path, {}, resume=True) as run:
        assert run.load_state("a") == ({}, {"draws": 1})
        run.finish(make_result())
    load(tmp_path)


def test_kill_while_saving_leaves_a_whole_state(tmp_path: Path) -> None:
    code = """
        import sys
        import numpy as np
        from fqtstats.run_directory import RunDirectory
        run = RunDirectory.create(sys.argv[1], {}, resume=True)
        draws = 0
        while True:
            draws += 1
            run.save_state("a", {"x": np.full(200_000, draws), "y": np.full(3, -draws)}, {"draws": draws})
            if draws == 1:
                print("saving", flush=True)
    """
    for delay in (0.0, 0.013, 0.031):
        process = run_python(code, str(tmp_path))
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with RunDirectory.create(tmp_path, {}, resume=True) as run:
            state = run.load_state("a")
            assert state is not None
            draws = state[1]["draws"]
            assert (state[0]["x"] == draws).all()
            assert state[0]["x"].shape == (200_000,)
            assert (state[0]["y"] == -np.int64(draws)).all()  # type: ignore[arg-type]


def test_provenance_is_json_and_names_what_matters() -> None:
    found = provenance("avx2")
    assert json.loads(json.dumps(found)) == found
    assert found["isa"] == "avx2"
    assert provenance()["isa"] is None
    versions = found["versions"]
    assert isinstance(versions, dict)
    assert {"python", "torch", "numpy", "fqtstats"} <= versions.keys()
    assert versions["numpy"] == np.__version__


def test_the_only_configuration_need_not_be_named() -> None:
    one = fqtstats.measure(small.mlp(), small.batch(), small.loss, small.psq(), draws=2)
    (only,) = one.configurations
    assert one.total().equals(one.total(only))
    assert one.rows().equals(one.rows(only))
    other = fqtstats.measure(small.mlp(), small.batch(), small.loss, small.psq(bits=5), draws=2)
    with pytest.raises(InputError, match=r"several configurations, psq@4, psq@5; name one of \.configurations"):
        results.merge([one, other]).total()
