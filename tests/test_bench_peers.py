"""Adapters of other projects compute the case's objective or say why not; each is skipped where it is not installed.

Without a GPU their Triton kernels run under Triton's interpreter, which truncates bfloat16 instead of rounding: there
bfloat16 is left out.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import reference
from hpo_fused.bench.cases import MODES, Case, Inputs, Mode, Op, Shape, draw
from hpo_fused.bench.check import Oracle
from hpo_fused.bench.linear import providers as of_heads
from hpo_fused.bench.logprob_loss import plain_logprob_loss
from hpo_fused.bench.providers import PROVIDERS, Output, Provider, Unavailable, create, liger, peers
from hpo_fused.bench.results import Errors
from hpo_fused.bench.run import Bench, _produce
from hpo_fused.bench.trial import Step
from hpo_fused.objective import Clip, LogFidelity, Objective, SoftGate, TruncatedRatio

from .bench_helpers import linear_case

DISTRIBUTIONS = {"trl:eager": "trl", "trl:triton": "trl", "liger:triton": "liger_kernel"}
PRESETS = list(Objective.presets())
LIGER_LACKS = ("mhpo", "mhpo_ahpo")
SUPPORTED = [
    (name, preset)
    for name in DISTRIBUTIONS
    for preset in PRESETS
    if name != "liger:triton" or preset not in LIGER_LACKS
]
# Which operations an adapter has, and in which modes.
OPS: dict[str, dict[Op, tuple[Mode, ...]]] = {
    "trl:eager": {"logits": MODES, "logprobs": MODES},
    "trl:triton": {"logits": MODES, "logprobs": MODES},
    "liger:triton": {"logits": MODES},
    "liger:logprobs": {"logprobs": ("forward",)},
}
INSTALLED = {"trl": "trl", "liger": "liger_kernel", "cce": "cut_cross_entropy"}  # by the name's first part
ROUNDED = ["fp16", "bf16"] if torch.cuda.is_available() else ["fp16"]
CPU = torch.device("cpu")


def tiny_case(**changes: Any) -> Case:
    """A case of milliseconds, of a width that no block divides."""
    values = {"shape": Shape("tiny", 97), "responses": 8, "length": 5, "dtype": "fp32", "ragged": True}
    return Case(**{**values, **changes})


def prepared(name: str, case: Case, device: torch.device) -> Provider:
    """The provider, ready for the case; skips the test where it is not installed."""
    pytest.importorskip(INSTALLED[name.partition(":")[0]])
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


@pytest.mark.parametrize("changes", [{}, {"ragged": False, "shape": Shape("capped", 97, 30.0)}])
@pytest.mark.parametrize(
    ("name", "op", "mode"),
    [(name, op, mode) for name, ops in OPS.items() for op, modes in ops.items() for mode in modes],
)
def test_every_mode_of_every_operation(
    name: str, op: Op, mode: Mode, changes: dict[str, Any], device: torch.device
) -> None:
    case = tiny_case(objective="ahpo", op=op, mode=mode, **changes)
    inputs = draw(case, device, 0)
    bench = Bench(prepared(name, case, device), inputs)
    bench.before()
    step = bench.step()
    oracle = Oracle.of(inputs)
    errors = oracle.judge(inputs, step)
    assert errors.complaint == ""
    assert len(step.gradients) == (mode != "forward")
    assert (errors.target is None) == (mode == "forward")
    assert (errors.loss is None) == (op == "logprobs")
    assert (errors.logprob is None) == (name == "liger:triton")
    told = step.output.loss if op == "logits" else step.output.logprobs
    assert told is not None
    wrong = step.output._replace(**{"loss" if op == "logits" else "logprobs": 1.01 * told + 0.01})
    assert "off by" in oracle.judge(inputs, step._replace(output=wrong)).complaint


@pytest.mark.parametrize(
    ("name", "op", "mode", "reason"),
    [
        ("liger:logprobs", "logprobs", "gradient", "has no backward: mode forward only"),
        ("liger:logprobs", "logprobs", "both", "has no backward: mode forward only"),
        ("liger:logprobs", "logits", "forward", "makes no loss"),
        ("liger:triton", "logprobs", "forward", "no differentiable log-probabilities"),
    ],
)
def test_what_an_adapter_has_not_is_said_before_it_runs(
    name: str, op: Op, mode: Mode, reason: str, device: torch.device
) -> None:
    with pytest.raises(Unavailable, match=reason):
        prepared(name, tiny_case(objective="grpo", op=op, mode=mode), device)


@pytest.mark.parametrize("name", PROVIDERS)
def test_operations_are_told_by_the_methods(name: str) -> None:
    ops = create(name).ops()
    assert ops == tuple(OPS.get(name, {"logits": MODES, "logprobs": MODES}))
    inputs = draw(tiny_case(), CPU, 0)
    for op, method in (("logits", "forward"), ("logprobs", "token_logprobs")):
        if op not in ops:
            with pytest.raises(Unavailable):
                getattr(create(name), method)(inputs, inputs.logits)


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_ligers_gradient_in_the_logits_storage(objective: str, softcap: float | None, device: torch.device) -> None:
    """In its own layout from the start: no copy, and the gradient where the logits were."""
    case = tiny_case(objective=objective, shape=Shape("tiny", 97, softcap))
    provider, inputs = prepared("liger:triton", case, device), draw(case, device, 0)
    assert isinstance(provider, liger.LigerTriton)
    plain, expected = run(provider, inputs)
    provider = create("liger:triton", inplace=True)
    assert isinstance(provider, liger.LigerTriton)
    provider.prepare(case, device)
    room = provider.room(inputs)
    assert room.shape == inputs.logits.shape
    anchor = torch.empty(0, device=device, requires_grad=True)
    for _ in range(2):  # the second time over the first one's gradient
        room.copy_(inputs.logits.detach())
        logits = _produce(anchor, room)
        output = provider.forward(inputs, logits)
        assert len(provider.storages) == 0  # no copy of the logits was made
        (gradient,) = torch.autograd.grad(output.loss, (logits,))
        assert (gradient.data_ptr() == room.data_ptr()) == (softcap is None)
        assert torch.equal(gradient, expected)
        assert output.loss is not None
        assert plain.loss is not None
        assert torch.equal(output.loss.detach(), plain.loss.detach())
        assert torch.equal(room, inputs.logits) == (softcap is not None)


# ---------------------------------------------------------------------------------------------------------------
# reasons


PEERS = [*OPS, "trl:chunked", "liger:chunked", "cce"]


def reason_of(name: str) -> str:
    """Why a peer cannot run on a CPU, by what it says itself and by preparing it for a case; "" if it can."""
    linear = name not in OPS
    found = []
    for act in ("available", "prepare"):
        provider: Any = of_heads.create(name) if linear else create(name)
        case = linear_case() if linear else tiny_case(objective="grpo", op=next(iter(OPS[name])), mode="forward")
        try:
            provider.available(CPU) if act == "available" else provider.prepare(case, CPU)
        except Unavailable as reason:
            found.append(str(reason))
    assert len(found) in (0, 2)
    assert len(set(found)) <= 1
    return found[0] if found else ""


def absent(distribution: str) -> str:
    """In the place of ``importlib.metadata.version``."""
    raise peers.metadata.PackageNotFoundError(distribution)


def test_absent_peers_give_one_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a report has one line for all of them."""
    monkeypatch.setattr(peers.metadata, "version", absent)
    assert {reason_of(name) for name in PEERS} == {"not installed (extra: peers)"}


@pytest.mark.parametrize("name", PEERS)
def test_old_peers_say_what_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {"trl": "trl>=1.16", "liger": "liger-kernel>=0.8", "cce": "cut-cross-entropy>=25.1"}
    monkeypatch.setattr(peers.metadata, "version", lambda distribution: "0.7.9.post1")
    assert reason_of(name) == f"needs {needed[name.partition(':')[0]]}, this is 0.7.9.post1"


def test_reasons_are_one_line_of_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="needs the bench extra")
    from hpo_fused.bench import report
    from hpo_fused.bench.linear import report as linear_report
    from hpo_fused.bench.linear.results import LinearResult
    from hpo_fused.bench.linear.run import run_linear
    from hpo_fused.bench.results import MemoryRow, Result
    from hpo_fused.bench.run import run_case
    from hpo_fused.bench.trial import Settings

    class Silent:
        def stage(self, text: str, *, timing: bool = False) -> None: ...
        def advance(self, cases: float) -> None: ...

    monkeypatch.setattr(peers.metadata, "version", absent)
    reason, untimed = "skipped: not installed (extra: peers)", Settings(CPU, 0, 0.0)
    result = Result({}, {})
    run_case(tiny_case(), [create("eager"), *map(create, OPS)], untimed, result.rows, Silent())
    assert [line.strip() for line in report.notes(result) if "installed" in line] == [f"{', '.join(OPS)}: {reason}"]

    linear = LinearResult({}, {}, "linear")
    names = [name for name in PEERS if name not in OPS]
    run_linear(linear_case(), [0.0], [*map(of_heads.create, names)], untimed, linear.rows, Silent())
    for name in names:
        row = MemoryRow("tokens", linear_case(), name, "cpu")
        row.status, row.note = "skipped", linear.rows[0].note
        linear.memory.append(row)
    assert list(linear_report.remarks(linear)) == [f"{', '.join(names)}: {reason}"]
    # Who was measured somewhere is named with the places where it was not.
    linear.rows[0].status, linear.rows[0].note = "ok", ""
    (line,) = (line for line in linear_report.remarks(linear) if "installed" in line)
    assert line == f"liger:chunked, cce, memory of trl:chunked at 32 tokens: {reason}"


def test_kernels_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.metadata, "version", lambda distribution: "99.0")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = {reason_of(name) for name in ("trl:triton", "liger:triton", "liger:logprobs", "cce")}
    (reason,) = reasons
    assert reason.startswith("needs a GPU")
    with pytest.raises(Unavailable) as ours:
        create("hpo_fused:triton").available(CPU)
    assert str(ours.value) == reason


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
# side by side with this package


@pytest.mark.parametrize("module", ["trl.trainer.grpo_trainer", "liger_kernel.transformers.grpo_loss"])
def test_peers_can_be_imported_beside_us(module: str) -> None:
    """transformers imports Hugging Face's distribution ``kernels``: the checkout's folder must not take its place."""
    root = Path(__file__).parent.parent
    if any(Path(entry or ".").resolve() == root for entry in sys.path):
        pytest.skip("started as python -m pytest, which puts the checkout on Python's path")
    pytest.importorskip(module.partition(".")[0])
    importlib.import_module(module)
    theirs = sys.modules.get("kernels")
    assert theirs is None or not str(theirs.__file__).startswith(str(root))
