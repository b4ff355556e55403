"""The public functions of the linear path: behaviour that no comparison with the oracle covers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf

from .equivalence import worst
from .linear_equivalence import build_linear
from .samples import hidden_arguments, leaves
from .test_equivalence import PRESETS
from .test_linear_equivalence import small


@pytest.mark.parametrize(("name", "dtype"), [("mhpo_ahpo", torch.bfloat16), ("gspo", torch.float32)])
def test_bitwise_reproducible(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    values, weights, tokens, advantages, old = hidden_arguments(device, 97, dtype)
    results = []
    for _ in range(2):
        hidden, weight, bias = leaves(values[:, :2], weights, weights[:, 0])
        out = hf.linear_policy_loss(hidden, weight, tokens[:, :2], advantages, bias=bias, old_logprobs=old[:, :2],
                                    objective=name, chunk_bytes=5 * 97 * dtype.itemsize, backend=backend)  # fmt: skip
        out.loss.backward()
        results.append((out.loss.detach(), out.logprobs, out.entropy, hidden.grad, weight.grad, bias.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*PRESETS, "group_mean_length"])
def test_same_as_from_logits(name: str, device: torch.device) -> None:
    """In float32 nothing lies between the two but the GEMMs' own rounding."""
    objective = hf.Objective.preset("ahpo", normalization=name) if name == "group_mean_length" else PRESETS[name]
    groups = torch.tensor([3, 3, 1, 1, 1], device=device) if name == "group_mean_length" else None
    hidden, weight, tokens, advantages, old = hidden_arguments(device)
    results = []
    for linear in (False, True):
        x, w = leaves(hidden, weight)
        options: dict[str, Any] = {"old_logprobs": old, "objective": objective, "groups": groups}
        if linear:
            out = hf.linear_policy_loss(x, w, tokens, advantages, **options, chunk_bytes=3 * 211 * 4)
        else:
            out = hf.policy_loss(x @ w.t(), tokens, advantages, **options)
        out.loss.backward()
        results.append((out.loss.detach(), out.logprobs, out.entropy, out.active, x.grad, w.grad))
    for ours, logits in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_inactive_rows_are_loud(device: torch.device) -> None:
    hidden, weight, tokens, advantages, old = hidden_arguments(device)
    lazy, full = (
        hf.linear_policy_loss(hidden, weight, tokens, advantages, old_logprobs=old, skip_inactive=skip)
        for skip in (True, False)
    )
    assert lazy.active.tolist() == full.active.tolist() == [[b != 2] * 4 for b in range(5)]
    assert lazy.entropy is not None
    assert full.entropy is not None
    for some, all_ in ((lazy.logprobs, full.logprobs), (lazy.entropy, full.entropy)):
        assert some[2].isnan().all()
        assert all_.isfinite().all()
        torch.testing.assert_close(some[lazy.active], all_[lazy.active])


def test_without_entropy(device: torch.device) -> None:
    hidden, weight, tokens, advantages, old = hidden_arguments(device)
    for name in ("mhpo_ahpo", "gspo"):
        for skip in (True, False):
            out = hf.linear_policy_loss(
                hidden, weight, tokens, advantages, old_logprobs=old, objective=name, entropy=False,
                skip_inactive=skip,
            )  # fmt: skip
            assert out.entropy is None
    bonus = hf.Objective.preset("grpo", entropy_coef=0.1)
    out = hf.linear_policy_loss(hidden, weight, tokens, advantages, objective=bonus, entropy=False)
    assert out.entropy is not None  # the objective needs it


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_metrics(name: str, device: torch.device) -> None:
    hidden, weight, tokens, advantages, old = hidden_arguments(device)
    ours = hf.linear_policy_loss(hidden, weight, tokens, advantages, old_logprobs=old, objective=name).metrics()
    logits = hf.policy_loss(hidden @ weight.t(), tokens, advantages, old_logprobs=old, objective=name).metrics()
    assert ours.keys() == logits.keys()
    for key, value in ours.items():
        assert value.dim() == 0
        torch.testing.assert_close(value, logits[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_stays_in_its_row(name: str, poison: float, device: torch.device) -> None:
    """A broken active row breaks the head's gradient, as it must, but no other row's hidden gradient."""
    values, weight, tokens, advantages, old = hidden_arguments(device)
    gradients = []
    for value in (0.0, poison):
        hidden, head = leaves(values, weight)
        with torch.no_grad():
            hidden[1, 2, 7] += value
        out = hf.linear_policy_loss(
            hidden, head, tokens, advantages, old_logprobs=old, objective=name, chunk_bytes=4 * 211 * 4,
        )  # fmt: skip
        out.loss.backward()
        gradients.append((hidden.grad, head.grad))
    assert out.loss.isnan()
    assert gradients[1][0][1, 2].isnan().any()
    assert gradients[1][1].isnan().any()
    spared = torch.ones(5, 4, dtype=torch.bool)
    spared[1, 2 if name == "mhpo_ahpo" else slice(None)] = False  # one ratio serves the whole response in GSPO
    torch.testing.assert_close(gradients[1][0][spared], gradients[0][0][spared], rtol=0, atol=0)


def test_any_integer_tokens(device: torch.device) -> None:
    hidden, weight, tokens, advantages, old = hidden_arguments(device, 100)
    losses = {
        hf.linear_policy_loss(hidden, weight, tokens.to(dtype), advantages, old_logprobs=old).loss.item()
        for dtype in (torch.int64, torch.int8, torch.int16, torch.int32, torch.uint8)
    }
    assert len(losses) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_does_not_matter(dtype: torch.dtype, device: torch.device) -> None:
    values = hidden_arguments(device)
    results = []
    for default in (torch.float32, dtype):
        hidden, weight = leaves(*values[:2])
        torch.set_default_dtype(default)
        try:
            out = hf.linear_policy_loss(
                hidden, weight, *values[2:4], old_logprobs=values[4], temperature=0.7, chunk_bytes=4 * 211 * 4,
            )  # fmt: skip
            out.loss.backward()
            metrics = out.metrics()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((out.loss.detach(), out.logprobs, hidden.grad, weight.grad, metrics["ratio_mean"]))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo", "sapo"])
@pytest.mark.parametrize("splits", [[3, 2], [1, 4]])
def test_micro_batches_add_up(name: str, splits: list[int], device: torch.device) -> None:
    """Accumulated over calls with the totals of the optimiser batch, in one .grad: one big call's gradient."""
    values, weights, tokens, advantages, old = hidden_arguments(device)
    mask = (torch.arange(4) < torch.tensor([4, 2, 3, 0, 1])[:, None]).to(device)
    statistics = hf.BatchStatistics.from_batch(advantages, mask)
    results = []
    for parts in ([5], splits):
        hidden, weight = leaves(values, weights)
        total = 0.0
        for rows in torch.arange(5, device=device).split(parts):
            out = hf.linear_policy_loss(
                hidden[rows], weight, tokens[rows], advantages[rows], old_logprobs=old[rows], mask=mask[rows],
                objective=name, statistics=statistics if parts == splits else None, chunk_bytes=3 * 211 * 4,
            )  # fmt: skip
            out.loss.backward()
            total += out.loss.item()
        results.append((hidden.grad, weight.grad, torch.tensor(total)))
    for whole, added in zip(*results, strict=True):
        torch.testing.assert_close(added, whole, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# nothing to do


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["masked", "inactive", "no-rows", "no-steps", "packed"])
def test_no_active_row(name: str, dtype: torch.dtype, kind: str, backend: str, device: torch.device) -> None:
    """Loss 0, attached to every input; gradients of zeros, not None: data-parallel collectives must not hang."""
    shape = {"no-rows": (0, 4), "no-steps": (3, 0), "packed": (0,)}.get(kind, (3, 4))
    hidden, weight, bias = leaves(
        torch.randn(*shape, 8, device=device, dtype=dtype),
        torch.randn(11, 8, device=device, dtype=dtype),
        torch.randn(11, device=device, dtype=dtype),
    )
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    options: dict[str, Any] = {}
    if kind == "packed":
        options["cu_seqlens"] = torch.zeros(3, dtype=torch.long, device=device)
    if kind == "masked":
        options["mask"] = torch.zeros_like(tokens)
    advantages = torch.full((2 if kind == "packed" else shape[0],), 0.0 if kind == "inactive" else 1.0, device=device)
    out = hf.linear_policy_loss(
        hidden, weight, tokens, advantages, bias=bias, objective=name, backend=backend, **options
    )
    assert out.loss.item() == 0
    assert out.loss.requires_grad
    assert not out.active.any()
    assert out.logprobs.shape == tokens.shape
    assert all(value.isfinite() for value in out.metrics().values())
    out.loss.backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_no_active_row_with_a_bound(name: str, backend: str, device: torch.device) -> None:
    """Rows that only fill up: GEMMs run, over zeros."""
    hidden, weight = leaves(torch.full((3, 4, 8), torch.nan, device=device), torch.randn(11, 8, device=device))
    tokens = torch.zeros(3, 4, dtype=torch.long, device=device)
    for count in (0, 5, 12):
        out = hf.linear_policy_loss(
            hidden, weight, tokens, torch.zeros(3, device=device), objective=name, active_count=count, backend=backend
        )
        gradients = torch.autograd.grad(out.loss, (hidden, weight))
        assert out.loss.item() == 0
        assert out.logprobs.isnan().all()
        assert not any(gradient.any() for gradient in gradients)


# ---------------------------------------------------------------------------------------------------------------
# rows counted by the caller


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_active_count_changes_nothing(name: str, backend: str, device: torch.device) -> None:
    """Exact or a bound, up to all rows, with NaN in every row that is not active."""
    made = build_linear(small(f"count-{name}", PRESETS[name], bias=True), device)
    count, total = int(made.active.sum()), made.active.numel()
    assert 0 < count < total
    results = []
    for given in (None, count, count + 1, total):
        hidden, weight, bias = leaves(made.hidden, made.weight, made.bias)
        out = hf.linear_policy_loss(
            hidden, weight, *made.positional, bias=bias, **made.keywords, active_count=given, backend=backend,
            chunk_bytes=3 * 97 * 4,
        )  # fmt: skip
        out.loss.backward()
        results.append((out.loss.detach(), out.logprobs, out.entropy, hidden.grad, weight.grad, bias.grad))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_active_count_too_small(name: str, device: torch.device) -> None:
    """An error, never a gradient dropped in silence (a device-side assert on a GPU, which would end this process)."""
    if device.type != "cpu":
        pytest.skip("a device-side assert ends the process")
    hidden, weight, tokens, advantages, old = hidden_arguments(device)
    for given in (15, 0):
        with pytest.raises(ValueError, match=f"active_count: expected at least the 16 active rows, got {given}"):
            hf.linear_policy_loss(
                hidden, weight, tokens, advantages, old_logprobs=old, objective=name, active_count=given,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# float32 logits, float16


def test_float32_logits_match_a_float32_sampler(device: torch.device) -> None:
    """bfloat16 hidden states and head: log-probabilities of the product itself, not of its rounding."""
    hidden, weight, tokens, advantages, old = hidden_arguments(device, 997, torch.bfloat16)
    exact = hf.reference.token_logprobs(hidden.double() @ weight.double().t(), tokens)
    errors = []
    for logits_dtype in (torch.float32, None):
        out = hf.linear_policy_loss(
            hidden, weight, tokens, advantages, old_logprobs=old, logits_dtype=logits_dtype, skip_inactive=False,
        )  # fmt: skip
        alone = hf.linear_token_logprobs(hidden, weight, tokens, logits_dtype=logits_dtype)
        errors.append([(result.logprobs - exact.logprobs).abs() for result in (out, alone)])
    for unrounded, rounded in zip(*errors, strict=True):
        worst("logprobs", unrounded, 1e-5)
        assert rounded.max() > 1e-3  # what it is for


@pytest.mark.parametrize("name", ["dapo", "gspo"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_float16_survives_a_loss_scaler(name: str, chunks: int, device: torch.device) -> None:
    """Gradients of 1e-8 vanish in float16; multiplied by 2^16 first, they do not."""
    values, weights, tokens, _, _ = hidden_arguments(device, 53, torch.float16)
    advantages = 2e-5 * torch.ones(5, device=device)

    def gradients(dtype: torch.dtype, scale: float) -> list[Tensor]:
        hidden, weight = leaves(values.to(dtype), weights.to(dtype))
        out = hf.linear_policy_loss(
            hidden, weight, tokens, advantages, objective=name, chunk_bytes=-(-20 // chunks) * 53 * dtype.itemsize,
        )  # fmt: skip
        (out.loss * scale).backward()
        return [leaf.grad.double() / scale for leaf in (hidden, weight)]

    scaled, plain, right = gradients(torch.float16, 2**16), gradients(torch.float16, 1), gradients(torch.float32, 1)
    for good, lost, expected in zip(scaled, plain, right, strict=True):
        size = expected.square().mean().sqrt()
        # Three roundings of 2^-11, and the logits' own.
        assert (good - expected).square().mean().sqrt() < 5e-3 * size
        assert (lost - expected).square().mean().sqrt() > 5e-2 * size  # it would otherwise show nothing


def test_float16_inputs_under_bfloat16_autocast(device: torch.device) -> None:
    """The loss scaler's factor enters before a gradient is rounded to float16, whatever the GEMMs run in."""
    values, weights, tokens, advantages, _ = hidden_arguments(device, 7, torch.float16)
    low, exact = leaves(values, weights), leaves(values.float(), weights.float())
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = hf.linear_policy_loss(*low, tokens, 1e-7 * advantages, objective="grpo").loss
    (loss * 65536).backward()
    hf.linear_policy_loss(*exact, tokens, 1e-7 * advantages, objective="grpo").loss.backward()
    for ours, expected in zip(low, exact, strict=True):
        # Roundings of 2^-9 of logits, gradient and factors.
        assert (ours.grad.float() / 65536 - expected.grad).norm() < 1e-2 * expected.grad.norm()


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_no_gradient_wanted(name: str, device: torch.device) -> None:
    hidden, weight, tokens, advantages, old = hidden_arguments(device)
    hidden.requires_grad_()

    def run() -> Tensor:
        return hf.linear_policy_loss(
            hidden, weight, tokens, advantages, old_logprobs=old, objective=name, chunk_bytes=5 * 211 * 4,
        ).loss  # fmt: skip

    with torch.no_grad():
        quiet = run()
    with torch.inference_mode():
        inference = run()
    assert not quiet.requires_grad
    assert quiet.item() == inference.item() == run().item()


# ---------------------------------------------------------------------------------------------------------------
# log-probabilities and entropies


def masked_arguments(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states that are a strided view, weight, tokens and a mask."""
    hidden, weight, tokens, *_ = hidden_arguments(device, 101)
    mask = (torch.arange(3) < torch.tensor([3, 2, 1, 0, 3])[:, None]).to(device)
    return hidden[:, :-1], weight, torch.where(mask, tokens[:, 1:], -100), mask


def test_no_log_probability(backend: str, device: torch.device) -> None:
    for shape, mask in (((2, 3), torch.zeros(2, 3)), ((0, 3), None), ((0,), None)):
        hidden, weight = leaves(torch.randn(*shape, 8, device=device), torch.randn(11, 8, device=device))
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        out = hf.linear_token_logprobs(
            hidden, weight, tokens, mask=None if mask is None else mask.to(device), backend=backend
        )
        assert out.entropy is not None
        assert out.logprobs.shape == out.entropy.shape == tokens.shape
        assert not out.logprobs.any()
        (out.logprobs.sum() + out.entropy.sum()).backward()
        for leaf in (hidden, weight):
            assert leaf.grad is not None
            assert not leaf.grad.any()


def test_log_probabilities_in_inference_mode(backend: str, device: torch.device) -> None:
    hidden, weight, tokens, mask = masked_arguments(device)
    both = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            both.append(
                hf.linear_token_logprobs(hidden, weight, tokens, mask=mask, chunk_bytes=3 * 101 * 4, backend=backend)
            )
    assert both[0].entropy is not None
    assert torch.equal(both[0].logprobs, both[1].logprobs)
    assert torch.equal(both[0].entropy, both[1].entropy)


def test_packed_needs_no_boundaries(device: torch.device) -> None:
    hidden, weight = torch.randn(7, 8, device=device), torch.randn(13, 8, device=device)
    tokens = torch.randint(13, (7,), device=device)
    packed = hf.linear_token_logprobs(hidden, weight, tokens)
    padded = hf.linear_token_logprobs(hidden[None], weight, tokens[None])
    assert packed.entropy is not None
    assert padded.entropy is not None
    assert packed.logprobs.shape == (7,)
    assert torch.equal(packed.logprobs, padded.logprobs[0])
    assert torch.equal(packed.entropy, padded.entropy[0])


def test_log_probabilities_without_entropy(device: torch.device) -> None:
    values, weights, tokens, mask = masked_arguments(device)
    hidden, weight = leaves(values, weights)
    with_, without = (
        hf.linear_token_logprobs(hidden, weight, tokens, mask=mask, entropy=entropy) for entropy in (True, False)
    )
    assert without.entropy is None
    torch.testing.assert_close(without.logprobs, with_.logprobs)
    gradients = [torch.autograd.grad(out.logprobs.sum(), weight)[0] for out in (with_, without)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("main_grad", [False, True])
def test_backward_of_log_probabilities_may_run_again(main_grad: bool, device: torch.device) -> None:
    """It recomputes: the second result is as right as the first, and adds to it."""
    values, weights, tokens, mask = masked_arguments(device)
    hidden, weight = leaves(values, weights)
    buffer = torch.zeros_like(weight) if main_grad else None
    out = hf.linear_token_logprobs(hidden, weight, tokens, mask=mask, weight_grad=buffer)
    total = out.logprobs.sum() - 0.1 * out.entropy.sum()
    total.backward(retain_graph=True)

    def gradients() -> list[Tensor]:
        return [hidden.grad.clone(), (weight.grad if buffer is None else buffer).clone()]

    first = gradients()
    total.backward()
    for once, twice in zip(first, gradients(), strict=True):
        assert once.abs().max() > 0.1
        torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=1e-6)


def test_chunks_change_no_log_probability(device: torch.device) -> None:
    """In float32, up to the order of sums."""
    values, weights, tokens, mask = masked_arguments(device)
    results = []
    for rows in (1, 3, 7, None):
        hidden, weight, bias = leaves(values, weights, weights[:, 0])
        out = hf.linear_token_logprobs(
            hidden, weight, tokens, bias=bias, mask=mask, chunk_bytes=None if rows is None else rows * 101 * 4
        )
        (out.logprobs.sum() + out.entropy.sum()).backward()
        results.append((out.logprobs.detach(), out.entropy.detach(), hidden.grad, weight.grad, bias.grad))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)


def test_upstream_gradients_of_any_shape(device: torch.device) -> None:
    """Expanded (from a sum), transposed, of one output, of some rows only."""
    values, weights, tokens, _, _ = hidden_arguments(device)
    factor = torch.randn(4, 5, device=device)
    hidden, weight = leaves(values, weights)
    log_p = (hidden @ weight.t()).log_softmax(-1)
    chosen = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    for build_loss in (
        lambda lp, h: lp.sum(),
        lambda lp, h: h.sum(),
        lambda lp, h: (lp.t() * factor).sum() + (h * factor.t()).sum(),
        lambda lp, h: lp[:, 1:].sum() - h[::2].mean(),
    ):
        result = hf.linear_token_logprobs(hidden, weight, tokens, chunk_bytes=4 * 211 * 4)
        ours = torch.autograd.grad(build_loss(result.logprobs, result.entropy), (hidden, weight))
        expected = torch.autograd.grad(build_loss(chosen, entropy), (hidden, weight), retain_graph=True)
        for first, second in zip(ours, expected, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_feeds_a_loss_of_log_probabilities(device: torch.device) -> None:
    """logprob_policy_loss of them is linear_policy_loss."""
    values, weights, tokens, mask = masked_arguments(device)
    advantages, old = (
        torch.tensor([1.0, -1.0, 0.0, 0.5, -2.0], device=device),
        torch.full(tokens.shape, -4.6).to(device),
    )
    options: dict[str, Any] = {"objective": hf.Objective.preset("gspo", entropy_coef=0.01), "mask": mask}
    results = []
    for whole in (True, False):
        hidden, weight = leaves(values, weights)
        if whole:
            out = hf.linear_policy_loss(hidden, weight, tokens, advantages, old_logprobs=old, **options)
        else:
            made = hf.linear_token_logprobs(hidden, weight, tokens, mask=mask)
            out = hf.logprob_policy_loss(made.logprobs, advantages, entropy=made.entropy, old_logprobs=old, **options)
        out.loss.backward()
        results.append((out.loss.detach(), hidden.grad, weight.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
