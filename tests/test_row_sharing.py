"""Few rows: several programs share each, and no bit of the results shows it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hpo_fused.rows import LogitTransform, RowStatistics

kernels = pytest.importorskip("hpo_fused.kernels", reason="needs Triton")
from hpo_fused.kernels import launch, token_gradient, token_statistics  # noqa: E402

# 3 to 10 steps of the interpreter's launch; not a whole number of 16-byte groups, and one that is.
VOCABULARIES = (50257, 70001, 100352, 151936)
TRANSFORMS = (LogitTransform(0.8, None), LogitTransform(1.3, 15.0))


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Has every launch share a row among (at most) so many programs; returns the numbers it then did."""

    def share(parts: int) -> list[int]:
        seen: list[int] = []

        def chosen(self: Any, rows: int, V: int) -> int:
            seen.append(min(parts, self.steps(V)))
            return seen[-1]

        monkeypatch.setattr(launch.LaunchConfiguration, "parts", chosen)
        # The module, which the package's function of the same name hides.
        monkeypatch.setattr(sys.modules["hpo_fused.kernels.token_statistics"], "_WORTH_SHARING_BYTES", 1)
        return seen

    return share


def rows(V: int, dtype: torch.dtype, device: torch.device, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, tokens and which to compute; targets at both ends, a row left out."""
    generator = torch.Generator().manual_seed(V)
    logits = (3 * torch.randn(1, count, V, generator=generator)).to(dtype)
    tokens = torch.randint(V, (1, count), generator=generator)
    tokens[0, 0], tokens[0, 1] = 0, V - 1
    compute = torch.ones(1, count, dtype=torch.bool)
    compute[0, -1] = False
    return logits.to(device), tokens.to(device), compute.to(device)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_statistics_are_the_same_bits(
    V: int, dtype: torch.dtype, transform: LogitTransform, shared: Callable[[int], list[int]], device: torch.device
) -> None:
    logits, tokens, compute = rows(V, dtype, device)
    found = []
    for parts in (1, 2, 3, 100):
        seen = shared(parts)
        found.append(token_statistics(logits, tokens, compute, transform, entropy=True))
        assert seen[0] == 1 if parts == 1 else seen[0] > 1
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))
    exact = logits.double() if transform.softcap is None else transform.softcap * torch.tanh(logits.double() / 15.0)
    exact = (exact / transform.temperature).log_softmax(-1)
    target = exact.gather(-1, tokens[..., None])[..., 0]
    limit = 4e-6 if transform.softcap is None else 1e-5
    assert (found[0].logprobs - target).abs()[compute].max() <= limit
    assert (found[0].entropy + (exact.exp() * exact).sum(-1)).abs()[compute].max() <= 1e-4
    assert found[0].logprobs[~compute].isnan().all()


@pytest.mark.parametrize("tilt", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_gradients_are_the_same_bits(
    V: int, dtype: torch.dtype, tilt: bool, shared: Callable[[int], list[int]], device: torch.device
) -> None:
    logits, tokens, compute = rows(V, dtype, device)
    tokens[0, 2] = V // 2
    transform = TRANSFORMS[0]
    statistics = token_statistics(logits, tokens, compute, transform, entropy=True)
    c = torch.tensor([[0.5, -1.0, 2.0, 0.0]], device=device)
    h = torch.tensor([[0.1, 0.2, -0.3, 0.0]], device=device) if tilt else None
    found = []
    for parts in (1, 2, 3, 100):
        seen = shared(parts)
        out = torch.full_like(logits, float("nan"))
        token_gradient(logits, tokens, statistics, c, h, transform, out)
        assert seen == [min(parts, seen[0])]
        assert out.isfinite().all(), "entries were left out"
        assert not out[0, -1].any()
        found.append(out)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_in_place_is_not_shared(shared: Callable[[int], list[int]], device: torch.device) -> None:
    """A program might write over the sampled token's logit before another has read it."""
    logits, tokens, compute = rows(70001, torch.float32, device)
    seen = shared(3)
    statistics = token_statistics(logits, tokens, compute, TRANSFORMS[0], entropy=False)
    c = torch.ones_like(statistics.logprobs)
    seen.clear()
    token_gradient(logits, tokens, RowStatistics(*statistics), c * compute, None, TRANSFORMS[0], logits)
    assert seen == []


def test_parts_fill_the_machine() -> None:
    found = launch.LaunchConfiguration(16, 512, 8, 4, 264, {})
    assert found.steps(151936) == 10
    assert [found.parts(rows, 151936) for rows in (1, 26, 27, 132, 133, 264, 8192)] == [10, 10, 9, 2, 1, 1, 1]
    assert found.parts(1, 5) == 1


def test_small_rows_are_not_worth_a_second_kernel(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """What sharing saves must exceed the second kernel's launch: Qwen's rows do, GPT-2's do not."""
    made: list[tuple[int, ...]] = []
    empty = torch.empty

    def counted(*size: Any, **options: Any) -> Tensor:
        made.append(size)
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", counted)
    monkeypatch.setattr(launch.LaunchConfiguration, "parts", lambda self, rows, V: 4)
    for V, expected in ((50257, False), (151936, True)):
        logits, tokens, compute = rows(V, torch.bfloat16, device, count=2)
        made.clear()
        token_statistics(logits, tokens, compute, TRANSFORMS[0], entropy=False)
        assert any(len(size) == 4 for size in made) is expected
