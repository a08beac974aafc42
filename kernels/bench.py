"""Times every op on the GPU, beside torch's bf16 matmul, peers and the ceilings of the device.

    python -m requant.kernels.bench              all ops, shapes and batches; writes catalog/measured/kernels.json
    python -m requant.kernels.bench --cpu        what makes sense on a CPU: int8_matmul against its float32 truth

A time is the median of --runs calls (50 or more) after warm-up, each with a cold L2: a buffer larger than the cache
is overwritten before it, which also hides the launch. Speed-ups are printed with their theoretical ceiling, 16 over
the bits stored a weight: what reading nothing but the weight would give. Bandwidth and operations a second are
given as fractions of what copies and matmuls reach in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import requant.catalog
from requant.kernels import bench_table as table

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(requant.catalog.__file__).parent / "measured" / "kernels.json"
FLUSH_BYTES = 256 * 2**20
"""Larger than any L2 cache there is."""
MIN_RUNS = 50
NO_GPU = "no CUDA device: kernels are timed on a GPU only (--cpu times int8_matmul against its float32 truth)"


def say(line: str = "") -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def median_cuda(run: Callable[[], Any], runs: int, flush: Tensor) -> float:
    """Median seconds of run() on the current stream, with a cold L2; warm-up includes autotuning."""
    for _ in range(5):
        run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    torch.cuda.synchronize()
    for before, after in pairs:
        flush.zero_()
        before.record()
        run()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairs) / 1e3


def median_cpu(run: Callable[[], Any], runs: int) -> float:
    """Median seconds of run()."""
    times = []
    for index in range(runs + 3):
        start = time.perf_counter()
        run()
        if index >= 3:  # the first calls warm up
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(device: torch.device, runs: int, flush: Tensor) -> dict[str, float]:
    """What the device reaches here and now: bytes a second of a copy, operations a second of matmuls."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    n = 8192
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    q = torch.randint(-127, 128, (n, n), device=device).to(torch.int8)
    copy = median_cuda(lambda: target.copy_(source), runs, flush)
    dense = median_cuda(lambda: a @ b, runs, flush)
    integer = median_cuda(lambda: torch._int_mm(q, q.T), runs, flush)
    return {
        "copy_bytes_per_s": 2 * source.numel() / copy,
        "bf16_flop_per_s": 2 * n**3 / dense,
        "int8_op_per_s": 2 * n**3 / integer,
    }


def relative_error(case: table.Case) -> float | None:
    """Largest error of the op over the largest value of its truth; None if it has none."""
    if case.truth is None:
        return None
    truth = case.truth().double()
    return float((case.run().double() - truth).abs().max() / truth.abs().max().clamp(min=1e-30))


def measure(case: table.Case, seconds: float, ceiling: dict[str, float]) -> dict[str, Any]:
    """Achieved rates of a case."""
    moved = case.weight_bytes + case.io_bytes
    top = ceiling["int8_op_per_s" if case.integer else "bf16_flop_per_s"]
    return {
        "seconds": seconds,
        "bytes_per_s": moved / seconds,
        "of_copy_bandwidth": moved / seconds / ceiling["copy_bytes_per_s"],
        "op_per_s": case.operations / seconds,
        "of_matmul": case.operations / seconds / top,
    }


def time_shape(
    shape: table.Linear,
    rows: int,
    ops: Sequence[table.Op],
    runs: int,
    ceiling: dict[str, float],
    flush: Tensor,
) -> Iterator[dict[str, Any]]:
    """One result an op and peer at this shape; the first is torch's bf16 matmul."""
    device = flush.device
    where = {
        "model": shape.model,
        "layers": shape.layers,
        "d_out": shape.d_out,
        "d_in": shape.d_in,
        "rows": rows,
    }
    W, x = (torch.randn(n, shape.d_in, device=device).bfloat16() for n in (shape.d_out, rows))
    operations = 2 * rows * shape.d_out * shape.d_in
    base = table.Case(lambda: x @ W.T, None, 2 * W.numel(), 2 * (x.numel() + rows * shape.d_out), operations)
    dense = median_cuda(base.run, runs, flush)
    yield {"op": "torch bf16", **where, **measure(base, dense, ceiling), "speedup": 1.0, "ceiling": 1.0}
    for op in ops:
        case = op.make(shape, rows, device)
        if case is None:
            continue
        error = relative_error(case)
        seconds = median_cuda(case.run, runs, flush)
        row = {"op": op.name, **where, **measure(case, seconds, ceiling), "error": error}
        if case.dense:
            stored_bits = 8 * case.weight_bytes / (shape.d_out * shape.d_in)
            row |= {"bits": stored_bits, "speedup": dense / seconds, "ceiling": 16 / stored_bits}
        yield row
    for peer in table.PEERS:
        if importlib.util.find_spec(peer.module) is None:
            continue
        try:
            seconds = median_cuda(peer.make(W, x), runs, flush)
        except Exception as problem:  # another library's failure is a result, not ours to hide or to stop at
            yield {"op": peer.name, **where, "failed": f"{type(problem).__name__}: {problem}"[:200]}
            continue
        yield {"op": peer.name, **where, "seconds": seconds, "speedup": dense / seconds}


def show(row: dict[str, Any]) -> str:
    """One printed line of a result."""
    shape = f"{row['d_out']:>6} x {row['d_in']:<6}{row['rows']:>5}  {row['op']:<28}"
    if "failed" in row:
        return f"{shape} failed: {row['failed']}"
    line = f"{shape}{row['seconds'] * 1e6:>10.1f} us"
    if "speedup" in row:
        line += f"  {row['speedup']:>5.2f}x" + (f" of {row['ceiling']:.2f}x" if "ceiling" in row else "")
    if "bytes_per_s" in row:
        line += f"  {row['bytes_per_s'] / 1e9:>6.0f} GB/s ({row['of_copy_bandwidth']:.0%} of a copy)"
        line += f"  {row['op_per_s'] / 1e12:>6.1f} Tops/s ({row['of_matmul']:.0%} of a matmul)"
    return line + (f"  error {row['error']:.1e}" if row.get("error") is not None else "")


def command_output(*command: str) -> str | None:
    """What a program prints, stripped; None if it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def clocks() -> dict[str, str] | None:
    """Clocks (MHz), power (W) and driver as nvidia-smi tells them."""
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "driver_version")
    found = command_output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits")
    if not found:
        return None
    return dict(zip(names, (v.strip() for v in found.splitlines()[0].split(",")), strict=False))


def versions() -> dict[str, str]:
    """Versions of what matters to speed, where installed."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or "none"}
    for name in ("torch", "triton", "requant", *(peer.module for peer in table.PEERS)):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, Any]:
    """Versions, commit and date of a record."""
    dirty = command_output("git", "status", "--porcelain", "--", "kernels")
    return {
        "versions": versions(),
        "commit": command_output("git", "rev-parse", "HEAD"),
        "kernels_changed_since": None if dirty is None else bool(dirty),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    from requant.catalog.files import write_json

    write_json(path, record)
    say(f"wrote {path}")


def bench_gpu(args: argparse.Namespace) -> int:
    """Time what args chooses on the current CUDA device."""
    device = torch.device("cuda", torch.cuda.current_device())
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    properties = torch.cuda.get_device_properties(device)
    ceiling = ceilings(device, args.runs, flush)
    copies, dense, integer = ceiling.values()
    say(
        f"{properties.name}: copies {copies / 1e9:.0f} GB/s, bf16 matmul {dense / 1e12:.0f} TFLOP/s, "
        f"int8 {integer / 1e12:.0f} Top/s"
    )
    ops = [op for op in table.OPS if args.only.lower() in op.name.lower()]
    results = []
    for shape in table.LINEARS:
        if args.model and shape.model != args.model:
            continue
        for rows in args.batch:
            for row in time_shape(shape, rows, ops, args.runs, ceiling, flush):
                results.append(row)
                say(show(row))
            torch.cuda.empty_cache()
    record = {
        "device": {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "clocks_after": clocks(),
        },
        **environment(),
        "protocol": {"runs": args.runs, "statistic": "median", "l2": "cold", "warm_up": 5},
        "ceilings": ceiling,
        "results": results,
    }
    whole = not args.only and not args.model and set(args.batch) == set(table.BATCHES)
    if args.out or whole:
        write_record(args.out or RECORD, record)
    else:
        say("no record written: a part of the table was chosen (--out FILE writes it)")
    return 0


def bench_cpu(args: argparse.Namespace) -> int:
    """Time the integer product against float32 on one thread."""
    from requant.kernels.int8_matmul import has_fast_int_mm, int8_matmul, int8_matmul_ref, quantize_per_token

    torch.set_num_threads(1)
    rows, d_out, d_in = args.size
    generator = torch.Generator().manual_seed(0)
    x, x_scale = quantize_per_token(torch.randn(rows, d_in, generator=generator))
    w = torch.randint(-127, 128, (d_out, d_in), generator=generator, dtype=torch.int8)
    w_scale = torch.rand(d_out, generator=generator) * 1e-3
    X, W = x.float() * x_scale, w.float() * w_scale[:, None]
    seconds = {
        "int8_matmul": median_cpu(lambda: int8_matmul(x, w, x_scale, w_scale), args.runs),
        "float32 truth": median_cpu(lambda: int8_matmul_ref(x, w, x_scale, w_scale), args.runs),
        "float32 matmul alone": median_cpu(lambda: X @ W.T, args.runs),
    }
    fast = seconds["int8_matmul"]
    how = (
        "torch's int8 product"
        if has_fast_int_mm()
        else "float32 in exact pieces: this CPU has no fast int8 product"
    )
    say(f"int8_matmul goes through {how}")
    say(f"{rows} x {d_in} times {d_out} x {d_in}, one thread, median of {args.runs}")
    for name, taken in seconds.items():
        rate = 2 * rows * d_out * d_in / taken / 1e9
        say(
            f"{name:<22}{taken * 1e3:>9.2f} ms  {rate:>7.1f} Gops/s  int8_matmul is {taken / fast:.2f}x as fast"
        )
    if args.out:
        shape = {"rows": rows, "d_out": d_out, "d_in": d_in}
        record = {
            "device": {"name": platform.processor() or platform.machine(), "threads": 1},
            **environment(),
            "protocol": {"runs": args.runs, "statistic": "median"},
            "fast_int8_product": has_fast_int_mm(),
            "results": [{"op": name, **shape, "seconds": taken} for name, taken in seconds.items()],
        }
        write_record(args.out, record)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 where there is no CUDA device or an argument is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m requant.kernels.bench", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--cpu", action="store_true", help="time int8_matmul on the CPU instead")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"record to write (default {RECORD.name}, if whole)"
    )
    parser.add_argument(
        "--runs", type=int, default=MIN_RUNS, help=f"timed calls, at least {MIN_RUNS} on a GPU"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="ops whose name contains TEXT")
    parser.add_argument(
        "--model", choices=sorted({s.model for s in table.LINEARS}), help="shapes of one model"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=table.BATCHES, metavar="N", help="rows of x")
    parser.add_argument("--size", type=int, nargs=3, default=(256, 4096, 4096), metavar=("ROWS", "D_OUT", "D_IN"),
                        help="shape for --cpu")  # fmt: skip
    args = parser.parse_args(argv)
    if args.runs < (1 if args.cpu else MIN_RUNS):
        parser.error(f"--runs must be at least {1 if args.cpu else MIN_RUNS}, not {args.runs}")
    if args.only and not any(args.only.lower() in op.name.lower() for op in table.OPS):
        parser.error(f"no op contains {args.only!r}; there are {', '.join(op.name for op in table.OPS)}")
    if args.cpu:
        return bench_cpu(args)
    if not torch.cuda.is_available():
        sys.stderr.write(NO_GPU + "\n")
        return 2
    return bench_gpu(args)


if __name__ == "__main__":
    sys.exit(main())
