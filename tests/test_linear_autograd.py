"""Heads as models have them: tied, views, frozen, half under autocast, sharded; and the backward contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hpo_fused as hf

from .samples import hidden_arguments, leaves

TOKEN_AND_SEQUENCE = ["mhpo_ahpo", "gspo"]


def plain(hidden: Tensor, weight: Tensor, tokens: Tensor, advantages: Tensor, **options: Any) -> hf.PolicyLossOutput:
    """The same by way of logits."""
    bias = options.pop("bias", None)
    return hf.policy_loss(nn.functional.linear(hidden, weight, bias), tokens, advantages, **options)


def linear(hidden: Tensor, weight: Tensor, tokens: Tensor, advantages: Tensor, **options: Any) -> hf.PolicyLossOutput:
    """In chunks of 6 rows."""
    return hf.linear_policy_loss(hidden, weight, tokens, advantages, chunk_bytes=6 * weight.shape[0] * 4, **options)


def close(ours: Tensor | None, expected: Tensor | None) -> None:
    assert ours is not None
    assert expected is not None
    assert expected.abs().max() > 1e-4
    # An entry is the sum of terms below 0.5, each known to what a row's arithmetic is (ROW_LIMIT, 4e-6).
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------
# heads


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_module_and_backward(name: str, device: torch.device) -> None:
    """nn.Linear with a bias, .backward() into .grad, on top of what is there."""
    values, _, tokens, advantages, old = hidden_arguments(device)
    torch.manual_seed(0)
    head, twin = (nn.Linear(24, 211, device=device) for _ in range(2))
    twin.load_state_dict(head.state_dict())
    for module, loss in ((head, linear), (twin, plain)):
        (hidden,) = leaves(values)
        for factor in (1.0, 2.0):  # two backward calls into one .grad
            out = loss(hidden, module.weight, tokens, advantages, bias=module.bias, old_logprobs=old, objective=name)
            (out.loss * factor).backward()
        module.hidden = hidden
    close(head.weight.grad, twin.weight.grad)
    close(head.bias.grad, twin.bias.grad)
    close(head.hidden.grad, twin.hidden.grad)


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_tied_embedding(name: str, device: torch.device) -> None:
    """One parameter, embedding and head: its gradient is the sum of both uses."""
    _, weight, tokens, advantages, old = hidden_arguments(device)
    inputs = tokens.roll(1, 1)
    gradients = []
    for loss in (linear, plain):
        embedding = nn.Embedding.from_pretrained(weight.clone(), freeze=False)
        hidden = torch.tanh(embedding(inputs)) * 2
        loss(hidden, embedding.weight, tokens, advantages, old_logprobs=old, objective=name).loss.backward()
        gradients.append(embedding.weight.grad)
    close(*gradients)


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["rows", "columns", "transposed", "strided"])
def test_head_as_a_view(name: str, view: str, dtype: torch.dtype, device: torch.device) -> None:
    """A padded vocabulary's first rows, a piece of a wider matrix, [H, V] transposed, every other row: the gradient
    reaches the base."""
    values, weight, tokens, advantages, old = hidden_arguments(device, dtype=dtype)
    base, take = {
        "rows": (torch.cat([weight, weight[:13] * 9]), lambda w: w[:211]),
        "columns": (torch.cat([weight, weight[:, :5]], 1), lambda w: w[:, :24]),
        "transposed": (weight.t().contiguous(), lambda w: w.t()),
        "strided": (weight.repeat_interleave(2, 0), lambda w: w[::2]),
    }[view]
    gradients = []
    for loss in (linear, plain):
        leaf, hidden = leaves(base, values)
        loss(hidden, take(leaf), tokens, advantages, old_logprobs=old, objective=name).loss.backward()
        gradients.append((leaf.grad, hidden.grad))
    for ours, expected in zip(*gradients, strict=True):
        if dtype == torch.float32:
            close(ours, expected)
        else:  # another order of sums, other roundings
            error = (ours - expected).float().square().mean().sqrt() / expected.float().square().mean().sqrt()
            assert error < 1e-2


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
@pytest.mark.parametrize("view", ["steps", "transposed", "columns", "expanded"])
def test_hidden_as_a_view(name: str, view: str, device: torch.device) -> None:
    values, weight, tokens, advantages, old = hidden_arguments(device)
    base, take = {
        "steps": (torch.cat([values, values[:, :1] * torch.nan], 1), lambda h: h[:, :-1]),
        "transposed": (values.transpose(0, 1).contiguous(), lambda h: h.transpose(0, 1)),
        "columns": (values.repeat_interleave(2, -1), lambda h: h[..., ::2]),
        "expanded": (values[:1].clone(), lambda h: h.expand(5, 4, 24)),
    }[view]
    gradients = []
    for loss in (linear, plain):
        leaf, head = leaves(base, weight)
        hidden = take(leaf)
        if loss is plain:
            hidden = hidden.contiguous()
        loss(hidden, head, tokens, advantages, old_logprobs=old, objective=name).loss.backward()
        gradients.append((leaf.grad, head.grad))
    for ours, expected in zip(*gradients, strict=True):
        close(ours, expected)


def test_frozen_head(device: torch.device) -> None:
    """Low-rank adapters below a frozen head: the hidden states' gradient only, and no graph to the head."""
    values, weight, tokens, advantages, old = hidden_arguments(device)
    head = nn.Linear(24, 211, bias=False, device=device).requires_grad_(False)
    head.load_state_dict({"weight": weight})
    gradients = []
    for loss in (linear, plain):
        torch.manual_seed(1)
        down, up = nn.Linear(24, 2, device=device), nn.Linear(2, 24, device=device)
        hidden = values + up(down(values))
        loss(hidden, head.weight, tokens, advantages, old_logprobs=old).loss.backward()
        assert head.weight.grad is None
        gradients.append((down.weight.grad, up.weight.grad))
    for ours, expected in zip(*gradients, strict=True):
        close(ours, expected)


def test_frozen_body(device: torch.device) -> None:
    values, weight, tokens, advantages, old = hidden_arguments(device)
    (head, main), buffer = leaves(weight, weight), torch.zeros_like(weight)
    (twin,) = leaves(weight)
    linear(values, head, tokens, advantages, old_logprobs=old).loss.backward()
    linear(values, main, tokens, advantages, old_logprobs=old, weight_grad=buffer).loss.backward()
    plain(values, twin, tokens, advantages, old_logprobs=old).loss.backward()
    assert values.grad is None
    close(head.grad, twin.grad)
    close(buffer, twin.grad)


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_equals_the_call_in_its_dtype(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """float32 parameters: the same logits and log-probabilities to the bit, gradients in float32."""
    values, weights, tokens, advantages, old = hidden_arguments(device)
    bias = weights[:, 0].clone()
    results = []
    for autocast in (True, False):
        hidden, weight, offset = leaves(*((v if autocast else v.to(dtype)) for v in (values, weights, bias)))
        with torch.autocast(device.type, dtype, enabled=autocast):
            out = linear(hidden, weight, tokens, advantages, bias=offset, old_logprobs=old, objective=name)
        (out.loss * 16).backward()  # outside autocast, as trainers do
        results.append((out, hidden.grad, weight.grad, offset.grad))
    (ours, *gradients), (expected, *half) = results
    torch.testing.assert_close(ours.loss, expected.loss, rtol=0, atol=0)
    torch.testing.assert_close(ours.logprobs, expected.logprobs, rtol=0, atol=0, equal_nan=True)
    for gradient, rounded in zip(gradients, half, strict=True):
        assert gradient.dtype == torch.float32
        assert rounded.abs().max() > 1e-3
        torch.testing.assert_close(gradient.to(dtype), rounded, rtol=torch.finfo(dtype).eps, atol=1e-7)


def test_autocast_mixes_dtypes(device: torch.device) -> None:
    """A float32 norm's output above a bfloat16 head: what F.linear takes under autocast is taken."""
    values, weights, tokens, advantages, old = hidden_arguments(device)
    hidden, weight = leaves(values, weights.to(torch.bfloat16))
    with torch.autocast(device.type, torch.bfloat16):
        out = linear(hidden, weight, tokens, advantages, old_logprobs=old)
    out.loss.backward()
    assert hidden.grad.dtype == torch.float32
    assert weight.grad.dtype == torch.bfloat16
    twin = values.to(torch.bfloat16), weights.to(torch.bfloat16)
    expected = linear(*twin, tokens, advantages, old_logprobs=old)
    torch.testing.assert_close(out.loss.detach(), expected.loss, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------
# a caller's buffer for the head's gradient


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
@pytest.mark.parametrize("flat", [False, True])
def test_main_grad(name: str, flat: bool, device: torch.device) -> None:
    """Added to what is there, with the upstream factor in it; weight.grad stays None, hidden's and bias's do not."""
    values, weights, tokens, advantages, old = hidden_arguments(device)
    hidden, weight, bias = leaves(values, weights, weights[:, 0])
    twins = leaves(values, weights, weights[:, 0])
    start = torch.randn(211, 24, device=device)
    buffer = start.clone()
    if flat:  # Megatron's buffers are pieces of one flat tensor
        whole = torch.zeros(3 + start.numel() + 5, device=device)
        buffer = whole[3:-5].view(211, 24)
        buffer.copy_(start)
    out = linear(hidden, weight, tokens, advantages, bias=bias, old_logprobs=old, objective=name, weight_grad=buffer)
    assert torch.equal(buffer, start)  # forward does not know the factor: a checkpoint may run it twice
    (out.loss * 3).backward()
    expected = plain(*twins[:2], tokens, advantages, bias=twins[2], old_logprobs=old, objective=name)
    (expected.loss * 3).backward()
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    assert weight.grad is None
    close(buffer - start, twins[1].grad)
    close(hidden.grad, twins[0].grad)
    close(bias.grad, twins[2].grad)
    if flat:
        assert not whole[:3].any()
        assert not whole[-5:].any()


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_main_grad_over_micro_batches(name: str, device: torch.device) -> None:
    """bfloat16 parameters, a float32 buffer: the big batch's gradient, without a rounding for each micro-batch."""
    values, weights, tokens, advantages, old = hidden_arguments(device, dtype=torch.bfloat16)
    statistics = hf.BatchStatistics.from_batch(advantages, torch.ones_like(tokens))
    buffers = []
    for splits in ([5], [1, 1, 1, 2]):
        buffer = torch.zeros(211, 24, device=device)
        for rows in torch.arange(5, device=device).split(splits):
            hidden, weight = leaves(values[rows], weights)
            out = hf.linear_policy_loss(
                hidden, weight, tokens[rows], advantages[rows], old_logprobs=old[rows], objective=name,
                statistics=statistics, logits_dtype=torch.float32, weight_grad=buffer,
            )  # fmt: skip
            out.loss.backward()
            assert hidden.grad is not None
            assert weight.grad is None
        buffers.append(buffer)
    whole, added = buffers
    error = (added - whole).square().mean().sqrt() / whole.square().mean().sqrt()
    # On the CPU each product is rounded to bfloat16, by 2e-3; an accumulation in bfloat16 would add as much each time.
    # Elsewhere a few entries of the logits' gradient are rounded the other way.
    assert error < (3e-3 if device.type == "cpu" else 5e-4)


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_every_backward_adds_to_main_grad(name: str, device: torch.device) -> None:
    """As documented: autograd does not tell which of the inputs' gradients it will use."""
    values, weights, tokens, advantages, old = hidden_arguments(device)
    hidden, weight = leaves(values, weights)
    twins = leaves(values, weights)
    buffer = torch.zeros_like(weights)
    loss = linear(hidden, weight, tokens, advantages, old_logprobs=old, objective=name, weight_grad=buffer).loss
    (gradient,) = torch.autograd.grad(loss, hidden)
    plain(*twins, tokens, advantages, old_logprobs=old, objective=name).loss.backward()
    close(gradient, twins[0].grad)
    close(buffer, twins[1].grad)


# ---------------------------------------------------------------------------------------------------------------
# the backward contract


def test_second_backward_leaves_the_buffer_alone(device: torch.device) -> None:
    values, weights, tokens, advantages, old = hidden_arguments(device)
    (weight,) = leaves(weights)
    buffer = torch.zeros_like(weights)
    loss = linear(values, weight, tokens, advantages, old_logprobs=old, weight_grad=buffer).loss
    loss.backward(retain_graph=True)
    kept = buffer.clone()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert kept.any()
    assert torch.equal(buffer, kept)


@pytest.mark.parametrize("name", [*TOKEN_AND_SEQUENCE, "logprobs"])
@pytest.mark.parametrize("changed", ["hidden", "weight", "bias", "tokens", "mask", "keep"])
def test_inputs_changed_before_backward(name: str, changed: str, device: torch.device) -> None:
    """The right gradient, or an error where backward would need what was overwritten; never another gradient."""
    values, weights, tokens, advantages, old = hidden_arguments(device)
    mask = torch.arange(4, device=device) < torch.tensor([[4], [2], [3], [4], [1]], device=device)

    def step(overwrite: bool) -> tuple[list[Tensor], str]:
        both = leaves(values, weights, weights[:, 0])
        inputs = {"hidden": both[0], "weight": both[1], "bias": both[2], "tokens": tokens.clone(), "mask": mask.clone()}
        inputs["keep"] = torch.full((5, 4, 7), -1, dtype=torch.int32, device=device)
        chosen, given = inputs["tokens"], {"mask": inputs["mask"], "bias": both[2], "keep": inputs["keep"]}
        if name == "logprobs":
            total = hf.linear_token_logprobs(*both[:2], chosen, **given).logprobs.sum()
        else:
            total = linear(*both[:2], chosen, advantages, old_logprobs=old, objective=name, **given).loss
        if overwrite:
            with torch.no_grad():
                inputs[changed].zero_()
        try:
            total.backward()
        except RuntimeError as error:
            return [], str(error)
        return [leaf.grad for leaf in both], ""

    (expected, _), (ours, message) = step(False), step(True)
    assert ours or "modified by an inplace operation" in message
    for gradient, right in zip(ours, expected, strict=False):
        torch.testing.assert_close(gradient, right, rtol=0, atol=0)


@pytest.mark.parametrize("emptied", ["weight", "bias"])
def test_emptied_before_backward(emptied: str, device: torch.device) -> None:
    """As ZeRO-3 does with a gathered parameter: refused where backward would read it, and where not, the gradient."""
    values, weights, tokens, advantages, _ = hidden_arguments(device)

    def gradient(name: str, empty: bool, frozen: bool) -> Tensor | None:
        hidden, weight, bias = leaves(values, weights, weights[:, 0])
        weight.requires_grad_(not frozen)
        bias.requires_grad_(not frozen)
        loss = linear(hidden, weight, tokens, advantages, bias=bias, objective=name).loss
        if empty:
            {"weight": weight, "bias": bias}[emptied].data = torch.empty(0, device=device)
        loss.backward()
        return hidden.grad

    shape = r"\[211, 24\]" if emptied == "weight" else r"\[211\]"
    for name, frozen in (("gspo", False), ("gspo", True), ("grpo", False)):
        with pytest.raises(RuntimeError, match=rf"^{emptied}: expected shape {shape} .* got float32 \[0\].*Gathered"):
            gradient(name, empty=True, frozen=frozen)
    close(gradient("grpo", empty=True, frozen=True), gradient("grpo", empty=False, frozen=True))


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_one_gradient_of_two(name: str, device: torch.device) -> None:
    """autograd.grad for one input alone: the other one's is dropped, not added anywhere."""
    values, weights, tokens, advantages, old = hidden_arguments(device)
    expected = leaves(values, weights)
    plain(*expected, tokens, advantages, old_logprobs=old, objective=name).loss.backward()
    for side in (0, 1):
        both = leaves(values, weights)
        loss = linear(*both, tokens, advantages, old_logprobs=old, objective=name).loss
        (gradient,) = torch.autograd.grad(loss, both[side])
        close(gradient, expected[side].grad)
        assert both[0].grad is both[1].grad is None


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_two_losses_of_one_head(name: str, device: torch.device) -> None:
    """Added up before one backward: each loss keeps its own gradients until then."""
    values, weights, tokens, advantages, old = hidden_arguments(device)
    gradients = []
    for loss in (linear, plain):
        hidden, weight = leaves(values, weights)
        first, second = (
            loss(hidden, weight, tokens, a, old_logprobs=old, objective=name).loss
            for a in (advantages, advantages.flip(0))
        )
        (first - 2 * second).backward()
        gradients.append((hidden.grad, weight.grad))
    for ours, expected in zip(*gradients, strict=True):
        close(ours, expected)


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
@pytest.mark.parametrize("reentrant", [False, True])
def test_under_a_checkpoint(name: str, reentrant: bool, device: torch.device) -> None:
    """Forward runs twice; a caller's buffer still gets the gradient once."""
    values, weights, tokens, advantages, old = hidden_arguments(device)
    for main_grad in (False, True):
        hidden, weight = leaves(values, weights)
        twins = leaves(values, weights)
        buffer = torch.zeros(211, 24, device=device) if main_grad else None

        def step(hidden: Tensor, weight: Tensor = weight, buffer: Tensor | None = buffer) -> Tensor:
            return linear(
                torch.tanh(hidden), weight, tokens, advantages, old_logprobs=old, objective=name, weight_grad=buffer
            ).loss

        checkpoint(step, hidden, use_reentrant=reentrant).backward()
        plain(torch.tanh(twins[0]), twins[1], tokens, advantages, old_logprobs=old, objective=name).loss.backward()
        close(hidden.grad, twins[0].grad)
        close(buffer if main_grad else weight.grad, twins[1].grad)


@pytest.mark.parametrize("name", TOKEN_AND_SEQUENCE)
def test_between_compiled_graphs(name: str, device: torch.device) -> None:
    values, weights, tokens, advantages, old = hidden_arguments(device)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear(hidden * 1.5, weight, tokens, advantages, old_logprobs=old, objective=name).loss * 2

    gradients = []
    for function in (step, torch.compile(step, backend="eager")):
        both = leaves(values, weights)
        function(*both).backward()
        gradients.append([leaf.grad for leaf in both])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
