"""Behaviour of the public losses that no comparison with the oracle covers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf

from .samples import Sample, every_path, logits_arguments
from .test_equivalence import PRESETS


@every_path
@pytest.mark.parametrize(
    ("name", "vocabulary", "dtype"),
    [("mhpo_ahpo", 211, torch.bfloat16), ("gspo", 211, torch.bfloat16), ("mhpo_ahpo", 50257, torch.float32)],
)
def test_bitwise_reproducible(name: str, vocabulary: int, dtype: torch.dtype, path: str, device: torch.device) -> None:
    sample = Sample(path, device, vocabulary, dtype)
    results = []
    for _ in range(2):
        inputs = sample.leaves()
        out = sample.loss(inputs, objective=name)
        out.loss.backward()
        results.append((out.loss.detach(), out.logprobs, out.entropy, *(leaf.grad for leaf in inputs)))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@every_path
@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_nan_stays_in_its_row(name: str, path: str, device: torch.device) -> None:
    """A broken active row breaks the head's gradient, as it must, but no other row's of logits or hidden states."""
    sample = Sample(path, device)
    gradients = []
    for broken in (False, True):
        inputs = sample.leaves()
        if broken:
            with torch.no_grad():
                inputs[0][1, 2, 7], inputs[0][3, 1, 7] = math.nan, math.inf
        out = sample.loss(inputs, objective=name)
        out.loss.backward()
        gradients.append(inputs[0].grad)
    assert out.loss.isnan()
    assert all(head.grad.isnan().any() for head in inputs[1:])
    spared = torch.ones(5, 4, dtype=torch.bool)
    for b, t in ((1, 2), (3, 1)):
        assert gradients[1][b, t].isnan().any()
        spared[b, t if name == "mhpo_ahpo" else slice(None)] = False  # one ratio serves the whole response in GSPO
    torch.testing.assert_close(gradients[1][spared], gradients[0][spared], rtol=0, atol=0)


@every_path
@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_inactive_rows_are_loud(name: str, path: str, device: torch.device) -> None:
    sample = Sample(path, device)
    lazy, full = (sample.loss(sample.values, objective=name, skip_inactive=skip) for skip in (True, False))
    assert lazy.active.tolist() == full.active.tolist() == [[b != 2] * 4 for b in range(5)]
    for some, all_ in ((lazy.logprobs, full.logprobs), (lazy.entropy, full.entropy)):
        assert some[2].isnan().all()
        assert all_.isfinite().all()
        torch.testing.assert_close(some[lazy.active], all_[lazy.active])
    assert lazy.loss.item() == pytest.approx(full.loss.item(), rel=1e-6)


@every_path
def test_without_entropy(path: str, device: torch.device) -> None:
    sample = Sample(path, device)
    for name, skip in (("mhpo_ahpo", True), ("gspo", False)):
        assert sample.loss(sample.values, objective=name, entropy=False, skip_inactive=skip).entropy is None
    bonus = hf.Objective.preset("grpo", entropy_coef=0.1)
    assert sample.loss(sample.values, objective=bonus, entropy=False).entropy is not None  # the objective needs it
    inputs = sample.leaves()
    alone, both = (sample.logprobs(inputs, entropy=entropy) for entropy in (False, True))
    assert alone.entropy is None
    torch.testing.assert_close(alone.logprobs, both.logprobs)
    for gradients in zip(*(torch.autograd.grad(out.logprobs.sum(), inputs) for out in (alone, both)), strict=True):
        torch.testing.assert_close(*gradients)


@every_path
def test_any_integer_tokens(path: str, device: torch.device) -> None:
    sample = Sample(path, device, 100)
    losses = {
        sample.loss(sample.values, tokens=sample.tokens.to(dtype)).loss.item()
        for dtype in (torch.int64, torch.int8, torch.int16, torch.int32, torch.uint8)
    }
    assert len(losses) == 1


@every_path
def test_packed_log_probabilities_need_no_boundaries(path: str, device: torch.device) -> None:
    sample = Sample(path, device)
    rows, *head = sample.values
    packed = sample.logprobs([rows[0], *head], tokens=sample.tokens[0])
    padded = sample.logprobs([rows[:1], *head], tokens=sample.tokens[:1])
    assert packed.logprobs.shape == (4,)
    assert torch.equal(packed.logprobs, padded.logprobs[0])
    assert torch.equal(packed.entropy, padded.entropy[0])


@pytest.mark.parametrize("vocabulary", [208, 211, 50257])
def test_a_row_does_not_depend_on_the_others(vocabulary: int, backend: str, device: torch.device) -> None:
    """Bit for bit. Rows of whole 16-byte groups may also move: others are grouped from their own first boundary."""
    logits, tokens, advantages, old = logits_arguments(device, vocabulary)
    statistics = hf.BatchStatistics.from_batch(advantages, torch.ones_like(tokens))
    whole = logits.clone().requires_grad_()
    out = hf.policy_loss(whole, tokens, advantages, old_logprobs=old, statistics=statistics, backend=backend)
    out.loss.backward()
    for b, t in ((0, 1), (4, 3)):
        row = slice(b, b + 1), slice(t, t + 1)
        leaf = whole.detach()[row]
        leaf = (leaf.clone() if vocabulary % 8 == 0 else leaf).requires_grad_()
        alone = hf.policy_loss(
            leaf, tokens[row], advantages[row[0]], old_logprobs=old[row], statistics=statistics, backend=backend
        )
        alone.loss.backward()
        assert alone.logprobs.item() == out.logprobs[b, t].item()
        torch.testing.assert_close(leaf.grad[0, 0], whole.grad[b, t], rtol=0, atol=0)


def test_rows_of_weight_zero_ignore_nan(backend: str, device: torch.device) -> None:
    """A = 0, a caller's weight of 0 and alpha = 0 switch a row off, whatever it holds."""
    logits, tokens, advantages, old = logits_arguments(device)
    weights = torch.ones(5, 4, device=device)
    weights[0, 1] = 0
    logits[2], logits[0, 1], logits[1] = torch.nan, torch.inf, torch.nan
    old[2], old[0, 1] = torch.nan, -torch.inf
    leaf = logits.requires_grad_()
    objective = hf.Objective(weighting=hf.Hysteretic(0.0))
    out = hf.policy_loss(
        leaf,
        tokens,
        advantages,
        old_logprobs=old,
        token_weights=weights,
        objective=objective,
        backend=backend,
    )
    out.loss.backward()
    assert out.loss.isfinite()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[2].any()
    assert not leaf.grad[0, 1].any()
    assert not leaf.grad[1].any()
    assert out.active.tolist() == [[True, False, True, True], *[[b == 3] * 4 for b in range(1, 5)]]


@pytest.mark.parametrize("name", PRESETS)
def test_extreme_log_ratios_stay_finite(name: str, backend: str, device: torch.device) -> None:
    logits, tokens, advantages, _ = logits_arguments(device)
    leaf = logits.requires_grad_()
    objective = hf.Objective.preset(name, kl_coef=0.1, max_length=4)
    extreme = torch.tensor([math.inf, -math.inf, 100.0, -100.0], device=device).expand(5, 4)
    if objective.ratio_level != "token":  # one kind to a response, or their mean would be NaN
        extreme = torch.tensor([[math.inf], [-math.inf], [100.0], [-100.0], [100.0]], device=device).expand(5, 4)
    out = hf.policy_loss(leaf, tokens, advantages, old_logprobs=extreme, ref_logprobs=extreme, objective=objective,
                         backend=backend)  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite()
    assert leaf.grad.isfinite().all()
    # Beyond max_log_ratio every derivative with respect to the log-ratio is zero; a weight on log p stays.
    assert isinstance(objective.shaping, (hf.TruncatedRatio, hf.GammaGate)) or not leaf.grad.any()


def test_transposed_and_sliced_logits(backend: str, device: torch.device) -> None:
    """Only the last dimension has to be contiguous."""
    logits, tokens, advantages, old = logits_arguments(device)
    expected = hf.policy_loss(logits, tokens, advantages, old_logprobs=old, backend=backend)
    padded = torch.zeros(5, 4, 300, device=device)
    padded[..., 50:261] = logits
    for view in (logits.transpose(0, 1).contiguous().transpose(0, 1), padded[..., 50:261]):
        leaf = view.detach().requires_grad_()
        out = hf.policy_loss(leaf, tokens, advantages, old_logprobs=old, backend=backend)
        out.loss.backward()
        torch.testing.assert_close(out.loss.detach(), expected.loss)
        assert leaf.grad.shape == logits.shape


def test_logprob_loss_in_low_precision(device: torch.device) -> None:
    logprobs = torch.tensor([[-1.0, -2.0]], dtype=torch.bfloat16, device=device, requires_grad=True)
    out = hf.logprob_policy_loss(logprobs, torch.tensor([2.0], device=device), objective="dapo")
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert logprobs.grad.dtype == torch.bfloat16
    assert logprobs.grad.tolist() == [[-1.0, -1.0]]


def test_backend_for(device: torch.device, backend: str) -> None:
    tensor = torch.zeros(1, device=device)
    assert hf.backend_for(tensor) == ("triton" if tensor.is_cuda and hf.backend.kernels is not None else "torch")
    assert hf.backend_for(tensor, backend) == backend


def test_more_than_65535_rows(backend: str, device: torch.device) -> None:
    """No grid dimension may run out (65,535 is CUDA's limit for all but the first)."""
    rows = 10 if backend == "triton" and device.type == "cpu" else 70000  # the interpreter has no such limit
    logits = torch.zeros(rows, 1, 2, device=device, requires_grad=True)
    tokens = torch.zeros(rows, 1, dtype=torch.long, device=device)
    out = hf.policy_loss(logits, tokens, torch.ones(rows, device=device), objective="grpo", backend=backend)
    out.loss.backward()
    assert logits.grad[-1, 0].tolist() == pytest.approx([-0.5 / rows, 0.5 / rows], rel=1e-5)


def test_wide_strides_do_not_overflow(backend: str, device: torch.device) -> None:
    """Row offsets past 2^31 elements: a view with a huge stride over a small piece of storage is enough."""
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device)
    logits = storage.as_strided((2, 1, 64), (2**31, 64, 1))
    logits.copy_(torch.randn(2, 1, 64))
    tokens = torch.tensor([[3], [5]], device=device)
    small = hf.token_logprobs(logits.clone(), tokens, backend=backend)
    wide = hf.token_logprobs(logits, tokens, backend=backend)
    assert torch.equal(small.logprobs, wide.logprobs)


def test_gspo_token_is_gspo_with_gradients_of_its_own(backend: str, device: torch.device) -> None:
    """On-policy, advantages 1 and -1 in one response: GSPO's ratio gets their sum, each of GSPO-token's its own."""
    for name, expected in (("gspo", [0.0, 0.0]), ("gspo_token", [-0.5, 0.5])):
        logprobs = torch.full((1, 2), -1.0, device=device, requires_grad=True)
        advantages = torch.tensor([[1.0, -1.0]], device=device)
        hf.logprob_policy_loss(logprobs, advantages, objective=name, backend=backend).loss.backward()
        assert logprobs.grad.tolist() == [expected]


# ---------------------------------------------------------------------------------------------------------------
# per-token tensors in every layout that a trainer's slicing leaves them in: both backends see the same values

Change = Callable[[Tensor], Tensor]


def _stretched(value: Tensor) -> Tensor:
    """Every second entry of a tensor twice as long."""
    return value.repeat_interleave(2, dim=-1)[..., ::2]


def _transposed(value: Tensor) -> Tensor:
    return value.mT.contiguous().mT if value.dim() > 1 else value


def _sliced(value: Tensor) -> Tensor:
    """As ``mask[:, 1:]`` is: rows start off any boundary."""
    return torch.cat([value[..., :1], value], -1)[..., 1:]


def _last_of_three(value: Tensor) -> Tensor:
    return torch.stack([value, value, value], -1)[..., 2]


LAYOUTS: dict[str, Change] = {
    "stretched": _stretched, "transposed": _transposed, "sliced": _sliced, "last of three": _last_of_three,
}  # fmt: skip


def per_token(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logprobs = -3 * torch.rand(3, 4, generator=generator)
    values = {
        "logprobs": logprobs,
        "advantages": torch.randn(3, 4, generator=generator),
        "old_logprobs": logprobs - 0.3 * torch.randn(3, 4, generator=generator),
        "ref_logprobs": logprobs + 0.1 * torch.randn(3, 4, generator=generator),
        "token_weights": torch.rand(3, 4, generator=generator),
        "entropy": torch.rand(3, 4, generator=generator),
        "mask": torch.rand(3, 4, generator=generator) < 0.7,
    }
    values["advantages"][2] = 0.0
    return {name: value.to(device) for name, value in values.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_logprob_loss_of_any_strides(level: Any, layout: str, backend: str, device: torch.device) -> None:
    objective = hf.Objective(ratio_level=level, kl_coef=0.1, entropy_coef=0.01)
    values = per_token(device)

    def run(change: Change, name: str) -> tuple[Tensor, ...]:
        given = {key: change(value) for key, value in values.items()}
        leaves = [given.pop(key).detach().requires_grad_() for key in ("logprobs", "entropy")]
        out = hf.logprob_policy_loss(leaves[0], given.pop("advantages"), entropy=leaves[1], objective=objective,
                                     backend=name, **given)  # fmt: skip
        return out.loss, *torch.autograd.grad(out.loss, leaves), out.logprobs, out.active

    expected = run(lambda value: value.contiguous(), "torch")
    for ours, wanted in zip(run(LAYOUTS[layout], backend), expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-7)


def test_logprobs_expanded_along_the_response(backend: str, device: torch.device) -> None:
    values = per_token(device)
    leaf = values["logprobs"][:, :1].clone().requires_grad_()
    out = hf.logprob_policy_loss(leaf.expand(3, 4), values["advantages"], objective="grpo", backend=backend)
    full = values["logprobs"][:, :1].repeat(1, 4).requires_grad_()
    wanted = hf.logprob_policy_loss(full, values["advantages"], objective="grpo", backend="torch")
    torch.testing.assert_close(out.loss, wanted.loss)
    (gradient,), (expected,) = torch.autograd.grad(out.loss, leaf), torch.autograd.grad(wanted.loss, full)
    torch.testing.assert_close(gradient, expected.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("layout", "objective", "dtype", "skip_inactive"),
    [
        ("stretched", "gspo", "float32", True), ("transposed", "grpo", "float16", False),
        ("sliced", "mhpo_ahpo", "float32", True), ("last of three", "gspo", "float32", False),
        ("expanded", "mhpo_ahpo", "float32", False),
    ],
)  # fmt: skip
def test_per_token_tensors_of_any_strides(
    layout: str, objective: str, dtype: str, skip_inactive: bool, backend: str, device: torch.device
) -> None:
    """All of them at once; one by one in test_token_terms.py."""
    values = per_token(device)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 4, 33, generator=generator).to(device, getattr(torch, dtype))
    tokens = torch.randint(33, (3, 4), generator=generator).to(device)
    mask = values["mask"]
    if layout == "expanded":
        mask = (torch.arange(4, device=device) < 3).expand(3, 4)

    def run(change: Change, name: str) -> tuple[Tensor, ...]:
        leaf = logits.clone().requires_grad_()
        given = {key: change(values[key]) for key in ("advantages", "old_logprobs", "token_weights")}
        out = hf.policy_loss(
            leaf, change(tokens), given.pop("advantages"), mask=mask if layout == "expanded" else change(mask),
            objective=objective, skip_inactive=skip_inactive, backend=name, **given,
        )  # fmt: skip
        return out.loss, *torch.autograd.grad(out.loss, leaf), out.logprobs, out.active

    expected = run(lambda value: value.contiguous(), "torch")
    close = {"rtol": 2e-3, "atol": 1e-6} if dtype == "float16" else {"rtol": 2e-5, "atol": 1e-7}
    for ours, wanted in zip(run(LAYOUTS.get(layout, _sliced), backend), expected, strict=True):
        torch.testing.assert_close(ours, wanted, equal_nan=True, **close)
