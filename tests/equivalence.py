"""One case, its oracle, and the comparison that every backend has to pass.

Errors are judged per row and relative to the row's own gradient, the sampled token's column apart from the others:
a gradient of zero, a forgotten factor or a wrong column in a single row fails, however small that row's weight.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import reference

# Log-ratios that reach every branch of every shaping: both sides of both clip bounds (and of the sequence-level
# preset's 3e-4), the saturated ends, the clamp at 20 and what lies beyond it. None lies on a boundary.
INFINITE = float("inf")
LOG_RATIOS = (
    0.0,
    0.05,
    -0.05,
    0.19,
    -0.21,
    0.26,
    -0.26,
    0.6,
    -0.6,
    1.0,
    -1.7,
    2.5,
    -5.0,
    5.0,
    19.0,
    -19.0,
    25.0,
    -25.0,
    100.0,
    -100.0,
    INFINITE,
    -INFINITE,
)
ADVANTAGES = (1.0, -1.0, 0.0, 0.5, -2.0)

# What the arithmetic may add to the one rounding to the logits' dtype, relative to the row's gradient. A perturbation
# d of a value that is then rounded moves the result by at most 2 |d| past the value's own rounding error.
GRADIENT_LIMIT = {torch.float32: 3e-6, torch.bfloat16: 6e-6, torch.float16: 6e-6}
LOGPROB_LIMIT = 4e-6


@dataclass(frozen=True)
class Case:
    """What to run; ``name`` seeds the random numbers."""

    name: str
    objective: hf.Objective
    dtype: torch.dtype = torch.float32
    layout: str = "padded"  # "padded" (strided view, ragged mask) or "packed"
    vocabulary: int = 97
    responses: int = 6
    length: int = 5
    rows: str = "random"  # "random", "peaked", "flat", "negative", "minus_inf"
    ragged: bool = True  # different lengths, a hole, one response fully masked
    on_policy: bool = False
    per_token_advantages: bool = False
    token_weights: bool = False
    small_ratios: bool = False  # log-ratios around a sequence-level clip range
    advantages: tuple[float, ...] = ADVANTAGES  # of the responses in turn
    micro_batch: bool = False  # totals of a larger batch, gradient averaged over 2 ranks
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    """Arguments of ``policy_loss`` in the case's dtype; ``base`` is the leaf that ``logits`` is a view of."""

    base: Tensor
    logits: Tensor
    positional: tuple[Tensor, Tensor]
    keywords: dict[str, Any]
    mask: Tensor


def _logits(case: Case, shape: tuple[int, ...], tokens: Tensor, generator: torch.Generator) -> Tensor:
    z = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    if case.rows == "flat":
        z = 1e-3 * z + 5
    if case.rows == "negative":
        z = z - 300
    if case.rows == "minus_inf":
        z[torch.rand(*shape, generator=generator) < 0.3] = -torch.inf
        z.scatter_(-1, tokens.unsqueeze(-1), 0.5)
    if case.rows == "peaked":  # 1 - p(token) from about 1e-1 down to 1e-8, and tokens that are nearly impossible
        peak = torch.linspace(4, 28, tokens.numel(), dtype=torch.float64).reshape(tokens.shape)
        z = z / 3
        z.scatter_(-1, tokens.unsqueeze(-1), peak.unsqueeze(-1))
        z[..., ::5, :].scatter_(-1, tokens[..., ::5].unsqueeze(-1), -12.0)
    return z


def build(case: Case, device: torch.device) -> Inputs:
    """Random inputs of a case: ragged lengths, one response fully masked, garbage wherever the mask is off."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    count, length, width = case.responses, case.length, case.vocabulary
    tokens = torch.randint(width, (count, length), generator=generator)
    lengths = torch.full((count,), length)
    if case.ragged:
        lengths = torch.randint(1, length + 1, (count,), generator=generator)
        lengths[0], lengths[-1] = length, 0
    mask = torch.arange(length) < lengths[:, None]
    if case.ragged and length > 2:
        mask[0, 1] = False  # a hole, such as a tool's output
    # In the case's dtype before anything is derived from them: the oracle sees the numbers that the backend sees.
    z = _logits(case, (count, length, width), tokens, generator).to(case.dtype).double()

    repeat = -(-count * length // len(LOG_RATIOS))
    x = torch.tensor(LOG_RATIOS * repeat, dtype=torch.float64)[: count * length].reshape(count, length)
    if case.small_ratios:
        x = torch.sign(x) * (1e-4 + 7e-4 * torch.rand(count, 1, generator=generator, dtype=torch.float64))
        x[1], x[-2] = 25.0, -0.5  # beyond the clamp, and far outside the clip range
    # Signs shift with each cycle through the log-ratios: any three cycles give each of them a positive and a negative.
    signs = torch.tensor(case.advantages * (count * length), dtype=torch.float64)
    places = torch.arange(count * length)
    advantages = signs[places + 2 * (places // len(LOG_RATIOS))].reshape(count, length)
    if not case.per_token_advantages:
        advantages = (
            advantages[:, 0].clone() if case.small_ratios else signs[torch.arange(count) % len(case.advantages)]
        )

    options = dict(case.options)
    transform = {key: options[key] for key in ("temperature", "softcap") if key in options}
    logp = reference.token_logprobs(z, tokens, **transform).logprobs
    keywords: dict[str, Any] = dict(options, objective=case.objective)
    per_token: dict[str, Tensor] = {}
    if not case.on_policy:
        per_token["old_logprobs"] = logp - x
    if case.objective.kl_coef != 0:
        per_token["ref_logprobs"] = logp + x.flip(0) / 2
    if case.token_weights:
        per_token["token_weights"] = torch.rand(count, length, generator=generator, dtype=torch.float64) + 0.5
        per_token["token_weights"][1] = 0
    per_token = {key: value.float() for key, value in per_token.items()}
    if case.objective.normalization == "group_mean_length":
        keywords["groups"] = torch.arange(count, device=device) // 2 * 7
    if case.micro_batch:
        keywords["statistics"] = hf.BatchStatistics(
            responses=3 * count, tokens=11 * count, positive=count, negative=3 * count,
            group_ids=None if "groups" not in keywords else keywords["groups"].repeat(3),
            group_lengths=None if "groups" not in keywords else lengths.to(device).repeat(3) + 1,
            gradient_average=2.0,
        )  # fmt: skip

    # What a mask hides may hold anything at all.
    tokens[~mask] = -100
    z[~mask] = torch.nan
    for value in per_token.values():
        value[~mask] = torch.nan
    advantages = advantages.float()
    if advantages.dim() == 2:
        advantages[~mask] = torch.nan

    if case.layout == "padded":
        base = torch.full((count, length + 1, width), torch.nan, dtype=case.dtype)
        base[:, :-1] = z
        base = base.to(device).requires_grad_()
        logits = base[:, :-1]
        keywords["mask"] = mask.to(device)
    else:
        inside = torch.arange(length) < lengths[:, None]
        base = z[inside].to(case.dtype).to(device).requires_grad_()
        logits = base
        tokens, mask = tokens[inside], mask[inside]
        per_token = {key: value[inside] for key, value in per_token.items()}
        advantages = advantages[inside] if advantages.dim() == 2 else advantages
        keywords["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)
        keywords["mask"] = mask.to(device)
    keywords |= {key: value.to(device) for key, value in per_token.items()}
    return Inputs(base, logits, (tokens.to(device), advantages.to(device)), keywords, mask.to(device))


def oracle(inputs: Inputs, logprobs: Tensor) -> tuple[reference.ReferenceOutput, Tensor]:
    """The reference's output, and its gradient in float64, shaped like logits.

    The coefficient of a row's gradient is judged at ``logprobs``, the backend's own (NaN: the oracle's), whose error
    is judged apart: SoftGate's slope, for one, multiplies it by tau r.
    """
    logits = inputs.logits.detach().double().requires_grad_()
    out = reference.policy_loss(logits, *inputs.positional, **inputs.keywords)
    tokens, advantages = inputs.positional
    keywords = dict(inputs.keywords)
    transform = {key: keywords.pop(key) for key in ("temperature", "softcap") if key in keywords}
    exact = reference.token_logprobs(logits, tokens, mask=inputs.mask, **transform)
    shift = (logprobs.double() - exact.logprobs).detach()
    shifted = exact.logprobs + torch.where(logprobs.isnan(), 0.0, shift)
    loss = reference.logprob_policy_loss(shifted, advantages, entropy=exact.entropy, **keywords)
    (gradient,) = torch.autograd.grad(loss, logits)
    return out, torch.where(inputs.mask.unsqueeze(-1), gradient, 0.0)


def gradient_errors(
    gradient: Tensor, expected: Tensor, tokens: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """What each row's gradient is off beyond one rounding to ``dtype``, relative to the row's own gradient.

    Returns the relative error of the target column, and the RMS of the error over the RMS of the other columns,
    each less the error that rounding the oracle's ``scale * gradient`` once makes. Rows whose expected gradient
    vanishes are judged absolutely: below 1e-12 there is nothing but the oracle's own rounding.
    """
    column = tokens.long().clamp(min=0).unsqueeze(-1)

    def parts(value: Tensor) -> tuple[Tensor, Tensor]:
        return value.gather(-1, column).abs().squeeze(-1), value.scatter(-1, column, 0.0).square().mean(-1).sqrt()

    error = parts(gradient.double() - expected)
    rounding = parts((expected * scale).to(dtype).double() / scale - expected)
    size = parts(expected)
    target, others = ((e - r) / s.clamp(min=1e-12) for e, r, s in zip(error, rounding, size, strict=True))
    return target, others


def worst(name: str, error: Tensor, limit: float) -> None:
    """Assert that no entry of ``error`` passes ``limit``, naming the row that does; NaN passes no limit."""
    bad = ~(error <= limit)
    if bool(bad.any()):
        where = bad.nonzero()[0].tolist()
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} rows beyond {limit:g}; row {where} is "
            f"off by {error[tuple(where)].item():.3g}"
        )


def check(case: Case, backend: str, device: torch.device, *, scale: float | None = None, **options: Any) -> None:
    """Run a case and hold loss, log-probabilities, entropy and gradient against the oracle.

    ``scale`` is the factor with which backward is called (float16 needs a loss scaler's).
    """
    scale = scale if scale is not None else (2.0**8 if case.dtype == torch.float16 else 1.0)
    inputs = build(case, device)
    out = hf.policy_loss(inputs.logits, *inputs.positional, **inputs.keywords, **options, backend=backend)
    (out.loss * scale).backward()
    expected, expected_gradient = oracle(inputs, out.logprobs)
    assert inputs.base.grad is not None
    assert inputs.base.grad.dtype == case.dtype
    gradient = inputs.base.grad.double() / scale
    if case.layout == "padded":
        assert not gradient[:, -1].any()
        gradient = gradient[:, :-1]

    known = out.active if options.get("skip_inactive", True) else inputs.mask
    assert not (out.active & ~inputs.mask).any()
    assert not out.logprobs[~inputs.mask].any()
    assert out.logprobs[inputs.mask & ~known].isnan().all()
    worst("logprobs", (out.logprobs - expected.logprobs)[known].abs(), LOGPROB_LIMIT)
    assert (out.logprobs[known] <= 0).all()
    if out.entropy is not None:
        worst("entropy", (out.entropy - expected.entropy)[known].abs(), 2e-5)
    idle = ~out.active
    assert not gradient[idle].any(), "rows without a signal have a gradient"
    assert expected_gradient[idle].abs().max().item() < 1e-12 if bool(idle.any()) else True
    target, others = gradient_errors(gradient, expected_gradient, inputs.positional[0], case.dtype, scale)
    limit = GRADIENT_LIMIT[case.dtype]
    if "softcap" in case.options:  # tanh is known to a rounding of 1, which the exponential multiplies
        limit += 4e-7 * case.options["softcap"] / case.options.get("temperature", 1.0)
    worst("gradient of the sampled tokens", target, limit)
    worst("gradient of the other tokens", others, limit)
    worst(
        "loss",
        ((out.loss.double() - expected.loss) / expected.loss.abs().clamp(min=3e-2)).reshape(1).abs(),
        1e-5,
    )
