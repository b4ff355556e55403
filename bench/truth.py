"""The float64 truth about a case's inputs, and gradients held against it.

A gradient is c·(dlogp/dinput) summed over tokens, whatever the objective: c = dloss/dlogp is the loss's own, the slopes
dlogp/dinput are the operation's. The truth knows the slopes; ``check.py`` brings c.

Of logits the gradient is checked row by row on a few rows spread over the batch, since one float64 copy of all of them
would not fit. Of hidden states and head every row of both gradients is checked: a few in full, all of them along random
directions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from hpo_fused import reference

from .cases import Case
from .inputs import CHUNK_ELEMENTS, Inputs, draw_advantages, draw_hidden, draw_logits, draw_mask, draw_old_logprobs

ROWS = 16  # rows whose gradient is checked in full, and as many without a gradient where there are such
COLUMNS = 16  # further rows of weight's gradient that are, beside those of the checked rows' tokens
PROBES = 2  # random directions along which every row of hidden's gradient is checked
BLOCKS = 64  # of the vocabulary, in each of which all rows of weight's gradient are checked, summed with random signs

# Complaints: errors that no implementation in float32 arithmetic comes near (plain PyTorch on a CPU comes nearest: its
# log_softmax is off by 5e-5 at V = 151936).
#
# Gradient of logits beyond one rounding to their dtype, relative to the row's own; a second rounding passes.
GRADIENT_LIMIT = {"bf16": 4e-3, "fp16": 2e-3, "fp32": 2e-3}
# Gradients of hidden and weight, relative to the row. The gradient of the logits is rounded to the dtype, then the
# GEMM's result, and over several chunks each chunk's part: three roundings, each at most half a unit in the last place.
ROW_LIMIT = {"bf16": 6e-3, "fp16": 1e-3, "fp32": 1e-3}
# Along a random direction an error as large as the row's whole rounding shows up to a few times larger.
PROBE_LIMIT = {"bf16": 2e-2, "fp16": 4e-3, "fp32": 2e-3}
# Rows this much smaller than the largest are judged on its scale: their relative error is cancellation, not a bug.
NEGLIGIBLE = 1e-3
# As is the sampled token's entry, c·(1 - p), where p is so near to 1 that it is this small beside c.
PEAKED = 0.05
# hpo_fused's own limits. A value that is rounded after it was perturbed by d ends at most 2 |d| beyond its own
# rounding error, hence twice float32's limit for the narrower dtypes.
OWN_GRADIENT_LIMIT = {"bf16": 6e-6, "fp16": 6e-6, "fp32": 3e-6}
OWN_LOGPROB_LIMIT = 4e-6
TINY = torch.finfo(torch.float64).tiny
Gradients = tuple[Tensor, ...]


@dataclass(frozen=True)
class GradientError:
    """Errors of a gradient relative to the same row of the exact one, over the checked rows.

    Attributes:
        worst, median: of the rows' errors.
        beyond: worst of the rows' errors less the row's own rounding to the dtype; None where rounding is not known.
    """

    worst: float
    median: float
    beyond: float | None = None


def off(name: str, error: float, limit: float) -> str:
    """The complaint about an error beyond its limit, else "". NaN is beyond every limit."""
    return "" if error <= limit else f"{name} off by {error:.1e} (limit {limit:.0e})"


@dataclass
class Verdict:
    """Errors by the name of the gradient's part, and complaints ("" where nothing is wrong)."""

    errors: dict[str, GradientError] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def hold(
        self, part: str, error: Tensor, size: Tensor, limit: float, floor: Tensor | None = None,
        judged: Tensor | None = None, told: bool = True,
    ) -> None:  # fmt: skip
        """Hold rows' errors, relative to rows of that size, against a limit.

        Args:
            part: of the gradient.
            error, size: [R].
            limit: of the relative error.
            floor: scale [R] on which smaller rows are judged.
            judged: bool [R], rows to judge; NaN is judged anyway.
            told: the errors are results, too, and not only a check.
        """
        judged = torch.ones_like(size, dtype=torch.bool) if judged is None else judged | error.isnan()
        if not bool(judged.any()):
            return
        scale = (size if floor is None else size.maximum(floor)).clamp(min=max(NEGLIGIBLE * size.max().item(), TINY))
        self.complaints.append(off(f"gradient of {part}", (error / scale)[judged].max().item(), limit))
        rows = judged & (size > 0)
        if told and bool(rows.any()):
            relative = error[rows] / size[rows]
            self.errors[part] = GradientError(relative.max().item(), relative.median().item())


def spread_rows(chosen: Tensor, most: int) -> Tensor:
    """At most ``most`` of the indices where the flat ``chosen`` holds, spread evenly over them."""
    indices = chosen.nonzero().squeeze(1)
    return indices[torch.linspace(0, len(indices) - 1, min(most, len(indices))).round().long().to(indices.device)]


@dataclass(frozen=True, eq=False)
class Truth(ABC):
    """Exact values of every row; everything is float64.

    Attributes:
        logprobs, entropies: of the tokens [B, T].
        slack: error of a log-probability that is no mistake, whose coefficient c is then taken at the provider's own
            value [B, T]: next to a clip's edge the last bit decides whether there is a gradient at all.
    """

    logprobs: Tensor
    entropies: Tensor
    slack: Tensor

    @abstractmethod
    def judge(self, inputs: Inputs, gradients: Gradients, c: Tensor, moved: Tensor, tolerance: float) -> Verdict:
        """Hold gradients, which carry the case's upstream factor, against the exact ones.

        Args:
            inputs: of the case.
            gradients: as the leaves.
            c: dloss/dlogp [B, T].
            moved: [B, T], 0, or the error of a log-probability whose logits were rounded otherwise than the truth's.
            tolerance: times the limits.
        """


@dataclass(frozen=True, eq=False)
class LogitsTruth(Truth):
    """Truth about logits. ``rows``: indices [R] of the rows whose slopes dlogp/dlogits [R, V] are at hand."""

    rows: Tensor
    slopes: Tensor

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, softcap: float | None, rows: Tensor, shape: torch.Size) -> LogitsTruth:
        """Truth about logits [N, V] and tokens [N] in the layout ``shape`` [B, T], a few rows in float64 at a time."""
        step = max(1, CHUNK_ELEMENTS // logits.shape[-1])
        pieces = zip(logits.split(step), tokens.split(step), strict=True)
        parts = [reference.token_logprobs(z.double(), y, softcap=softcap) for z, y in pieces]
        logprobs, entropies = (torch.cat(values).view(shape) for values in zip(*parts, strict=True))
        z = logits[rows].double().requires_grad_()
        (slopes,) = torch.autograd.grad(reference.token_logprobs(z, tokens[rows], softcap=softcap).logprobs.sum(), z)
        return cls(logprobs, entropies, torch.full_like(logprobs, OWN_LOGPROB_LIMIT), rows, slopes)

    def judge(self, inputs: Inputs, gradients: Gradients, c: Tensor, moved: Tensor, tolerance: float) -> Verdict:
        """The column of a row's token is judged apart from the others: its entry can be larger than all of them."""
        (gradient,), upstream, verdict = gradients, inputs.case.gradient_factor, Verdict()
        c = c.flatten()[self.rows]
        exact = c.unsqueeze(-1) * self.slopes
        got = gradient.detach().flatten(0, 1)[self.rows].double() / upstream
        rounded = (exact * upstream).to(gradient.dtype).double() / upstream
        column = inputs.tokens.flatten()[self.rows].unsqueeze(-1)

        def parts(values: Tensor) -> tuple[Tensor, Tensor]:
            return values.gather(-1, column).abs().squeeze(-1), values.scatter(-1, column, 0.0).norm(dim=-1)

        error, rounding, size = parts(got - exact), parts(rounded - exact), parts(exact)
        smallest = max(NEGLIGIBLE * max(part.max().item() for part in size), TINY)
        allowed = (size[0].maximum(PEAKED * c.abs()).clamp(min=smallest), size[1].clamp(min=smallest))
        # NaN wins a maximum, and a median too.
        worst = torch.cat([(e - r) / a for e, r, a in zip(error, rounding, allowed, strict=True)]).max().item()
        verdict.complaints.append(off("gradient", worst, tolerance * GRADIENT_LIMIT[inputs.case.dtype]))
        for name, e, r, s in zip(("sampled token", "other tokens"), error, rounding, size, strict=True):
            if bool((rows := s > 0).any()):
                relative, beyond = e[rows] / s[rows], (e - r)[rows] / s[rows]
                found = GradientError(relative.max().item(), relative.median().item(), beyond.max().item())
                verdict.errors[name] = found
        return verdict


class LogprobsTruth(Truth):
    """Truth about log-probabilities that are given: their gradient is c itself."""

    def judge(self, inputs: Inputs, gradients: Gradients, c: Tensor, moved: Tensor, tolerance: float) -> Verdict:
        c, got, verdict = c.flatten(), gradients[0].detach().flatten().double() / inputs.case.gradient_factor, Verdict()
        verdict.hold("log-probabilities", (got - c).abs(), c.abs(), tolerance * GRADIENT_LIMIT["fp32"])
        return verdict


def _signs(*shape: int, device: torch.device, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).double().to(device)


def block_sums(values: Tensor) -> Tensor:
    """[n, V] -> [n, BLOCKS]: sums over equal parts of the vocabulary, the last ones shorter or empty."""
    width = -(-values.shape[-1] // BLOCKS)
    return F.pad(values, (0, width * BLOCKS - values.shape[-1])).view(-1, BLOCKS, width).sum(-1)


def _by_rows(values: Tensor) -> list[Tensor]:
    return list(values.split(max(1, CHUNK_ELEMENTS // values.shape[-1])))


@dataclass(frozen=True, eq=False)
class LinearTruth(Truth):
    """Truth about the logits of hidden states; s is a row's dlogp/dlogits [V].

    It starts from the logits as one GEMM of the dtype rounds them: that rounding is everybody's. A GEMM of another
    shape may sum in another order and round a logit the other way; ``slack`` bounds how far that moves a row.

    Attributes:
        rows, directions: indices [R] of rows, and their s·W [R, H].
        columns, column_slopes: ids [C], and s of every row in these columns [N, C].
        probes, hidden_probes: directions [H, PROBES], and (s·W) along them for every row [N, PROBES].
        signs, weight_probes: [V], and s times them summed over each block of the vocabulary [N, BLOCKS].
        masses: |s| summed over each block [N, BLOCKS].
    """

    rows: Tensor
    directions: Tensor
    columns: Tensor
    column_slopes: Tensor
    probes: Tensor
    hidden_probes: Tensor
    signs: Tensor
    weight_probes: Tensor
    masses: Tensor

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, tokens: Tensor, softcap: float | None, rows: Tensor, shape: torch.Size,
        seed: int,
    ) -> LinearTruth:  # fmt: skip
        """One GEMM and a pass in float64 over its result, a few rows at a time."""
        (count, size), vocabulary, device = hidden.shape, weight.shape[0], hidden.device
        generator = torch.Generator().manual_seed(seed + 2)
        others = torch.randint(vocabulary, (COLUMNS,), generator=generator).to(device)
        columns = torch.cat([tokens[rows], others]).unique()
        probes = _signs(size, PROBES, device=device, generator=generator)
        signs = _signs(vocabulary, device=device, generator=generator)
        along = torch.cat([part.double() @ probes for part in _by_rows(weight)])
        checked = torch.empty(len(rows), vocabulary, dtype=torch.float64, device=device)
        step = max(1, CHUNK_ELEMENTS // vocabulary) * (8 if device.type == "cuda" else 1)
        parts = []
        for start in range(0, count, step):
            part = slice(start, min(start + step, count))
            logits = torch.mm(hidden[part], weight.t())
            logprobs, entropies, slack, slopes = _row_slopes(logits, tokens[part], softcap, size)
            here = ((rows >= part.start) & (rows < part.stop)).nonzero().squeeze(1)
            checked[here] = slopes[rows[here] - part.start]
            of_rows = (logprobs, entropies, slack, slopes[:, columns], slopes @ along)
            parts.append((*of_rows, block_sums(slopes.mul_(signs)), block_sums(slopes.abs_())))
        logprobs, entropies, slack, *sums = (torch.cat(values) for values in zip(*parts, strict=True))
        column_slopes, hidden_probes, weight_probes, masses = sums
        directions = checked.new_zeros(len(rows), size)
        start = 0
        for piece in _by_rows(weight):
            directions.addmm_(checked[:, start : start + len(piece)], piece.double())
            start += len(piece)
        return cls(
            logprobs.view(shape), entropies.view(shape), slack.view(shape), rows, directions, columns, column_slopes,
            probes, hidden_probes, signs, weight_probes, masses,
        )  # fmt: skip

    def judge(self, inputs: Inputs, gradients: Gradients, c: Tensor, moved: Tensor, tolerance: float) -> Verdict:
        verdict, dtype = Verdict(), inputs.case.dtype
        of_hidden, of_weight = (gradient.detach() for gradient in gradients)
        limits = tolerance * ROW_LIMIT[dtype], tolerance * PROBE_LIMIT[dtype]
        self._judge_hidden(verdict, inputs, of_hidden.flatten(0, 1), c.flatten(), moved.flatten() == 0, limits)
        self._judge_weight(verdict, inputs, of_weight, c.flatten(), moved.flatten(), limits)
        return verdict

    def _judge_hidden(
        self, verdict: Verdict, inputs: Inputs, got: Tensor, c: Tensor, steady: Tensor, limits: tuple[float, float]
    ) -> None:
        upstream = inputs.case.gradient_factor
        floor = PEAKED * c.abs() * inputs.leaves[1].detach()[inputs.tokens.flatten()].double().norm(dim=-1)
        expected = c[self.rows].unsqueeze(-1) * self.directions
        error = (got[self.rows].double() / upstream - expected).norm(dim=-1)
        verdict.hold("hidden", error, expected.norm(dim=-1), limits[0], floor[self.rows], steady[self.rows])
        along = torch.cat([part.double() @ self.probes for part in _by_rows(got)]) / upstream
        size = torch.cat([part.double().norm(dim=-1) for part in _by_rows(got)]) / upstream
        expected = c.unsqueeze(-1) * self.hidden_probes
        error, size = (along - expected).abs().amax(-1), size.maximum(expected.abs().amax(-1))
        verdict.hold("hidden, all rows,", error, size, limits[1], floor, steady, told=False)
        if bool((got[c == 0] != 0).any()):
            verdict.complaints.append("gradient of hidden not zero in rows without a learning signal")

    def _judge_weight(
        self, verdict: Verdict, inputs: Inputs, got: Tensor, c: Tensor, moved: Tensor, limits: tuple[float, float]
    ) -> None:
        upstream, hidden = inputs.case.gradient_factor, inputs.leaves[0].detach().flatten(0, 1).double()
        sizes, rows = c.abs() * hidden.norm(dim=-1), (moved != 0).nonzero().squeeze(1)

        def expected_of(slopes: Tensor, masses: Tensor) -> tuple[Tensor, Tensor]:
            """Exact sums over rows [k, H], and the part [k] that logits rounded otherwise may change.

            One that moves a log-probability by d moves the entries of s by 2 |d| in all, and none by more than slack.
            """
            reach = 2 * self.slack.flatten()[rows].unsqueeze(-1) * masses[rows]
            reach = reach.minimum(3 * moved[rows].abs().unsqueeze(-1))
            return (c.unsqueeze(-1) * slopes).mT @ hidden, reach.mT @ sizes[rows]

        expected, allowed = expected_of(self.column_slopes, self.column_slopes.abs())
        error = ((got[self.columns].double() / upstream - expected).norm(dim=-1) - allowed).clamp(min=0)
        own = torch.where(inputs.tokens.flatten().unsqueeze(-1) == self.columns, sizes.unsqueeze(-1), 0.0).amax(0)
        verdict.hold("weight", error, expected.norm(dim=-1), limits[0], PEAKED * own)
        expected, allowed = expected_of(self.weight_probes, self.masses)
        width, sums, scale = -(-len(got) // BLOCKS), torch.zeros_like(expected), expected.norm(dim=-1)
        for block, (part, sign) in enumerate(zip(got.split(width), self.signs.split(width), strict=True)):
            exact = part.double() / upstream
            sums[block], scale[block] = sign @ exact, scale[block].maximum(exact.norm())
        error = ((sums - expected).norm(dim=-1) - allowed).clamp(min=0)
        verdict.hold("weight, all rows,", error, scale, limits[1], told=False)


def _row_slopes(logits: Tensor, tokens: Tensor, softcap: float | None, size: int) -> tuple[Tensor, ...]:
    """Log-probabilities, entropies, slack [n], and slopes [n, V]; by hand, so that a row costs few float64 copies."""
    epsilon = torch.finfo(logits.dtype).eps  # a unit in the last place is at most this part of a value
    if logits.dtype == torch.float32:
        epsilon *= size**0.5  # nothing is rounded after the sum: its own error is all there is
    column = tokens.unsqueeze(-1)
    z = logits.double()
    slack = epsilon * (z.gather(-1, column).squeeze(-1).abs() + z.abs().amax(-1))
    slope = None
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z, slope = softcap * tanh, 1 - tanh.square()
    z -= z.logsumexp(-1, keepdim=True)
    logprobs = z.gather(-1, column).squeeze(-1)
    slopes = z.exp().neg_()
    entropies = (slopes * z).sum(-1)
    slopes.scatter_add_(-1, column, torch.ones_like(column, dtype=torch.float64))
    return logprobs, entropies, slack, slopes if slope is None else slopes.mul_(slope)


def draw(case: Case, device: torch.device, seed: int) -> tuple[Inputs, Truth]:
    """Random inputs of ``case`` on ``device``, and the truth about them."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = torch.Size((case.responses, case.length))
    advantages = draw_advantages(case.responses, case.inactive, torch.Generator().manual_seed(seed)).to(device)
    mask = draw_mask(case, device, generator)
    empty = torch.zeros(shape, device=device)
    inputs = Inputs(case, case.resolved_objective(), (), empty.long(), advantages, empty, mask, empty)
    needed = inputs.needed().flatten()
    rows = torch.cat([spread_rows(needed, ROWS), spread_rows(~needed, ROWS)])
    truth: Truth
    leaves: tuple[Tensor, ...]
    if case.operation == "logprob_policy_loss":
        # As of a policy that is sure of itself: most near 0, some far below.
        logprobs = -torch.empty(shape, device=device).exponential_(1.0, generator=generator)
        tokens, leaves = empty.long().flatten(), (logprobs,)
        truth = LogprobsTruth(logprobs.double(), torch.zeros_like(logprobs, dtype=torch.float64), empty.double())
    elif case.linear:
        hidden, weight, tokens = draw_hidden(case, device, generator)
        truth = LinearTruth.of(hidden, weight, tokens, case.shape.softcap, rows, shape, seed)
        leaves = (hidden.view(*shape, -1), weight)
    else:
        logits, tokens = draw_logits(case, device, generator)
        truth = LogitsTruth.of(logits, tokens, case.shape.softcap, rows, shape)
        leaves = (logits.view(*shape, -1),)
    upstream = torch.randn(shape, generator=generator, device=device) / case.tokens
    return replace(
        inputs,
        leaves=tuple(leaf.requires_grad_() for leaf in leaves),
        tokens=tokens.view(shape),
        old_logprobs=draw_old_logprobs(truth.logprobs, generator, inputs.objective, mask),
        upstream=upstream if mask is None else upstream * mask,
    ), truth
