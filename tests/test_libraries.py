"""The comparison with libraries (tools/compare_libraries.py) without any of them: what it measures and what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from requant.catalog.context import load_impl, make_config
from requant.reference_impls import rtn


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parent / "tools" / "compare_libraries.py"
    spec = importlib.util.spec_from_file_location("compare_libraries", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_own_side_of_every_pair_can_be_configured(tool):
    for library in tool.LIBRARIES:
        for pair in library.pairs:
            make_config(load_impl(pair.impl), pair.ours)


def test_missing_library_is_named_with_its_installation(tool, monkeypatch, capsys):
    absent = tool.Library("no-such-library", "no_such_library", None, ())
    monkeypatch.setattr(tool, "LIBRARIES", (absent,))
    monkeypatch.setattr(sys, "argv", ["compare_libraries.py"])
    tool.main()
    assert "pip install torch==2.13.0 no-such-library" in capsys.readouterr().out


def _row(tool, run) -> list[str]:
    pair = tool.Pair("rtn", "W3", {"w_bits": 3}, {"w_bits": 3})
    line = tool.row(tool.Library("torch", "torch", run, (pair,)), pair, seeds=1, whole=False)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_same_rounding_gives_the_same_loss_and_other_rounding_does_not(tool):
    def same(folder, calib, seed, *, w_bits):
        return rtn.quantize(tool.load(folder), calib, rtn.Config(w_bits))

    def finer(folder, calib, seed, *, w_bits):
        return rtn.quantize(tool.load(folder), calib, rtn.Config(w_bits + 1))

    cells = _row(tool, same)
    assert cells[4] == cells[5]
    assert float(cells[4].split()[0]) > 0.01
    assert float(cells[6].split()[0]) == 0
    assert float(_row(tool, finer)[6].split()[0]) > 0.01


def test_error_of_a_library_stands_in_its_row(tool):
    def broken(folder, calib, seed, **how):
        raise RuntimeError("needs an accelerator")

    assert _row(tool, broken)[4:] == ["RuntimeError: needs an accelerator"]
