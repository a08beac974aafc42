"""The benchmark: its table of ops is sound on a CPU, and without a GPU it says so and measures nothing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from requant.kernels import bench, bench_codes
from requant.kernels import bench_table as table

SMALL = table.Linear("toy", "all", 24, 256)
SMALL_ATTENTION = table.Linear("llama-3-70b", "q, o", 1024, 1024)
CPU = torch.device("cpu")
CEILING = {"copy_bytes_per_s": 1e9, "bf16_flop_per_s": 1e12, "int8_op_per_s": 2e12}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_sentence_and_code_2(tmp_path: Path):
    out = tmp_path / "kernels.json"
    done = subprocess.run(
        [sys.executable, "-m", "requant.kernels.bench", "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr == bench.NO_GPU + "\n" and not out.exists()


def test_on_a_cpu_the_integer_product_is_timed_against_its_truth(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "cpu.json"
    assert bench.main(["--cpu", "--runs", "2", "--size", "5", "24", "32", "--out", str(out)]) == 0
    assert "int8_matmul" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert [r["op"] for r in record["results"]] == ["int8_matmul", "float32 truth", "float32 matmul alone"]
    assert all(r["seconds"] > 0 and r["rows"] == 5 and r["d_in"] == 32 for r in record["results"])
    assert record["protocol"] == {"runs": 2, "statistic": "median"}
    assert record["versions"]["torch"] == torch.__version__ and record["date"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "10"], "--runs must be at least 50, not 10"),
        (["--only", "W5A16"], "no op contains 'W5A16'; there are W2A16"),
        (["--model", "gpt-2"], "invalid choice"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("op", table.OPS, ids=lambda op: op.name)
def test_every_op_of_the_table_agrees_with_its_truth(
    op: table.Op, rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench_codes, "TOKENS", 64)
    monkeypatch.setattr(bench_codes, "MIN_PREFILL", 1)
    shape = SMALL_ATTENTION if op.name.startswith(("decode", "prefill")) else SMALL
    case = op.make(shape, rows, CPU)
    error = bench.relative_error(case)
    assert error is None or error < (0.1 if op.name == "prefill FP8" else 0.01)  # FP8 rounds its operands
    assert case.io_bytes > 0 and case.operations > 0
    codebooks = 2**21 if op.name.startswith(("AQLM", "VPTQ")) else 0  # as large for a toy as for a model
    assert not case.dense or 0 < case.weight_bytes < 2.2 * SMALL.d_out * SMALL.d_in + codebooks


def test_names_are_unique():
    names = [row.name for row in (*table.OPS, *table.PEERS)]
    assert len(set(names)) == len(names)


def test_stored_bits_give_the_published_ceiling():
    """Marlin's authors give 3.87 as the optimum at 4 bits in groups of 128 with float16 scales: 16 / 4.125."""
    shape = dataclasses.replace(SMALL, d_in=4096)
    case = table.weight_only(4)(shape, 1, CPU)
    assert 8 * case.weight_bytes / (shape.d_out * shape.d_in) == 4.125


def test_rows_of_a_shape(monkeypatch: pytest.MonkeyPatch):
    """Everything but the clock: speed-ups against bf16, fractions of the ceilings, peers that fail."""
    seconds = iter([8e-3, 2e-3, 1e-3, 4e-3])
    monkeypatch.setattr(bench, "median_cuda", lambda run, runs, flush: run() is not None and next(seconds))
    present = types.SimpleNamespace(find_spec=lambda name: None if name == "absent" else True)
    monkeypatch.setattr(bench, "importlib", types.SimpleNamespace(util=present))

    def fails(W, x):
        raise RuntimeError("no kernel for this shape")

    peers = (
        table.Peer("fast", "torch", lambda W, x: lambda: x @ W.T),
        table.Peer("broken", "torch", fails),
        table.Peer("missing", "absent", fails),
    )
    monkeypatch.setattr(table, "PEERS", peers)
    ops = [
        table.Op("W4", table.weight_only(4)),
        table.Op("none", lambda *a: None),
        table.Op("q", table.per_token),
    ]
    rows = list(bench.time_shape(SMALL, 3, ops, 50, CEILING, torch.zeros(1)))
    assert [r["op"] for r in rows] == ["torch bf16", "W4", "q", "fast", "broken"]
    dense, w4, per_token, fast, broken = rows
    assert dense["speedup"] == 1.0 and dense["op_per_s"] == 2 * 3 * 24 * 256 / 8e-3
    assert w4["speedup"] == 4.0 and w4["bits"] == 4.125 and w4["ceiling"] == 16 / 4.125
    moved = 24 * 256 * 4.125 / 8 + 2 * (3 * 256 + 3 * 24)
    assert w4["bytes_per_s"] == moved / 2e-3 and w4["of_copy_bandwidth"] == moved / 2e-3 / 1e9
    assert "speedup" not in per_token and fast["speedup"] == 2.0
    assert broken["failed"] == "RuntimeError: no kernel for this shape"
    lines = [bench.show(r) for r in rows]
    assert "4.00x of 3.88x" in lines[1] and "failed: RuntimeError" in lines[4]
    json.dumps(rows, allow_nan=False)


def test_shapes_are_those_of_the_models():
    """All linear layers of a decoder block, by their parameter counts."""
    count = {"q, k, v, o": 4, "q, o": 2, "k, v": 2, "gate, up": 2, "down": 1}
    total = dict.fromkeys(("llama-2-7b", "llama-3-70b"), 0)
    for s in table.LINEARS:
        total[s.model] += count[s.layers] * s.d_out * s.d_in
    assert total == {"llama-2-7b": 202_375_168, "llama-3-70b": 855_638_016}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(table, "LINEARS", (dataclasses.replace(SMALL, model="llama-2-7b", d_out=256),))
    out = tmp_path / "kernels.json"
    assert bench.main(["--batch", "1", "16", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["device"]["name"] and record["ceilings"]["copy_bytes_per_s"] > 0
    assert all(r.get("error") is None or r["error"] < 0.02 for r in record["results"])
