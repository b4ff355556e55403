"""Other projects' losses from hidden states and head compute the case's objective, or say why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import reference
from hpo_fused.bench.cases import MODES, Mode
from hpo_fused.bench.linear import providers as of_heads
from hpo_fused.bench.linear.check import LinearOracle
from hpo_fused.bench.linear.draw import draw as draw_linear
from hpo_fused.bench.linear.draw import draw_weight
from hpo_fused.bench.linear.exact import Exact
from hpo_fused.bench.linear.run import LinearTrial
from hpo_fused.bench.providers import Output, Unavailable, linear_peers
from hpo_fused.objective import Objective

from .bench_helpers import linear_case

DISTRIBUTIONS = {"trl:eager": "trl", "trl:triton": "trl", "liger:triton": "liger_kernel"}
PRESETS = list(Objective.presets())
LIGER_LACKS = ("mhpo", "mhpo_ahpo")
INSTALLED = {"trl": "trl", "liger": "liger_kernel", "cce": "cut_cross_entropy"}  # by the name's first part
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------
# hidden states and head

LinearPeer = Callable[..., Output]
RELATIVE = {torch.float32: 5e-6, torch.bfloat16: 6e-3}  # bfloat16: the logits' gradient and the result are rounded


def check_linear(
    peer: LinearPeer, objective: Objective, device: torch.device, *, dtype: torch.dtype = torch.float32,
    softcap: float | None = None, masked: bool = True,
) -> Output:  # fmt: skip
    """Hold loss, log-probabilities, entropy and both gradients against float64 at logits rounded as a GEMM's are."""
    generator = torch.Generator().manual_seed(0)
    responses, length, size, vocabulary = 4, 5, 16, 97

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden = normal(responses, length, size).to(device, dtype).requires_grad_()
    weight = (0.7 * normal(vocabulary, size)).to(device, dtype).requires_grad_()
    tokens = torch.randint(vocabulary, (responses, length), generator=generator).to(device)
    advantages = torch.tensor([1.2, -0.8, 0.0, -0.4], device=device)
    mask = (torch.arange(length) < torch.tensor([5, 3, 4, 1])[:, None]).to(device) if masked else None

    x, w = (value.detach().double().requires_grad_() for value in (hidden, weight))
    z = x @ w.t()
    if dtype != torch.float32:
        z = z + (z.detach().to(dtype).double() - z.detach())
    exact = reference.token_logprobs(z, tokens, mask=mask, softcap=softcap)
    noise = 0.3 * normal(responses, length)
    old = (exact.logprobs.detach() + noise.to(device)).float()
    expected = reference.logprob_policy_loss(
        exact.logprobs, advantages, old_logprobs=old, mask=mask, objective=objective
    )
    wanted = torch.autograd.grad(expected, (x, w))

    output = peer(hidden, weight, tokens, advantages, old, mask, objective, softcap)
    torch.testing.assert_close(output.loss.detach().double(), expected.detach(), rtol=0, atol=2e-6)
    for value, truth in ((output.logprobs, exact.logprobs), (output.entropy, exact.entropy)):
        if value is not None:
            assert not value.requires_grad
            torch.testing.assert_close(value.double(), truth.detach(), rtol=0, atol=1e-5)
    for got, truth in zip(torch.autograd.grad(output.loss, (hidden, weight)), wanted, strict=True):
        assert got.dtype == dtype
        error = (got.double() - truth).norm() / truth.norm()
        assert error < RELATIVE[dtype], f"relative error {error:.1e}"
    return output


def of_preset(name: str) -> Objective:
    """A preset, with the length that Dr. GRPO needs."""
    return Objective.preset(name, max_length=5) if name == "dr_grpo" else Objective.preset(name)


@pytest.mark.parametrize("objective", PRESETS)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_trl_chunked(objective: str, softcap: float | None, device: torch.device) -> None:
    pytest.importorskip("trl", minversion="1.16")
    for masked in (True, False):
        output = check_linear(linear_peers.trl_chunked, of_preset(objective), device, softcap=softcap, masked=masked)
        assert output.logprobs is not None
        assert output.entropy is not None


@pytest.mark.parametrize("objective", [name for name in PRESETS if name not in LIGER_LACKS])
def test_liger_chunked(objective: str, device: torch.device) -> None:
    pytest.importorskip("liger_kernel")
    peer = partial(linear_peers.liger_chunked, compiled=False)
    for masked in (True, False):
        assert check_linear(peer, of_preset(objective), device, masked=masked)[1:] == (None, None)


@pytest.mark.parametrize(
    ("objective", "softcap", "reason"),
    [
        (Objective.preset("grpo"), 30.0, "no softcap"),
        (Objective.preset("mhpo_ahpo"), None, "cispo, hpo, ahpo"),
        (Objective.preset("sapo", normalization="mean_length"), None, "sapo by mean_length"),
        (Objective.preset("grpo", normalization="group_mean_length"), None, "grpo by group_mean_length"),
    ],
)
def test_liger_chunked_refuses(objective: Objective, softcap: float | None, reason: str) -> None:
    pytest.importorskip("liger_kernel")
    rows = torch.zeros(2, 3)
    with pytest.raises(Unavailable, match=reason):
        linear_peers.liger_chunked(
            torch.zeros(2, 3, 4), torch.zeros(9, 4), rows.long(), rows[:, 0], rows, None, objective, softcap
        )


@pytest.mark.parametrize("name", ["trl_chunked", "liger_chunked"])
def test_linear_peers_in_bfloat16(name: str, device: torch.device) -> None:
    pytest.importorskip(DISTRIBUTIONS[f"{name.removesuffix('_chunked')}:triton"])
    peer = getattr(linear_peers, name)
    if name == "liger_chunked":
        peer = partial(peer, compiled=False)
    check_linear(peer, of_preset("ahpo"), device, dtype=torch.bfloat16)


@pytest.mark.parametrize("objective", ["grpo", "gspo", "mhpo_ahpo"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_cce(objective: str, softcap: float | None, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU through its PyTorch implementation: Triton's interpreter has no libdevice, which its kernels call."""
    package = pytest.importorskip("cut_cross_entropy")
    native = device.type == "cuda"
    if not native:
        function = partial(package.linear_cross_entropy, impl="torch_compile")
        monkeypatch.setattr(package, "linear_cross_entropy", function)
    with torch.compiler.set_stance("default" if native else "force_eager"):
        for masked in (True, False):
            output = check_linear(linear_peers.cce, of_preset(objective), device, softcap=softcap, masked=masked)
            assert output.logprobs is not None
            assert math.isfinite(output.logprobs.sum().item())


def test_cces_gradient_filter_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for its kernels knows none, so that no result would tell."""
    package = pytest.importorskip("cut_cross_entropy")
    function, filters = package.linear_cross_entropy, []

    def recorded(*arguments: Any, filter_eps: Any = "high", **options: Any) -> Tensor:
        filters.append(filter_eps)
        return function(*arguments, **options, impl="torch_compile")

    monkeypatch.setattr(package, "linear_cross_entropy", recorded)
    with torch.compiler.set_stance("force_eager"):
        check_linear(linear_peers.cce, of_preset("grpo"), CPU)
    assert filters == [None]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["trl:chunked", "liger:chunked", "cce"])
def test_every_mode_of_linear_peers(
    name: str, dtype: str, mode: Mode, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the benchmark runs and judges them; torch.compile, which Liger's loss and the stand-in for cce use, eager."""
    package = pytest.importorskip(INSTALLED[name.partition(":")[0]])
    if name == "cce" and device.type == "cpu":
        function = partial(package.linear_cross_entropy, impl="torch_compile")
        monkeypatch.setattr(package, "linear_cross_entropy", function)
    case = linear_case(mode, dtype, 0.5)
    problem = draw_linear(case, [0.5], device, 0, draw_weight(case.shape, case.torch_dtype, device, 0))
    exact = Exact.of(problem, 0)
    inputs = problem.inputs(0.5, exact.logprobs)
    provider, oracle = of_heads.create(name), LinearOracle(inputs, exact)
    provider.prepare(case, device)
    trial = LinearTrial(provider, inputs)
    with torch.compiler.set_stance("default" if device.type == "cuda" else "force_eager"):
        trial.before()
        step = trial.step()
    errors = provider.judge(oracle, step)
    assert errors is not None
    assert errors.complaint == ""
    assert len(step.gradients) == (0 if mode == "forward" else 2)
    assert step.output.loss is not None
    wrong = step._replace(output=step.output._replace(loss=1.01 * step.output.loss + 0.01))
    told = provider.judge(oracle, wrong)
    assert told is not None
    assert "off by" in told.complaint
    for which in range(len(step.gradients)):
        gradients = list(step.gradients)
        gradients[which] = 1.1 * gradients[which]
        told = provider.judge(oracle, step._replace(gradients=tuple(gradients)))
        assert told is not None
        assert "gradient of" in told.complaint
