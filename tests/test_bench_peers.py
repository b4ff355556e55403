"""Adapters of other projects compute the case's objective or say why not; each is skipped where it is not installed.

Without a GPU their Triton kernels run under Triton's interpreter, which truncates bfloat16 instead of rounding: there
bfloat16 is left out.
"""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import reference
from hpo_fused.bench.cases import Case, Inputs, Shape, draw
from hpo_fused.bench.check import Oracle
from hpo_fused.bench.logprob_loss import plain_logprob_loss
from hpo_fused.bench.providers import Output, Provider, Unavailable, create, liger, linear_peers, peers
from hpo_fused.bench.results import Errors
from hpo_fused.bench.trial import Step
from hpo_fused.objective import Clip, LogFidelity, Objective, SoftGate, TruncatedRatio

DISTRIBUTIONS = {"trl:eager": "trl", "trl:triton": "trl", "liger:triton": "liger_kernel"}
PRESETS = list(Objective.presets())
LIGER_LACKS = ("mhpo", "mhpo_ahpo")
SUPPORTED = [
    (name, preset)
    for name in DISTRIBUTIONS
    for preset in PRESETS
    if name != "liger:triton" or preset not in LIGER_LACKS
]
ROUNDED = ["fp16", "bf16"] if torch.cuda.is_available() else ["fp16"]
CPU = torch.device("cpu")


def tiny_case(**changes: Any) -> Case:
    """A case of milliseconds, of a width that no block divides."""
    values = {"shape": Shape("tiny", 97), "responses": 8, "length": 5, "dtype": "fp32", "ragged": True}
    return Case(**{**values, **changes})


def prepared(name: str, case: Case, device: torch.device) -> Provider:
    """The provider, ready for the case; skips the test where it is not installed."""
    pytest.importorskip(DISTRIBUTIONS[name])
    provider = create(name)
    provider.prepare(case, device)
    return provider


def run(provider: Provider, inputs: Inputs) -> tuple[Output, Tensor]:
    """Output and gradient, as the benchmark takes them."""
    output = provider.forward(inputs, inputs.logits)
    upstream = torch.tensor(inputs.case.upstream, device=inputs.logits.device)
    (gradient,) = torch.autograd.grad(output.loss, (inputs.logits,), upstream)
    return output, gradient


def as_step(output: Output, gradient: Tensor) -> Step:
    """What a trial returns."""
    return Step(output, (gradient,))


def errors_of(name: str, case: Case, device: torch.device) -> Errors:
    """Of a provider against the float64 oracle."""
    inputs = draw(case, device, 0)
    return Oracle.of(inputs).judge(inputs, as_step(*run(prepared(name, case, device), inputs)))


# ---------------------------------------------------------------------------------------------------------------
# logits


@pytest.mark.parametrize(("name", "objective"), SUPPORTED)
def test_every_supported_objective_is_computed(name: str, objective: str, device: torch.device) -> None:
    errors = errors_of(name, tiny_case(objective=objective), device)
    assert errors.complaint == ""
    assert errors.loss < 1e-6
    assert (errors.logprob or 0.0) < 4e-6
    for columns in (errors.target, errors.others):
        assert columns is not None
        assert columns.beyond < 2e-5


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize(
    "changes",
    [
        *({"dtype": dtype, "objective": objective} for dtype in ROUNDED for objective in ("grpo", "gspo")),
        {"shape": Shape("capped", 97, 30.0)},
        {"ragged": False},
        {"inactive": 0.5},
        {"shape": Shape("wide", 5003), "responses": 4, "length": 3},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())).replace(" ", ""),
)
def test_every_kind_of_input(name: str, changes: dict[str, Any], device: torch.device) -> None:
    errors = errors_of(name, tiny_case(**{"objective": "ahpo", **changes}), device)
    assert errors.complaint == ""
    assert errors.loss < 1e-6


def test_trl_eager_is_pytorch_on_every_device(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU TRL hands over to its kernel wherever that takes the arguments."""
    case = tiny_case()
    provider, inputs = prepared("trl:eager", case, device), draw(case, device, 0)

    def kernel(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("the Triton kernel was called")

    monkeypatch.setattr("trl.trainer.utils._fused_logprob_entropy", kernel)
    output, _ = run(provider, inputs)
    assert output.entropy is not None
    exact = reference.token_logprobs(inputs.logits.detach().double(), inputs.tokens)
    torch.testing.assert_close(output.entropy.double(), exact.entropy, rtol=0, atol=1e-5)
    assert output.entropy.shape == inputs.tokens.shape


@pytest.mark.parametrize("objective", LIGER_LACKS)
def test_liger_says_what_it_has_instead(objective: str) -> None:
    with pytest.raises(Unavailable, match=r"grpo, dapo, dr_grpo, gspo, sapo, cispo, hpo, ahpo"):
        peers.liger_shaping(Objective.preset(objective))


@pytest.mark.parametrize(
    "objective",
    [
        Objective("token", Clip(dual=3.0), None, "response"),
        Objective("token", TruncatedRatio(5.0, low=0.1), None, "mean_length"),
        Objective("sequence", SoftGate(), None, "response"),
        Objective("token", LogFidelity(hazard=None), None, "response"),
        Objective.preset("grpo", kl_coef=0.1),
        Objective.preset("grpo", entropy_coef=0.1),
    ],
)
def test_liger_refuses_what_it_would_compute_otherwise(objective: Objective) -> None:
    with pytest.raises(Unavailable):
        peers.liger_shaping(objective)


def test_the_check_notices_another_objective(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """HPO without its weights, or with other bounds."""
    case = tiny_case(objective="hpo")
    provider, inputs = prepared("liger:triton", case, device), draw(case, device, 0)
    with monkeypatch.context() as patch:
        patch.setattr(liger, "weighted_advantages", lambda objective, advantages, mask, length: advantages)
        assert "off by" in Oracle.of(inputs).judge(inputs, as_step(*run(provider, inputs))).complaint
    with monkeypatch.context() as patch:
        narrower = {**peers.liger_shaping(inputs.objective), "epsilon_high": 0.05}
        patch.setattr(liger, "liger_shaping", lambda objective: dict(narrower))
        assert "off by" in Oracle.of(inputs).judge(inputs, as_step(*run(provider, inputs))).complaint
    assert Oracle.of(inputs).judge(inputs, as_step(*run(provider, inputs))).complaint == ""


def test_ligers_layout_is_made_once_and_dies_with_the_inputs(device: torch.device) -> None:
    case = tiny_case(objective="grpo")
    provider, inputs = prepared("liger:triton", case, device), draw(case, device, 0)
    assert isinstance(provider, liger.LigerTriton)
    output, gradient = run(provider, inputs)
    storage = provider.storages[inputs]
    assert storage.shape == (8, 6, 97)
    again, repeated = run(provider, inputs)
    assert provider.storages[inputs] is storage
    assert torch.equal(storage[:, :-1], inputs.logits)  # its own default would have left gradients there
    assert torch.equal(gradient, repeated)
    # Other logits than the inputs' own are computed, too.
    other = inputs.logits.detach().clone().requires_grad_()
    loss = provider.forward(inputs, other).loss
    assert torch.equal(loss, output.loss)
    assert torch.equal(torch.autograd.grad(loss, other)[0], gradient)
    del inputs, output, again, loss
    gc.collect()
    assert len(provider.storages) == 0


# ---------------------------------------------------------------------------------------------------------------
# reasons


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_absent_and_old_peers_say_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(distribution: str) -> str:
        raise peers.metadata.PackageNotFoundError(distribution)

    case = tiny_case(objective="grpo")
    monkeypatch.setattr(peers.metadata, "version", absent)
    with pytest.raises(Unavailable, match=r"is not installed \(pip install '(trl>=1.16|liger-kernel>=0.8)'\)"):
        create(name).prepare(case, CPU)
    monkeypatch.setattr(peers.metadata, "version", lambda distribution: "0.7.9.post1")
    with pytest.raises(Unavailable, match=r"needs (trl>=1.16|liger-kernel>=0.8), this is 0.7.9.post1"):
        create(name).prepare(case, CPU)


@pytest.mark.parametrize("name", ["trl:triton", "liger:triton"])
def test_kernels_need_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.metadata, "version", lambda distribution: "99.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Unavailable, match="needs a GPU"):
        create(name).prepare(tiny_case(objective="grpo"), CPU)


def test_ligers_longest_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.metadata, "version", lambda distribution: "99.0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(Unavailable, match="65535 tokens at most, these have 65536"):
        create("liger:triton").prepare(tiny_case(objective="grpo", length=65536), CPU)


@pytest.mark.parametrize(
    ("old", "new"), [("0.8", "0.8.5"), ("1.9.2", "1.16"), ("1.16", "1.16.0.dev0"), ("1.16", "2"), ("0.8", "0.10rc1")]
)
def test_versions_compare_by_number(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.metadata, "version", lambda distribution: new)
    if new == "0.10rc1":  # a part that is not a number ends the comparison: too old rather than wrong
        with pytest.raises(Unavailable):
            peers.require("peer", old)
    else:
        peers.require("peer", old)


# ---------------------------------------------------------------------------------------------------------------
# the loss after log-probabilities


@pytest.mark.parametrize("objective", PRESETS)
@pytest.mark.parametrize("ragged", [False, True])
def test_the_eager_loss_is_the_reference(objective: str, ragged: bool) -> None:
    inputs = draw(tiny_case(objective=objective, ragged=ragged, inactive=0.25), CPU, 0)
    logprobs = inputs.exact_logprobs.float().requires_grad_()
    exact = inputs.exact_logprobs.clone().requires_grad_()
    loss = plain_logprob_loss(inputs.objective, logprobs, inputs.advantages, inputs.old_logprobs, inputs.mask)
    expected = reference.logprob_policy_loss(
        exact, inputs.advantages, old_logprobs=inputs.old_logprobs, mask=inputs.mask, objective=inputs.objective
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    gradients = (torch.autograd.grad(value, leaf)[0] for value, leaf in ((loss, logprobs), (expected, exact)))
    got, wanted = gradients
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-8)


TRAINER_OPTIONS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "sapo": {"loss_type": "sapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
}


@pytest.mark.parametrize("objective", TRAINER_OPTIONS)
def test_presets_are_what_trls_trainer_computes(objective: str) -> None:
    """GRPOTrainer's own loss, called with log-probabilities in the place of a model."""
    pytest.importorskip("trl", minversion="1.16")
    from trl.trainer.grpo_trainer import GRPOTrainer

    inputs = draw(tiny_case(objective=objective), CPU, 0)
    assert inputs.mask is not None
    logprobs = inputs.exact_logprobs.clone().requires_grad_()
    ids, mask = inputs.tokens, inputs.mask.long()
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda value, reduction: value, gather=lambda value: value, gather_for_metrics=None
    )
    values = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        "_metrics": {"train": defaultdict(list)},
        "_entropy_bonus_enabled": False,
        "accelerator": accelerator,
        "args": SimpleNamespace(
            delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1
        ),
        "aux_loss_enabled": False,
        "beta": 0.0,
        "current_gradient_accumulation_steps": 1,
        "epsilon_high": 0.2,
        "epsilon_low": 0.2,
        "importance_sampling_level": "token",
        "max_completion_length": inputs.case.length,
        "model": SimpleNamespace(training=True),
        "off_policy_mask_threshold": None,
        "top_entropy_quantile": 1.0,
        "use_vllm": False,
    }
    trainer = SimpleNamespace(**{**values, **TRAINER_OPTIONS[objective]})
    batch = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": inputs.advantages.double(),
        "old_per_token_logps": inputs.old_logprobs.double(),
        "num_items_in_batch": mask.sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    exact = inputs.exact_logprobs.clone().requires_grad_()
    expected = reference.logprob_policy_loss(
        exact, inputs.advantages, old_logprobs=inputs.old_logprobs, mask=inputs.mask, objective=inputs.objective
    )
    limit = 1e-7 if objective == "sapo" else 1e-14  # TRL keeps SAPO's temperatures in float32
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=limit)
    (got,), (wanted,) = torch.autograd.grad(loss, logprobs), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=limit)


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


def test_cce_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.metadata, "version", lambda distribution: "99.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(Unavailable, match="needs a GPU"):
        check_linear(linear_peers.cce, of_preset("grpo"), CPU)
