"""GEMMs that write or add float32, which only GPUs have, stood in for by float32 GEMMs on any device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
