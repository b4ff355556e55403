"""The backward contract: scaling, second backward, in place, what is handed over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import autograd

from .samples import Sample, every_path, logits_arguments

TOKEN_AND_SEQUENCE = ["grpo", "gspo"]


# ---------------------------------------------------------------------------------------------------------------
# from logits and from hidden states alike


def agree(ours: Any, expected: Any, **tolerance: float) -> None:
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0, "atol": 0}), equal_nan=True)


def gradients(inputs: list[Tensor]) -> list[Tensor]:
    """Copies of what lies in .grad."""
    return [leaf.grad.clone() for leaf in inputs]


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_second_backward_raises(name: str, dtype: torch.dtype, path: str, device: torch.device) -> None:
    sample = Sample(path, device, dtype=dtype)
    inputs = sample.leaves()
    loss = sample.loss(inputs, objective=name).loss
    (loss * 2).backward(retain_graph=True)
    kept = gradients(inputs)
    with pytest.raises(RuntimeError, match="second time"):
        (loss * 3).backward()
    agree(gradients(inputs), kept)


@every_path
@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_double_backward_raises(name: str, path: str, device: torch.device) -> None:
    sample = Sample(path, device)
    inputs = sample.leaves()
    loss, logprobs = sample.loss(inputs, objective=name).loss, sample.logprobs(inputs).logprobs
    for leaf in inputs:
        # The second term keeps the sum attached: a gradient that merely lacked a graph would go unnoticed.
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(loss + leaf.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(logprobs.sum(), leaf, create_graph=True)


@every_path
@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_loss_may_be_changed_in_place(name: str, path: str, device: torch.device) -> None:
    sample = Sample(path, device)
    inputs, twins = sample.leaves(), sample.leaves()
    loss = sample.loss(inputs, objective=name).loss
    with torch.no_grad():
        loss.sub_(0.125)
    loss -= 0.25
    loss *= 0.5
    loss.backward()
    (0.5 * sample.loss(twins, objective=name).loss).backward()
    agree(gradients(inputs), gradients(twins))


@every_path
@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_no_gradient_wanted(name: str, path: str, device: torch.device) -> None:
    sample = Sample(path, device)
    inputs = sample.leaves()
    with torch.no_grad():
        quiet, quiet_logprobs = sample.loss(inputs, objective=name).loss, sample.logprobs(inputs)
    with torch.inference_mode():
        inference, logprobs = sample.loss(inputs, objective=name).loss, sample.logprobs(inputs)
    assert not quiet.requires_grad
    assert not quiet_logprobs.logprobs.requires_grad
    assert quiet.item() == inference.item() == sample.loss(inputs, objective=name).loss.item()
    agree(logprobs, quiet_logprobs)


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_does_not_matter(dtype: torch.dtype, path: str, device: torch.device) -> None:
    sample = Sample(path, device)
    results = []
    for default in (torch.float32, dtype):
        inputs = sample.leaves()
        torch.set_default_dtype(default)
        try:
            out = sample.loss(inputs, temperature=0.7)
            out.loss.backward()
            metrics = out.metrics()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((out.loss.detach(), out.logprobs, metrics["ratio_mean"], *gradients(inputs)))
    agree(*results)


@every_path
def test_upstream_gradients_of_any_shape(path: str, device: torch.device) -> None:
    """Expanded (from sum), transposed, of one output, of some rows only."""
    sample = Sample(path, device)
    inputs, twins, factor = sample.leaves(), sample.leaves(), torch.randn(4, 5, device=device)
    log_p = sample.logits(twins).log_softmax(-1)
    chosen = log_p.gather(-1, sample.tokens.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    result = sample.logprobs(inputs)
    for build_loss in (
        lambda lp, h: lp.sum(),
        lambda lp, h: h.sum(),
        lambda lp, h: (lp.t() * factor).sum() + (h * factor.t()).sum(),
        lambda lp, h: lp[:, 1:].sum() - h[::2].mean(),
    ):
        ours = torch.autograd.grad(build_loss(*result), inputs, retain_graph=True)
        agree(ours, torch.autograd.grad(build_loss(chosen, entropy), twins, retain_graph=True), rtol=1e-4, atol=1e-5)


@every_path
def test_backward_of_log_probabilities_may_run_again(path: str, device: torch.device) -> None:
    """It recomputes: the second result is as right as the first, and adds to it."""
    sample = Sample(path, device)
    inputs = sample.leaves()
    out = sample.logprobs(inputs)
    total = out.logprobs.sum() - 0.1 * out.entropy.sum()
    total.backward(retain_graph=True)
    first = gradients(inputs)
    total.backward()
    assert all(gradient.abs().max() > 0.1 for gradient in first)
    agree(gradients(inputs), [2 * gradient for gradient in first], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# from logits


@pytest.mark.parametrize(
    ("taken", "like"),
    [
        (lambda z: z, False),
        (lambda z: z[:, :-1], True),  # rows of an odd number of entries, one row in five left out
        (lambda z: z[1:], True),  # contiguous, but off a 16-byte boundary
        (lambda z: z[:, :1], False),  # room of the same strides would be five times as large
        (lambda z: z[:, :1].expand(3, 4, 37), False),
        (lambda z: z[..., :32], True),
    ],
)
def test_room_for_the_gradient_is_aligned_as_the_logits_are(taken: Any, like: bool, device: torch.device) -> None:
    kernels = pytest.importorskip("hpo_fused.kernels.launch", reason="needs Triton")
    logits = taken(torch.randn(3, 5, 37, device=device).bfloat16())
    room = autograd._gradient_like(logits)
    assert room.shape == logits.shape
    assert room.dtype == logits.dtype
    assert room.untyped_storage().nbytes() <= 1.25 * 2 * logits.numel() + 512
    assert kernels.same_alignment(logits, room) or not like
    for first, second in zip(room.flatten(0, 1)[:-1], room.flatten(0, 1)[1:], strict=True):
        assert abs(second.data_ptr() - first.data_ptr()) >= 2 * logits.shape[-1], "rows overlap"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
@pytest.mark.parametrize("sliced", [False, True])
def test_inplace_gives_the_same_gradient(
    name: str, sliced: bool, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    logits, tokens, advantages, old = logits_arguments(device, 37, dtype)
    if sliced:
        tokens, old = tokens[:, :-1], old[:, :-1]
    gradients = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        produced = leaf * 1  # what a language-model head would return
        view = produced[:, :-1] if sliced else produced
        pointer, version = produced.data_ptr(), produced._version
        seen: list[int] = []
        view.register_hook(lambda gradient, seen=seen: seen.append(gradient.data_ptr()))
        out = hf.policy_loss(
            view, tokens, advantages, old_logprobs=old, objective=name, inplace=inplace, backend=backend
        )
        view.register_hook(lambda gradient: None)  # a version that moved under a view must not crash it
        (out.loss * 0.5).backward()
        assert (seen == [pointer]) == inplace
        assert (produced._version > version) == inplace
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_reading_overwritten_logits_raises(name: str, backend: str, device: torch.device) -> None:
    """Another term of the loss that saved the logits must fail, not read gradients."""
    logits, tokens, advantages, old = logits_arguments(device, 37)
    produced = logits.requires_grad_() * 1
    other = produced.square().sum()
    loss = hf.policy_loss(
        produced, tokens, advantages, old_logprobs=old, objective=name, inplace=True, backend=backend
    ).loss
    if name == "gspo":  # the two-kernel path overwrites in backward
        loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_writing_to_stored_gradient_raises(backend: str, device: torch.device) -> None:
    logits, tokens, advantages, old = logits_arguments(device, 37)
    produced = logits.requires_grad_() * 1
    loss = hf.policy_loss(produced, tokens, advantages, old_logprobs=old, inplace=True, backend=backend).loss
    with torch.no_grad():
        produced.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_all_masked_stays_attached(name: str, backend: str, device: torch.device) -> None:
    logits, tokens, advantages, old = logits_arguments(device, 37)
    leaf = logits.requires_grad_()
    out = hf.policy_loss(
        leaf, tokens, advantages, old_logprobs=old, mask=torch.zeros_like(tokens), objective=name, backend=backend
    )
    assert out.loss.item() == 0
    assert out.loss.requires_grad
    out.loss.backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()
    assert not out.active.any()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_batch(shape: tuple[int, int], backend: str, device: torch.device) -> None:
    logits = torch.randn(*shape, 11, device=device, requires_grad=True)
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    out = hf.policy_loss(logits, tokens, torch.zeros(shape[0], device=device), backend=backend)
    out.loss.backward()
    assert out.loss.item() == 0
    assert logits.grad.shape == logits.shape
    assert all(value.isfinite() for value in out.metrics().values())


def test_float16_survives_a_loss_scaler(backend: str, device: torch.device) -> None:
    """Gradients of 1e-8 vanish in float16; multiplied by 2^16 first, they do not."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 8, 53, generator=generator).to(device, torch.float16)
    tokens = torch.randint(53, (4, 8), generator=generator).to(device)
    advantages = 2e-5 * torch.ones(4, device=device)
    leaf, twin = logits.clone().requires_grad_(), logits.float().requires_grad_()
    (hf.policy_loss(leaf, tokens, advantages, objective="dapo", backend=backend).loss * 2**16).backward()
    (hf.policy_loss(twin, tokens, advantages, objective="dapo", backend="torch").loss * 2**16).backward()
    error = (leaf.grad.float() - twin.grad).square().mean().sqrt() / twin.grad.square().mean().sqrt()
    assert error < 1e-3
    assert (leaf.grad == 0).sum() < leaf.numel() / 1000


def test_stored_gradient_is_handed_over(device: torch.device) -> None:
    """The gradient made in forward becomes the leaf's .grad: no copy of [N, V] in backward."""
    logits = torch.randn(4, 8, 4000, device=device, requires_grad=True)
    out = hf.policy_loss(logits, torch.zeros(4, 8, dtype=torch.long, device=device), torch.ones(4, device=device))
    pointer = out.loss.grad_fn.saved_tensors[0].data_ptr()
    out.loss.backward()
    assert logits.grad.data_ptr() == pointer


def test_hooks_on_packed_views_survive_inplace(backend: str, device: torch.device) -> None:
    produced = (torch.randn(7, 11, device=device, requires_grad=True) * 1)[:-1]
    tokens = torch.zeros(6, dtype=torch.long, device=device)
    out = hf.policy_loss(
        produced,
        tokens,
        torch.ones(2, device=device),
        cu_seqlens=torch.tensor([0, 2, 6], device=device),
        inplace=True,
        backend=backend,
    )
    produced.register_hook(lambda gradient: None)
    out.loss.backward()
