"""Kernels compile for an NVIDIA GPU (sm_90), which none has to be present for: finds what the interpreter lets pass.

Compiling needs triton without its interpreter, hence another process: this file run as a script.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED_MEMORY = 227 * 1024
"""Bytes a program may take on an H100 or H200."""


def shape_args(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def pack_cases(m) -> Iterator[tuple]:
    for bits in m.WIDTHS:
        types = {"codes_ptr": "*u8", "words_ptr": "*i32", **shape_args("d_in", "row_words")}
        yield m._pack_kernel, types, {"BITS": bits, "BLOCK_WORDS": 128}
        yield m._unpack_kernel, types, {"BITS": bits, "BLOCK_CODES": 512}


def int_matmul_cases(m) -> Iterator[tuple]:
    types = {
        "x_ptr": "*bf16",
        "words_ptr": "*i32",
        "scale_ptr": "*fp16",
        "zero_ptr": "*i32",
        "out_ptr": "*bf16",
    }
    types |= shape_args("n_rows", "d_out", "d_in", "row_words", "n_groups", "zero_words")
    for bits, zero in ((2, True), (3, False), (4, True), (8, False)):
        common = {"BITS": bits, "HAS_ZERO": zero, "SPLIT_K": 1}
        yield m._gemv_kernel.fn, types, {**common, "GROUP": 128, "BLOCK_N": 8, "BLOCK_CHUNKS": 128}
        mode = {4: m.PER_BLOCK, 3: m.PER_CHANNEL, 2: m.PER_ELEMENT}.get(bits, m.PER_BLOCK)
        tile = {"MODE": mode, "BLOCK_M": 16 if bits == 4 else 64, "BLOCK_K": 64, "BLOCK_N": 64}
        yield m._tile_kernel.fn, types, {**common, "GROUP": 0 if mode == m.PER_CHANNEL else 128, **tile}
    half = types | {"x_ptr": "*fp32", "out_ptr": "*fp32"}
    tile = {"MODE": m.PER_BLOCK, "BLOCK_M": 16, "BLOCK_K": 32, "BLOCK_N": 32}
    yield m._tile_kernel.fn, half, {"BITS": 4, "HAS_ZERO": True, "SPLIT_K": 2, "GROUP": 32, **tile}


def int8_types() -> dict[str, str]:
    return {"x_ptr": "*i8", "x_scale_ptr": "*fp32", **shape_args("n_rows", "d_out", "d_in")}


def int8_matmul_cases(m) -> Iterator[tuple]:
    types = {**int8_types(), "w_ptr": "*i8", "w_scale_ptr": "*fp32"}
    for block_m, split in ((16, 4), (128, 1)):
        tile = {"SPLIT_K": split, "BLOCK_M": block_m, "BLOCK_K": 128, "BLOCK_N": 64}
        yield m._int8_kernel.fn, {**types, "out_ptr": "*bf16" if split == 1 else "*i32"}, tile
    quantize = {"x_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32", "width": "i32"}
    yield m._quantize_kernel, quantize | {"clip_ratio": "fp32", "smallest": "fp32"}, {"BLOCK": 4096}


def w4a8_matmul_cases(m) -> Iterator[tuple]:
    types = {**int8_types(), "words_ptr": "*i32", "group_scale_ptr": "*i16"}
    types |= shape_args("row_words", "n_groups")
    for block_m, split in ((16, 4), (128, 1)):
        tile = {"SPLIT_K": split, "BLOCK_M": block_m, "BLOCK_K": 128, "BLOCK_N": 64, "GROUP": 128}
        yield m._w4a8_kernel.fn, {**types, "out_ptr": "*bf16" if split == 1 else "*i32"}, tile


def shared_cases(m) -> Iterator[tuple]:
    types = {"parts_ptr": "*i32", "row_scale_ptr": "*fp32", "column_scale_ptr": "*fp32", "out_ptr": "*bf16"}
    types |= shape_args("size", "n_columns")
    yield m._sum_parts_kernel, types, {"PARTS": 4, "ROW_SCALE": True, "COLUMN_SCALE": False, "BLOCK": 1024}


def nf4_matmul_cases(m) -> Iterator[tuple]:
    types = {"words_ptr": "*i32", "book_ptr": "*fp32", "outer_ptr": "*fp32", "mean_ptr": "*fp32"}
    types |= {"outer_book_ptr": "*fp32", "exponents_ptr": "*i8"}
    types |= shape_args("M", "N", "K", "row_words", "part_k")
    for block_m, double, x, run in (
        (1, True, "*bf16", 64),
        (128, True, "*bf16", 64),
        (16, False, "*fp32", 1),
    ):
        types |= {"x_ptr": x, "out_ptr": x, "absmax_ptr": "*u8" if double else "*fp32"}
        tile = {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64}
        yield (
            m._nf4_matmul_kernel.fn,
            dict(types),
            {"BLOCK": 64, "OUTER": 256, "DOUBLE": double, "EXPONENTS": not double, "RUN": run, **tile},
        )


def hadamard_cases(m) -> Iterator[tuple]:
    """The largest tiles, and one for int8 codes."""
    types = {"base_ptr": "*fp32", "scale_ptr": "*fp32", "n_rows": "i32", "norm": "fp32"}
    for n, x, limit in ((11008, "*bf16", 127), (32768, "*bf16", 0)):
        base, padded, power, rows = m._tile(n)
        found = {"BASE": base, "P": padded, "POWER": power, "ROWS": rows, "LIMIT": limit}
        stages = m.windows(power.bit_length() - 1, (rows * power).bit_length() - 1)
        for i, (low, size, bits) in enumerate(stages + [(1, 0, 0)] * (3 - len(stages))):
            found |= {f"LOW{i}": low, f"D{i}": size, f"BITS{i}": bits}
        del found["LOW0"]
        found["PRECISION"] = m.precision(x == "*fp32", padded * rows * power)
        yield (
            m._hadamard_kernel,
            types | {"x_ptr": x, "y_ptr": "*i8" if limit else x},
            found,
            {"num_warps": 16},
        )


def binary_matmul_cases(m) -> Iterator[tuple]:
    words = ("words_ptr", "flags_ptr", "salient_ptr", "residual_ptr", "ranks_ptr")
    types = dict.fromkeys(words, "*i32") | dict.fromkeys(("scale_ptr", "mean_ptr", "column_ptr"), "*fp16")
    types |= shape_args("M", "N", "K", "row_words", "residual_words", "scale_rows", "row_run", "n_groups")
    types |= shape_args("part_k")
    for kind, levels, x, block_m in ((1, 1, "*i8", 16), (5, 1, "*bf16", 1), (1, 6, "*fp16", 64)):
        plain = levels == 1
        types |= {"words_ptr": "*u8" if kind == 5 else "*i32", "x_ptr": x}
        types["out_ptr"] = "*i32" if x == "*i8" else x
        found = {"KIND": kind, "LEVELS": levels, "PLAIN": plain, "GROUP": 128, "MEAN": levels == 6}
        found |= {"COLUMN": levels == 6, "INTEGER": x == "*i8", "RUN": 128}
        yield (
            m._binary_matmul_kernel.fn,
            dict(types),
            found | {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64},
        )


def codebook_cases(m) -> Iterator[tuple]:
    types = {
        "x_ptr": "*bf16",
        "order_ptr": "*i16",
        "words_ptr": "*i32",
        "books_ptr": "*fp16",
        "scale_ptr": "*fp16",
    }
    types |= {
        "out_ptr": "*fp32",
        **shape_args("M", "d_out", "d_in", "stride_xm", "n_rows", "row_words", "places"),
    }
    types |= shape_args("set_places", "entries", "split_places")
    formats = ((16, 1, 8, True), (8, 2, 8, True), (12, 2, 12, False), (12, 1, 6, False))
    for (width, books, vector, along_input), block_m in zip(formats, (1, 16, 128, 1), strict=True):
        code = {"WIDTH_0": width, "WIDTH": width, "N_BOOKS": books, "ALIGNED": width != 12, "VECTOR": vector}
        code |= {"LANES": 1 << (vector - 1).bit_length(), "ALONG_INPUT": along_input}
        flags = {"HAS_ORDER": not along_input, "HAS_SCALE": along_input}
        yield (
            m._codebook_matmul_kernel.fn,
            types,
            {**code, **flags, "BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64},
        )


def trellis_cases(m) -> Iterator[tuple]:
    types = {
        "x_ptr": "*bf16",
        "words_ptr": "*i32",
        "scale_ptr": "*fp32",
        "table_ptr": "*fp16",
        "out_ptr": "*bf16",
    }
    types |= shape_args("M", "d_out", "d_in", "tiles_in", "split_k")
    for code, step, bits in (("1mad", 1, 2), ("3inst", 1, 3), ("hyb", 2, 4), ("hyb", 2, 2)):
        constants = {"CODE": code, "BITS": bits, "STEP": step, "STATE_BITS": 16, "INDEX_BITS": 9, "UNIT": 1.0}
        block_m = {2: 1, 3: 16, 4: 128}[bits]
        yield (
            m._trellis_matmul_kernel.fn,
            types,
            {**constants, "BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64},
        )


def attention_decode_cases(m) -> Iterator[tuple]:
    types = dict.fromkeys(("k_words_ptr", "v_words_ptr", "lengths_ptr"), "*i32") | {"q_ptr": "*bf16"}
    types |= dict.fromkeys(("k_scale_ptr", "k_offset_ptr", "v_scale_ptr", "v_offset_ptr"), "*fp16")
    types |= dict.fromkeys(("cos_ptr", "sin_ptr", "out_ptr", "lse_ptr"), "*fp32") | {"scale_log2": "fp32"}
    types |= shape_args("kv_heads", "seqlen", "k_row_words", "v_row_words")
    for coupled, bits, lanes in ((False, 2, 16), (False, 8, 4), (True, 10, 8)):
        side = {"COUPLED": coupled, "BITS": bits, "LANES": lanes, "ALIGNED": bits != 10}
        constants = {f"{x}_{name}": value for name, value in side.items() for x in "KV"}
        constants |= {"K_TOKEN_GROUP": 128, "K_CHANNEL_GROUP": 1, "V_TOKEN_GROUP": 1, "V_CHANNEL_GROUP": 128}
        constants |= {
            "HAS_ROPE": coupled,
            "HAS_LENGTHS": True,
            "SHARED": 4,
            "SPLIT": 8,
            "HEAD_DIM": 128,
            "HALF": 64,
        }
        constants |= {"BLOCK_H": 64, "BLOCK_Q": 16, "BLOCK_T": 64}
        yield m._attention_decode_kernel.fn, types, constants


def attention_prefill_cases(m) -> Iterator[tuple]:
    pointers = ("q_scale_ptr", "k_scale_ptr", "v_scale_ptr", "out_ptr", "lse_ptr")
    types = (
        dict.fromkeys(pointers, "*fp32") | {"scale_log2": "fp32"} | shape_args("heads", "n_query", "n_key")
    )
    for mode, operand in ((m.PLAIN, "*bf16"), (m.FP8_WIDENED, "*u8"), (m.FP8_NATIVE, "*fp8e4nv")):
        constants = {"MODE": mode, "CAUSAL": True, "SHARED": 4, "HEAD_DIM": 128, "BLOCK_D": 128}
        constants |= {"BLOCK_M": 64, "BLOCK_N": 64}
        yield m._prefill_kernel, types | dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), operand), constants


CASES = {
    "nf4_matmul": nf4_matmul_cases,
    "hadamard": hadamard_cases,
    "binary_matmul": binary_matmul_cases,
    "_triton": shared_cases,
    "pack": pack_cases,
    "int_matmul": int_matmul_cases,
    "int8_matmul": int8_matmul_cases,
    "w4a8_matmul": w4a8_matmul_cases,
    "codebook_matmul": codebook_cases,
    "trellis_matmul": trellis_cases,
    "attention_quantized": attention_decode_cases,
    "attention_prefill": attention_prefill_cases,
}
"""Module -> its cases (kernel, types, constants, options or nothing): one row more for each new kernel file."""


@pytest.mark.parametrize("module", CASES)
def test_compiles_for_sm90(module: str, tmp_path: Path):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, __file__, module], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found and all(0 <= shared <= SHARED_MEMORY for _, shared in found), found


def test_everything_imports_and_runs_without_triton():
    """A platform without a wheel of triton gets the reference path."""
    code = """if True:
        import sys, pkgutil, importlib
        sys.modules["triton"] = None
        import torch, requant.kernels as kernels
        for found in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"requant.kernels.{found.name}")
        layer = kernels.QuantLinear.from_weight(torch.ones(3, 32, dtype=torch.int32), torch.ones(3, 1), None, 4)
        assert layer(torch.ones(1, 32)).tolist() == [[-7.0 * 32] * 3]
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def main(name: str) -> None:
    """Compile the cases of one module; the last line is JSON: kernel names and bytes of shared memory."""
    module = importlib.import_module(f"requant.kernels.{name}")
    shared = importlib.import_module("requant.kernels._triton")
    done = [shared.compile_for_gpu(*case[:3], **dict(*case[3:])) for case in CASES[name](module)]
    sys.stdout.write("\n" + json.dumps([(c.name, c.metadata.shared) for c in done]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
