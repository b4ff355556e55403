"""The operators that a compiler sees: registered right, and the same results as the plain calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import ops
from hpo_fused.interface import MASKED, SKIPPED, TERMS, LogitTransform, LossSpec

from .equivalence import Case, build
from .samples import logits_arguments, room_for_statistics
from .test_equivalence import PRESETS

CPU = torch.device("cpu")


def operator_calls(backend: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each operator and arguments; rows of every kind."""
    logits, tokens, _, _ = logits_arguments(CPU, 37)
    logits, targets = logits[:2], tokens[:2].to(torch.int32)
    targets[0, 1], targets[1, 2] = MASKED, SKIPPED
    values = torch.rand(TERMS, 2, 4)
    spec = LossSpec("clip", (0.8, 1.2, torch.inf, torch.inf), 20.0, True, "k3", True, "token")
    statistics, number = room_for_statistics(targets), LogitTransform(0.9, 5.0)
    rows = LogitTransform(1.0, None, 0.5 + torch.rand(2, 4))
    ops.token_statistics(logits, targets, number, statistics, backend)
    c, h = torch.randn(2, 2, 4)
    results, out = torch.zeros(3, 2, 4), torch.zeros_like(logits)
    return {
        "policy_loss": (ops._policy_loss, (logits, targets, values, *spec, *number, results, out, backend)),
        "forward": (ops._policy_loss, (logits, targets, values, *spec, *rows, results[:2], None, backend)),
        "token_statistics": (
            ops._token_statistics, (logits, targets, *rows, *room_for_statistics(targets), backend)
        ),
        "token_gradient": (
            ops._token_gradient, (logits, targets, *statistics, c * (targets >= 0), None, *rows, out, backend)
        ),
        "with_entropy": (
            ops._token_gradient, (logits, targets, *statistics, c * (targets >= 0), h, *number, out, backend)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["policy_loss", "forward", "token_statistics", "token_gradient", "with_entropy"])
def test_opcheck(name: str) -> None:
    """Schema and what it says is written, fakes, and tracing with symbolic sizes."""
    torch.library.opcheck(*operator_calls("torch")[name])


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compiles_as_one_graph(name: str, layout: str) -> None:
    """torch.compile(fullgraph=True) of a step that calls the op gives the eager step's loss and gradient."""
    case = Case(f"compile-{name}-{layout}", PRESETS[name], layout=layout, small_ratios=name == "gspo")
    made = build(case, CPU)

    def step(base: Tensor) -> Tensor:
        logits = base[:, :-1] if layout == "padded" else base
        out = hf.policy_loss(logits * 1.5, *made.positional, **made.keywords)
        return out.loss * 2 + out.metric_sums().values.sum() * 0

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = made.base.detach().clone().requires_grad_()
        loss = function(leaf)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[1][0], results[0][0])
    torch.testing.assert_close(results[1][1], results[0][1], equal_nan=True)


TEMPERATURES = (1.0, 0.9, 0.8, torch.linspace(0.5, 2.0, 20).view(5, 4), torch.linspace(2.0, 0.5, 5))


@pytest.mark.parametrize(
    ("objective", "dynamic", "temperatures"),
    [
        (None, None, TEMPERATURES),
        (None, True, TEMPERATURES),
        ("gspo", True, TEMPERATURES[1:4:2]),  # another path: a number, and one for each token
        ("grpo", None, TEMPERATURES[:1]),  # another name
        ("hpo", None, TEMPERATURES[:1]),
    ],
    ids=["default", "default-dynamic", "gspo-dynamic", "grpo", "hpo"],
)
@torch._dynamo.config.patch(recompile_limit=64)  # counted over all parameters of this test
def test_preset_names_and_changing_values_compile(
    objective: str | None, dynamic: bool | None, temperatures: tuple[float | Tensor, ...]
) -> None:
    """The default call, presets by name, symbolic sizes, and temperatures that change between calls."""
    logits, tokens, advantages, old = logits_arguments(CPU, 37)
    options = {} if objective is None else {"objective": objective}

    def step(z: Tensor, temperature: float | Tensor) -> Tensor:
        return hf.policy_loss(z, tokens, advantages, old_logprobs=old, temperature=temperature, **options).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for temperature in temperatures:
        gradients = [
            torch.autograd.grad(f(z, temperature), z)[0]
            for f in (step, compiled)
            for z in (logits.clone().requires_grad_(),)
        ]
        torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("temperature", [0.8, torch.linspace(0.5, 2.0, 5)], ids=["number", "tensor"])
def test_compiled_token_logprobs(temperature: float | Tensor) -> None:
    logits, tokens, _, _ = logits_arguments(CPU, 37)

    def step(z: Tensor) -> Tensor:
        result = hf.token_logprobs(z, tokens, temperature=temperature)
        return result.logprobs.sum() - 0.1 * result.entropy.sum()

    gradients = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        function(leaf).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
