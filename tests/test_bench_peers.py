"""Adapters of other projects compute the case's objective or say why not; each is skipped where it is not installed.

Without a GPU their Triton kernels run under Triton's interpreter, which truncates bfloat16 instead of rounding: there
bfloat16 is left out.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpo_fused import Clip, LogFidelity, Objective, SoftGate, TruncatedRatio, reference
from hpo_fused.bench.cases import MODES, Mode, Operation, Shape
from hpo_fused.bench.check import judge
from hpo_fused.bench.providers import Provider, Unavailable, create, peers
from hpo_fused.bench.truth import draw

from .bench_helpers import CPU, measured, stepped, tiny, with_gradient, with_loss

MODULES = {"trl": "trl", "liger": "liger_kernel", "cce": "cut_cross_entropy"}  # by the name's first part
PEERS: dict[str, tuple[Operation, ...]] = {
    "trl:eager": ("policy_loss", "token_logprobs"),
    "trl:triton": ("policy_loss", "token_logprobs"),
    "trl:chunked": ("linear_policy_loss", "linear_token_logprobs"),
    "liger:triton": ("policy_loss",),
    "liger:chunked": ("linear_policy_loss",),
    "cce": ("linear_policy_loss", "linear_token_logprobs"),
}
LIGER_LACKS = ("mhpo", "mhpo_ahpo")


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Any:
    """Makes an adapter; on a CPU torch.compile and kernels that the interpreter cannot run are replaced."""

    def make(name: str) -> Provider:
        package = pytest.importorskip(MODULES[name.partition(":")[0]])
        provider = create(name)
        if device.type == "cpu" and name == "liger:chunked":
            monkeypatch.setattr(provider, "compiled", False)
        if device.type == "cpu" and name == "cce":  # the interpreter has no libdevice, which its kernels call
            function = partial(package.linear_cross_entropy, impl="torch_compile")
            monkeypatch.setattr(package, "linear_cross_entropy", function)
        return provider

    with torch.compiler.set_stance("default" if device.type == "cuda" else "force_eager"):
        yield make


@pytest.mark.parametrize("objective", Objective.presets())
@pytest.mark.parametrize(("name", "operation"), [(name, operations[0]) for name, operations in PEERS.items()])
def test_every_supported_objective_is_computed(
    name: str, operation: Operation, objective: str, peer: Any, device: torch.device
) -> None:
    provider, case = peer(name), tiny(operation, objective=objective, ragged=True, inactive=0.25)
    if name.startswith("liger") and objective in LIGER_LACKS:
        with pytest.raises(Unavailable, match="grpo, dapo, dr_grpo, gspo, sapo, cispo, hpo, ahpo"):
            stepped(case, provider, device)
        return
    inputs, truth, step = stepped(case, provider, device)
    errors = judge(inputs, truth, step, provider)
    assert errors.complaint == ""
    assert (errors.loss or 0.0) < 2e-6
    assert (errors.logprob or 0.0) < 1e-5
    assert {name for name, error in errors.gradients.items() if error.median < 1e-4} == errors.gradients.keys()
    # HPO without its weights, another bound or a wrong gradient would be noticed.
    for change in (with_loss(lambda loss: loss + 0.01), with_gradient(0, lambda gradient: 1.1 * gradient)):
        assert "off by" in judge(inputs, truth, change(step), provider).complaint


@pytest.mark.parametrize(
    "fields",
    [{"dtype": "fp16"}, {"dtype": "bf16"}, {"shape": Shape("capped", 97, 48, 30.0)}, {"ragged": True}],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "operation"), [(name, one) for name, operations in PEERS.items() for one in operations]
)
def test_every_mode_and_kind_of_input(
    name: str, operation: Operation, mode: Mode, fields: dict[str, Any], peer: Any, device: torch.device
) -> None:
    provider, case = peer(name), tiny(operation, **{"objective": "ahpo", "mode": mode, **fields})
    if case.dtype == "bf16" and name.endswith("triton") and device.type == "cpu":
        pytest.skip("Triton's interpreter truncates bfloat16")
    if case.shape.softcap is not None and name == "liger:chunked":
        with pytest.raises(Unavailable, match="has no softcap"):
            stepped(case, provider, device)
        return
    inputs, truth, step = stepped(case, provider, device)
    assert judge(inputs, truth, step, provider).complaint == ""
    assert len(step.gradients) == (0 if mode == "forward" else len(inputs.leaves))
    entropy_rows = inputs.needed() if step.output.entropy is not None else None
    assert (entropy_rows is None) == (name.startswith("liger") or name == "cce")


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_ligers_gradient_in_the_logits_storage(softcap: float | None, peer: Any, device: torch.device) -> None:
    """In its own layout from the start: no copy, and the gradient where the logits were."""
    provider: Any = peer("liger:triton")
    fields: dict[str, Any] = {"objective": "grpo", "shape": Shape("tiny", 97, 48, softcap)}
    _, _, plain = stepped(tiny("policy_loss", **fields), provider, device)
    assert len(provider.storages) <= 1
    row = measured(tiny("policy_loss", inplace=True, **fields), provider, repeats=1)["liger:triton"]
    assert (row.status, row.rounds, row.repeats) == ("ok", 1, True)
    _, _, step = stepped(tiny("policy_loss", inplace=True, **fields), provider, device)
    assert torch.equal(step.gradients[0], plain.gradients[0])
    assert len(provider.storages) == 0


@pytest.mark.skipif(not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="PyTorch < 2.13")
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_cross_entropy_is_judged_as_such(dtype: str) -> None:
    provider, case = create("linear_cross_entropy"), tiny("linear_policy_loss", 64, dtype=dtype, inactive=0.5)
    inputs, truth, step = stepped(case, provider)
    assert judge(inputs, truth, step, provider).complaint == ""
    assert "loss off by" in judge(inputs, truth, with_loss(lambda loss: 1.1 * loss)(step), provider).complaint
    assert "gradient" in judge(inputs, truth, with_gradient(1, torch.zeros_like)(step), provider).complaint


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


def reasons(monkeypatch: pytest.MonkeyPatch, version: str | None) -> set[str]:
    """Why the peers cannot run on a CPU where their distributions have this version; None: are absent."""

    def installed(distribution: str) -> str:
        if version is None:
            raise peers.metadata.PackageNotFoundError(distribution)
        return version

    monkeypatch.setattr(peers.metadata, "version", installed)
    found = set()
    for name in PEERS:
        try:
            create(name).available(CPU)
        except Unavailable as reason:
            found.add(str(reason))
    return found


def test_reasons_why_peers_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reasons(monkeypatch, None) == {"not installed (extra: peers)"}
    assert reasons(monkeypatch, "0.7.9.post1") == {
        f"needs {name}, this is 0.7.9.post1" for name in ("trl>=1.16", "liger-kernel>=0.8", "cut-cross-entropy>=25.1")
    }
    (reason,) = reasons(monkeypatch, "99.0")
    assert reason.startswith("needs a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reasons(monkeypatch, "99.0") == set()
    with pytest.raises(Unavailable, match="65535 tokens at most, these have 65536"):
        create("liger:triton").prepare(tiny("policy_loss", 65536 * 64, objective="grpo"), CPU)


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

    inputs, truth = draw(tiny("policy_loss", objective=objective, ragged=True), CPU, 0)
    assert inputs.mask is not None
    logprobs, exact = (truth.logprobs.clone().requires_grad_() for _ in range(2))
    ids, mask = inputs.tokens, inputs.mask.long()
    accelerator = SimpleNamespace(
        num_processes=1, reduce=lambda value, reduction: value, gather=lambda value: value, gather_for_metrics=None
    )
    arguments = SimpleNamespace(delta=None, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, steps_per_generation=1)
    values = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        "_metrics": {"train": defaultdict(list)}, "_entropy_bonus_enabled": False, "accelerator": accelerator,
        "args": arguments, "aux_loss_enabled": False, "beta": 0.0, "current_gradient_accumulation_steps": 1,
        "epsilon_high": 0.2, "epsilon_low": 0.2, "importance_sampling_level": "token",
        "max_completion_length": inputs.case.length, "model": SimpleNamespace(training=True),
        "off_policy_mask_threshold": None, "top_entropy_quantile": 1.0, "use_vllm": False,
    }  # fmt: skip
    trainer = SimpleNamespace(**{**values, **TRAINER_OPTIONS[objective]})
    batch = {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": inputs.advantages.double(), "old_per_token_logps": inputs.old_logprobs.double(),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, batch)
    expected = reference.logprob_policy_loss(
        exact, inputs.advantages, old_logprobs=inputs.old_logprobs, mask=inputs.mask, objective=inputs.objective
    )
    limit = 1e-7 if objective == "sapo" else 1e-14  # TRL keeps SAPO's temperatures in float32
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=limit)
    (got,), (wanted,) = torch.autograd.grad(loss, logprobs), torch.autograd.grad(expected, exact)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=limit)
