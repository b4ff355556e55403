"""The head's GEMMs on devices of other kinds than the one at hand.

GEMMs that write or add float32, which only GPUs have, are stood in for by float32 GEMMs; a processor that does not
multiply in bfloat16 is one that is said not to.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hpo_fused as hf
from hpo_fused.linear import head
from hpo_fused.linear.head import Float32Gemms, GemmDtypes, Head, HeadGradients
from hpo_fused.linear.rows import Rows

V, H, N, CHUNK = 300, 16, 24, 7
LOW = GemmDtypes(torch.bfloat16, torch.bfloat16, torch.bfloat16)


class Gemms:
    """torch.mm and torch.addmm as CUDA has them: with ``out_dtype``. Counts the calls that asked for float32."""

    def __init__(self, able: Float32Gemms) -> None:
        self.able, self.written, self.added = able, 0, 0
        self.mm_, self.addmm_ = torch.mm, torch.addmm

    def mm(self, a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return self.mm_(a, b) if out is None else self.mm_(a, b, out=out)
        assert self.able.write
        assert a.dtype == b.dtype
        assert out_dtype == torch.float32
        self.written += 1
        product = self.mm_(a.float(), b.float())
        if out is None:
            return product
        assert out.dtype == torch.float32
        return out.copy_(product)

    def addmm(self, c: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None, *, out: Tensor) -> Tensor:
        if out_dtype is None:
            assert c.dtype == a.dtype == b.dtype
            return self.addmm_(c, a, b, out=out)
        assert self.able.add
        assert a.dtype == b.dtype
        assert c.dtype == out.dtype == out_dtype == torch.float32
        self.added += 1
        return out.copy_(c + self.mm_(a.float(), b.float()))


@pytest.fixture(params=[Float32Gemms(False, False), Float32Gemms(True, False), Float32Gemms(True, True)], ids=str)
def gemms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gemms:
    stand_in = Gemms(request.param)
    monkeypatch.setattr(head, "float32_gemms", lambda *_: request.param)
    monkeypatch.setattr(torch, "mm", stand_in.mm)
    monkeypatch.setattr(torch, "addmm", stand_in.addmm)
    # Several slices, the last of them not full.
    monkeypatch.setattr(head, "TILE_BYTES", (128 * H * 4, 128 * H * 4))
    return stand_in


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("into", [False, True])
def test_dweight_over_chunks(gemms: Gemms, into: bool) -> None:
    hidden, weight, gradient = draw(1, N, H, seed=0), draw(V, H, seed=1), draw(N, V, seed=2)
    rows = Rows.all(torch.zeros(1, N, dtype=torch.int32))
    buffer = torch.ones(V, H) if into else None
    sums = HeadGradients((None, weight, None), Head(weight, None, LOW), rows, 4, buffer)
    parts = [slice(start, min(start + CHUNK, N)) for start in range(0, N, CHUNK)]
    for part in parts:
        sums.add(rows.part(part), rows.part(part).hidden(hidden), gradient[part])
    exact = gradient.double().t() @ hidden[0].double()
    _, dweight, _ = sums.finish()
    if buffer is None:
        assert dweight is not None
        assert dweight.dtype == torch.bfloat16
        error, rounding = (dweight.double() - exact).abs(), (exact.bfloat16().double() - exact).abs()
    else:
        assert dweight is None
        error, rounding = (buffer.double() - 1 - exact).abs(), torch.zeros_like(exact)
    limit = 1e-5 * exact.abs().max()
    if not gemms.able.write:  # each chunk is rounded, by 2^-8 at most, and the sum then elsewhere
        limit = limit + 2 * 2**-8 * sum(
            (gradient[part].double().t() @ hidden[0, part].double()).abs() for part in parts
        )
    assert (error <= rounding + limit).all()
    slices = -(-V // 128)
    expected = {
        Float32Gemms(False, False): (0, 0),
        Float32Gemms(True, False): (slices * len(parts) if into else 1 + slices * (len(parts) - 1), 0),
        Float32Gemms(True, True): (0, len(parts)) if into else (1, len(parts) - 1),
    }
    assert (gemms.written, gemms.added) == expected[gemms.able]


def test_float32_logits(gemms: Gemms) -> None:
    x, weight, bias = draw(N, H, seed=0), draw(V, H, seed=1), draw(V, seed=2)
    made = Head(weight, bias, LOW._replace(logits=torch.float32))
    logits = made.new_logits(N)
    made.logits(x, logits)
    exact = x.double() @ weight.double().t() + bias.double()
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-5)
    assert gemms.written == (1 if gemms.able.write else 0)


def test_fake_tensors_tell_nothing_about_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(head, "_float32_gemms", {})
    with FakeTensorMode():
        head.float32_gemms(device, torch.bfloat16)
    assert not head._float32_gemms
    head.float32_gemms(device, torch.bfloat16)
    assert head._float32_gemms


def test_the_probe_tells_what_the_device_has(device: torch.device) -> None:
    able = head.float32_gemms(device, torch.bfloat16)
    a = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    for name, can in (("mm", able.write), ("addmm", able.add)):
        total: list[Any] = [] if name == "mm" else [torch.zeros(16, 16, device=device)]
        try:
            getattr(torch, name)(*total, a, a, out_dtype=torch.float32)
        except (RuntimeError, TypeError):
            assert not can
        else:
            assert can


# ---------------------------------------------------------------------------------------------------------------
# a CPU that does not multiply in the operands' dtype


class Products(TorchDispatchMode):
    """Dtypes of all products' operands, and the largest matrix that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes |= {value.dtype for value in args if isinstance(value, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
            self.largest = max(self.largest, result.numel() * result.element_size())
        return result


@pytest.fixture
def widening(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without bfloat16 and float16; several slices, the last of them not full."""
    monkeypatch.setattr(head, "multiplies_in", lambda dtype, device: dtype == torch.float32)
    monkeypatch.setattr(head, "TILE_BYTES", (128 * N * 4,) * 2)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["rounded", "float32"])
def test_widened_products(widening: None, stored: torch.dtype, logits_dtype: torch.dtype | None) -> None:
    """Exact but for float32 sums and one rounding, without a float32 copy of the head; float32 is under autocast."""
    operands = torch.bfloat16 if stored == torch.float32 else stored
    dtypes = GemmDtypes.of(operands, logits_dtype or operands, torch.device("cpu"))
    hidden, weight, bias, g = (
        draw(*shape, seed=seed).to(stored) for seed, shape in enumerate([(1, N, H), (V, H), (V,), (N, V)])
    )
    hidden, weight = hidden * 1.001, weight * 1.001  # not representable in bfloat16 where they are float32
    g = g.to(dtypes.logits) * 1.001
    x, w, b, rounded = (value.to(operands).double() for value in (hidden[0], weight, bias, g))
    rows = Rows.all(torch.zeros(1, N, dtype=torch.int32))
    made = Head(weight, bias, dtypes)
    operand, logits = made.operand(rows.hidden(hidden)), made.new_logits(N)
    with Products() as products:
        made.logits(operand, logits)
    assert products.dtypes == {torch.float32}
    assert products.largest <= head.TILE_BYTES[0] < 4 * weight.numel()
    with Products() as products:
        sums = HeadGradients((hidden, weight, None), made, rows, 1)
        sums.add(rows, operand, g)
        dhidden, dweight, _ = sums.finish()
    assert products.dtypes == {torch.float32}
    assert products.largest <= max(head.TILE_BYTES[0], V * H * stored.itemsize) < 4 * g.numel()
    assert dhidden is not None
    assert dweight is not None
    for actual, left, right, shift, kind in (
        (logits, x, w.t(), b, dtypes.logits),
        (dhidden[0], rounded, w, 0 * x[0], stored),
        (dweight, rounded.t(), x, 0 * x[0], stored),
    ):
        assert actual.dtype == kind
        # The products are exact in float32; a sum of n terms and the bias has n roundings of 2^-24 at most.
        exact, size = left @ right + shift, left.abs() @ right.abs() + shift.abs()
        low, high = ((exact + sign * left.shape[1] * 2**-24 * size).to(kind).double() for sign in (-1, 1))
        assert ((low <= actual) & (actual <= high)).all()


@pytest.mark.parametrize("options", [
    {}, {"bias": True}, {"autocast": torch.bfloat16, "dtype": torch.float32}, {"logits_dtype": torch.float32},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("chunks", [1, 4])
def test_memory_of_widened_operands(options: dict[str, Any], chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the prediction, in which there is no widened copy of the weight or of a chunk."""
    from .test_linear_memory import measured, step

    monkeypatch.setattr(head, "multiplies_in", lambda dtype, device: dtype == torch.float32)
    rows, width, vocabulary, cpu = 256, 512, 24000, torch.device("cpu")
    budget = rows // chunks * vocabulary * (4 if "logits_dtype" in options else 2)
    peak = measured(step(rows, width, vocabulary, cpu, chunk_bytes=budget, **options), cpu)
    memory = hf.linear_memory(rows, width, vocabulary, chunk_bytes=budget, device="cpu", **options)
    assert peak <= memory.peak
    assert memory.working < 4 * vocabulary * max(width, rows // chunks) + (33 << 20)


def test_what_the_processor_multiplies_in() -> None:
    cpu = torch.device("cpu")
    assert head.multiplies_in(torch.float32, cpu)
    assert head.multiplies_in(torch.bfloat16, torch.device("cuda", 0))
    with torch.backends.mkldnn.flags(enabled=False):
        assert head.multiplies_in(torch.float32, cpu)
        assert not head.multiplies_in(torch.bfloat16, cpu)
        assert not head.multiplies_in(torch.float16, cpu)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs a processor with AVX2")
def test_a_processor_with_avx2_multiplies_in_float32(tmp_path: Path) -> None:
    """oneDNN, told that there is no more than AVX2, in a process of its own."""
    program = """if True:
        import torch
        from hpo_fused.linear.head import multiplies_in
        assert not multiplies_in(torch.bfloat16, torch.device("cpu"))
        assert not multiplies_in(torch.float16, torch.device("cpu"))
    """
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", program], env=environment, cwd=tmp_path, check=True)
