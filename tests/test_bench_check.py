"""The benchmark's inputs are those of a trained policy, and its check finds what is wrong with a provider's result."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import reference
from hpo_fused.objective import Objective

pytest.importorskip("rich", reason="needs the bench extra")
testing = pytest.importorskip("typer.testing", reason="needs the bench extra")


from hpo_fused.bench.cases import (  # noqa: E402
    SHAPES,
    Case,
    Inputs,
    Mode,
    Op,
    Shape,
    draw,
    draw_advantages,
    parse_shape,
)
from hpo_fused.bench.check import Oracle, fingerprint  # noqa: E402
from hpo_fused.bench.providers import Output  # noqa: E402
from hpo_fused.bench.results import Errors  # noqa: E402
from hpo_fused.bench.trial import Step  # noqa: E402

from .bench_helpers import as_step, step, tiny_case  # noqa: E402

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------
# inputs


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes(name: str) -> None:
    assert parse_shape(name) is SHAPES[name]


def test_custom_shape() -> None:
    assert parse_shape("custom:V=300,softcap=30") == Shape("custom:V=300,softcap=30", 300, 30.0)


@pytest.mark.parametrize("text", ["qwen", "custom:", "custom:V=x", "custom:V=1", "custom:V=9,softcap=0", "custom:W=3"])
def test_unknown_shape_lists_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown shape .*qwen3, llama3, gemma, gpt2 or custom:V=N"):
        parse_shape(text)


def test_inputs_are_those_of_a_trained_policy() -> None:
    """Log-probabilities as in training, ratios inside and beyond the clip range, advantages of both signs."""
    inputs = draw(Case(Shape("s", 5000), 16, 16), CPU, seed=1)
    assert inputs.logits.dtype == torch.bfloat16
    assert inputs.logits.requires_grad
    exact = reference.token_logprobs(inputs.logits.detach().double(), inputs.tokens).logprobs
    torch.testing.assert_close(inputs.exact_logprobs, exact)
    assert -2.5 < exact.mean() < -0.3
    ratio = (exact - inputs.old_logprobs).exp()
    assert ((ratio > 1.2) | (ratio < 0.8)).double().mean() > 0.03
    assert ((ratio < 1.2) & (ratio > 0.8)).double().mean() > 0.8
    assert (inputs.advantages > 0).any()
    assert (inputs.advantages < 0).any()
    assert (inputs.advantages != 0).all()
    assert inputs.mask is None


def test_equal_seeds_draw_equal_inputs() -> None:
    first, second, other = (draw(tiny_case(), CPU, seed) for seed in (3, 3, 4))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.old_logprobs, second.old_logprobs)
    assert not torch.equal(first.logits, other.logits)


@pytest.mark.parametrize(("inactive", "zeros"), [(0.0, 0), (0.5, 8), (0.75, 12), (1.0, 16)])
def test_inactive_share_is_exact(inactive: float, zeros: int) -> None:
    values = draw_advantages(16, inactive, torch.Generator().manual_seed(0))
    assert int((values == 0).sum()) == zeros
    assert abs(float(values.sum())) < 1e-5  # group-normalised


def test_ragged_inputs_are_masked() -> None:
    mask = draw(tiny_case(ragged=True, length=16), CPU, 0).mask
    assert mask is not None
    assert mask[:, 0].all()
    assert not mask.all()


@pytest.mark.parametrize("tokens", [1, 7, 48, 101, 1024])
def test_case_has_exactly_the_tokens_asked_for(tokens: int) -> None:
    case = Case.of_tokens(Shape("s", 11), tokens, "bf16", "grpo", 0.0, False)
    assert (case.tokens, case.logits_bytes) == (tokens, tokens * 11 * 2)


# ---------------------------------------------------------------------------------------------------------------
# the check


@pytest.mark.parametrize("objective", Objective.presets())
@pytest.mark.parametrize("ragged", [False, True])
def test_plain_loss_is_the_reference(objective: str, ragged: bool) -> None:
    """The baseline does the same work: every preset's loss, log-probabilities, entropy and gradient."""
    case = tiny_case(objective=objective, ragged=ragged, shape=Shape("tiny", 97, 30.0))
    inputs = draw(case, CPU, 0)
    output, gradient = step(inputs)
    z = inputs.logits.detach().double().requires_grad_()
    expected = reference.policy_loss(
        z, inputs.tokens, inputs.advantages, old_logprobs=inputs.old_logprobs, mask=inputs.mask,
        objective=inputs.objective, softcap=30.0,
    )  # fmt: skip
    (exact,) = torch.autograd.grad(expected.loss, z)
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-3, atol=1e-8)
    keep = slice(None) if inputs.mask is None else inputs.mask
    assert output.entropy is not None
    torch.testing.assert_close(output.logprobs.double()[keep], expected.logprobs[keep], rtol=0, atol=1e-5)
    torch.testing.assert_close(output.entropy.double()[keep], expected.entropy[keep], rtol=0, atol=1e-4)
    assert Oracle.of(inputs).judge(inputs, as_step(output, gradient)).complaint == ""


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_oracle_passes_right_answers_in_every_dtype(dtype: str) -> None:
    inputs = draw(tiny_case(dtype=dtype), CPU, 0)
    assert Oracle.of(inputs).judge(inputs, as_step(*step(inputs))).complaint == ""


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (lambda loss, gradient: (loss * 1.01, gradient), "loss"),
        (lambda loss, gradient: (loss * torch.nan, gradient), "loss"),
        (lambda loss, gradient: (loss, gradient * 0.99), "gradient"),
        (lambda loss, gradient: (loss, torch.zeros_like(gradient)), "gradient"),
        (lambda loss, gradient: (loss, gradient.roll(1, -1)), "gradient"),
        (lambda loss, gradient: (loss, gradient * torch.nan), "gradient"),
        (lambda loss, gradient: (loss, gradient.index_fill(0, torch.tensor([7]), 0.0)), "gradient"),
    ],
)
def test_oracle_rejects_wrong_answers(dtype: str, mistake: Callable[..., Any], complaint: str) -> None:
    inputs = draw(tiny_case(dtype=dtype), CPU, 0)
    output, gradient = step(inputs)
    loss, gradient = mistake(output.loss, gradient)
    verdict = Oracle.of(inputs).judge(inputs, as_step(output._replace(loss=loss), gradient)).complaint
    assert verdict.startswith(f"{complaint} off by")


@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("op", ["logits", "logprobs"])
def test_who_returns_nothing_is_wrong(op: Op, mode: Mode) -> None:
    inputs = draw(tiny_case(op=op, mode=mode), CPU, 0)
    root = "loss" if op == "logits" else "log-probabilities"
    nothing = Oracle.of(inputs).judge(inputs, Step(Output(None, None, None), ()))
    assert nothing.complaint == f"returned no {root}" + (", returned no gradient" if mode == "both" else "")


def test_what_may_be_missing() -> None:
    """Of a loss its log-probabilities and entropies, of log-probabilities the loss and entropies; no gradient."""
    inputs = draw(tiny_case(), CPU, 0)
    output, gradient = step(inputs)
    oracle = Oracle.of(inputs)
    loss = Output(output.loss, None, None)
    assert oracle.judge(inputs, as_step(loss, gradient)).complaint == ""
    assert oracle.judge(inputs, Step(loss, ())).complaint == "returned no gradient"
    assert oracle.judge(inputs, as_step(Output(None, output.logprobs, None), gradient)).complaint == "returned no loss"
    inputs = draw(tiny_case(op="logprobs", mode="forward"), CPU, 0)
    given = Step(Output(None, output.logprobs, None), ())
    assert Oracle.of(inputs).judge(inputs, given).complaint == ""


@pytest.mark.parametrize("change", [lambda h: h + 0.01, lambda h: h * torch.nan, torch.zeros_like])
def test_oracle_rejects_wrong_entropies(change: Callable[[Tensor], Tensor]) -> None:
    inputs = draw(tiny_case(), CPU, 0)
    output, gradient = step(inputs)
    assert output.entropy is not None
    output = output._replace(entropy=change(output.entropy))
    assert Oracle.of(inputs).judge(inputs, as_step(output, gradient)).complaint.startswith("entropy off by")


def test_inactive_rows_must_have_no_gradient() -> None:
    inputs = draw(tiny_case(inactive=0.5), CPU, 0)
    output, gradient = step(inputs)
    idle = inputs.advantages == 0
    assert not gradient[idle].any()
    gradient[idle] += 1e-4
    assert "gradient" in Oracle.of(inputs).judge(inputs, as_step(output, gradient)).complaint


def exact_step(inputs: Inputs) -> tuple[Output, Tensor]:
    """What a provider with exact arithmetic returns: the gradient rounded once."""
    case = inputs.case
    z = inputs.logits.detach().double().requires_grad_()
    out = reference.policy_loss(
        z, inputs.tokens, inputs.advantages, old_logprobs=inputs.old_logprobs, mask=inputs.mask,
        objective=inputs.objective, softcap=case.shape.softcap,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(out.loss * case.upstream, z)
    return Output(out.loss.detach(), out.logprobs.detach(), None), gradient.to(case.torch_dtype)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("objective", ["mhpo_ahpo", "gspo", "sapo"])
def test_errors_of_exact_arithmetic_are_its_rounding(dtype: str, objective: str) -> None:
    inputs = draw(tiny_case(dtype=dtype, objective=objective, ragged=True), CPU, 0)
    errors = Oracle.of(inputs).judge(inputs, as_step(*exact_step(inputs)), ours=True)
    assert (errors.complaint, errors.broken) == ("", "")
    assert errors.logprob is not None
    assert errors.logprob < 1e-12
    unit = {"bf16": 2**-8, "fp16": 2**-11, "fp32": 2**-24}[dtype]
    for columns in (errors.target, errors.others):
        assert columns is not None
        assert unit / 4 < columns.rounding <= unit
        assert columns.median <= columns.worst == pytest.approx(columns.rounding)
        assert columns.beyond < 1e-12


def test_sampled_and_other_columns_are_judged_apart() -> None:
    """A mistake in one shows there, at its size, and nowhere else."""
    inputs = draw(tiny_case(), CPU, 0)
    oracle = Oracle.of(inputs)
    output, gradient = exact_step(inputs)
    column = inputs.tokens.unsqueeze(-1)
    sampled = gradient.scatter(-1, column, 1.0001 * gradient.gather(-1, column))
    both = [oracle.judge(inputs, as_step(output, wrong), ours=True) for wrong in (sampled, 1.0001 * gradient)]
    for errors, target, others in ((both[0], 1e-4, 0), (both[1], 1e-4, 1e-4)):
        assert errors.target is not None
        assert errors.others is not None
        assert errors.target.beyond == pytest.approx(target, rel=0.01)
        assert errors.others.beyond == pytest.approx(others, rel=0.01, abs=1e-12)
        assert errors.complaint == ""
        assert "gradient of the sampled token off by 1.0e-04 (limit 3e-06)" in errors.broken
        assert ("other tokens" in errors.broken) is (others > 0)


def test_logprob_errors() -> None:
    inputs = draw(tiny_case(inactive=0.5), CPU, 0)
    oracle = Oracle.of(inputs)
    output, gradient = exact_step(inputs)
    assert output.logprobs is not None
    active = inputs.advantages.unsqueeze(-1) != 0

    def judge(logprobs: Tensor | None, ours: bool = True) -> Errors:
        return oracle.judge(inputs, as_step(output._replace(logprobs=logprobs), gradient), ours=ours)

    assert judge(None).logprob is None
    assert judge(output.logprobs.masked_fill(~active, torch.nan)).broken == ""
    assert "log-probability off by nan" in judge(output.logprobs.masked_fill(active, torch.nan)).complaint
    shifted = judge(output.logprobs.index_add(1, torch.tensor([2]), torch.full((8, 1), 1e-5).double()))
    assert shifted.logprob == pytest.approx(1e-5, rel=0.1)
    assert (shifted.complaint, "log-probability" in shifted.broken) == ("", True)
    assert judge(output.logprobs + 1e-5, ours=False).broken == ""
    assert "log-probability" in judge(output.logprobs + 0.01).complaint


def test_a_clip_edge_within_the_logprob_limit_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether such a token has a gradient is decided by the last bit of its log-probability."""
    inputs = draw(tiny_case(objective="grpo"), CPU, 0)
    edge = (inputs.exact_logprobs - torch.tensor(1.2).double().log()).float()
    inputs.advantages.fill_(1.0)
    for side in (1e-6, -1e-6):
        moved = dataclasses.replace(inputs, old_logprobs=edge + side)
        output, gradient = exact_step(moved)
        # The oracle is made to stand on the other side of the edge, 2e-6 from the provider.
        beyond = dataclasses.replace(moved, exact_logprobs=inputs.exact_logprobs + 2 * side)
        oracle = Oracle.of(beyond)
        assert "gradient" not in oracle.judge(beyond, as_step(output, gradient)).complaint
        with monkeypatch.context() as patch:
            patch.setattr("hpo_fused.bench.check.OWN_LOGPROB_LIMIT", 0.0)
            assert "gradient" in oracle.judge(beyond, as_step(output, gradient)).complaint


def test_fingerprint_tells_every_bit() -> None:
    values = torch.randn(5, 1000).bfloat16()
    assert torch.equal(fingerprint(values), fingerprint(values.clone()))
    assert torch.equal(fingerprint(values.view(5, 1, 1000)), fingerprint(values))
    other = values.clone()
    other.view(torch.int16)[3, 7] ^= 1
    assert (fingerprint(values) != fingerprint(other)).tolist() == [False, False, False, True, False]
    swapped = values[:, torch.arange(1000).roll(1)]
    assert (fingerprint(values) != fingerprint(swapped)).all()
    assert fingerprint(torch.zeros(1)) != fingerprint(-torch.zeros(1))
