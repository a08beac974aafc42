"""What all kernels share: the one import of triton, the choice of a back end, argument checks, autotuning.

Triton is optional: without it every module of this package imports, `jit` leaves the function as it is, and the
public ops run their torch reference. The interpreter (TRITON_INTERPRET=1, set before triton is imported) runs
kernels on CPU tensors, slowly, for tests: what it gets wrong (bfloat16 arithmetic, conversion to bfloat16 and fp8)
decides the rules the kernels keep:
  bfloat16 values are widened to float32 right after a load, and narrowed only by a store;
  dots in float32 ask for input_precision="ieee";
  operands of a dot have 16 or more rows, columns and inner elements (`assert_dot_block`), which the interpreter
  does not check;
  masks are joined with & only between tensors (the interpreter makes scalar & tensor an int32, then refuses it);
  no inline assembly, no libdevice, no block pointers; a mask on every load and store.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform, or not installed
    triton = tl = None

Backend = Literal["auto", "triton", "reference"]

HAS_TRITON = triton is not None
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
"""Kernels run on the CPU, in Python: fixed when triton is imported."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of activations and of scales."""

MIN_DOT = 16
"""Smallest extent of a dot's operands that every GPU accepts."""


def jit(fn: Callable) -> Any:
    """`triton.jit`, or the function itself where triton is missing (it is then never launched)."""
    return triton.jit(fn) if HAS_TRITON else fn


def config(*, num_warps: int = 4, num_stages: int = 2, **blocks: int) -> Any:
    """One candidate of `autotune`: block sizes by name, warps a program, pipeline stages."""
    return triton.Config(blocks, num_warps=num_warps, num_stages=num_stages) if HAS_TRITON else blocks


def autotune(configs: Sequence[Any], key: Sequence[str], **options: Any) -> Callable[[Any], Any]:
    """`triton.autotune` over configs, once for each new value of the arguments named by key.

    The interpreter cannot time: it takes configs[:1], so the first candidate has to be small. Outputs that a
    kernel accumulates into must be named in reset_to_zero.
    """
    if not HAS_TRITON:
        return lambda fn: fn
    return triton.autotune(list(configs[:1] if INTERPRET else configs), key=list(key), **options)


def why_not(*tensors: Tensor) -> str | None:
    """Why a kernel cannot run on these tensors, or None if it can."""
    if not HAS_TRITON:
        return "triton is not installed (pip install 'requant[bench]', Linux only)"
    if INTERPRET:
        narrow = any(t.dtype == torch.bfloat16 for t in tensors)
        return "the interpreter computes bfloat16 wrongly; use float32 or float16" if narrow else None
    away = next((t.device for t in tensors if not t.is_cuda), None)
    if away is None:
        return None
    return (
        f"a tensor is on {away}; move it to a CUDA device, or set TRITON_INTERPRET=1 before the first import"
    )


def can_launch(*tensors: Tensor) -> bool:
    """Whether kernels run on these tensors: all on a CUDA device, or the interpreter is on."""
    return why_not(*tensors) is None


def use_triton(backend: Backend, *tensors: Tensor, unsupported: str | None = None) -> bool:
    """Decide between the kernel and the reference.

    Args:
        backend: "auto" takes the kernel for CUDA tensors where triton is installed, the reference otherwise (on
            the CPU always: the interpreter runs only when asked for by "triton").
        tensors: all tensors of the call; they must be on one device.
        unsupported: why the kernel does not take this case (a size, a dtype), or None.
    Raises: ValueError for another backend or tensors on several devices; RuntimeError, saying why, if "triton"
        cannot run.
    """
    if backend not in ("auto", "triton", "reference"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'reference', not {backend!r}")
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        raise ValueError(f"tensors are on several devices: {', '.join(devices)}; move them to one")
    if backend == "reference":
        return False
    reason = unsupported or why_not(*tensors)
    if backend == "triton":
        if reason:
            raise RuntimeError(f"the Triton kernel cannot run: {reason}")
        return True
    return reason is None and all(t.is_cuda for t in tensors)


def check(condition: bool, message: str) -> None:
    """Raise ValueError with message unless condition holds."""
    if not condition:
        raise ValueError(message)


def check_tensor(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype], ndim: int | None = None) -> Tensor:
    """Check dtype, number of dimensions and that the tensor is not empty; returns it contiguous.

    Raises: ValueError naming the argument.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    check(tensor.dtype in dtypes, f"{name} must be {allowed}, not {str(tensor.dtype).removeprefix('torch.')}")
    if ndim is not None:
        check(tensor.ndim == ndim, f"{name} must have {ndim} dimensions, not shape {tuple(tensor.shape)}")
    check(tensor.numel() > 0, f"{name} is empty: shape {tuple(tensor.shape)}")
    return tensor.contiguous()


def apply_weight(
    x: Tensor, weight: Any, backend: Backend, reference: Callable[..., Tensor], launch: Callable[..., Tensor]
) -> Tensor:
    """x [..., d_in] times the transpose of a stored weight [d_out, d_in]: [..., d_out] in x's dtype.

    Args:
        weight: has d_in, d_out and `tensors`, which are on x's device.
        reference: the torch truth, called with x as it is; launch: the kernel, called with x as [rows, d_in].
    Raises: ValueError for a wrong shape, dtype or device, or an empty x; RuntimeError if backend="triton" cannot run.
    """
    x = check_tensor("x", x, FLOATS)
    check(
        x.shape[-1] == weight.d_in,
        f"x must have d_in={weight.d_in} as its last dimension, not shape {tuple(x.shape)}",
    )
    if not use_triton(backend, x, *weight.tensors.values()):
        return reference(x, weight)
    return launch(x.reshape(-1, weight.d_in), weight).reshape(*x.shape[:-1], weight.d_out)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises: ValueError naming the argument, its shape and the shape wanted."""
    check(tuple(tensor.shape) == shape, f"{name} must have shape {shape}, not {tuple(tensor.shape)}")


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least n; 1 for n <= 1."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up, for non-negative a and positive b."""
    return -(-a // b)


def assert_dot_block(**blocks: int) -> None:
    """Assert that block sizes of a dot's operands are powers of two of at least 16 (what GPUs take)."""
    for name, size in blocks.items():
        assert size >= MIN_DOT and size & (size - 1) == 0, f"{name}={size} is no power of two of at least 16"


@jit
def _sum_parts_kernel(
    parts_ptr, row_scale_ptr, column_scale_ptr, out_ptr, size, n_columns,
    PARTS: tl.constexpr, ROW_SCALE: tl.constexpr, COLUMN_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [BLOCK] of the flattened result: parts added in order, times the scales of row and column."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.load(parts_ptr + index, mask=mask, other=0)
    for part in range(1, PARTS):
        total += tl.load(parts_ptr + tl.full([BLOCK], part, tl.int64) * size + index, mask=mask, other=0)
    y = total.to(tl.float32)
    if ROW_SCALE:
        y = y * tl.load(row_scale_ptr + index // n_columns, mask=mask, other=0.0).to(tl.float32)
    if COLUMN_SCALE:
        y = y * tl.load(column_scale_ptr + index % n_columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + index, y.to(out_ptr.dtype.element_ty), mask=mask)


def sum_parts(
    parts: Tensor, dtype: torch.dtype, row_scale: Tensor | None = None, column_scale: Tensor | None = None
) -> Tensor:
    """Add the parts of a product whose inner dimension was split over programs, in a fixed order, in one launch.

    Args:
        parts: [n_parts, rows, columns] float32 or int32 (exact), contiguous.
        row_scale: [rows]; column_scale: [columns]; multiplied into the sum in float32.
    Returns: [rows, columns] in dtype.
    """
    n_parts, rows, columns = parts.shape
    out = torch.empty(rows, columns, dtype=dtype, device=parts.device)
    block = 1024
    scales = [
        parts if s is None else s for s in (row_scale, column_scale)
    ]  # a pointer is passed, but not read
    _sum_parts_kernel[(cdiv(rows * columns, block),)](
        parts, *scales, out, rows * columns, columns,
        PARTS=n_parts, ROW_SCALE=row_scale is not None, COLUMN_SCALE=column_scale is not None, BLOCK=block,
    )  # fmt: skip
    return out


def split_parts(blocks: int, programs: int, device: torch.device) -> int:
    """Into how many parts to split an inner dimension of `blocks` blocks, for a launch of `programs` without.

    A power of two of at most `blocks`, to have about four programs a multiprocessor; on the CPU, where only tests
    launch kernels, to have 16.
    """
    wanted = (
        16 if device.type == "cpu" else 4 * torch.cuda.get_device_properties(device).multi_processor_count
    )
    return max(1, min(next_power_of_2(wanted // programs), next_power_of_2(blocks + 1) // 2))


def compile_for_gpu(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], *, num_warps: int = 4, arch: int = 90
) -> Any:
    """Compile a kernel for an NVIDIA GPU of this architecture; none needs to be present.

    Finds what the interpreter lets pass (types, shapes of dots, shared memory beyond the limit is seen in
    `.metadata.shared`, bytes). Not available under the interpreter.

    Args:
        kernel: a function under `jit` (of an autotuned kernel, its `.fn`).
        types: argument -> "*fp16", "*i32", "i32", "fp32", ...; pointers and i32 are taken as divisible by 16.
        constants: the constexpr arguments.
    Returns: triton's compiled kernel; `.asm` holds "ttir", "ttgir", "llir", "ptx" and "cubin".
    """
    if not HAS_TRITON or INTERPRET:
        raise RuntimeError("compiling ahead needs triton with TRITON_INTERPRET unset")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = [n for n in types if types[n][0] == "*" or types[n] == "i32"]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})
