"""The linear path's oracle, and how tightly it is held.

The logits that count are those that the call's own GEMM produced. They are recorded (and held against the exact
product by themselves); from there on all is float64. Of every entry of a gradient it is then known between which two
values it must lie, because rounding is monotone: the exact gradient of the logits, give or take what the arithmetic of
a row is allowed, is rounded to the GEMMs' dtype; the exact product of that, give or take a sum in float32, is rounded
to the result's dtype. Nearly always both bounds round to one and the same number. One rounding too many, in one place,
shows at once: no tolerance is as wide as a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import reference
from hpo_fused.linear.autograd import _Chunks
from hpo_fused.linear.head import float32_gemms
from hpo_fused.linear.rows import Rows

from .equivalence import (
    ROUNDING,
    LogitGradient,
    exact_loss,
    gradient_scale,
    hold_loss,
    hold_values,
    logit_gradient,
    softcap_error,
    worst,
)
from .linear_cases import LinearCase, LinearInputs, build_linear, exact_logits

# What the arithmetic of one row may be off, relative to the terms that an entry of its gradient is the sum of.
ROW_LIMIT = 4e-6


def gemm_error(terms: int, device: torch.device) -> float:
    """Error of a sum of ``terms`` products in float32, relative to the sum of their absolute values.

    A random walk of roundings, each half a unit at most, stays within twice the square root of their number. Tensor
    cores truncate: their errors have one sign, and add up over the groups of 8 or more products that they sum at once.
    """
    return (2 * math.sqrt(terms) + 2 + (terms / 8 if device.type == "cuda" else 0)) * ROUNDING


# ---------------------------------------------------------------------------------------------------------------
# what the GEMMs made


class Chunk(NamedTuple):
    """Rows of a chunk that are asked for: their places b * T + t, and their logits in float64."""

    positions: Tensor
    logits: Tensor


@contextmanager
def recorded(device: torch.device) -> Iterator[list[list[Chunk]]]:
    """Keeps the logits that calls inside make, by pass over the rows and by chunk.

    On a GPU, GEMMs inside sum in float32 all through: PyTorch lets cuBLAS round partial sums to the inputs' dtype.
    """
    passes: list[list[Chunk]] = []
    original = _Chunks.__iter__

    def spy(self: _Chunks) -> Iterator[tuple[slice, Rows, Tensor, Tensor]]:
        chunks: list[Chunk] = []
        passes.append(chunks)
        for part, rows, x, logits in original(self):
            positions = torch.arange(self.hidden.shape[:2].numel(), device=device)[rows.positions]
            chosen = slice(None) if rows.exact else rows.targets >= 0
            chunks.append(Chunk(positions[chosen], logits[0][chosen].double()))
            yield part, rows, x, logits

    settings = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(settings, name) for name in names} if device.type == "cuda" else {}
    try:
        _Chunks.__iter__ = spy  # type: ignore[method-assign]
        for name in before:
            setattr(settings, name, False)
        yield passes
    finally:
        _Chunks.__iter__ = original  # type: ignore[method-assign]
        for name, value in before.items():
            setattr(settings, name, value)


def merged(passes: list[list[Chunk]], shape: torch.Size, width: int, device: torch.device) -> Tensor:
    """Logits of all passes, float64 [..., V]; NaN in rows that no GEMM saw. A row made twice is twice the same."""
    z = torch.full((shape.numel(), width), torch.nan, dtype=torch.float64, device=device)
    for chunk in [chunk for chunks in passes for chunk in chunks]:
        known = ~z[chunk.positions].isnan().any(-1)
        assert torch.equal(z[chunk.positions][known], chunk.logits[known]), "backward made other logits than forward"
        z[chunk.positions] = chunk.logits
    return z.reshape(*shape, width)


# ---------------------------------------------------------------------------------------------------------------
# where the results must lie


class Bounds(NamedTuple):
    """Two float64 tensors, between which a result must lie entry by entry."""

    low: Tensor
    high: Tensor

    @classmethod
    def around(cls, center: Tensor, radius: Tensor | float) -> Bounds:
        return cls(center - radius, center + radius)

    @property
    def center(self) -> Tensor:
        return (self.low + self.high) / 2

    @property
    def radius(self) -> Tensor:
        return (self.high - self.low) / 2

    def rounded(self, *dtypes: torch.dtype) -> Bounds:
        """After roundings to each of ``dtypes`` in turn."""
        low, high = self
        for dtype in dtypes:
            low, high = low.to(dtype).double(), high.to(dtype).double()
        return Bounds(low, high)

    def times(self, factor: float) -> Bounds:
        low, high = factor * self.low, factor * self.high
        return Bounds(torch.minimum(low, high), torch.maximum(low, high))

    def product(self, other: Tensor, error: float) -> Bounds:
        """Of self [m, k] and ``other`` [k, n], summed with a relative ``error``."""
        center, size = self.center, other.abs()
        return Bounds.around(center @ other, self.radius @ size + error * (center.abs() @ size))

    def transposed(self) -> Bounds:
        return Bounds(self.low.t(), self.high.t())

    def rows(self, positions: Tensor) -> Bounds:
        return Bounds(self.low[positions], self.high[positions])


class HeadBounds(NamedTuple):
    """Where dhidden [N, H], dweight [V, H] and dbias [V] must lie."""

    hidden: Bounds
    weight: Bounds
    bias: Bounds


def head_bounds(
    case: LinearCase,
    inputs: LinearInputs,
    gradient: LogitGradient,
    chunks: list[Chunk],
    *,
    upstream: float = 1.0,
    factor: float = 1.0,
    start: Tensor | None = None,
) -> HeadBounds:
    """What three GEMMs may make of the logits' gradient.

    Args:
        chunks: of the pass that makes gradients.
        upstream: enters before anything is rounded.
        factor: multiplies the finished gradients, which are then rounded again.
        start: what weight_grad held.
    """
    device, compute, stored = inputs.weight.device, case.dtype, case.stored or case.dtype
    exact, size = (value.flatten(0, -2) for value in gradient)
    limit = ROW_LIMIT + softcap_error(inputs.transform)
    plain = Bounds.around(exact * upstream, limit * size * abs(upstream))
    plain = plain.rounded(case.logits_dtype or compute)
    g = plain.rounded(compute)
    x, w = (value.detach().to(compute).double() for value in (inputs.hidden, inputs.weight))
    x = x.reshape(-1, x.shape[-1])
    # GEMMs of widened operands leave float32. Others round their product, before it is added where they cannot add into
    # a wider sum.
    widened = case.dtypes(device).widened
    of_hidden = g.product(w, gemm_error(w.shape[0], device))
    of_hidden = of_hidden.rounded(stored) if widened else of_hidden.rounded(compute, stored)
    sums = torch.float32 if start is not None or len(chunks) > 1 else stored
    rounds = sums != compute and not widened and not float32_gemms(device, compute).write
    total = torch.zeros_like(w) if start is None else start.double()
    low, high, size = total, total, total.abs()
    bias_center, bias_radius = torch.zeros_like(w[:, 0]), torch.zeros_like(w[:, 0])
    for chunk in chunks:
        rows = chunk.positions
        part = g.rows(rows).transposed().product(x[rows], gemm_error(len(rows), device))
        part = part.rounded(compute) if rounds else part
        low, high, size = low + part.low, high + part.high, size + part.center.abs()
        of_rows = plain.rows(rows)
        bias_center = bias_center + of_rows.center.sum(0)
        bias_radius = bias_radius + of_rows.radius.sum(0) + gemm_error(len(rows), device) * of_rows.center.abs().sum(0)
    added = (len(chunks) + 1) * ROUNDING * size if sums == torch.float32 and len(chunks) > 0 else 0.0
    of_weight = Bounds(low - added, high + added).rounded(torch.float32 if start is not None else stored)
    bias_radius = bias_radius + (len(chunks) + 1) * ROUNDING * bias_center.abs()
    of_bias = Bounds.around(bias_center, bias_radius).rounded(stored)
    bounds = HeadBounds(of_hidden, of_weight, of_bias)
    if factor != 1:
        bounds = HeadBounds._make(each.times(factor).rounded(stored) for each in bounds)
    return bounds


def hold(name: str, actual: Tensor, bounds: Bounds) -> None:
    """Assert that every entry lies within its bounds; says by how much of its row's size (RMS) the worst does not."""
    actual = actual.detach().double()
    outside = (bounds.low - actual).clamp(min=0) + (actual - bounds.high).clamp(min=0)
    outside = torch.where(actual.isnan(), torch.nan, outside)
    size = bounds.center.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
    worst(name, (outside / size).reshape(-1, outside.shape[-1]).amax(-1), 1e-9)


def hold_gradients(case: LinearCase, inputs: LinearInputs, bounds: HeadBounds, weight_gradient: Tensor | None) -> None:
    """The leaves' gradients against their bounds; frozen leaves have none.

    Rows of sampled tokens are named apart from the others, which are small and many: each is held by its own size.
    """
    stored = case.stored or case.dtype
    if "hidden" in case.frozen:
        assert inputs.base.grad is None
    else:
        assert inputs.base.grad is not None
        assert inputs.base.grad.dtype == stored
        gradient = inputs.base.grad
        if case.layout == "padded":
            assert not gradient[:, -1].any(), "positions outside the view have a gradient"
            gradient = gradient[:, :-1]
        gradient = gradient.reshape(-1, gradient.shape[-1])
        idle = ~inputs.active.reshape(-1)
        assert not gradient[idle].any(), "rows without a signal have a gradient"
        hold("dhidden", gradient, bounds.hidden)
    if "weight" in case.frozen:
        assert weight_gradient is None
    else:
        assert weight_gradient is not None
        sampled = torch.zeros(case.vocabulary, dtype=torch.bool, device=weight_gradient.device)
        sampled[inputs.positional[0][inputs.active].long()] = True
        for name, chosen in (("sampled", sampled), ("other", ~sampled)):
            rows = chosen.nonzero().squeeze(1)
            hold(f"dweight of the {name} tokens", weight_gradient[rows], bounds.weight.rows(rows))
    if inputs.bias is not None:
        if "bias" in case.frozen:
            assert inputs.bias.grad is None
        else:
            assert inputs.bias.grad is not None
            assert inputs.bias.grad.dtype == stored
            hold("dbias", inputs.bias.grad, bounds.bias)


# ---------------------------------------------------------------------------------------------------------------
# the check


def late(case: LinearCase) -> bool:
    """Whether the logits' gradient is made in backward, the upstream factor in it before it is rounded."""
    half = torch.float16 in (case.dtype, case.stored)
    return case.objective.ratio_level == "sequence" or half or case.weight_grad


def autocast(case: LinearCase, device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if case.stored is None else torch.autocast(device.type, case.dtype)


def hold_logits(case: LinearCase, inputs: LinearInputs, z: Tensor, known: Tensor) -> None:
    """The GEMM's logits: one rounding of a float32 sum, in exactly the rows ``known``."""
    assert torch.equal(~z.isnan().any(-1), known), "other rows than expected entered a GEMM"
    exact, size = exact_logits(inputs, case.dtype)
    if inputs.kept is not None:
        assert torch.equal(z == -torch.inf, known.unsqueeze(-1) & ~inputs.kept), "another set than the kept one"
        z, exact = (torch.where(inputs.kept, value, 0.0) for value in (z, exact))
    radius = gemm_error(inputs.weight.shape[1], z.device) * size
    hold("logits", z[known], Bounds.around(exact, radius).rows(known).rounded(case.logits_dtype or case.dtype))


def options_of(case: LinearCase, inputs: LinearInputs, rows: Tensor) -> dict[str, Any]:
    """Keywords of both functions that say how, not what, to compute; ``rows`` enter the GEMMs."""
    options: dict[str, Any] = {
        "chunk_bytes": case.chunk_bytes(inputs.weight.device), "logits_dtype": case.logits_dtype, "keep": inputs.keep,
    }  # fmt: skip
    if case.weight_grad:
        start = torch.randn(inputs.weight.shape, generator=torch.Generator().manual_seed(7))
        options["weight_grad"] = start.to(inputs.weight.device)
    if case.slack is not None:
        options["active_count"] = int(rows.sum()) + case.slack
    return options


def check_linear(
    case: LinearCase, backend: str, device: torch.device, *, scale: float | None = None, **options: Any
) -> None:
    """Run a case and hold logits, loss, log-probabilities, entropy and gradients.

    ``scale`` is the factor with which backward is called.
    """
    scale = gradient_scale(case.dtype, case.stored) if scale is None else scale
    scale = torch.tensor(scale, dtype=torch.float32).item()  # as backward gets it
    skip_inactive = options.get("skip_inactive", True)
    inputs = build_linear(case, device, skip_inactive=skip_inactive)
    options |= options_of(case, inputs, inputs.active)
    buffer = options.get("weight_grad")
    start = None if buffer is None else buffer.clone()
    with recorded(device) as passes:
        with autocast(case, device):
            out = hf.linear_policy_loss(
                inputs.hidden, inputs.weight, *inputs.positional, bias=inputs.bias, backend=backend,
                **inputs.keywords, **options,
            )  # fmt: skip
        attached = inputs.attached
        assert out.loss.requires_grad == attached
        if attached:
            (out.loss * scale).backward()

    if case.chunk_rows is not None:
        assert max(len(chunk.positions) for chunks in passes for chunk in chunks) <= case.chunk_rows
    tokens = inputs.positional[0]
    known = inputs.active if skip_inactive else inputs.mask
    assert torch.equal(out.active, inputs.active)
    made = merged(passes, tokens.shape, case.vocabulary, device)
    hold_logits(case, inputs, made, known)
    z = torch.where(known.unsqueeze(-1), made, 0.0)
    exact = reference.token_logprobs(z, tokens, mask=inputs.mask, **inputs.transform)
    hold_values(exact, inputs.mask, out.logprobs, out.entropy, known, inputs.transform)
    loss = exact_loss(inputs, exact, out.logprobs, known)
    hold_loss(out.loss, loss)
    if not attached:
        return
    gradient = logit_gradient(z, tokens, inputs.mask, *loss[1:], inputs.transform)
    assert not gradient.exact[~inputs.active].any()
    if late(case):
        bounds = head_bounds(case, inputs, gradient, passes[-1], upstream=scale, start=start)
    else:
        bounds = head_bounds(case, inputs, gradient, passes[0], factor=scale, start=start)
    assert buffer is None or inputs.weight.grad is None
    hold_gradients(case, inputs, bounds, inputs.weight.grad if buffer is None else buffer)


def check_linear_logprobs(
    case: LinearCase, backend: str, device: torch.device, *, outputs: str = "both", **options: Any
) -> None:
    """The same for ``linear_token_logprobs``, differentiated with random factors from ``outputs``."""
    inputs = build_linear(case, device, skip_inactive=False)
    tokens, mask = inputs.positional[0], inputs.mask
    inputs.active = mask
    c, h = (1e2 * torch.randn(2, *tokens.shape, generator=torch.Generator().manual_seed(5))).to(device)
    options |= options_of(case, inputs, mask)
    buffer = options.get("weight_grad")
    start = None if buffer is None else buffer.clone()
    with recorded(device) as passes:
        with autocast(case, device):
            out = hf.linear_token_logprobs(
                inputs.hidden, inputs.weight, tokens, bias=inputs.bias, mask=mask, backend=backend,
                **inputs.transform, **options,
            )  # fmt: skip
        terms = []
        if outputs != "entropy":
            terms.append((out.logprobs * c).sum())
        if outputs != "logprobs":
            terms.append((out.entropy * h).sum())
        torch.stack(terms).sum().backward()
    made = merged(passes, tokens.shape, case.vocabulary, device)
    hold_logits(case, inputs, made, mask)
    z = torch.where(mask.unsqueeze(-1), made, 0.0)
    exact = reference.token_logprobs(z, tokens, mask=mask, **inputs.transform)
    hold_values(exact, mask, out.logprobs, out.entropy, mask, inputs.transform)
    up_c = torch.zeros_like(c) if outputs == "entropy" else c
    up_h = None if outputs == "logprobs" else h.double()
    gradient = logit_gradient(z, tokens, mask, up_c.double(), up_h, inputs.transform)
    bounds = head_bounds(case, inputs, gradient, passes[-1], start=start)
    hold_gradients(case, inputs, bounds, inputs.weight.grad if buffer is None else buffer)
