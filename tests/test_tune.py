"""Measured kernel choices: what is asked of the clock, what of the disk, and what of neither."""

from __future__ import annotations

import json

import pytest
import torch

from fxbt import tune

FLOAT = torch.float32


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FXBT_TUNE", "1")
    monkeypatch.setenv("FXBT_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def measured(monkeypatch):
    """Counts the measurements, and answers: packed is twice as fast from the third number of rows on."""
    shapes = []

    def measure(n, k, dtype):
        shapes.append((n, k))
        return {"linear": [4.0] * len(tune.ROWS), "packed": [4.0, 4.0] + [2.0] * (len(tune.ROWS) - 2)}

    monkeypatch.setattr(tune, "_measure", measure)
    return shapes


WANTED = (False, False, True, True, True)


def test_a_shape_is_measured_once_and_remembered(measured, cache):
    assert tune.Tuner().packed_pays(8, 6, FLOAT) == WANTED
    assert tune.Tuner().packed_pays(8, 6, FLOAT) == WANTED
    assert measured == [(8, 6)]
    (file,) = cache.iterdir()  # no temporary file is left
    assert set(json.loads(file.read_text())["linears"]) == {"8x6 float32"}


def test_measurements_add_up(measured):
    for n in (8, 9, 10):
        tune.Tuner().packed_pays(n, 6, FLOAT)
    for n in (8, 9, 10):
        tune.Tuner().packed_pays(n, 6, FLOAT)
    assert len(measured) == 3


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"machine": 1}', '{"machine": {}, "linears": {}}', "\\x00\\xff"],
)
def test_foreign_and_broken_files_are_ignored(measured, content):
    path = tune.cache_file()
    path.write_text(content)
    assert tune.Tuner().packed_pays(8, 6, FLOAT) == WANTED
    assert tune.Tuner().packed_pays(8, 6, FLOAT) == WANTED and measured == [(8, 6)]


@pytest.mark.parametrize(
    "times", [None, {}, {"linear": [1.0], "packed": [1.0]}, {"linear": ["a"] * 5, "packed": [-1.0] * 5}]
)
def test_broken_entries_are_measured_anew(measured, times):
    data = {"machine": tune._machine(), "linears": {"8x6 float32": times}}
    tune.cache_file().write_text(json.dumps(data))
    assert tune.Tuner().packed_pays(8, 6, FLOAT) == WANTED and measured == [(8, 6)]


def test_another_machine_has_a_file_of_its_own(measured, monkeypatch):
    tune.Tuner().packed_pays(8, 6, FLOAT)
    first = tune.cache_file()
    monkeypatch.setattr(tune, "_cpu_name", lambda: "another")
    assert tune.cache_file() != first
    tune.Tuner().packed_pays(8, 6, FLOAT)
    assert len(measured) == 2


def test_a_folder_that_cannot_be_written_is_no_error(measured, monkeypatch, cache):
    (cache / "file").write_text("")
    monkeypatch.setenv("FXBT_CACHE_DIR", str(cache / "file" / "below"))
    assert tune.Tuner().packed_pays(8, 6, FLOAT) == WANTED


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.delenv("FXBT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tune.cache_file().parent == tmp_path / "xdg" / "fxbt"


def test_without_tuning_a_rule_decides(measured, monkeypatch, cache):
    monkeypatch.setenv("FXBT_TUNE", "0")
    tuner = tune.Tuner()
    assert set(tuner.packed_pays(16, 16, FLOAT)) == {False}
    assert set(tuner.packed_pays(1024, 1024, FLOAT)) == {torch.cpu._is_avx512_supported()}
    assert not measured and not list(cache.iterdir())
    assert "by rule" in tuner.answers["16x16 float32"]


def test_when_the_time_is_up_the_rule_decides(measured, monkeypatch):
    monkeypatch.setattr(tune, "BUDGET_SECONDS", 0.0)
    assert tune.Tuner().packed_pays(16, 16, FLOAT) == (False,) * len(tune.ROWS)
    assert not measured


def test_only_a_clear_gain_counts():
    count = len(tune.ROWS)
    assert not any(tune._by_times({"linear": [1.0] * count, "packed": [0.98] * count}))
    assert all(tune._by_times({"linear": [1.0] * count, "packed": [0.9] * count}))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_real_kernels_can_be_measured():
    tuner = tune.Tuner()
    tuner.packed_pays(24, 16, FLOAT)
    assert "us)" in tuner.answers["24x16 float32"]


@pytest.mark.parametrize(("rows", "bucket"), [(0, 0), (1, 0), (2, 0), (3, 1), (8, 1), (9, 2), (129, 4), (10**6, 4)])
def test_rows_have_the_bucket_of_the_next_measurement(rows, bucket):
    assert tune.bucket_of(rows) == bucket
