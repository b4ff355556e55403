"""Rows that start anywhere: not a byte beside them is read or written, and 64 bits reach the last of them.

Under the interpreter every address that a kernel touches is looked at; on a GPU canaries tell of writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpo_fused.interface import SKIPPED, LogitTransform, LossSpec

from .equivalence import LOGPROB_LIMIT
from .samples import room_for_statistics, values_of

kernels = pytest.importorskip("hpo_fused.kernels", reason="needs Triton")
from hpo_fused.kernels import policy_loss, scale_gradient, token_gradient, token_statistics  # noqa: E402

CANARY = 12345.0
PLAIN = LogitTransform()
CLIP = LossSpec("clip", (0.8, 1.2, float("inf"), float("inf")), 20.0, False, "none", False, "token")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Rows:
    """``count`` rows of ``V`` elements among canaries, the first one ``offset`` elements off a 16-byte boundary."""

    def __init__(self, V: int, dtype: torch.dtype, offset: int, device: torch.device, gap: int = 3, count: int = 3):
        ahead = 64
        self.buffer = torch.full((ahead + offset + count * (V + gap) + 64,), CANARY, dtype=dtype, device=device)
        assert self.buffer.data_ptr() % 16 == 0
        self.view = self.buffer.as_strided((1, count, V), (count * (V + gap), V + gap, 1), ahead + offset)
        itemsize = dtype.itemsize
        self.starts = [self.view[0, t].data_ptr() for t in range(count)]
        self.row_bytes, self.itemsize = V * itemsize, itemsize

    def fill(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        self.view.copy_(3 * torch.randn(self.view.shape, generator=generator))
        return self.view.double()

    def canaries(self) -> Tensor:
        """Everything beside the rows."""
        beside = torch.ones_like(self.buffer, dtype=torch.bool)
        beside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(False)
        return self.buffer[beside]

    def outside(self, addresses: Any) -> Any:
        """Of ``addresses``, those in the buffer and beside its rows."""
        first = self.buffer.data_ptr()
        near = addresses[(addresses >= first) & (addresses < first + self.buffer.nbytes)]
        within = np.zeros(near.shape, dtype=bool)
        for start in self.starts:
            within |= (near >= start) & (near + self.itemsize <= start + self.row_bytes)
        return near[~within]


@contextlib.contextmanager
def watched(*buffers: Rows) -> Iterator[None]:
    """Fails if a kernel touches a buffer beside its rows. On a GPU it sees nothing; the canaries still do."""
    if not kernels.interpreting():
        yield
        return
    from triton.runtime import interpreter

    real, counted = interpreter._interpreter, [0]

    class Watch:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def _look(self, pointers: Any, mask: Any) -> None:
            touched = np.asarray(pointers)[np.asarray(mask, dtype=bool)].astype(np.int64)
            for rows in buffers:
                beside = rows.outside(touched)
                assert beside.size == 0, f"{beside.size} elements beside the rows were touched"
                counted[0] += touched.size

        def load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._look(pointers, mask)
            return real.load(pointers, mask, *rest)

        def store(self, pointers: Any, value: Any, mask: Any) -> Any:
            self._look(pointers, mask)
            return real.store(pointers, value, mask)

    interpreter._interpreter = Watch()
    try:
        yield
    finally:
        interpreter._interpreter = real
    assert counted[0] >= sum(rows.row_bytes // rows.itemsize for rows in buffers), "nothing was watched"


def per_token(device: torch.device, count: int = 3) -> tuple[Tensor, Tensor]:
    """Targets, all 0, and advantages."""
    advantages = torch.tensor([[1.0, -0.5, 2.0]], device=device)[:, :count]
    return torch.zeros(1, count, dtype=torch.int32, device=device), advantages


def statistics_of(logits: Tensor, targets: Tensor, *, entropy: bool = False) -> Any:
    statistics = room_for_statistics(targets, entropy=entropy)
    token_statistics(logits, targets, PLAIN, statistics)
    return statistics


def loss_of(logits: Tensor, targets: Tensor, advantages: Tensor, out: Tensor, *, entropy: bool = True) -> Tensor:
    results = torch.full((3 if entropy else 2, *targets.shape), 7.0, device=targets.device)
    policy_loss(logits, targets, values_of(advantages), CLIP, PLAIN, results, out)
    return results


def expected_gradient(exact: Tensor, targets: Tensor, c: Tensor) -> Tensor:
    """c (delta - p) in float64."""
    one = torch.zeros_like(exact).scatter_(-1, targets.long()[..., None], 1.0)
    return c.double()[..., None] * (one - exact.softmax(-1))


def close(gradient: Tensor, expected: Tensor) -> None:
    """Two roundings to the gradient's dtype (a wrong entry is off by far more), or what a row's arithmetic adds."""
    tolerance = max(torch.finfo(gradient.dtype).eps, 1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=1e-7)


# Where `out` starts: None is in place, "same" as the logits do, a number so many elements further.
OUTS = (None, "same", 1)


# V mod 8 of 7 and 0; every misalignment that a dtype has.
ROWS = [(1031, offset, dtype) for dtype in DTYPES for offset in range(16 // dtype.itemsize)]
ROWS += [(1032, offset, torch.bfloat16) for offset in (0, 1)]


@pytest.mark.parametrize("out_at", OUTS, ids=str)
@pytest.mark.parametrize(("V", "offset", "dtype"), ROWS, ids=str)
def test_nothing_beside_the_rows_is_touched(
    V: int, offset: int, dtype: torch.dtype, out_at: str | int | None, device: torch.device
) -> None:
    """Every kernel, on three rows whose starts differ."""
    targets, advantages = per_token(device)
    targets[0, 1], targets[0, 2] = V - 1, V // 2
    c = -advantages

    def rows() -> tuple[Rows, Rows, Tensor]:
        logits = Rows(V, dtype, offset, device)
        if out_at is None:
            return logits, logits, logits.fill(0)
        other = Rows(V, dtype, offset if out_at == "same" else (offset + int(out_at)) % 8, device)
        return logits, other, logits.fill(0)

    logits, out, exact = rows()
    with watched(logits, out):
        statistics = statistics_of(logits.view, targets)
        token_gradient(logits.view, targets, statistics, c, None, PLAIN, out.view)
    target = exact.log_softmax(-1).gather(-1, targets.long()[..., None])[..., 0]
    torch.testing.assert_close(statistics.logprobs.double(), target, rtol=0, atol=LOGPROB_LIMIT)
    close(out.view, expected_gradient(exact, targets, c))
    assert (logits.canaries() == CANARY).all()
    assert (out.canaries() == CANARY).all()

    logits, out, exact = rows()
    with watched(logits, out):
        loss_of(logits.view, targets, advantages, out.view)
        scale_gradient(out.view, torch.tensor(2.0, device=device))
    close(out.view, 2 * expected_gradient(exact, targets, c))
    assert (logits.canaries() == CANARY).all()
    assert (out.canaries() == CANARY).all()

    logits, out, _ = rows()  # rows without a gradient: zeros, and no reading of the logits
    with watched(out):
        loss_of(logits.view, torch.full_like(targets, SKIPPED), advantages, out.view)
        token_gradient(logits.view, targets, statistics, torch.zeros_like(c), None, PLAIN, out.view)
    assert not out.view.any()
    assert (out.canaries() == CANARY).all()


@pytest.mark.parametrize("V", [1, 2, 7, 8, 9, 15, 16, 17])
@pytest.mark.parametrize("offset", range(8))
def test_rows_shorter_than_their_edges(V: int, offset: int, device: torch.device) -> None:
    targets, advantages = per_token(device)
    targets[0, 1] = V - 1
    logits, out = Rows(V, torch.bfloat16, offset, device), Rows(V, torch.bfloat16, (offset + 3) % 8, device)
    exact = logits.fill(1)
    with watched(logits, out):
        loss_of(logits.view, targets, advantages, out.view)
    close(out.view, expected_gradient(exact, targets, -advantages))
    assert (out.canaries() == CANARY).all()


@pytest.mark.parametrize("offset", [0, 5])
def test_whole_steps_of_odd_rows(offset: int, device: torch.device) -> None:
    """50257 entries: whole steps, a masked one and an edge."""
    V, count = 50257, 2
    targets, _ = per_token(device, count)
    targets[0, 1] = V - 1
    c = torch.tensor([[0.5, -1.0]], device=device)
    logits = Rows(V, torch.bfloat16, offset, device, count=count)
    out = Rows(V, torch.bfloat16, offset, device, count=count)
    exact = logits.fill(2)
    with watched(logits, out):
        statistics = statistics_of(logits.view, targets, entropy=True)
        token_gradient(logits.view, targets, statistics, c, None, PLAIN, out.view)
    close(out.view, expected_gradient(exact, targets, c))
    assert (out.canaries() == CANARY).all()


def test_offsets_beyond_31_bits(device: torch.device) -> None:
    """[2, 2, V] whose second row lies 2^31 + 8 elements on; pages between are never touched, so never there."""
    if device.type != "cpu":
        pytest.skip("takes 4 GiB of address space, which only a CPU gives without memory behind it")
    V, far = 33, 2**31 + 8
    base = torch.empty(far + far // 2 + 4 * V, dtype=torch.bfloat16)
    logits = base.as_strided((2, 2, V), (far // 2, far, 1))
    generator = torch.Generator().manual_seed(3)
    logits.copy_(3 * torch.randn(2, 2, V, generator=generator))
    targets, ones = torch.tensor([[0, 1], [2, V - 1]], dtype=torch.int32), torch.ones(2, 2)
    statistics = statistics_of(logits, targets)
    exact = logits.double()
    target = exact.log_softmax(-1).gather(-1, targets.long()[..., None])[..., 0]
    torch.testing.assert_close(statistics.logprobs.double(), target, rtol=0, atol=LOGPROB_LIMIT)
    loss_of(logits, targets, ones, logits, entropy=False)
    close(logits, expected_gradient(exact, targets, -ones))
    scale_gradient(logits, torch.tensor(3.0))
    close(logits, 3 * expected_gradient(exact, targets, -ones))
