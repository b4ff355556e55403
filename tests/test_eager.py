"""The torch backend against float64 autograd, and what it promises beyond: determinism, row independence, memory."""

from __future__ import annotations

import os
import shutil
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import compiled_rows, eager
from hpo_fused.compiled_rows import ENVIRONMENT_VARIABLE, MINIMUM_WIDTH
from hpo_fused.row_chunks import RowSelection
from hpo_fused.rows import LogitTransform, RowStatistics, SurrogateSpec, TokenTerms

PLAIN = LogitTransform()
MHPO = SurrogateSpec("log_fidelity", (1.5, 1.5, 1.0, 2.0, 1.25), 20.0, 0.0, 0.0)


@pytest.fixture(params=["0", "1"], ids=["plain", "compiled"])
def setting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each implementation; "1" raises where compilation fails, which the automatic choice would hide."""
    if request.param == "1" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        pytest.skip("no C++ compiler")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, request.param)
    return str(request.param)


def make(
    batch: int, steps: int, width: int, *, dtype: torch.dtype = torch.float32, spread: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Logits with a peaked row, an all-negative row and a row with -inf entries among them, and tokens."""
    generator = torch.Generator().manual_seed(width)
    logits = (torch.randn(batch, steps, width, generator=generator) * spread).to(dtype)
    tokens = torch.randint(0, width, (batch, steps), generator=generator)
    rows, flat = logits.view(-1, width), tokens.view(-1)
    if rows.shape[0] > 3:
        rows[1, flat[1]] = rows[1].max() + 15
        rows[2] -= 100
        kept = rows[3, flat[3]].clone()
        rows[3, ::2] = -torch.inf
        rows[3, flat[3]] = kept
    return logits, tokens


def expected(
    logits: Tensor, tokens: Tensor, c: Tensor, h: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and dL/dlogits by float64 autograd."""
    leaf = logits.double().requires_grad_()
    z = leaf if transform.softcap is None else transform.softcap * torch.tanh(leaf / transform.softcap)
    log_p = torch.log_softmax(z / transform.temperature, -1)
    finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
    entropy = -(finite.exp() * finite).masked_fill(log_p == -torch.inf, 0.0).sum(-1)
    logprobs = log_p.gather(-1, tokens[..., None]).squeeze(-1)
    (gradient,) = torch.autograd.grad((c.double() * logprobs + h.double() * entropy).sum(), leaf)
    return logprobs.detach(), entropy.detach(), gradient


def run(
    logits: Tensor, tokens: Tensor, c: Tensor, h: Tensor | None, transform: LogitTransform = PLAIN
) -> tuple[RowStatistics, Tensor]:
    compute = torch.ones_like(tokens, dtype=torch.bool)
    statistics = eager.token_statistics(logits, tokens, compute, transform, entropy=True)
    out = torch.full(logits.shape, 7.0, dtype=logits.dtype)
    eager.token_gradient(logits, tokens, statistics, c, h, transform, out)
    return statistics, out


def coefficients(tokens: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(tokens.shape, generator=generator)
    return c, torch.randn(tokens.shape, generator=generator) * 0.1


def terms_of(tokens: Tensor, *, advantages: Tensor | None = None, weights: Tensor | None = None) -> TokenTerms:
    ones = torch.ones(tokens.shape)
    return TokenTerms(
        ones if advantages is None else advantages, ones if weights is None else weights, ones, None, None
    )


@pytest.mark.parametrize("width", [1, 2, 17, 997, 50257])
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(0.7), LogitTransform(1.3, 30.0)], ids=str)
def test_float32_matches_float64_autograd(
    width: int, transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "0")
    check_float32(width, transform)


@pytest.mark.parametrize("width", [MINIMUM_WIDTH, MINIMUM_WIDTH + 1, 50257])
@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(0.7)], ids=str)
def test_compiled_float32_matches_float64_autograd(width: int, transform: LogitTransform) -> None:
    check_float32(width, transform)


def check_float32(width: int, transform: LogitTransform) -> None:
    logits, tokens = make(2, 4, width)
    c, h = coefficients(tokens)
    logprobs, entropy, gradient = expected(logits, tokens, c, h, transform)
    statistics, out = run(logits, tokens, c, h, transform)
    assert (statistics.logprobs <= 0).all()
    torch.testing.assert_close(statistics.logprobs.double(), logprobs, rtol=1e-7, atol=4e-6)
    torch.testing.assert_close(statistics.entropy.double(), entropy, rtol=1e-6, atol=2e-6)
    target = torch.nn.functional.one_hot(tokens, width).bool()
    error, size = (
        (out - gradient).masked_fill(target, 0).norm(dim=-1),
        gradient.masked_fill(target, 0).norm(dim=-1),
    )
    assert (error <= 3e-6 * size + 1e-30).all()
    # c's and h's parts may have opposite signs: with a temperature each carries two more roundings into their sum.
    rtol = 3e-6 if transform.temperature == 1 else 1e-5
    torch.testing.assert_close(out[target].double(), gradient[target], rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("width", [997, 50257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradient_is_rounded_once(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "0" if dtype == torch.float16 else "")
    logits, tokens = make(1, 8, width, dtype=dtype)
    c, h = coefficients(tokens)
    exact = expected(logits, tokens, c, h, PLAIN)[2]
    _, out = run(logits, tokens, c, h)
    once = exact.to(dtype)
    # A float32 result next to the middle between two neighbours may fall to the other side of it.
    assert (out != once).float().mean() < 2e-3
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    spacing = torch.finfo(dtype).eps * once.double().abs() + smallest
    assert ((out.double() - once.double()).abs() <= spacing).all()


def test_rows_do_not_depend_on_their_company(setting: str) -> None:
    width = 50257 if setting == "1" else 997
    logits, tokens = make(1, 70, width, dtype=torch.bfloat16)
    c, h = coefficients(tokens)
    statistics, out = run(logits, tokens, c, h)
    again, repeated = run(logits, tokens, c, h)
    assert torch.equal(out, repeated)
    assert all(torch.equal(one, other) for one, other in zip(statistics, again, strict=True))
    for rows in ([0], [1], [69], [5, 6], [3, 40, 41, 68], list(range(1, 70, 2))):
        few, part = run(logits[:, rows], tokens[:, rows], c[:, rows], h[:, rows])
        assert torch.equal(part, out[:, rows])
        assert all(torch.equal(one, other[:, rows]) for one, other in zip(few, statistics, strict=True))


def test_fused_equals_two_steps_and_skips_rows(setting: str) -> None:
    width = 50257 if setting == "1" else 997
    logits, tokens = make(3, 6, width, dtype=torch.bfloat16)
    advantages = torch.linspace(-1, 1, 18).view(3, 6)
    weights = torch.full((3, 6), 0.1)
    compute = torch.ones(3, 6, dtype=torch.bool)
    compute[0, :2] = False
    compute[2, 3] = False
    weights[~compute] = 0
    advantages[1] = 0
    logits[~compute] = torch.nan
    tokens = tokens.masked_fill(~compute, -100)
    terms = terms_of(tokens, advantages=advantages, weights=weights)
    spec = MHPO._replace(entropy_coef=0.01)
    terms = terms._replace(penalty_weights=weights * (advantages != 0))
    out = torch.full_like(logits, torch.nan)
    losses, logprobs, entropy = eager.fused_policy_loss(
        logits, tokens, compute, terms, PLAIN, spec, entropy=False, out=out
    )
    statistics = eager.token_statistics(logits, tokens, compute, PLAIN, entropy=True)
    assert torch.equal(logprobs.nan_to_num(7), statistics.logprobs.nan_to_num(7))
    assert torch.equal(entropy.nan_to_num(7), statistics.entropy.nan_to_num(7))
    assert logprobs[~compute].isnan().all()
    inactive = ~compute | (advantages == 0)
    assert (losses[inactive] == 0).all()
    assert (losses[~inactive] != 0).all()
    assert (out[inactive] == 0).all()
    # The two numbers, from the losses' own table.
    result = eager.token_loss(spec, terms, statistics.logprobs, statistics.entropy)
    c, h = (torch.where(inactive, 0.0, entry) for entry in result[1:])
    two_steps = torch.full_like(logits, torch.nan)
    eager.token_gradient(logits, tokens, statistics, c, h, PLAIN, two_steps)
    assert torch.equal(two_steps, out)
    eager.fused_policy_loss(logits, tokens, compute, terms, PLAIN, spec, entropy=False, out=logits)
    assert torch.equal(logits, out)


def test_clipped_rows_get_zeros(setting: str) -> None:
    logits, tokens = make(1, 9, 4099)
    spec = SurrogateSpec("clip", (0.8, 1.2, torch.inf, torch.inf), 20.0, 0.0, 0.0)
    old = torch.full((1, 9), -50.0)
    tokens[0, 4], old[0, 4] = logits[0, 4].argmax(), 0.0  # the only ratio below 1.2
    out = torch.full_like(logits, torch.nan)
    terms = terms_of(tokens)._replace(old_logprobs=old)
    compute = torch.ones_like(tokens, dtype=torch.bool)
    eager.fused_policy_loss(logits, tokens, compute, terms, PLAIN, spec, entropy=False, out=out)
    assert (out.abs().sum(-1) > 0).tolist() == [[step == 4 for step in range(9)]]


@pytest.mark.parametrize("layout", ["shifted", "transposed", "cut", "expanded"])
def test_strided_logits(layout: str, setting: str) -> None:
    width = 4099
    base, _ = make(4, 6, width + (5 if layout == "cut" else 0))
    views = {
        "shifted": lambda tensor: tensor[:, :-1],
        "transposed": lambda tensor: tensor.transpose(0, 1),
        "cut": lambda tensor: tensor[..., :width],
        "expanded": lambda tensor: tensor[:, :1].expand(4, 6, width),
    }
    view = views[layout](base)
    tokens = torch.randint(0, width, view.shape[:2])
    c, h = coefficients(tokens)
    c[0, 1] = h[0, 1] = 0
    statistics, out = run(view, tokens, c, h)
    plain_statistics, plain_out = run(view.contiguous(), tokens, c, h)
    assert torch.equal(out, plain_out)
    assert torch.equal(statistics.logprobs, plain_statistics.logprobs)
    if layout != "expanded":
        untouched = base.clone()
        eager.token_gradient(view, tokens, statistics, c, h, PLAIN, view)
        assert torch.equal(view, plain_out)
        views[layout](base).copy_(views[layout](untouched))
        assert torch.equal(base, untouched)


def test_undefined_rows_stay_alone(setting: str) -> None:
    logits, tokens = make(1, 6, 4099)
    logits[0, 0, 5] = torch.nan
    logits[0, 4] = -torch.inf
    tokens[0, 3] = 0  # an entry of -inf in the row that has them
    logits[0, 3, 0] = -torch.inf
    c, h = torch.ones(1, 6), torch.full((1, 6), 0.1)
    statistics, out = run(logits, tokens, c, h)
    for row in (0, 4):
        assert statistics.logprobs[0, row].isnan()
        assert out[0, row].isnan().all()
    assert statistics.logprobs[0, 3] == -torch.inf
    assert out[0, [1, 2, 3, 5]].isfinite().all()
    assert statistics.entropy[0, [1, 2, 3, 5]].isfinite().all()
    assert (out[0, 3][logits[0, 3] == -torch.inf][1:] == 0).all()


def test_ids_out_of_range(setting: str) -> None:
    logits, tokens = make(1, 4, 17)
    compute = torch.tensor([[True, True, False, True]])
    for bad in (-1, 17, -100):
        tokens[0, 2] = bad
        eager.token_statistics(logits, tokens, compute, PLAIN, entropy=True)
        with pytest.raises(ValueError, match=rf"tokens: expected ids in \[0, 17\).*{bad}"):
            eager.token_statistics(logits, tokens, ~compute, PLAIN, entropy=True)


def test_empty_batches(setting: str) -> None:
    for shape in ((0, 3, 50257), (1, 0, 50257)):
        logits, tokens = torch.empty(shape), torch.empty(shape[:2], dtype=torch.int64)
        statistics, out = run(logits, tokens, torch.empty(shape[:2]), None)
        assert statistics.logprobs.shape == tokens.shape
        assert out.shape == shape


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes_give_the_same(mode: type) -> None:
    logits, tokens = make(1, 5, 50257, dtype=torch.bfloat16)
    c, h = coefficients(tokens)
    reference = run(logits, tokens, c, h)[1]
    with mode():
        assert torch.equal(run(logits.clone(), tokens, c, h)[1], reference)


def test_several_threads() -> None:
    logits, tokens = make(1, 5, 50257, dtype=torch.bfloat16)
    c, h = coefficients(tokens)
    reference = run(logits, tokens, c, h)[1]
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(run(logits, tokens, c, h)[1])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(result, reference) for result in results)


def test_compilation_is_chosen_and_its_failure_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        attempts.append(1)
        raise RuntimeError("no compiler")

    attempts: list[int] = []
    monkeypatch.setattr(compiled_rows, "_compile", failing)
    monkeypatch.setattr(compiled_rows, "_compiled", {})
    large, small = torch.empty(1, 1, MINIMUM_WIDTH), torch.empty(1, 1, MINIMUM_WIDTH - 1)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "0")
    assert compiled_rows.compiled_sweeps(large, PLAIN) is None
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert compiled_rows.compiled_sweeps(small, PLAIN) is None
    assert not attempts
    assert compiled_rows.compiled_sweeps(large, PLAIN) is None
    assert compiled_rows.compiled_sweeps(large, PLAIN) is None
    assert len(attempts) == 1
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "1")
    with pytest.raises(RuntimeError, match="no compiler"):
        compiled_rows.compiled_sweeps(large, PLAIN)


@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(1.0, 30.0)], ids=["plain", "softcap"])
def test_no_temporary_of_the_logits_size(transform: LogitTransform, setting: str) -> None:
    logits, tokens = make(1, 400, 50257, dtype=torch.bfloat16)
    out = torch.empty_like(logits)
    compute = torch.ones_like(tokens, dtype=torch.bool)
    arguments = (logits, tokens, compute, terms_of(tokens), transform, MHPO)
    eager.fused_policy_loss(*arguments, entropy=True, out=out)
    with torch.profiler.profile(profile_memory=True) as profile:
        eager.fused_policy_loss(*arguments, entropy=True, out=out)
    allocated = [event.nbytes() for event in _memory_events(profile)]
    live, peak = 0, 0
    for size in allocated:
        live += size
        peak = max(peak, live)
    assert peak <= 64 << 20
    assert peak < logits.nbytes  # the bound would mean little beside smaller logits


def _memory_events(profile: torch.profiler.profile) -> list[Any]:
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sorted(events, key=lambda event: event.start_ns())


def test_scale_gradient() -> None:
    gradient = torch.randn(2, 3, 101).bfloat16()
    once = (gradient.float() * 0.3).bfloat16()
    view = gradient[:, :2]
    eager.scale_gradient(view, torch.tensor(0.3))
    assert torch.equal(view, once[:, :2])
    eager.scale_gradient(gradient, torch.tensor(1.0))
    assert torch.equal(gradient[:, :2], once[:, :2])


def test_row_selection_views_only_neighbours() -> None:
    tensor = torch.arange(24.0).view(2, 4, 3)
    rows = RowSelection(tensor, torch.tensor([0, 1, 2, 4, 5]))
    assert torch.equal(rows.view(0, 3), tensor[0, :3])
    assert rows.view(1, 4) is None
    assert torch.equal(rows.view(3, 5), tensor[1, :2])
    assert RowSelection(tensor[:, ::2], torch.arange(4)).view(0, 2) is None
