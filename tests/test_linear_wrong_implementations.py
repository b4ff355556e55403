"""The linear path's checks have to reject wrong code: each mutation below is a mistake that could be made there.

As in test_wrong_implementations.py: a mutant replaces one piece and must fail a case with an assertion, not a crash.
What belongs to the rows' own arithmetic is mutated there; here it is what stands around it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import eager, linear_autograd, linear_head
from hpo_fused.linear_head import Head, HeadGradients, Rows
from hpo_fused.linear_plan import ChunkPlan

from .linear_equivalence import LinearCase, check_linear, check_linear_logprobs
from .test_equivalence import PRESETS
from .test_wrong_implementations import wrap_gradient

linear_policy_loss = importlib.import_module("hpo_fused.linear_policy_loss")  # the attribute is the function
Patch = pytest.MonkeyPatch
MUTANTS: dict[str, Callable[[Patch], None]] = {}

# Few cases, each with much in it: all that test_linear_equivalence.py holds the right code against is far more.
_OBJECTIVE = hf.Objective.preset("mhpo_ahpo", kl_coef=0.04, entropy_coef=0.02)
_TRANSFORM = {"temperature": 0.7, "softcap": 6.0}
SUITE = [
    LinearCase("token", _OBJECTIVE, torch.bfloat16, bias=True, chunk_rows=3, options=_TRANSFORM),
    LinearCase("token-float32", PRESETS["mhpo_ahpo"], bias=True, chunk_rows=4),
    LinearCase("one-chunk", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, layout="packed"),
    LinearCase("sequence", PRESETS["gspo"], torch.bfloat16, bias=True, chunk_rows=3, small_ratios=True),
    LinearCase("half", PRESETS["mhpo_ahpo"], torch.float16, chunk_rows=4, bias=True),
    LinearCase("main-grad", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=3, weight_grad=True),
    LinearCase("bound", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=4, slack=12),
    LinearCase("float32-logits", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, logits_dtype=torch.float32),
]


def mutant(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    MUTANTS[function.__name__] = function
    return function


def wrap_accumulate(patch: Patch, change: Callable[..., None]) -> None:
    """Replace what adds a chunk to dweight by ``change(original, total, gradient, x, fresh)``."""
    original = linear_head._accumulate
    patch.setattr(linear_head, "_accumulate", lambda total, g, x, *, fresh: change(original, total, g, x, fresh))


@mutant
def weight_gradient_accumulated_in_bfloat16(patch: Patch) -> None:
    def change(original: Any, total: Tensor, gradient: Tensor, x: Tensor, fresh: bool) -> None:
        original(total, gradient, x, fresh=fresh)
        total.copy_(total.to(x.dtype))

    wrap_accumulate(patch, change)


@mutant
def weight_gradient_rounded_once_more(patch: Patch) -> None:
    """A float32 sum cut to 10 bits after the point, as TF32 has them."""

    def change(original: Any, total: Tensor, gradient: Tensor, x: Tensor, fresh: bool) -> None:
        original(total, gradient, x, fresh=fresh)
        if total.dtype == torch.float32:
            total.copy_((total.view(torch.int32) & -(1 << 13)).view(torch.float32))

    wrap_accumulate(patch, change)


@mutant
def last_chunk_dropped(patch: Patch) -> None:
    original = ChunkPlan.slices
    patch.setattr(ChunkPlan, "slices", lambda plan, total: original(plan, total)[: max(plan.chunks - 1, 1)])


@mutant
def last_chunk_dropped_from_the_gradients(patch: Patch) -> None:
    original = HeadGradients.add

    def add(self: HeadGradients, part: slice, x: Tensor, gradient: Tensor) -> None:
        if part.start == 0 or part.stop != len(self.rows):
            original(self, part, x, gradient)

    patch.setattr(HeadGradients, "add", add)


@mutant
def chunks_overwrite_each_other(patch: Patch) -> None:
    wrap_accumulate(patch, lambda original, total, gradient, x, fresh: original(total, gradient, x, fresh=True))


@mutant
def first_chunk_added_to_what_was_there(patch: Patch) -> None:
    def change(original: Any, total: Tensor, gradient: Tensor, x: Tensor, fresh: bool) -> None:
        if fresh:
            total.fill_(1e-3)  # memory that was not cleared
        original(total, gradient, x, fresh=False)

    wrap_accumulate(patch, change)


@mutant
def main_grad_overwritten(patch: Patch) -> None:
    original = HeadGradients.__init__

    def init(self: HeadGradients, *arguments: Any) -> None:
        original(self, *arguments)
        if self.into is not None:
            self.into.zero_()

    patch.setattr(HeadGradients, "__init__", init)


@mutant
def rows_scattered_in_order(patch: Patch) -> None:
    def add_hidden(self: HeadGradients, part: slice, gradient: Tensor) -> None:
        assert self.hidden is not None
        self.hidden.view(-1, self.hidden.shape[-1])[part] = torch.mm(gradient, self.head.weight).to(self.hidden.dtype)

    patch.setattr(HeadGradients, "_add_hidden", add_hidden)


@mutant
def rows_scattered_to_the_first_chunk(patch: Patch) -> None:
    original = HeadGradients._add_hidden

    def add_hidden(self: HeadGradients, part: slice, gradient: Tensor) -> None:
        original(self, slice(0, part.stop - part.start), gradient)

    patch.setattr(HeadGradients, "_add_hidden", add_hidden)


@mutant
def other_rows_not_cleared(patch: Patch) -> None:
    original = HeadGradients.finish

    def finish(self: HeadGradients) -> Any:
        if self.hidden is not None:
            flat = self.hidden.view(-1, self.hidden.shape[-1])
            others = torch.ones(flat.shape[0], dtype=torch.bool)
            others[self.rows.positions] = False
            flat[others] = 1e-6
        return original(self)

    patch.setattr(HeadGradients, "finish", finish)


@mutant
def terms_not_gathered(patch: Patch) -> None:
    original = Rows.take

    def take(self: Rows, part: slice, entries: Tensor) -> Tensor:
        if entries.is_floating_point():
            return entries.reshape(-1)[: len(self)][part].unsqueeze(0).nan_to_num()
        return original(self, part, entries)

    patch.setattr(Rows, "take", take)


@mutant
def tokens_not_gathered(patch: Patch) -> None:
    original = Rows.take

    def take(self: Rows, part: slice, entries: Tensor) -> Tensor:
        if entries.dtype == torch.int64:
            return entries.reshape(-1)[: len(self)][part].unsqueeze(0).clamp(min=0)
        return original(self, part, entries)

    patch.setattr(Rows, "take", take)


@mutant
def results_not_scattered(patch: Patch) -> None:
    def put(self: Rows, part: slice, whole: Tensor, entries: Tensor) -> None:
        whole.view(-1)[: len(self)][part] = entries.view(-1)

    patch.setattr(Rows, "put", put)


@mutant
def view_taken_for_contiguous(patch: Patch) -> None:
    """hidden[:, :-1] read as if its steps lay side by side."""

    def rows(self: Rows, part: slice, hidden: Tensor) -> Tensor:
        flat = hidden.as_strided((self.positions.max().item() + 1, hidden.shape[-1]), (hidden.stride(1), 1))
        return flat[self.positions[part]].nan_to_num(0.1, 0.1, 0.1)

    patch.setattr(Rows, "hidden", rows)


@mutant
def hidden_of_the_chunk_before(patch: Patch) -> None:
    original = HeadGradients.add

    def add(self: HeadGradients, part: slice, x: Tensor, gradient: Tensor) -> None:
        before = getattr(self, "before", x)[: x.shape[0]]
        original(self, part, x if before.shape != x.shape else before, gradient)
        self.before = x  # type: ignore[attr-defined]

    patch.setattr(HeadGradients, "add", add)


@mutant
def filling_rows_not_cleared(patch: Patch) -> None:
    original = Rows.hidden

    def rows(self: Rows, part: slice, hidden: Tensor) -> Tensor:
        return original(Rows(self.positions, None, self.everything), part, hidden)

    patch.setattr(Rows, "hidden", rows)


def _plausible(entries: Tensor) -> Tensor:
    return entries if entries.is_floating_point() else entries.clamp(min=0)  # a mask hides ids of -100


@mutant
def filling_rows_computed(patch: Patch) -> None:
    """Their terms hold what a mask hides."""
    take = Rows.take
    patch.setattr(Rows, "take", lambda rows, part, entries: _plausible(take(rows, part, entries)))
    patch.setattr(
        linear_autograd, "_computed", lambda rows, part: torch.ones_like(rows.positions[part], dtype=torch.bool)[None]
    )


@mutant
def bias_gradient_forgotten(patch: Patch) -> None:
    original = HeadGradients.finish

    def finish(self: HeadGradients) -> Any:
        hidden, weight, bias = original(self)
        return hidden, weight, None if bias is None else torch.zeros_like(bias)

    patch.setattr(HeadGradients, "finish", finish)


@mutant
def bias_gradient_summed_in_low_precision(patch: Patch) -> None:
    original = HeadGradients.add

    def add(self: HeadGradients, part: slice, x: Tensor, gradient: Tensor) -> None:
        original(self, part, x, gradient)
        if self.bias is not None:
            self.bias.copy_(self.bias.to(torch.bfloat16))

    patch.setattr(HeadGradients, "add", add)


@mutant
def bias_forgotten_in_the_logits(patch: Patch) -> None:
    original = Head.__init__

    def init(self: Head, weight: Tensor, bias: Tensor | None, *rest: Any) -> None:
        original(self, weight, None, *rest)

    patch.setattr(Head, "__init__", init)


@mutant
def bias_added_after_the_rounding(patch: Patch) -> None:
    original = Head.logits

    def logits(self: Head, x: Tensor, out: Tensor) -> None:
        bias, self.bias = self.bias, None
        original(self, x, out)
        self.bias = bias
        if bias is not None:
            out.add_(bias)

    patch.setattr(Head, "logits", logits)


@mutant
def float32_logits_of_a_rounded_product(patch: Patch) -> None:
    original = Head.logits

    def logits(self: Head, x: Tensor, out: Tensor) -> None:
        original(self, x, out)
        out.copy_(out.to(self.compute))

    patch.setattr(Head, "logits", logits)


@mutant
def hidden_gradient_not_scaled(patch: Patch) -> None:
    original = eager.scale_gradient
    patch.setattr(eager, "scale_gradient", lambda g, factor: None if g.shape[0] > 1 else original(g, factor))


@mutant
def weight_gradient_not_scaled(patch: Patch) -> None:
    original = eager.scale_gradient
    patch.setattr(
        eager, "scale_gradient", lambda g, factor: original(g, factor) if g.shape[0] > 1 or g.shape[1] == 1 else None
    )


@mutant
def hidden_gradient_rounded_between(patch: Patch) -> None:
    """The vocabulary in two halves whose products are rounded before they are added."""

    def add_hidden(self: HeadGradients, part: slice, gradient: Tensor) -> None:
        assert self.hidden is not None
        half, weight = gradient.shape[1] // 2, self.head.weight
        product = torch.mm(gradient[:, :half], weight[:half]) + torch.mm(gradient[:, half:], weight[half:])
        self.hidden.view(-1, self.hidden.shape[-1]).index_copy_(
            0, self.rows.positions[part], product.to(self.hidden.dtype)
        )

    patch.setattr(HeadGradients, "_add_hidden", add_hidden)


@mutant
def idle_rows_computed(patch: Patch) -> None:
    """All unmasked rows enter the GEMMs: nothing is wrong but the cost, and NaN in rows that nobody may read."""
    prepare, choose = linear_policy_loss.prepare, linear_policy_loss.choose_rows
    masks: list[Tensor] = []

    def spy(*arguments: Any, **keywords: Any) -> Any:
        batch = prepare(*arguments, **keywords)
        masks.append(batch.layout.mask)
        return batch

    patch.setattr(linear_policy_loss, "prepare", spy)
    patch.setattr(linear_policy_loss, "choose_rows", lambda chosen, count, *rest: choose(masks.pop(), None, *rest))


@mutant
def idle_rows_given_gradient(patch: Patch) -> None:
    """Dapo's loss with a floor under the advantage: every unmasked row learns something."""
    original = linear_policy_loss.prepare

    def prepare(*arguments: Any, **keywords: Any) -> Any:
        batch = original(*arguments, **keywords)
        terms = batch.terms._replace(advantages=torch.where(batch.terms.advantages == 0, 1e-4, batch.terms.advantages))
        return batch._replace(terms=terms, active=batch.layout.mask)

    patch.setattr(linear_policy_loss, "prepare", prepare)


@mutant
def temperature_missing_from_the_gradient(patch: Patch) -> None:
    wrap_gradient(patch, lambda out, logits, tokens, transform: out.mul_(transform.temperature))


@mutant
def gradient_of_the_logits_truncated(patch: Patch) -> None:
    """Towards zero instead of to the nearest: half a unit more than a rounding may be off."""

    def spoil(out: Tensor, logits: Tensor, tokens: Tensor, transform: Any) -> None:
        if out.dtype == torch.bfloat16:
            bits = out.view(torch.int16)
            bits.copy_(torch.where((bits & 1 == 1) & (out != 0), bits - 1, bits))

    wrap_gradient(patch, spoil)


@mutant
def one_row_wrong(patch: Patch) -> None:
    """One percent off in the row with the smallest gradient of the first chunk."""
    original = HeadGradients._add_hidden

    def add_hidden(self: HeadGradients, part: slice, gradient: Tensor) -> None:
        if part.start == 0:
            gradient = gradient.clone()
            size = gradient.abs().amax(-1).float()
            gradient[torch.where(size > 0, size, torch.inf).argmin()] *= 1.01
        original(self, part, gradient)

    patch.setattr(HeadGradients, "_add_hidden", add_hidden)


@mutant
def slightly_off(patch: Patch) -> None:
    """By 5e-5, in float32 only, where nothing is rounded that far."""
    original = HeadGradients.finish

    def finish(self: HeadGradients) -> Any:
        if self.hidden is not None and self.hidden.dtype == torch.float32:
            self.hidden.mul_(1 + 5e-5)
        return original(self)

    patch.setattr(HeadGradients, "finish", finish)


@mutant
def loss_scale_after_the_rounding(patch: Patch) -> None:
    """float16: coefficients without the scaler's factor, the factor on the rounded gradient."""
    original = eager.token_gradient

    def gradient(logits: Tensor, tokens: Tensor, statistics: Any, c: Tensor, h: Any, *rest: Any) -> None:
        original(logits, tokens, statistics, c / 256, None if h is None else h / 256, *rest)
        rest[-1].mul_(256)

    patch.setattr(eager, "token_gradient", gradient)


@mutant
def logits_of_backward_differ(patch: Patch) -> None:
    """Made again with another sum, a bit may differ: not what the row's statistics belong to."""
    original = linear_autograd._TokenStatistics.backward

    def backward(ctx: Any, *upstream: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            right = Head.logits

            def logits(self: Head, x: Tensor, out: Tensor) -> None:
                right(self, x, out)
                out[0, 0] *= 1.01

            inner.setattr(Head, "logits", logits)
            return original(ctx, *upstream)

    patch.setattr(linear_autograd._TokenStatistics, "backward", staticmethod(backward))


def failing_case(device: torch.device) -> LinearCase | None:
    for case in SUITE:
        try:
            check_linear(case, "torch", device, scale=None if case.dtype == torch.float16 else 0.5)
        except AssertionError:
            return case
    return None


def test_the_suite_passes(device: torch.device) -> None:
    """Or a mutant's failure would say nothing."""
    assert failing_case(device) is None


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 10


@pytest.mark.parametrize("name", MUTANTS)
def test_rejected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    assert failing_case(torch.device("cpu")) is not None, f"no case of the suite notices {name}"


# What the log-probabilities' own path has of its own: everything else is shared, and is rejected above.
LOGPROBS = [
    "last_chunk_dropped_from_the_gradients",
    "rows_scattered_in_order",
    "tokens_not_gathered",
    "results_not_scattered",
    "bias_gradient_forgotten",
    "logits_of_backward_differ",
    "temperature_missing_from_the_gradient",
]


@pytest.mark.parametrize("name", LOGPROBS)
def test_rejected_by_the_log_probabilities(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    check_linear_logprobs(SUITE[0], "torch", device)
    MUTANTS[name](monkeypatch)
    with pytest.raises(AssertionError):
        check_linear_logprobs(SUITE[0], "torch", device)
