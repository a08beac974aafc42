"""`QuantLinear`: the same layer as its dequantized weight, true byte counts, and files that refuse damage."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from requant.kernels import PackedWeight, QuantLinear, load_layers, save_layers, with_layers
from requant.kernels._binary import pack_binary, pack_ternary
from requant.kernels._float4 import pack_float4
from requant.kernels._triton import HAS_TRITON
from requant.kernels.codebook import ColumnParts, pack_codebook
from requant.kernels.trellis_matmul import TrellisWeight
from requant.reference_impls import _quant


def grid(W: torch.Tensor, bits: int, group_size: int | None, symmetric: bool):
    """Codes, scale, zero point (None if symmetric) and the dequantized weight of plain rounding."""
    groups = _quant.grouped(W, group_size)
    scale, zero = _quant.choose_qparams(groups, bits, symmetric)
    codes = _quant.quantize(groups, scale, zero, bits)
    again = _quant.dequantize(codes, scale, zero).flatten(1)
    zeros = None if symmetric else zero[..., 0]
    return codes.flatten(1).int(), scale[..., 0], zeros, again


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def make(
    bits: int = 4, group_size: int | None = 32, symmetric: bool = False, bias: bool = True
) -> QuantLinear:
    codes, scale, zeros, _ = grid(weight(17, 96), bits, group_size, symmetric)
    zeros = None if zeros is None else zeros.int()
    return QuantLinear.from_weight(codes, scale.half(), zeros, bits, group_size, weight(17) if bias else None)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 32, 24])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_all_ways_in_give_the_reference_weight(bits: int, group_size: int | None, symmetric: bool):
    codes, scale, zeros, W = grid(weight(17, 96), bits, group_size, symmetric)
    n_groups = scale.shape[1]
    packed = _quant.pack_affine(
        codes.reshape(17, n_groups, -1),
        scale[..., None],
        torch.empty(0) if zeros is None else zeros[..., None],
        bits,
        symmetric,
    )
    bias = weight(17)
    layers = [
        QuantLinear.from_weight(
            codes, scale.half(), None if zeros is None else zeros.int(), bits, group_size
        ),
        QuantLinear.from_quantized(W, scale, zeros, bits, group_size, bias),
        QuantLinear.from_affine(packed, bits, symmetric),
    ]
    for layer in layers:
        assert layer.scale.dtype == torch.float16
        assert torch.equal(layer.dequantize(), W)
        assert torch.equal(_quant.unpack_affine(packed, bits, symmetric), W)
    x = weight(2, 5, 96)
    truth = x.double() @ W.double().T
    assert torch.allclose(layers[0](x).double(), truth, atol=1e-4)
    assert torch.allclose(layers[1](x).double(), truth + bias.double(), atol=1e-4)


@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="needs the interpreter")
def test_kernel_and_reference_agree():
    layer, x = make(), weight(3, 96)
    slow = QuantLinear(layer.packed, layer.bias, backend="triton")
    assert torch.allclose(slow(x), layer(x), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 16, 65])
def test_on_a_gpu(rows: int):
    layer, x = make().cuda(), weight(rows, 96).cuda().bfloat16()
    assert torch.allclose(layer(x).float(), make()(x.cpu().float()).cuda(), atol=0.1, rtol=0.02)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "bias", "total"),
    [
        (4, 32, False, True, 17 * (12 * 4 + 3 * 2 + 16) + 17 * 4),
        (3, None, True, False, 17 * (9 * 4 + 2)),
        (8, 32, True, False, 17 * (24 * 4 + 3 * 2)),
    ],
)
def test_stored_bytes_are_those_of_the_file(
    bits: int, group_size: int | None, symmetric: bool, bias: bool, total: int, tmp_path: Path
):
    layer = make(bits, group_size, symmetric, bias)
    layer.save(tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")
    assert layer.stored_bytes == total == sum(t.numel() * t.element_size() for t in stored.values())
    assert layer.bits_per_weight == 8 * (total - (17 * 4 if bias else 0)) / (17 * 96)


def test_bits_per_weight_of_a_usual_shape():
    W = torch.zeros(2, 4096, dtype=torch.int32)
    layer = QuantLinear.from_weight(W, torch.ones(2, 32).half(), None, 4, 128)
    assert layer.bits_per_weight == 4.125
    layer = QuantLinear.from_weight(W, torch.ones(2, 32).half(), W[:, :32], 4, 128)
    assert layer.bits_per_weight == 4.125 + 4 / 128


def test_weight_off_the_grid_is_refused():
    _, scale, zeros, W = grid(weight(17, 96), 4, 32, False)
    W[3, 40] += 0.3 * scale[3, 1]
    with pytest.raises(
        ValueError, match=r"1 of 1632 weights do not lie on the 4-bit grid, the first at \[3, 40\]"
    ):
        QuantLinear.from_quantized(W, scale, zeros, 4, 32)
    with pytest.raises(ValueError, match="do not lie on the 3-bit grid"):
        QuantLinear.from_quantized(grid(weight(17, 96), 4, 32, False)[3], scale, zeros, 3, 32)


def test_half_precision_weights_are_found_on_their_grid():
    codes, scale, zeros, W = grid(weight(17, 96), 4, 32, False)
    layer = QuantLinear.from_quantized(W.half(), scale, zeros, 4, 32)
    assert torch.equal(layer.dequantize(), W) and torch.equal(layer.packed.words, make().words)
    assert codes.shape == W.shape


def test_affine_with_more_than_the_grid_is_refused():
    packed = dict.fromkeys(("codes", "scale", "shape", "zero_point", "permutation"), torch.zeros(1))
    with pytest.raises(ValueError, match=r"packed must hold .*, not .*permutation"):
        QuantLinear.from_affine(packed, 4, False)


def test_scales_keep_their_dtype():
    layer = make()
    for changed in (
        make().bfloat16(),
        make().double(),
        make().to(torch.float32),
        nn.Sequential(make()).half()[0],
    ):
        assert changed.scale.dtype == torch.float16
        assert torch.equal(changed.dequantize(), layer.dequantize())
    assert make().bfloat16().bias.dtype == torch.bfloat16


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_saved_and_loaded(symmetric: bool, bias: bool, tmp_path: Path):
    path = tmp_path / "layers.safetensors"
    layers = {"a.b": make(4, 32, symmetric, bias), "c": make(3, None, symmetric, bias)}
    save_layers(layers, path)
    again = load_layers(path)
    assert again.keys() == layers.keys()
    x = weight(2, 96)
    for name, layer in layers.items():
        assert torch.equal(again[name](x), layer(x))
        assert again[name].settings == layer.settings
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "an unfinished file was left"
    with pytest.raises(ValueError, match="holds 2 layers"):
        QuantLinear.load(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    assert about["format"] == "requant.quant_linear" and about["version"] == "2"
    assert json.loads(about["layers"])["a.b"] == {
        "kind": "affine", "bias": bias,
        "settings": {"bits": 4, "d_in": 96, "group_size": 32} | ({"zero_point": None} if symmetric else {}),
    }  # fmt: skip


def test_truncated_files_are_refused(tmp_path: Path):
    path = tmp_path / "layer.safetensors"
    make().save(path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"layer\.safetensors is truncated, altered or no safetensors"):
            QuantLinear.load(path)
    path.write_bytes(whole)
    assert QuantLinear.load(path).settings["bits"] == 4


def test_no_altered_byte_passes(tmp_path: Path):
    path = tmp_path / "layer.safetensors"
    make().save(path)
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        changed = bytearray(whole)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(ValueError, match=r"layer\.safetensors"):
            QuantLinear.load(path)


def test_altered_metadata_and_other_files_are_refused(tmp_path: Path):
    path = tmp_path / "layer.safetensors"
    make().save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = file.metadata()
    for key, value, message in (
        ("layers", about["layers"].replace('"bits": 4', '"bits": 8'), "checksum does not match"),
        ("checksum", "0" * 64, "checksum does not match"),
        ("version", "1", "format version '1'; this package reads '2'"),
        ("format", "other", "no file of packed layers: format is 'other'"),
    ):
        save_file(tensors, path, about | {key: value})
        with pytest.raises(ValueError, match=message):
            load_layers(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="format is None"):
        load_layers(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_layers(tmp_path / "absent")
    with pytest.raises(ValueError, match="no layer to save"):
        save_layers({}, path)


def test_a_model_runs_with_packed_layers():
    model = nn.Sequential(nn.Linear(96, 17), nn.ReLU(), nn.Linear(17, 4))
    layer = make()
    packed = with_layers(model, {"0": layer})
    assert packed[0] is layer and isinstance(model[0], nn.Linear)
    dense = nn.Sequential(*model)
    x = weight(3, 96)
    wanted = dense[2](dense[1](x @ layer.dequantize().T + layer.bias))
    assert torch.allclose(packed(x), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="no module 'z'"):
        with_layers(model, {"z": layer})
    with pytest.raises(ValueError, match="1 is a ReLU, not a Linear"):
        with_layers(model, {"1": layer})
    with pytest.raises(ValueError, match=r"2 has shape \(4, 17\), not \(17, 96\)"):
        with_layers(model, {"2": layer})


OTHERS = {
    "nf4": lambda W: pack_float4(W, "nf4", 64),
    "nf4_double": lambda W: pack_float4(W, "nf4", 32, double_quant=True),
    "fp4_columns": lambda W: pack_float4(
        W, "fp4_e2m1", None, exponents=torch.arange(W.shape[1]).remainder(3).to(torch.int8)
    ),
    "binary": lambda W: pack_binary(W > 0, W.abs().mean(1)),
    "ternary": lambda W: pack_ternary(W.sign() * (W.abs() > 0.5), W.abs().mean()),
    "ternary_2_bits": lambda W: pack_ternary(W.sign(), W.abs().mean(1), trits=False),
    "codebook": lambda W: pack_codebook(*codes_of(W), (8, 8), tuple(W.shape)),
    "column_parts": lambda W: ColumnParts(
        tuple(pack_codebook(*codes_of(part), (8, 8), tuple(part.shape)) for part in (W[:, :32], W[:, 32:])),
        torch.randperm(96, generator=torch.Generator().manual_seed(0)).to(torch.int16),
    ),
    "trellis": lambda W: trellis(W, "1mad"),
    "trellis_hyb": lambda W: trellis(W, "hyb"),
}
"""Format -> container of a weight [16, 96]; which numbers the codes give does not matter here."""


def codes_of(W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two codes for every 8 inputs, one set of two codebooks of 256 vectors, and a scale a row."""
    codes = torch.randint(0, 256, (len(W), W.shape[1] // 8, 2), generator=torch.Generator().manual_seed(1))
    return codes, weight(1, 512, 8), weight(len(W)).abs()


def trellis(W: torch.Tensor, code: str) -> TrellisWeight:
    words = torch.randint(-(2**31), 2**31, (1, 6, 16), generator=torch.Generator().manual_seed(2))
    table = weight(512, 2) if code == "hyb" else None
    return TrellisWeight(words.to(torch.int32), torch.ones(1), code, 2, *W.shape, table)


@pytest.mark.parametrize("name", OTHERS)
def test_every_format_runs_is_counted_and_comes_back_from_a_file(name: str, tmp_path: Path):
    packed, bias, x = OTHERS[name](weight(16, 96)), weight(16), weight(3, 96)
    layer = QuantLinear(packed, bias)
    W = layer.dequantize()
    assert W.shape == (16, 96) and torch.isfinite(W).all() and W.std() > 0
    assert torch.allclose(layer(x), x @ W.T + bias, atol=1e-4)
    assert layer.bits_per_weight == packed.bits_per_weight == 8 * packed.stored_bytes / W.numel()
    assert layer.stored_bytes == packed.stored_bytes + bias.numel() * 4
    layer.save(tmp_path / "layer.safetensors")
    again = QuantLinear.load(tmp_path / "layer.safetensors")
    assert again.kind == layer.kind and torch.equal(again.dequantize(), W)
    stored = load_file(tmp_path / "layer.safetensors")
    assert sum(t.numel() * t.element_size() for t in stored.values()) == layer.stored_bytes
    assert torch.equal(copy.deepcopy(layer).half().dequantize(), W), "another dtype made another weight"


def test_what_is_no_packed_weight_is_refused():
    with pytest.raises(ValueError, match="a Tensor is none of the formats affine, float4"):
        QuantLinear(weight(4, 4))


def test_refuses_wrong_parts():
    with pytest.raises(ValueError, match=r"bias must have shape \(17,\), not \(16,\)"):
        QuantLinear(make().packed, torch.zeros(16))
    with pytest.raises(ValueError, match=r"words must have shape"):
        PackedWeight(make().words[:, 1:], make().scale, None, 4, 96, 32)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, requant.kernels as k; assert 'torch' not in sys.modules and 'QuantLinear' in dir(k)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
