"""Mistakes of the linear path that raised no error: each of these was once wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hpo_fused as hf
from hpo_fused import linear_head
from hpo_fused.linear_inputs import gathered


def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 3, 4, generator=generator).to(device).requires_grad_()
    weight = torch.randn(7, 4, generator=generator).to(device).requires_grad_()
    tokens = torch.randint(1, 7, (2, 3), generator=generator).to(device)
    return hidden, weight, tokens, torch.tensor([1.0, -1.0], device=device)


@pytest.mark.parametrize("function", ["linear_policy_loss", "policy_loss"])
@pytest.mark.parametrize("name", ["mhpo_ahpo", "ahpo"])
def test_adaptive_alpha_stays_on_the_device(function: str, name: str, device: torch.device) -> None:
    """masked_fill with a 0-d tensor fetches it to the host on CUDA."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.masked_fill, torch.ops.aten.masked_fill_):
                assert not isinstance(args[2], Tensor), "a value that CUDA would synchronise to read"
            return func(*args, **(kwargs or {}))

    hidden, weight, tokens, advantages = inputs(device)
    with Watch():
        if function == "policy_loss":
            hf.policy_loss(hidden @ weight.t(), tokens, advantages, objective=name)
        else:
            hf.linear_policy_loss(hidden, weight, tokens, advantages, objective=name)


@pytest.mark.parametrize("function", ["loss", "logprobs"])
def test_ids_changed_before_backward(function: str, device: torch.device) -> None:
    hidden, weight, tokens, advantages = inputs(device)
    if function == "loss":
        result = hf.linear_policy_loss(hidden, weight, tokens, advantages, objective="gspo").loss
    else:
        result = hf.linear_token_logprobs(hidden, weight, tokens).logprobs.sum()
    tokens.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_float16_inputs_under_bfloat16_autocast(device: torch.device) -> None:
    """The loss scaler's factor enters before a gradient is rounded to float16, whatever the GEMMs run in."""
    hidden, weight, tokens, advantages = inputs(device)
    low = [value.detach().half().requires_grad_() for value in (hidden, weight)]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = hf.linear_policy_loss(*low, tokens, 1e-7 * advantages, objective="grpo").loss
    (loss * 65536).backward()
    exact = [value.detach().double().float().requires_grad_() for value in low]
    hf.linear_policy_loss(*exact, tokens, 1e-7 * advantages, objective="grpo").loss.backward()
    for got, expected in zip(low, exact, strict=True):
        assert got.grad is not None
        assert expected.grad is not None
        error = (got.grad.float() / 65536 - expected.grad).norm() / expected.grad.norm()
        assert error < 1e-2


def test_bias_makes_no_float32_copy_of_the_logits(device: torch.device) -> None:
    measure = pytest.importorskip("hpo_fused.bench.measure", reason="needs the bench extra")
    rows, width, vocabulary = 1024, 32, 5000
    hidden, weight, bias = (
        torch.randn(*shape, device=device).bfloat16().requires_grad_()
        for shape in ((8, rows // 8, width), (vocabulary, width), (vocabulary,))
    )
    tokens = torch.randint(vocabulary, (8, rows // 8), device=device)
    advantages = torch.randn(8, device=device)

    def step() -> tuple[Tensor, ...]:
        loss = hf.linear_policy_loss(hidden, weight, tokens, advantages, bias=bias).loss
        return torch.autograd.grad(loss, (hidden, weight, bias))

    step()
    peak = measure.peak_extra_bytes(step, device)
    assert peak is not None
    assert peak <= hf.linear_memory(rows, width, vocabulary, bias=True, device=device).peak
    # A float32 copy would be twice the chunk of bfloat16 logits, on top of it.
    without = measure.peak_extra_bytes(
        lambda: torch.autograd.grad(hf.linear_policy_loss(hidden, weight, tokens, advantages).loss, (hidden, weight)),
        device,
    )
    assert peak - without <= rows * vocabulary * 2


def test_memory_under_another_narrow_autocast(device: torch.device) -> None:
    """The gradient's dtype is not the GEMMs': a single chunk, too, is summed in float32 and then cast."""
    memory = hf.linear_memory(64, 512, 150_000, dtype=torch.float16, autocast=torch.bfloat16, device=device)
    assert memory.accumulator == 4 * 512 * 150_000
    same = hf.linear_memory(64, 512, 150_000, dtype=torch.bfloat16, autocast=torch.bfloat16, device=device)
    assert same.accumulator == 0
    assert hf.linear_memory(0, 512, 150_000, dtype=torch.float16, autocast=torch.bfloat16).accumulator == 0


def test_strided_shards_are_refused() -> None:
    """FSDP2 over tensor parallelism: a Shard(0) by comparison (PyTorch 2.8), whose gradient is scattered wrongly."""
    pytest.importorskip("torch.distributed.tensor")
    from torch.distributed.tensor.placement_types import _StridedShard

    class DTensor:
        placements = (_StridedShard(0, split_factor=2),)
        full_tensor = None

    with pytest.raises(ValueError, match=r"weight: expected .* placements Replicate\(\) and Shard\(0\)"):
        gathered("weight", DTensor())  # type: ignore[arg-type]


def test_fake_tensors_tell_nothing_about_the_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(linear_head, "_float32_gemms", {})
    with FakeTensorMode():
        linear_head.float32_gemms(device, torch.bfloat16)
    assert not linear_head._float32_gemms
    linear_head.float32_gemms(device, torch.bfloat16)
    assert linear_head._float32_gemms
