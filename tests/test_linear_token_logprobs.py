"""linear_token_logprobs against the float64 oracle, and what no comparison covers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hpo_fused as hf

from .linear_equivalence import LinearCase, check_linear_logprobs
from .test_equivalence import PRESETS
from .test_linear_cost import ACTIVE, UNMASKED, VOCABULARY, Gemms, arguments, requiring
from .test_linear_policy_loss import DTYPES, leaves, short, small

OUTPUTS = ["logprobs", "entropy", "both"]
OBJECTIVE = PRESETS["mhpo_ahpo"]  # of which only the inputs are used


def cases() -> list[LinearCase]:
    transforms = [{}, {"temperature": 0.6}, {"softcap": 4.0}, {"temperature": 1.7, "softcap": 9.0}]
    return [
        LinearCase(
            f"logprobs-{short(dtype)}-{i}",
            OBJECTIVE,
            dtype,
            ("padded", "packed")[i % 2],
            options=options,
            bias=i % 3 == 0,
            chunk_rows=(3, None, 1)[i % 3],
        )
        for dtype in DTYPES
        for i, options in enumerate(transforms)
    ]


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("case", cases(), ids=str)
def test_matches_the_oracle_at_large(case: LinearCase, outputs: str, device: torch.device) -> None:
    check_linear_logprobs(case, "auto", device, outputs=outputs)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize(
    "case",
    [
        small("padded", OBJECTIVE, bias=True, chunk_rows=3),
        small("packed", OBJECTIVE, torch.bfloat16, layout="packed", options={"temperature": 0.6}),
        small("half", OBJECTIVE, torch.float16, chunk_rows=3, options={"softcap": 4.0}),
    ],
    ids=str,
)
def test_matches_the_oracle(case: LinearCase, outputs: str, backend: str, device: torch.device) -> None:
    check_linear_logprobs(case, backend, device, outputs=outputs)


@pytest.mark.parametrize(
    "case",
    [
        LinearCase("frozen-hidden", OBJECTIVE, torch.bfloat16, frozen=("hidden",), chunk_rows=3, bias=True),
        LinearCase("frozen-head", OBJECTIVE, torch.bfloat16, frozen=("weight", "bias"), chunk_rows=3, bias=True),
        LinearCase("float32-logits", OBJECTIVE, torch.bfloat16, logits_dtype=torch.float32, chunk_rows=3, bias=True),
        LinearCase("autocast", OBJECTIVE, torch.bfloat16, stored=torch.float32, chunk_rows=3, bias=True),
        LinearCase("main-grad", OBJECTIVE, torch.bfloat16, weight_grad=True, chunk_rows=3),
        LinearCase("exact", OBJECTIVE, torch.bfloat16, slack=0, chunk_rows=3),
        LinearCase("bound", OBJECTIVE, torch.bfloat16, slack=5, chunk_rows=3, bias=True),
        LinearCase("peaked", OBJECTIVE, torch.bfloat16, rows="peaked", chunk_rows=3),
        LinearCase("peaked-float32", OBJECTIVE, rows="peaked"),
    ],
    ids=str,
)
def test_options_match_the_oracle(case: LinearCase, device: torch.device) -> None:
    check_linear_logprobs(case, "auto", device)


def test_nothing_to_compute(backend: str, device: torch.device) -> None:
    for shape, mask in (((2, 3), torch.zeros(2, 3)), ((0, 3), None), ((0,), None)):
        hidden, weight = leaves(torch.randn(*shape, 8, device=device), torch.randn(11, 8, device=device))
        tokens = torch.zeros(shape, dtype=torch.long, device=device)
        out = hf.linear_token_logprobs(
            hidden, weight, tokens, mask=None if mask is None else mask.to(device), backend=backend
        )
        assert out.entropy is not None
        assert out.logprobs.shape == out.entropy.shape == tokens.shape
        assert not out.logprobs.any()
        (out.logprobs.sum() + out.entropy.sum()).backward()
        for leaf in (hidden, weight):
            assert leaf.grad is not None
            assert not leaf.grad.any()


def test_products(device: torch.device) -> None:
    """One product of unmasked rows under no_grad, four where differentiated, fewer with a frozen side."""
    values = requiring(arguments(device))

    def call() -> hf.TokenLogprobs:
        return hf.linear_token_logprobs(
            values["base"][:, :-1], values["weight"], values["tokens"], mask=values["mask"],
            chunk_bytes=5 * VOCABULARY * 4,
        )  # fmt: skip

    call().logprobs.sum().backward()
    with Gemms() as gemms, torch.no_grad():
        quiet = call()
    assert gemms.rows == UNMASKED
    with Gemms() as gemms:
        loud = call()
        assert gemms.rows == UNMASKED
        loud.logprobs.sum().backward()
    assert gemms.rows == 4 * UNMASKED
    assert not quiet.logprobs.requires_grad
    assert torch.equal(quiet.logprobs, loud.logprobs)
    requiring(values, "weight", "bias")
    with Gemms() as gemms:
        call().logprobs.sum().backward()
    assert gemms.rows == 3 * UNMASKED
    assert UNMASKED > ACTIVE  # advantages are nothing to it


def test_inference_mode(backend: str, device: torch.device) -> None:
    values = arguments(device)
    both = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            both.append(
                hf.linear_token_logprobs(
                    values["base"][:2, :2],
                    values["weight"],
                    values["tokens"][:2, :2],
                    chunk_bytes=3 * VOCABULARY * 4,
                    backend=backend,
                )
            )
    assert both[0].entropy is not None
    assert torch.equal(both[0].logprobs, both[1].logprobs)
    assert torch.equal(both[0].entropy, both[1].entropy)


def test_packed_needs_no_boundaries(device: torch.device) -> None:
    hidden, weight = torch.randn(7, 8, device=device), torch.randn(13, 8, device=device)
    tokens = torch.randint(13, (7,), device=device)
    packed = hf.linear_token_logprobs(hidden, weight, tokens)
    padded = hf.linear_token_logprobs(hidden[None], weight, tokens[None])
    assert packed.entropy is not None
    assert padded.entropy is not None
    assert packed.logprobs.shape == (7,)
    assert torch.equal(packed.logprobs, padded.logprobs[0])
    assert torch.equal(packed.entropy, padded.entropy[0])


def test_without_entropy(device: torch.device) -> None:
    values = requiring(arguments(device))
    hidden, weight, tokens = values["base"][:, :-1], values["weight"], values["tokens"].clamp(min=0)
    with_, without = (hf.linear_token_logprobs(hidden, weight, tokens, entropy=entropy) for entropy in (True, False))
    assert without.entropy is None
    torch.testing.assert_close(without.logprobs, with_.logprobs)
    gradients = [torch.autograd.grad(out.logprobs.sum(), weight)[0] for out in (with_, without)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("main_grad", [False, True])
def test_backward_may_run_again(main_grad: bool, device: torch.device) -> None:
    """It recomputes: the second result is as right as the first, and adds to it."""
    values = requiring(arguments(device))
    hidden, weight = (values[name].detach().requires_grad_() for name in ("base", "weight"))
    buffer = torch.zeros_like(weight) if main_grad else None
    tokens = values["tokens"].new_zeros(hidden.shape[:2])
    out = hf.linear_token_logprobs(hidden, weight, tokens, weight_grad=buffer)
    total = out.logprobs.sum() - 0.1 * out.entropy.sum()
    total.backward(retain_graph=True)

    def gradients() -> list[Tensor]:
        return [hidden.grad.clone(), (weight.grad if buffer is None else buffer).clone()]

    first = gradients()
    total.backward()
    for once, twice in zip(first, gradients(), strict=True):
        assert once.abs().max() > 0.1
        torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=1e-6)


def test_chunks_change_nothing(device: torch.device) -> None:
    """In float32, up to the order of sums."""
    values = arguments(device)
    results = []
    for rows in (1, 3, 7, None):
        hidden, weight, bias = leaves(values["base"][:, :-1], values["weight"], values["bias"])
        out = hf.linear_token_logprobs(
            hidden, weight, values["tokens"], bias=bias, mask=values["mask"],
            chunk_bytes=None if rows is None else rows * VOCABULARY * 4,
        )  # fmt: skip
        (out.logprobs.sum() + out.entropy.sum()).backward()
        results.append((out.logprobs.detach(), out.entropy.detach(), hidden.grad, weight.grad, bias.grad))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)


def test_upstream_gradients_of_any_shape(device: torch.device) -> None:
    """Expanded (from a sum), transposed, of one output, of some rows only."""
    values = arguments(device)
    tokens, factor = values["tokens"].clamp(min=0), torch.randn(5, 6, device=device)
    hidden, weight = leaves(values["base"][:, :-1], values["weight"])
    log_p = (hidden @ weight.t()).log_softmax(-1)
    chosen = log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    for build_loss in (
        lambda lp, h: lp.sum(),
        lambda lp, h: h.sum(),
        lambda lp, h: (lp.t() * factor).sum() + (h * factor.t()).sum(),
        lambda lp, h: lp[:, 1:].sum() - h[::2].mean(),
    ):
        result = hf.linear_token_logprobs(hidden, weight, tokens, chunk_bytes=4 * VOCABULARY * 4)
        ours = torch.autograd.grad(build_loss(result.logprobs, result.entropy), (hidden, weight))
        expected = torch.autograd.grad(build_loss(chosen, entropy), (hidden, weight), retain_graph=True)
        for first, second in zip(ours, expected, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_feeds_a_loss_of_log_probabilities(device: torch.device) -> None:
    """logprob_policy_loss of them is linear_policy_loss."""
    values = arguments(device)
    rest = {name: values[name] for name in ("old_logprobs", "mask")}
    objective = hf.Objective.preset("gspo", entropy_coef=0.01)
    results = []
    for whole in (True, False):
        hidden, weight = leaves(values["base"][:, :-1], values["weight"])
        if whole:
            out = hf.linear_policy_loss(
                hidden, weight, values["tokens"], values["advantages"], objective=objective, **rest
            )
        else:
            made = hf.linear_token_logprobs(hidden, weight, values["tokens"], mask=values["mask"])
            out = hf.logprob_policy_loss(
                made.logprobs, values["advantages"], entropy=made.entropy, objective=objective, **rest
            )
        out.loss.backward()
        results.append((out.loss.detach(), hidden.grad, weight.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
