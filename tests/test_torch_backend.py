"""The torch backend against float64 autograd, and what it promises beyond: determinism, row independence, memory."""

from __future__ import annotations

import os
import shutil
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused import reference, torch_backend
from hpo_fused.interface import (
    ADVANTAGE,
    ENTROPY_WEIGHT,
    MASKED,
    OLD_LOGPROB,
    SKIPPED,
    LogitTransform,
    LossSpec,
    SoftmaxStatistics,
)
from hpo_fused.surrogate import token_loss
from hpo_fused.torch_backend import compiled_sweeps, selected_rows
from hpo_fused.torch_backend.compiled_sweeps import ENVIRONMENT_VARIABLE, MINIMUM_WIDTH, sweeps_for
from hpo_fused.torch_backend.selected_rows import SelectedRows
from hpo_fused.torch_backend.sweeps import PlainSweeps

from .equivalence import (
    GRADIENT_LIMIT,
    Case,
    check,
    gradient_errors,
    hold_values,
    logit_gradient,
    softcap_error,
    worst,
)
from .samples import room_for_statistics, values_of
from .test_equivalence import difficult_rows, presets, terms, vocabularies

PLAIN = LogitTransform()
TRANSFORMS = {
    "plain": PLAIN, "temperature": LogitTransform(0.7), "both": LogitTransform(1.3, 30.0),
    "temperatures": LogitTransform(1.0, 6.0, torch.linspace(0.6, 1.7, 8).view(2, 4)),
}  # fmt: skip
MHPO = LossSpec("log_fidelity", (1.5, 1.5, 1.0, 2.0, 1.25), 20.0, False, "none", False, "token")


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
    """Logits with a peaked row, an all-negative row and a row with -inf entries among them, and targets."""
    generator = torch.Generator().manual_seed(width)
    logits = (torch.randn(batch, steps, width, generator=generator) * spread).to(dtype)
    targets = torch.randint(0, width, (batch, steps), generator=generator, dtype=torch.int32)
    rows, flat = logits.view(-1, width), targets.view(-1)
    if rows.shape[0] > 3:
        rows[1, flat[1]] = rows[1].max() + 15
        rows[2] -= 100
        kept = rows[3, flat[3]].clone()
        rows[3, ::2] = -torch.inf
        rows[3, flat[3]] = kept
    return logits, targets


def run(
    logits: Tensor, targets: Tensor, c: Tensor, h: Tensor | None, transform: LogitTransform = PLAIN
) -> tuple[SoftmaxStatistics, Tensor]:
    statistics = room_for_statistics(targets)
    torch_backend.token_statistics(logits, targets, transform, statistics)
    out = torch.full(logits.shape, 7.0, dtype=logits.dtype)
    torch_backend.token_gradient(logits, targets, statistics, c, h, transform, out)
    return statistics, out


def coefficients(targets: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    c = torch.randn(targets.shape, generator=generator)
    return c, torch.randn(targets.shape, generator=generator) * 0.1


def loss_of(
    logits: Tensor,
    targets: Tensor,
    values: Tensor,
    spec: LossSpec,
    out: Tensor | None,
    transform: LogitTransform = PLAIN,
) -> Tensor:
    results = torch.full((3, *targets.shape), 7.0)
    torch_backend.policy_loss(logits, targets, values, spec, transform, results, out)
    return results


@pytest.mark.parametrize("width", [1, 2, 17, 997, 50257])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_float32_matches_float64_autograd(
    width: int, transform: LogitTransform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "0")
    check_float32(width, transform)


@pytest.mark.parametrize("width", [MINIMUM_WIDTH, MINIMUM_WIDTH + 1, 50257])
@pytest.mark.parametrize("transform", [PLAIN, TRANSFORMS["temperatures"]], ids=["plain", "temperatures"])
def test_compiled_float32_matches_float64_autograd(width: int, transform: LogitTransform) -> None:
    check_float32(width, transform)


def check_float32(width: int, transform: LogitTransform) -> None:
    logits, targets = make(2, 4, width)
    c, h = coefficients(targets)
    mask = torch.ones_like(targets, dtype=torch.bool)
    statistics, out = run(logits, targets, c, h, transform)
    options: dict[str, Any] = {"temperature": transform.temperature, "softcap": transform.softcap}
    if transform.temperatures is not None:
        options["temperature"] = transform.temperatures
    options = {name: value for name, value in options.items() if value is not None}
    exact = reference.token_logprobs(logits.double(), targets, **options)
    hold_values(exact, mask, statistics.logprobs, statistics.entropy, mask, options)
    expected = logit_gradient(logits.double(), targets, mask, c.double(), h.double(), options)
    for name, error in zip(("sampled", "other"), gradient_errors(out, expected, targets), strict=True):
        worst(f"gradient of the {name} tokens", error, GRADIENT_LIMIT + softcap_error(options))


@pytest.mark.parametrize("width", [997, 50257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradient_is_rounded_once(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "0" if dtype == torch.float16 else "")
    logits, targets = make(1, 8, width, dtype=dtype)
    c, h = coefficients(targets)
    mask = torch.ones_like(targets, dtype=torch.bool)
    _, out = run(logits, targets, c, h)
    once = logit_gradient(logits.double(), targets, mask, c.double(), h.double(), {}).exact.to(dtype)
    # A float32 result next to the middle between two neighbours, at least eps / 2 apart, may fall to its other side.
    assert (out != once).float().mean() < 4 * GRADIENT_LIMIT / torch.finfo(dtype).eps
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    spacing = torch.finfo(dtype).eps * once.double().abs() + smallest
    assert ((out.double() - once.double()).abs() <= spacing).all()


def test_rows_do_not_depend_on_their_company(setting: str) -> None:
    width = 50257 if setting == "1" else 997
    logits, targets = make(1, 70, width, dtype=torch.bfloat16)
    c, h = coefficients(targets)
    statistics, out = run(logits, targets, c, h)
    again, repeated = run(logits, targets, c, h)
    assert torch.equal(out, repeated)
    assert all(torch.equal(one, other) for one, other in zip(statistics, again, strict=True))
    for rows in ([0], [1], [69], [5, 6], [3, 40, 41, 68], list(range(1, 70, 2))):
        few, part = run(logits[:, rows], targets[:, rows], c[:, rows], h[:, rows])
        assert torch.equal(part, out[:, rows])
        assert all(torch.equal(one, other[:, rows]) for one, other in zip(few, statistics, strict=True))


def test_one_call_equals_two_sweeps_and_skips_rows(setting: str) -> None:
    width = 50257 if setting == "1" else 997
    logits, targets = make(3, 6, width, dtype=torch.bfloat16)
    targets[0, :2], targets[2, 3] = SKIPPED, MASKED
    computed = targets >= 0
    logits[~computed] = torch.nan
    values = values_of(torch.linspace(-1, 1, 18).view(3, 6), torch.where(computed, 0.1, 0.0))
    values[ADVANTAGE, 1] = 0
    live = computed & (values[ADVANTAGE] != 0)
    values[ENTROPY_WEIGHT] = torch.where(live, 0.001, 0.0)
    spec = MHPO._replace(entropy_bonus=True)
    out = torch.full_like(logits, torch.nan)
    losses, logprobs, entropy = loss_of(logits, targets, values, spec, out)
    statistics = room_for_statistics(targets)
    torch_backend.token_statistics(logits, targets, PLAIN, statistics)
    assert torch.equal(logprobs[computed], statistics.logprobs[computed])
    assert torch.equal(entropy[computed], statistics.entropy[computed])
    for results in (logprobs, entropy):
        assert results[targets == SKIPPED].isnan().all()
        assert not results[targets == MASKED].any()
    assert torch.equal(losses != 0, live)
    assert not out[~live].any()
    # The two numbers, from the losses' own table.
    result = token_loss(spec, values, statistics.logprobs, statistics.entropy)
    c, h = (torch.where(live, entry, 0.0) for entry in result[1:])
    two_sweeps = torch.full_like(logits, torch.nan)
    torch_backend.token_gradient(logits, targets, statistics, c, h, PLAIN, two_sweeps)
    assert torch.equal(two_sweeps, out)
    loss_of(logits, targets, values, spec, logits)
    assert torch.equal(logits, out)


def test_clipped_rows_get_zeros(setting: str) -> None:
    logits, targets = make(1, 9, 4099)
    spec = LossSpec("clip", (0.8, 1.2, torch.inf, torch.inf), 20.0, True, "none", False, "token")
    values = values_of(torch.ones(1, 9))
    values[OLD_LOGPROB] = -50.0
    targets[0, 4], values[OLD_LOGPROB, 0, 4] = logits[0, 4].argmax(), 0.0  # the only ratio below 1.2
    out = torch.full_like(logits, torch.nan)
    loss_of(logits, targets, values, spec, out)
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
    targets = torch.randint(0, width, view.shape[:2], dtype=torch.int32)
    c, h = coefficients(targets)
    c[0, 1] = h[0, 1] = 0
    statistics, out = run(view, targets, c, h)
    plain_statistics, plain_out = run(view.contiguous(), targets, c, h)
    assert torch.equal(out, plain_out)
    assert torch.equal(statistics.logprobs, plain_statistics.logprobs)
    if layout != "expanded":
        untouched = base.clone()
        torch_backend.token_gradient(view, targets, statistics, c, h, PLAIN, view)
        assert torch.equal(view, plain_out)
        views[layout](base).copy_(views[layout](untouched))
        assert torch.equal(base, untouched)


def test_undefined_rows_stay_alone(setting: str) -> None:
    logits, targets = make(1, 6, 4099)
    logits[0, 0, 5] = torch.nan
    logits[0, 4] = -torch.inf
    targets[0, 3] = 0  # an entry of -inf in the row that has them
    logits[0, 3, 0] = -torch.inf
    c, h = torch.ones(1, 6), torch.full((1, 6), 0.1)
    statistics, out = run(logits, targets, c, h)
    for row in (0, 4):
        assert statistics.logprobs[0, row].isnan()
        assert out[0, row].isnan().all()
    assert statistics.logprobs[0, 3] == -torch.inf
    assert out[0, [1, 2, 3, 5]].isfinite().all()
    assert statistics.entropy[0, [1, 2, 3, 5]].isfinite().all()
    assert (out[0, 3][logits[0, 3] == -torch.inf][1:] == 0).all()


def test_empty_batches(setting: str) -> None:
    for shape in ((0, 3, 50257), (1, 0, 50257)):
        logits, targets = torch.empty(shape), torch.empty(shape[:2], dtype=torch.int32)
        statistics, out = run(logits, targets, torch.empty(shape[:2]), None)
        assert statistics.logprobs.shape == targets.shape
        assert out.shape == shape
        assert loss_of(logits, targets, values_of(torch.empty(shape[:2])), MHPO, out).shape == (3, *shape[:2])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes_give_the_same(mode: type) -> None:
    logits, targets = make(1, 5, 50257, dtype=torch.bfloat16)
    c, h = coefficients(targets)
    expected = run(logits, targets, c, h)[1]
    with mode():
        assert torch.equal(run(logits.clone(), targets, c, h)[1], expected)


def test_several_threads() -> None:
    logits, targets = make(1, 5, 50257, dtype=torch.bfloat16)
    c, h = coefficients(targets)
    expected = run(logits, targets, c, h)[1]
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(run(logits, targets, c, h)[1])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(result, expected) for result in results)


def test_compilation_is_chosen_and_its_failure_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        attempts.append(1)
        raise RuntimeError("no compiler")

    attempts: list[int] = []
    monkeypatch.setattr(compiled_sweeps, "_compile", failing)
    monkeypatch.setattr(compiled_sweeps, "_compiled", {})
    large, small = torch.empty(1, 1, MINIMUM_WIDTH), torch.empty(1, 1, MINIMUM_WIDTH - 1)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "0")
    assert isinstance(sweeps_for(large, PLAIN), PlainSweeps)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    assert isinstance(sweeps_for(small, PLAIN), PlainSweeps)
    assert not attempts
    assert isinstance(sweeps_for(large, PLAIN), PlainSweeps)
    assert isinstance(sweeps_for(large, PLAIN), PlainSweeps)
    assert len(attempts) == 1
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "1")
    with pytest.raises(RuntimeError, match="no compiler"):
        sweeps_for(large, PLAIN)


@pytest.mark.parametrize("transform", [PLAIN, LogitTransform(1.0, 30.0)], ids=["plain", "softcap"])
def test_no_temporary_of_the_logits_size(transform: LogitTransform, setting: str) -> None:
    logits, targets = make(1, 400, 50257, dtype=torch.bfloat16)
    out, values = torch.empty_like(logits), values_of(torch.ones(1, 400))
    loss_of(logits, targets, values, MHPO, out, transform)
    with torch.profiler.profile(profile_memory=True) as profile:
        loss_of(logits, targets, values, MHPO, out, transform)
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
    torch_backend.scale_gradient(view, torch.tensor(0.3))
    assert torch.equal(view, once[:, :2])
    torch_backend.scale_gradient(gradient, torch.tensor(1.0))
    assert torch.equal(gradient[:, :2], once[:, :2])


def test_only_neighbours_are_used_in_place() -> None:
    tensor = torch.arange(24.0).view(2, 4, 3)
    rows = SelectedRows(tensor, torch.tensor([0, 1, 2, 4, 5]))
    assert torch.equal(rows.part(slice(0, 3)).contiguous(), tensor[0, :3])
    assert rows.part(slice(1, 4)).contiguous() is None
    assert torch.equal(rows.part(slice(3, 5)).contiguous(), tensor[1, :2])
    assert SelectedRows(tensor[:, ::2], torch.arange(4)).part(slice(0, 2)).contiguous() is None


# ---------------------------------------------------------------------------------------------------------------
# the path for devices that are not the CPU, on the CPU: gathers by index, no look at values

GATHERED = [c for c in presets() + terms() + difficult_rows() + vocabularies()[:8] if c.dtype != torch.float16]


@pytest.mark.parametrize("case", GATHERED, ids=str)
def test_gathered_rows_match_the_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selected_rows, "by_offset", lambda tensor: False)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "0")
    check(case, "torch", torch.device("cpu"))
