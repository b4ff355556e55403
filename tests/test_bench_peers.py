"""Adapters of other projects compute the case's objective or say why not; each is skipped where it is not installed.

Without a GPU their Triton kernels run under Triton's interpreter, which truncates bfloat16 instead of rounding: there
bfloat16 is left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from hpo_fused import Clip, LogFidelity, Objective, SoftGate, TruncatedRatio
from hpo_fused.bench.cases import MODES, Mode, Operation, Shape
from hpo_fused.bench.check import judge
from hpo_fused.bench.providers import Provider, Unavailable, create, peers

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
LIGER_LACKS = Objective.presets().keys() - set(peers.LIGER_OBJECTIVES.split(", "))


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
        with pytest.raises(Unavailable, match="grpo, dapo, dr_grpo, gspo, luspo, sapo, cispo, hpo, ahpo"):
            stepped(case, provider, device)
        return
    if name == "liger:chunked" and objective == "luspo":
        with pytest.raises(Unavailable, match="not grpo by response_sum"):
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
        Objective("token", TruncatedRatio(5.0, outside="zero"), None, "mean_length"),
        Objective("sequence_token", Clip(), None, "response"),
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
