"""One case, its oracle, and the comparison that every backend has to pass.

Errors are judged per row and relative to the terms that the row's own gradient is the sum of, the sampled token's
column apart from the others: a gradient of zero, a forgotten factor or a wrong column in a single row fails, however
small that row's weight.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import reference

# Log-ratios that reach every branch of every shaping: both sides of both clip bounds (and of the sequence-level
# preset's 3e-4), the saturated ends, the clamp at 20 and what lies beyond it. None lies on a boundary.
LOG_RATIOS = (
    0.0, 0.05, -0.05, 0.19, -0.21, 0.26, -0.26, 0.6, -0.6, 1.0, -1.7, 2.5, -5.0, 5.0, 19.0, -19.0, 25.0, -25.0, 100.0,
    -100.0, float("inf"), -float("inf"),
)  # fmt: skip
ADVANTAGES = (1.0, -1.0, 0.0, 0.5, -2.0)

# Half a unit of float32: what one rounding may be off, relative to its result.
ROUNDING = 2.0**-24
# What a row's arithmetic may add to the one rounding to the logits' dtype, relative to the terms of its gradient:
# about 100 roundings. The log-ratio (up to 20, so 20 of them) and some 20 operations on it in the coefficient; the
# exponential's argument (24: entries that weigh in a row have |z' - max| < 8, rounded twice, and once more where each
# row has a temperature), exp itself (4: two units) and the sums' steps (up to 40 in sequence over 151,936 entries,
# which mostly cancel).
GRADIENT_LIMIT = 6e-6
# log p: the sum over the vocabulary as above, where at most 49 roundings in a row add up (37 steps and a tree of 12).
LOGPROB_LIMIT = 4e-6
# The entropy is the difference of a logarithm and a mean of size log V, up to 12, each with its sum's error.
ENTROPY_LIMIT = 2e-5


@dataclass(frozen=True)
class Case:
    """What to run; ``name`` seeds the random numbers."""

    name: str
    objective: hf.Objective
    dtype: torch.dtype = torch.float32
    layout: str = "padded"  # "padded" (strided view, ragged mask) or "packed"
    vocabulary: int = 97
    responses: int = 6
    length: int = 4
    rows: str = "random"  # "random", "peaked", "flat", "negative", "minus_inf", "masked"
    ragged: bool = True  # different lengths, a hole, one response fully masked
    on_policy: bool = False
    per_token_advantages: bool = False
    token_weights: bool = False
    entropy_weights: str = "none"  # "0-d", "response", "token"
    small_ratios: bool = False  # log-ratios around a sequence-level clip range
    advantages: tuple[float, ...] = ADVANTAGES  # of the responses in turn
    micro_batch: bool = False  # totals of a larger batch, gradient averaged over 2 ranks
    temperature: str = ""  # a tensor of these levels: "call" (0-d), "response", "token"
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


@dataclass
class Arguments:
    """Arguments of a loss but for its logits or hidden states: tokens and advantages, everything else by name."""

    positional: tuple[Tensor, Tensor]
    keywords: dict[str, Any]
    mask: Tensor

    @property
    def transform(self) -> dict[str, Any]:
        """Temperature and softcap where they are given; a tensor of temperatures has one for each token."""
        given = {key: self.keywords[key] for key in ("temperature", "softcap") if key in self.keywords}
        if isinstance(given.get("temperature"), Tensor):
            tokens, boundaries = self.positional[0], self.keywords.get("cu_seqlens")
            given["temperature"] = reference.token_temperatures(given["temperature"], tokens, boundaries)
        return given

    @property
    def terms(self) -> dict[str, Any]:
        """The keywords that a loss of log-probabilities takes."""
        return {key: value for key, value in self.keywords.items() if key not in ("temperature", "softcap")}


@dataclass
class Inputs(Arguments):
    """Arguments of ``policy_loss`` in the case's dtype; ``base`` is the leaf that ``logits`` is a view of."""

    base: Tensor
    logits: Tensor


def _logits(case: Case, shape: tuple[int, ...], tokens: Tensor, generator: torch.Generator) -> Tensor:
    z = 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    if case.rows == "flat":
        z = 1e-3 * z + 5
    if case.rows == "negative":
        z = z - 300
    if case.rows == "minus_inf":
        z[torch.rand(*shape, generator=generator) < 0.3] = -torch.inf
        z.scatter_(-1, tokens.unsqueeze(-1), 0.5)
    if case.rows == "masked":  # as models mask: finite, and next to each other
        for t, value in enumerate((-1e10, -1e15, float(torch.finfo(case.dtype).min))):
            z[:, t::3, shape[-1] // 3 :] = value
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

    transform = {key: case.options[key] for key in ("temperature", "softcap") if key in case.options}
    if case.temperature:
        shape = {"call": (), "response": (count,), "token": (count, length)}[case.temperature]
        transform["temperature"] = 0.5 + 1.2 * torch.rand(shape, generator=generator)
        if case.temperature == "response":
            transform["temperature"][lengths == 0] = 0.0  # a mask hides it
    logp = reference.token_logprobs(z, tokens, **transform).logprobs
    keywords: dict[str, Any] = dict(case.options, objective=case.objective)
    per_token: dict[str, Tensor] = {}
    if not case.on_policy:
        per_token["old_logprobs"] = logp - x
    if case.objective.kl_coef != 0:
        d = x.flip(0) / 2
        if case.small_ratios:  # of both signs in a response, or k3 and its slope would cancel in a shared ratio's
            d = torch.where(torch.arange(length) % 2 == 0, 1.3, -0.9) + 0.2 * torch.rand(
                count, length, generator=generator, dtype=torch.float64
            )
            d[count // 2, 0] = 25.0  # beyond the clamp
        per_token["ref_logprobs"] = logp + d
    if case.token_weights:
        per_token["token_weights"] = torch.rand(count, length, generator=generator, dtype=torch.float64) + 0.5
        per_token["token_weights"][1] = 0
    if case.temperature == "token":
        per_token["temperature"] = transform["temperature"]
    elif case.temperature:
        keywords["temperature"] = transform["temperature"].to(device)
    weights = torch.rand(count, length, generator=generator) - 0.3
    weights[count // 2] = 0
    if case.entropy_weights == "token":
        per_token["entropy_weights"] = weights
    elif case.entropy_weights != "none":
        keywords["entropy_weights"] = (weights[0, 0] if case.entropy_weights == "0-d" else weights[:, :1]).to(device)
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
        if tokens.numel() == count > 1:  # [B] or [N]?
            keywords["advantage_level"] = "token" if advantages.dim() == 2 else "response"
            for key in {"token_weights", "entropy_weights"} & per_token.keys():
                per_token[key] = per_token[key].unsqueeze(0)
        advantages = advantages[inside] if advantages.dim() == 2 else advantages
        keywords["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)
        keywords["mask"] = mask.to(device)
        if len(tokens) == count > 1:  # what has one entry for each response, and what for each token, must be said
            keywords["advantage_level"] = "token" if case.per_token_advantages else "response"
            of_tokens = per_token.keys() & {"token_weights", "temperature"}
            per_token |= {name: per_token[name].unsqueeze(0) for name in of_tokens}
            if case.temperature == "response":
                keywords["temperature"] = keywords["temperature"].unsqueeze(1)
    keywords |= {key: value.to(device) for key, value in per_token.items()}
    return Inputs((tokens.to(device), advantages.to(device)), keywords, mask.to(device), base, logits)


# ---------------------------------------------------------------------------------------------------------------
# the oracle


class ExactLoss(NamedTuple):
    """A loss and its two numbers for every token, c = dL/dlogp and h = dL/dH (None: no entropy term), in float64."""

    loss: Tensor
    logprob_coefficients: Tensor
    entropy_coefficients: Tensor | None


def exact_loss(arguments: Arguments, exact: reference.ReferenceLogprobs, logprobs: Tensor, known: Tensor) -> ExactLoss:
    """The reference's loss and coefficients at the backend's own log-probabilities, where ``known``.

    The error of ``logprobs`` is judged apart: SoftGate's slope multiplies it by tau r, and a weight of a response's
    product of ratios by k - lambda r and by log p.
    """
    advantages, keywords = arguments.positional[1], arguments.terms
    given = torch.where(known, logprobs.detach().double(), exact.logprobs.detach()).requires_grad_()
    entropy = exact.entropy.detach().clone().requires_grad_()
    loss = reference.logprob_policy_loss(given, advantages, entropy=entropy, **keywords)
    c, h = torch.autograd.grad(loss, (given, entropy), allow_unused=True)
    assert c is not None
    return ExactLoss(loss.detach(), c, h)


class LogitGradient(NamedTuple):
    """Exact gradient of the logits, and the size of the terms that each entry is the sum of."""

    exact: Tensor
    size: Tensor


def logit_gradient(
    z: Tensor, tokens: Tensor, mask: Tensor, c: Tensor, h: Tensor | None, transform: Mapping[str, Any]
) -> LogitGradient:
    """From c = dL/dlogp and h = dL/dH, float64, shaped like ``tokens``: by the oracle and autograd.

    c (delta - p) + h p (E - z'): the parts can cancel, and h's within itself; their own sizes are what an error is
    relative to.
    """
    z = z.detach().requires_grad_()
    exact = reference.token_logprobs(z, tokens, mask=mask, **transform)
    total = (c * exact.logprobs).sum() + (0 if h is None else (h * exact.entropy).sum())
    (gradient,) = torch.autograd.grad(total, z)
    z = z.detach()
    softcap = transform.get("softcap")
    temperature = reference.token_temperatures(transform.get("temperature", 1.0), tokens).unsqueeze(-1)
    slope = (1 / temperature).expand(z.shape)
    if softcap is not None:
        slope = slope / torch.cosh(z / softcap) ** 2
        z = torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))
    z = z / temperature
    p, log_p = z.softmax(-1), z.log_softmax(-1)
    chosen = torch.zeros_like(p).scatter_(-1, tokens.long().clamp(min=0).unsqueeze(-1), 1.0)
    # Of coefficients below 1e-12 there is nothing left but rounding, the oracle's own included.
    c, h = (None if k is None else k.abs().clamp(min=1e-12) for k in (c, h))
    # 1 - p of the sampled token from log p, or it would be its own rounding error on peaked rows
    size = c.unsqueeze(-1) * torch.where(chosen.bool(), -torch.expm1(log_p), p)
    if h is not None:
        below, log_p = (torch.where(p > 0, value, 0.0) for value in (z.amax(-1, keepdim=True) - z, log_p))  # -inf
        entropy = -(p * log_p).sum(-1, keepdim=True)
        size = size + h.unsqueeze(-1) * p * (below + entropy + (p * below).sum(-1, keepdim=True))
    keep = mask.unsqueeze(-1)
    return LogitGradient(torch.where(keep, gradient, 0.0), torch.where(keep, size * slope, 0.0))


# ---------------------------------------------------------------------------------------------------------------
# the comparison


def gradient_errors(
    gradient: Tensor, expected: LogitGradient, tokens: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Each row's error beyond one rounding to the gradient's dtype, relative to the terms of the row's own gradient.

    Returns the relative error of the target column, and the RMS of the error over the RMS of the other columns' terms,
    each less the error that rounding the oracle's ``scale * gradient`` once makes. ``gradient`` has that factor. Rows
    whose expected gradient vanishes are judged absolutely: below 1e-12 there is nothing but the oracle's own rounding.
    """
    column = tokens.long().clamp(min=0).unsqueeze(-1)

    def parts(value: Tensor) -> tuple[Tensor, Tensor]:
        return value.gather(-1, column).abs().squeeze(-1), value.scatter(-1, column, 0.0).square().mean(-1).sqrt()

    error = parts(gradient.double() / scale - expected.exact)
    rounding = parts((expected.exact * scale).to(gradient.dtype).double() / scale - expected.exact)
    target, others = (
        (e - r) / s.clamp(min=1e-12) for e, r, s in zip(error, rounding, parts(expected.size), strict=True)
    )
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


def hold_values(
    exact: reference.ReferenceLogprobs, mask: Tensor, logprobs: Tensor, entropy: Tensor | None, known: Tensor,
    transform: Mapping[str, Any],
) -> None:  # fmt: skip
    """Log-probabilities and entropy in the rows ``known``; NaN in other unmasked ones, 0 where masked."""
    for name, values, right, limit in (
        ("logprobs", logprobs, exact.logprobs, LOGPROB_LIMIT + softcap_error(transform)),
        ("entropy", entropy, exact.entropy, ENTROPY_LIMIT),
    ):
        if values is not None:
            assert values.dtype == torch.float32
            assert not values[~mask].any()
            assert values[mask & ~known].isnan().all()
            worst(name, (values.detach() - right)[known].abs(), limit)
    assert (logprobs[known] <= 0).all()


def hold_loss(loss: Tensor, exact: ExactLoss) -> None:
    """Terms can cancel in the loss: it may be off by what the log-probabilities are."""
    allowed = 1e-5 * exact.loss.abs().clamp(min=3e-2) + LOGPROB_LIMIT * exact.logprob_coefficients.abs().sum()
    worst("loss", (loss.detach().double() - exact.loss).abs().reshape(1), allowed.item())


def gradient_scale(*dtypes: torch.dtype | None) -> float:
    """The factor with which backward is called: float16 needs a loss scaler's."""
    return 2.0**8 if torch.float16 in dtypes else 1.0


def softcap_error(transform: Mapping[str, Any]) -> float:
    """What tanh adds to log p's and a gradient's error: a few roundings of 1, times softcap over temperature."""
    if "softcap" not in transform:
        return 0.0
    temperatures = torch.as_tensor(transform.get("temperature", 1.0))
    return 4e-7 * transform["softcap"] / float(temperatures[temperatures > 0].min())  # masked ones are NaN


def check(
    case: Case, backend: str, device: torch.device, *, scale: float | None = None, columns: slice | None = None,
    **options: Any,
) -> None:  # fmt: skip
    """Run a case and hold loss, log-probabilities, entropy and gradient against the oracle.

    ``scale`` is the factor with which backward is called. ``columns``: this rank's of the vocabulary, with
    ``vocab_group`` among the options; the gradients of all ranks are put together.
    """
    scale = gradient_scale(case.dtype) if scale is None else scale
    inputs = build(case, device)
    logits = inputs.logits if columns is None else inputs.logits[..., columns]
    out = hf.policy_loss(logits, *inputs.positional, **inputs.keywords, **options, backend=backend)
    (out.loss * scale).backward()
    gradient = inputs.base.grad
    if columns is not None:
        torch.distributed.all_reduce(gradient)  # zeros outside a rank's columns
    assert gradient is not None
    assert gradient.dtype == case.dtype
    if case.layout == "padded":
        assert not gradient[:, -1].any()
        gradient = gradient[:, :-1]

    tokens, mask = inputs.positional[0], inputs.mask
    known = out.active if options.get("skip_inactive", True) else mask
    assert not (out.active & ~mask).any()
    z = inputs.logits.detach().double()
    exact = reference.token_logprobs(z, tokens, mask=mask, **inputs.transform)
    hold_values(exact, mask, out.logprobs, out.entropy, known, inputs.transform)
    loss = exact_loss(inputs, exact, out.logprobs, known)
    hold_loss(out.loss, loss)
    expected = logit_gradient(z, tokens, mask, *loss[1:], inputs.transform)
    idle = ~out.active
    assert not gradient[idle].any(), "rows without a signal have a gradient"
    assert (expected.exact[idle].abs() <= 1e-12).all()
    limit = GRADIENT_LIMIT + softcap_error(inputs.transform)
    for name, error in zip(("sampled", "other"), gradient_errors(gradient, expected, tokens, scale), strict=True):
        worst(f"gradient of the {name} tokens", error, limit)
