"""The comparison with libraries (tools/compare_libraries.py) without any of them: what it measures and what it says."""

from __future__ import annotations

import sys

import compare_libraries as tool
import library_runs
from library_numerics import NUMERICS, numerics

from requant.catalog.context import load_impl, make_config
from requant.reference_impls import rtn


def test_own_side_of_every_pair_can_be_configured():
    for library in tool.LIBRARIES:
        for pair in library.pairs:
            make_config(load_impl(pair.impl), pair.ours)


def test_missing_library_is_named_with_its_installation(monkeypatch, capsys):
    absent = tool.Library("no-such-library", "no_such_library", None, ())
    monkeypatch.setattr(tool, "LIBRARIES", (absent,))
    monkeypatch.setattr(sys, "argv", ["compare_libraries.py"])
    tool.main()
    assert "pip install torch==2.13.0 no-such-library" in capsys.readouterr().out


def test_numerics_of_every_pair_are_known():
    used = {
        name
        for library in tool.LIBRARIES
        for pair in library.pairs
        for name in (*library.numerics, *pair.numerics)
    }
    assert used == set(NUMERICS)


def _row(run, numerics: tuple[str, ...] = ()) -> list[str]:
    pair = tool.Pair("rtn", "W3", {"w_bits": 3}, {"w_bits": 3})
    library = tool.Library("torch", "torch", run, (pair,), numerics=numerics)
    line = tool.row(library, pair, seeds=1, whole=False)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_same_rounding_gives_the_same_loss_and_other_rounding_does_not():
    def same(folder, calib, seed, *, w_bits):
        return rtn.quantize(library_runs.load(folder), calib, rtn.Config(w_bits))

    def finer(folder, calib, seed, *, w_bits):
        return rtn.quantize(library_runs.load(folder), calib, rtn.Config(w_bits + 1))

    cells = _row(same)
    assert cells[4] == cells[5]
    assert float(cells[4].split()[0]) > 0.01
    assert float(cells[6].split()[0]) == 0
    assert float(_row(finer)[6].split()[0]) > 0.01


def test_numerics_of_a_library_close_a_gap_that_is_theirs_alone():
    def float32_scales(folder, calib, seed, *, w_bits):
        with numerics("float32 scales"):
            return rtn.quantize(library_runs.load(folder), calib, rtn.Config(w_bits))

    paper, library = (_row(float32_scales, names) for names in ((), ("float32 scales",)))
    assert paper[5] == library[5], "outside of `numerics` ours is as it was"
    assert paper[7:10] == ["", "", ""]
    assert library[7:10] == [library[4], "0.0000", "float32 scales"]
    assert library[5] != library[7]


def test_error_of_a_library_stands_in_its_row():
    def broken(folder, calib, seed, **how):
        raise RuntimeError("needs an accelerator")

    assert _row(broken)[4:] == ["RuntimeError: needs an accelerator"]
