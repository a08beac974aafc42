"""Binary and ternary weights: storage against the methods' own definitions, the product against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from requant.kernels._binary import BinaryWeight, dequantize_ref, pack_trits, unpack_trits
from requant.kernels._triton import can_launch
from requant.kernels.binary_matmul import (
    TernaryWeight,
    binary_matmul,
    binary_matmul_ref,
    pack_binary,
    pack_ternary,
)
from requant.reference_impls import billm, bitnet

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
triton_only = pytest.mark.skipif(not can_launch(torch.ones(1)), reason="needs triton and its interpreter")
KINDS = ("bitnet", "two_groups", "billm", "billm_means", "arb_rc", "arb_x", "trits", "two_bit")
PLAIN = ("bitnet", "trits", "two_bit")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as NaN, so that an element no program writes shows."""
    plain = torch.empty

    def empty(*args, **kwargs):
        out = plain(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(77)

    monkeypatch.setattr(torch, "empty", empty)


def _parts(N: int, K: int, group: int | None, rows: int, seed: int = 0) -> dict[str, Tensor]:
    """Random planes and scales of every kind."""
    g = torch.Generator().manual_seed(seed)
    n_groups = -(-K // (group or K))
    return {
        "positive": torch.rand(N, K, generator=g) < 0.5,
        "flags": torch.rand(N, K, generator=g) < 0.4,
        "residual": torch.rand(N, K, generator=g) < 0.5,
        "salient": torch.rand(K, generator=g) < 0.2,
        "scale": torch.rand(6, rows, n_groups, generator=g).half(),
        "mean": torch.randn(6, rows, n_groups, generator=g).half(),
        "column_scale": torch.rand(6, K, generator=g).half() + 0.5,
        "ternary": torch.randint(-1, 2, (N, K), generator=g),
    }


def _weight(
    kind: str, N: int, K: int, group: int | None = None, rows: int | None = None, seed: int = 0
) -> tuple[BinaryWeight | TernaryWeight, dict[str, Tensor]]:
    p = _parts(N, K, group, N if rows is None else rows, seed)
    if kind in ("trits", "two_bit"):
        return pack_ternary(p["ternary"], p["scale"][:1], group, trits=kind == "trits"), p
    chosen = {
        "bitnet": (1, ()),
        "two_groups": (2, ("flags",)),
        "billm": (4, ("flags", "salient")),
        "billm_means": (4, ("flags", "salient", "mean")),
        "arb_rc": (6, ("flags", "salient", "residual", "column_scale")),
        "arb_x": (6, ("flags", "salient", "residual", "mean")),
    }
    levels, names = chosen[kind]
    planes = {name: p[name][:levels] if name in ("mean", "column_scale") else p[name] for name in names}
    return pack_binary(p["positive"], p["scale"][:levels], group_size=group, **planes), p


def _by_hand(kind: str, p: dict[str, Tensor], group: int | None) -> Tensor:
    """The weight element by element, float64, from the definition of the methods."""
    N, K = p["positive"].shape
    W = torch.zeros(N, K, dtype=torch.float64)
    rows = p["scale"].shape[1]
    for n in range(N):
        for k in range(K):
            at = (n // (N // rows), k // (group or K))

            def term(level: int, positive: Tensor, at=at, k=k) -> float:
                value = float(p["scale"][level][at]) * (1 if positive else -1)
                if kind == "arb_rc":
                    value *= float(p["column_scale"][level, k])
                return value + (float(p["mean"][level][at]) if kind in ("arb_x", "billm_means") else 0.0)

            sign, flag, second = p["positive"][n, k], p["flags"][n, k], p["residual"][n, k]
            if kind in ("trits", "two_bit"):
                W[n, k] = float(p["ternary"][n, k]) * float(p["scale"][0][at])
            elif kind == "bitnet":
                W[n, k] = term(0, sign)
            elif kind == "two_groups" or not p["salient"][k]:
                W[n, k] = term(1 if flag else 0, sign)
            elif kind.startswith("billm"):
                W[n, k] = term(2, sign) + term(3, flag)
            else:
                level = 4 if flag else 2
                W[n, k] = term(level, sign) + term(level + 1, second)
    return W


def _close(y: Tensor, x: Tensor, weight: BinaryWeight | TernaryWeight, unit: float = 2.0**-19) -> None:
    W, x = dequantize_ref(weight, torch.float64), x.double()
    assert y.isfinite().all()
    assert ((y.double() - x @ W.T).abs() <= unit * (x.abs() @ W.abs().T) + 1e-6).all()


def _x(M: int, K: int, seed: int = 0) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(seed + 100))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "N, K, group, rows", [(1, 1, None, 1), (4, 37, 8, 4), (6, 70, 32, 2), (3, 33, None, 1)]
)
def test_storage_is_what_the_methods_define(kind, N, K, group, rows):
    weight, parts = _weight(kind, N, K, group, rows)
    assert torch.allclose(dequantize_ref(weight, torch.float64), _by_hand(kind, parts, group), atol=1e-12)


@given(st.lists(st.integers(-1, 1), min_size=1, max_size=40), st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_trits_are_a_bijection(row, n_rows):
    values = torch.tensor(row).repeat(n_rows, 1)
    packed = pack_trits(values)
    assert packed.shape == (n_rows, -(-len(row) // 5)) and int(packed.max()) <= 242
    assert torch.equal(unpack_trits(packed, len(row)).long(), values)


def test_every_byte_of_trits():
    values = torch.cartesian_prod(*[torch.arange(-1, 2)] * 5)
    assert torch.equal(pack_trits(values).flatten().unique(), torch.arange(243, dtype=torch.uint8))
    assert torch.equal(unpack_trits(pack_trits(values), 5).long(), values)


@triton_only
def test_kernel_reads_every_byte_of_trits():
    values = torch.cartesian_prod(*[torch.arange(-1, 2)] * 5)
    y = binary_matmul(torch.eye(5), pack_ternary(values, torch.ones(1)), backend="triton")
    assert torch.equal(y.T.long(), values)


def test_bits_per_weight():
    N, K = 256, 1280
    bits = {kind: _weight(kind, N, K, rows=1)[0].bits_per_weight for kind in ("bitnet", "trits", "two_bit")}
    assert bits["bitnet"] == pytest.approx(1, abs=1e-3)
    assert bits["trits"] == pytest.approx(1.6, abs=1e-3)
    assert bits["two_bit"] == pytest.approx(2, abs=1e-3)
    p = _parts(N, K, 128, N)
    stored = pack_binary(
        p["positive"], p["scale"][:4], flags=p["flags"], salient=p["salient"], group_size=128
    )
    assert stored.bits_per_weight == pytest.approx(2 + 64 / 128 + 1 / N)  # as billm.bits_per_weight counts


def test_bitnet_layer():
    """Signs and one scale, int8 activations a token: the output of BitLinear after training."""
    g = torch.Generator().manual_seed(5)
    linear = torch.nn.Linear(48, 20, bias=False)
    linear.weight.data = torch.randn(20, 48, generator=g)
    x = torch.randn(7, 48, generator=g)
    positive, beta = bitnet.binarize(linear.weight)
    weight = pack_binary(positive[0], beta.flatten())
    layer = bitnet.BitLinear(linear, bitnet.Config(), norm=False).eval()
    layer.freeze()
    scale = x.abs().amax(1, keepdim=True) / 128
    codes = (x / scale).round().clamp(-128, 127).to(torch.int8)
    with torch.no_grad():
        wanted = layer(x)
    assert torch.allclose(binary_matmul(codes, weight, scale), wanted, atol=1e-4)
    if can_launch(x):
        assert torch.allclose(binary_matmul(codes, weight, scale, backend="triton"), wanted, atol=1e-4)


@pytest.mark.parametrize("row_means", [False, True])
def test_billm_blocks(row_means):
    g = torch.Generator().manual_seed(6)
    W, X = torch.randn(9, 80, generator=g), torch.randn(200, 80, generator=g)
    cfg = billm.Config(block_size=32, row_means=row_means)
    blocks = list(billm.binarize_columns(W, X.T @ X, cfg))
    weight = pack_binary(
        torch.cat([b.first for b in blocks], 1),
        torch.cat([b.scale for b in blocks], 2).half(),
        flags=torch.cat([b.second for b in blocks], 1),
        salient=torch.cat([b.salient for b in blocks]),
        mean=torch.cat([b.mean for b in blocks], 2).half() if row_means else None,
        group_size=32,
    )
    wanted = torch.cat([b.dequantize() for b in blocks], 1)
    assert torch.allclose(dequantize_ref(weight), wanted, atol=1e-6)
    if can_launch(X):
        y = binary_matmul(X[:3], weight, backend="triton")
        assert torch.allclose(y, X[:3] @ wanted.T, atol=1e-4)


SHAPES = [
    (1, 1, 1, None),
    (1, 3, 17, 8),
    (3, 17, 123, 32),
    (17, 5, 123, None),
    (2, 20, 160, 128),
    (5, 6, 96, 24),
]


@triton_only
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M, N, K, group", SHAPES)
def test_kernel_agrees_with_truth(poisoned, kind, M, N, K, group):
    weight, _ = _weight(kind, N, K, group)
    x = _x(M, K)
    _close(binary_matmul(x, weight, backend="triton"), x, weight)
    _close(binary_matmul(x, weight), x, weight)


@triton_only
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_in_half_precision(poisoned, kind):
    weight, _ = _weight(kind, 12, 96, 32, rows=3)
    x = _x(4, 96).half()
    y = binary_matmul(x, weight, backend="triton")
    assert y.dtype == torch.float16
    _close(y, x, weight, 2.0**-10)


@triton_only
@given(
    kind=st.sampled_from(KINDS), M=st.integers(1, 20), N=st.integers(1, 20), K=st.integers(1, 160),
    group=st.sampled_from((None, 5, 16, 48)), one_row=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_kernel_at_any_shape(kind, M, N, K, group, one_row, seed):
    weight, _ = _weight(kind, N, K, group, 1 if one_row else N, seed)
    x = _x(M, K, seed)
    _close(binary_matmul(x, weight, backend="triton"), x, weight)


@triton_only
@pytest.mark.parametrize("kind", ["bitnet", "arb_rc", "trits"])
def test_long_rows_are_cut_in_parts(poisoned, kind):
    K = 4097 if kind == "bitnet" else 1025
    weight, _ = _weight(kind, 2, K, 128 if kind == "arb_rc" else None)
    x = _x(1, K)
    _close(binary_matmul(x, weight, backend="triton"), x, weight)


@triton_only
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (3, 17, 123), (18, 5, 300)])
def test_int8_activations_are_exact(poisoned, kind, M, N, K):
    weight, parts = _weight(kind, N, K, rows=1)
    g = torch.Generator().manual_seed(1)
    x = torch.randint(-128, 128, (M, K), generator=g).to(torch.int8)
    x_scale = torch.rand(M, 1, generator=g)
    values = parts["ternary"] if kind != "bitnet" else 2 * parts["positive"].long() - 1
    sums = x.long() @ values.T
    wanted = sums.double() * float(parts["scale"][0, 0, 0]) * x_scale.double()
    for backend in ("triton", "reference"):
        y = binary_matmul(x, weight, x_scale, backend=backend)
        assert y.dtype == torch.float32
        assert torch.allclose(y.double(), wanted, rtol=1e-6, atol=0)


@triton_only
def test_batched_and_strided_inputs():
    weight, _ = _weight("billm", 6, 64, 32)
    x = _x(12, 64)
    strided = torch.stack([x, x], -1)[..., 0]
    assert not strided.is_contiguous()
    y = binary_matmul(strided.reshape(3, 4, 64), weight, backend="triton")
    assert y.shape == (3, 4, 6)
    _close(y.reshape(12, 6), x, weight)
    transposed = pack_binary(_x(64, 6).T > 0, torch.rand(1, 6, 2), group_size=32)
    _close(binary_matmul(_x(64, 3).T, transposed, backend="triton"), _x(64, 3).T, transposed)


@triton_only
@pytest.mark.parametrize("salient", [False, True])
def test_no_or_only_salient_columns(salient):
    p = _parts(5, 40, None, 5)
    weight = pack_binary(
        p["positive"],
        p["scale"],
        flags=p["flags"],
        salient=torch.full((40,), salient),
        residual=p["residual"],
    )
    p["salient"] = torch.full((40,), salient)
    assert torch.allclose(dequantize_ref(weight, torch.float64), _by_hand("arb", p, None))
    _close(binary_matmul(_x(2, 40), weight, backend="triton"), _x(2, 40), weight)


def test_truth_in_float64():
    weight, parts = _weight("arb_x", 4, 50, 16)
    x = _x(3, 50).double()
    assert torch.allclose(binary_matmul_ref(x, weight), x @ _by_hand("arb_x", parts, 16).T, atol=1e-10)
    assert binary_matmul(x, weight).dtype == torch.float64
    with pytest.raises(RuntimeError, match="float64"):
        binary_matmul(x, weight, backend="triton")


def test_wrong_arguments_are_named():
    weight, p = _weight("billm", 4, 50, 16)
    plain, _ = _weight("bitnet", 4, 50)
    x, codes = _x(3, 50), torch.ones(3, 50, dtype=torch.int8)
    for message, call in {
        "x is empty": lambda: binary_matmul(x[:0], weight),
        "d_in 50": lambda: binary_matmul(x[:, :40], weight),
        "x_scale belongs": lambda: binary_matmul(codes, plain),
        "one scale a row": lambda: binary_matmul(codes, weight, torch.ones(3, 1)),
        "x_scale must have shape": lambda: binary_matmul(codes, plain, torch.ones(3)),
        "scale must have shape": lambda: pack_binary(p["positive"], p["scale"]),
        "must divide d_out": lambda: pack_binary(p["positive"], torch.ones(3)),
        "salient columns need flags": lambda: pack_binary(
            p["positive"], p["scale"][:2], salient=p["salient"]
        ),
        "residual signs need": lambda: pack_binary(p["positive"], p["scale"], residual=p["residual"]),
        "positive must be bool": lambda: pack_binary(p["positive"].int(), torch.ones(1)),
        "positive is empty": lambda: pack_binary(p["positive"][:0], torch.ones(1)),
        "must be -1, 0 or": lambda: pack_ternary(torch.full((2, 2), 2), torch.ones(1)),
        "values is empty": lambda: pack_ternary(torch.ones(0, 2), torch.ones(1)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("M", [1, 17, 300])
def test_kernel_on_gpu(kind, dtype, M):
    parts, _ = _weight(kind, 515, 1027, None if kind in PLAIN else 128)
    moved = {name: t.cuda() for name, t in parts.tensors.items()}
    weight = type(parts)(**moved, d_in=1027, group_size=parts.group_size)
    x = _x(M, 1027).cuda().to(dtype)
    unit = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-18}[dtype]
    _close(binary_matmul(x, weight), x, weight, unit)
