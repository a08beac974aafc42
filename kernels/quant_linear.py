"""`QuantLinear`: a linear layer that holds its weight packed, in any of the formats here, and files of such layers.

Source    the modules named in `KINDS`: affine grids (GPTQ, AWQ), four-bit floats (QLoRA, LLM-FP4), binary and ternary
          planes (BitNet, BiLLM, ARB-LLM), vector codes (AQLM, VPTQ), trellis codes (QTIP)
Deviates  nothing of the grid is changed: a weight that does not lie on the grid given is refused

A file is safetensors: per layer `name/tensor` of its container and `name/bias`, with metadata `format`, `version`,
`layers` (JSON: kind and settings of each container) and `checksum`, SHA-256 of the rest. A truncated or altered
file is refused.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from requant.kernels import _binary, _float4, codebook, pack, trellis_matmul
from requant.kernels._stored import Stored
from requant.kernels._triton import Backend, check, check_shape
from requant.kernels.binary_matmul import binary_matmul
from requant.kernels.codebook_matmul import codebook_matmul
from requant.kernels.int_matmul import int_matmul
from requant.kernels.nf4_matmul import nf4_matmul
from requant.kernels.pack import PackedWeight, check_bits, pack_weight

FORMAT, VERSION = "requant.quant_linear", "2"


@dataclass(frozen=True)
class Kind:
    """A storage format: its container, (x, container, backend=) -> x W^T, and (container) -> W [d_out, d_in]."""

    container: type[Stored]
    matmul: Callable[..., Tensor]
    decode: Callable[..., Tensor]


KINDS = {
    "affine": Kind(PackedWeight, int_matmul, pack.dequantize_ref),
    "float4": Kind(_float4.Float4Weight, nf4_matmul, _float4.dequantize_ref),
    "binary": Kind(_binary.BinaryWeight, binary_matmul, _binary.dequantize_ref),
    "ternary": Kind(_binary.TernaryWeight, binary_matmul, _binary.dequantize_ref),
    "codebook": Kind(codebook.CodebookWeight, codebook_matmul, codebook.decode_ref),
    "column_parts": Kind(codebook.ColumnParts, codebook_matmul, codebook.decode_ref),
    "trellis": Kind(trellis_matmul.TrellisWeight, trellis_matmul.trellis_matmul, trellis_matmul.decode_ref),
}
"""Name in a file -> format."""


class QuantLinear(nn.Module):
    """y = x W^T + bias, with W packed in one of the formats `KINDS`.

    The packed tensors are buffers: they follow `.to(device)`, but keep their dtypes under `.half()`,
    `.bfloat16()` or `.to(dtype)`, since another scale would be another weight.

    Args:
        weight: the packed weight [d_out, d_in].
        bias: [d_out], floating point, or None.
        backend: "auto" runs the kernel on CUDA and the reference elsewhere; see `int_matmul`.
    Raises: ValueError for a container of another kind, or a bias that does not fit.
    """

    bias: Tensor | None

    def __init__(self, weight: Stored, bias: Tensor | None = None, *, backend: Backend = "auto"):
        super().__init__()
        kind = next((name for name, kind in KINDS.items() if isinstance(weight, kind.container)), None)
        check(kind is not None, f"a {type(weight).__name__} is none of the formats {', '.join(KINDS)}")
        if bias is not None:
            check_shape("bias", bias, (weight.d_out,))
        self.kind, self.backend, self.settings = kind, backend, weight.settings
        self.in_features, self.out_features = weight.d_in, weight.d_out
        self._stored = {name: name.replace(".", "_") for name in weight.tensors}  # tensor -> its buffer
        for name, buffer in self._stored.items():
            self.register_buffer(buffer, weight.tensors[name].contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._packed: Stored | None = None  # the container of these very buffers, once asked for

    @classmethod
    def from_weight(
        cls,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
        group_size: int | None = None,
        bias: Tensor | None = None,
    ) -> QuantLinear:
        """From codes [d_out, d_in], scale and zero_point [d_out, n_groups]: see `pack.pack_weight`."""
        return cls(pack_weight(codes, scale, zero_point, bits, group_size), bias)

    @classmethod
    def from_quantized(
        cls,
        W: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
        group_size: int | None = None,
        bias: Tensor | None = None,
    ) -> QuantLinear:
        """From a dequantized weight, as reference implementations return it, and the grid it lies on.

        Args:
            W: [d_out, d_in] floating point. scale, zero_point: [d_out, n_groups]; scale is kept as float16 where that
                changes none of them, in its dtype otherwise; zero_point integer-valued, None = 2^(bits-1).
        Raises: ValueError if a weight is farther from its grid than rounding to W's dtype explains.
        """
        check_bits(bits)
        d_out, d_in = W.shape
        size = group_size or d_in
        check(d_in % size == 0, f"group_size {size} does not divide d_in {d_in}; choose a divisor or None")
        check_shape("scale", scale, (d_out, d_in // size))
        s = scale.double().repeat_interleave(size, 1)
        zeros = torch.full_like(scale, 2.0 ** (bits - 1)) if zero_point is None else zero_point
        check_shape("zero_point", zeros, (d_out, d_in // size))
        z = zeros.double().repeat_interleave(size, 1)
        codes = (W.double() / s + z).round()
        again = (codes - z) * s
        slack = 2 * torch.finfo(W.dtype).eps * again.abs()
        off = ((W.double() - again).abs() > slack) | (codes < 0) | (codes > 2**bits - 1) | ~codes.isfinite()
        if off.any():
            row, column = (int(i) for i in off.nonzero()[0])
            raise ValueError(
                f"{int(off.sum())} of {W.numel()} weights do not lie on the {bits}-bit grid, the first at "
                f"[{row}, {column}]: {float(W[row, column]):.6g} with scale {float(s[row, column]):.6g} and zero "
                f"point {float(z[row, column]):g}"
            )
        half = scale.half()
        scale = half if torch.equal(half.to(scale.dtype), scale) else scale
        return cls.from_weight(
            codes.int(), scale, None if zero_point is None else zeros.int(), bits, group_size, bias
        )

    @classmethod
    def from_affine(
        cls, packed: Mapping[str, Tensor], bits: int, symmetric: bool, bias: Tensor | None = None
    ) -> QuantLinear:
        """From the tensors `reference_impls._quant.pack_affine` makes (codes, scale, zero_point, shape).

        Raises: ValueError for other keys too: a permutation or input scales would be lost.
        """
        from requant.reference_impls._quant import unpack_bits

        check_bits(bits)
        wanted = {"shape", "codes", "scale"} | (set() if symmetric else {"zero_point"})
        check(set(packed) == wanted, f"packed must hold {sorted(wanted)}, not {sorted(packed)}")
        d_out, n_groups, size = (int(n) for n in packed["shape"])
        codes = unpack_bits(packed["codes"], bits, (d_out, n_groups * size))
        scale = packed["scale"].reshape(d_out, n_groups)
        zeros = None if symmetric else unpack_bits(packed["zero_point"], bits, (d_out, n_groups))
        return cls.from_weight(codes, scale, zeros, bits, None if n_groups == 1 else size, bias)

    @property
    def packed(self) -> Stored:
        """The weight as the kernels take it; shares the buffers."""
        tensors = {name: getattr(self, buffer) for name, buffer in self._stored.items()}
        kept = {} if self._packed is None else self._packed.tensors
        if kept.keys() != tensors.keys() or any(kept[name] is not t for name, t in tensors.items()):
            self._packed = KINDS[self.kind].container.from_stored(tensors, self.settings)
        return self._packed

    @property
    def stored_bytes(self) -> int:
        """Bytes of all buffers, the bias and the padding of rows included."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    @property
    def bits_per_weight(self) -> float:
        """Bits that the weight's tensors take, over d_out * d_in (the bias is not a weight)."""
        return self.packed.bits_per_weight

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [d_out, d_in] in dtype."""
        return KINDS[self.kind].decode(self.packed).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_in] float16, bfloat16 or float32 -> [..., d_out] in its dtype."""
        y = KINDS[self.kind].matmul(x, self.packed, backend=self.backend)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        told = {"in_features": self.in_features, "out_features": self.out_features, "kind": self.kind}
        simple = {k: v for k, v in self.settings.items() if k not in ("d_in", "d_out", "parts")}
        told |= simple | {"bias": self.bias is not None}
        return ", ".join(f"{key}={value}" for key, value in told.items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        """Let fn move the buffers, and undo what it did to the dtypes of the weight's."""
        before = {buffer: getattr(self, buffer) for buffer in self._stored.values()}
        super()._apply(fn, recurse)
        for buffer, tensor in before.items():
            moved = getattr(self, buffer)
            if moved.dtype != tensor.dtype:
                setattr(self, buffer, tensor.to(moved.device))
        return self

    def save(self, path: str | Path) -> None:
        """Write this layer alone: see `save_layers`."""
        save_layers({"layer": self}, path)

    @classmethod
    def load(cls, path: str | Path) -> QuantLinear:
        """Read a file of one layer. Raises: ValueError as `load_layers`, or if the file holds several."""
        layers = load_layers(path)
        check(len(layers) == 1, f"{path} holds {len(layers)} layers; read it with load_layers")
        return next(iter(layers.values()))


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over metadata (checksum left out) and names, dtypes, shapes and bytes of the tensors."""
    digest = hashlib.sha256()
    digest.update(json.dumps({k: v for k, v in metadata.items() if k != "checksum"}, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_layers(layers: Mapping[str, QuantLinear], path: str | Path) -> None:
    """Write packed layers by name to one safetensors file; a reader finds the old file or the whole new one.

    Raises: ValueError if there is no layer; OSError.
    """
    check(bool(layers), "there is no layer to save")
    path = Path(path)
    tensors = {
        f"{name}/{key}": tensor.cpu().contiguous()
        for name, layer in layers.items()
        for key, tensor in (
            layer.packed.tensors | ({} if layer.bias is None else {"bias": layer.bias})
        ).items()
    }
    about = {
        name: {"kind": layer.kind, "bias": layer.bias is not None, "settings": layer.settings}
        for name, layer in layers.items()
    }
    metadata = {"format": FORMAT, "version": VERSION, "layers": json.dumps(about, sort_keys=True)}
    metadata["checksum"] = _checksum(tensors, metadata)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        save_file(tensors, unfinished, metadata)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_layers(path: str | Path) -> dict[str, QuantLinear]:
    """Read the layers of a file by `save_layers`, on the CPU.

    Raises: ValueError, naming the file, if it is truncated, altered, or of another format or version;
        FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, "pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, RuntimeError, ValueError) as problem:
        raise ValueError(f"{path} is truncated, altered or no safetensors file: {problem}") from problem
    found = metadata.get("format")
    check(found == FORMAT, f"{path} is no file of packed layers: format is {found!r}, not {FORMAT!r}")
    version = metadata.get("version")
    check(version == VERSION, f"{path} has format version {version!r}; this package reads {VERSION!r}")
    check(
        _checksum(tensors, metadata) == metadata.get("checksum"),
        f"{path} was altered after it was saved: its checksum does not match; save it again from its source",
    )
    try:
        return {name: _layer(name, about, tensors) for name, about in json.loads(metadata["layers"]).items()}
    except (KeyError, TypeError, json.JSONDecodeError) as problem:
        raise ValueError(f"{path} was altered: {type(problem).__name__} for {problem}") from problem


def _layer(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> QuantLinear:
    """One layer of a file; its container checks shapes and dtypes."""
    own = {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
    bias = own.pop("bias") if about["bias"] else None
    return QuantLinear(KINDS[about["kind"]].container.from_stored(own, about["settings"]), bias)


def with_layers(model: nn.Module, layers: Mapping[str, QuantLinear]) -> nn.Module:
    """A copy of the model with the named linear layers replaced by packed ones.

    Raises: ValueError for a name that is no nn.Linear of the model, or of another shape.
    """
    for name, layer in layers.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the model has no module {name!r}") from None
        check(isinstance(old, nn.Linear), f"{name} is a {type(old).__name__}, not a Linear")
        shape = (layer.out_features, layer.in_features)
        check(tuple(old.weight.shape) == shape, f"{name} has shape {tuple(old.weight.shape)}, not {shape}")
    kept = {id(model.get_submodule(name)): layer for name, layer in layers.items()}
    return copy.deepcopy(model, memo=dict(kept))
