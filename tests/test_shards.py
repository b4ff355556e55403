"""A vocabulary in shards, on one device: what ranks send each other is put together here, natively on a GPU too."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hpo_fused import ops, reference, vocab_parallel
from hpo_fused.backend import implementation
from hpo_fused.interface import MASKED, SKIPPED, LogitTransform, SoftmaxStatistics
from hpo_fused.vocab_parallel import Shards, local_statistics

from .equivalence import (
    ENTROPY_LIMIT,
    GRADIENT_LIMIT,
    LOGPROB_LIMIT,
    gradient_errors,
    logit_gradient,
    softcap_error,
    worst,
)

WIDTH = 61
SIZES = (20, 0, 1, 40)  # the second without a column, the third with one


class Row(NamedTuple):
    """What ranks know of rows after the second sweep."""

    logprobs: list[Tensor]  # of each rank
    entropies: list[Tensor]
    gradient: Tensor  # the ranks' columns side by side


def shards(sizes: tuple[int, ...], rank: int) -> Shards:
    return Shards(None, rank, tuple(itertools.pairwise([0, *itertools.accumulate(sizes)])))  # type: ignore[arg-type]


def put_together(
    z: Tensor, targets: Tensor, c: Tensor, h: Tensor, transform: LogitTransform, backend: str,
    sizes: tuple[int, ...] = SIZES,
) -> Row:  # fmt: skip
    """Both sweeps of every rank's columns, and what stands between them, without ranks."""
    parts = z.split(sizes, -1)
    message = torch.empty(len(sizes), 4, *targets.shape, device=z.device)
    for rank, (part, own) in enumerate(zip(parts, message, strict=True)):
        local_statistics(shards(sizes, rank), part, targets, transform, SoftmaxStatistics(*own), backend)
    found: list[Any] = []
    for rank, part in enumerate(parts):
        of_rank = shards(sizes, rank)
        ranges = torch.tensor(of_rank.ranges, dtype=torch.int32, device=z.device)
        logprobs, statistics = implementation(backend).combine_statistics(message, targets, ranges, rank)
        out = torch.full(part.shape, math.nan, dtype=z.dtype, device=z.device)
        vocab_parallel.token_gradient(of_rank, part, targets, statistics, c, h, transform, out, backend)
        found.append((logprobs, statistics.entropy, out))
    logprobs, entropies, gradients = zip(*found, strict=True)
    return Row(list(logprobs), list(entropies), torch.cat(gradients, -1))


CASES = {
    "plain": ({}, torch.float32, 1.0),
    "peaked": ({}, torch.float32, 3.0),
    "bfloat16, temperature": ({"temperature": 0.7}, torch.bfloat16, 1.0),
    "softcap": ({"softcap": 30.0, "temperature": 1.3}, torch.float32, 2.0),
    "minus inf": ({}, torch.float32, 1.0),
    "minus inf, softcap": ({"softcap": 5.0}, torch.float32, 1.0),
    "finite minimum": ({"temperature": 0.7}, torch.float32, 1.0),
}


def check(case: str, backend: str, device: torch.device) -> None:
    """Hold log-probabilities, entropies and gradients of shards against the oracle's of the whole."""
    options, dtype, spread = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    tokens = torch.randint(WIDTH, (3, 8), generator=generator)
    tokens[0, :5] = torch.tensor([0, 19, 20, 21, 60])  # the shards' edges
    z = 3 * spread * torch.randn(3, 8, WIDTH, generator=generator)
    if case.startswith("minus inf"):
        z[torch.rand(z.shape, generator=generator) < 0.5] = -torch.inf
        z[1, :, :20], z[2, :4, 1:] = -torch.inf, -torch.inf  # a shard without any, and rows of one token
        z[2, :4, 0] = 1.0
        tokens[2, :4] = 0
        z.scatter_(-1, tokens.unsqueeze(-1), 0.5)
    if case == "finite minimum":  # in whole shards
        for t, value in enumerate((-1e9, -1e10, -1e15, torch.finfo(dtype).min)):
            z[:2, t::4, 20:] = value
            z[2, t::4, :21] = value
        z.scatter_(-1, tokens.unsqueeze(-1), 0.5)
    z, tokens = z.to(dtype).to(device), tokens.to(device)
    c, h = torch.randn(2, 3, 8, generator=generator).to(device)
    c[1, 3] = h[1, 3] = 0.0
    transform = LogitTransform(options.get("temperature", 1.0), options.get("softcap"))
    rows = put_together(z, tokens.to(torch.int32), c, h, transform, backend)
    exact = reference.token_logprobs(z.double(), tokens, **options)
    for logprobs, entropy in zip(rows.logprobs, rows.entropies, strict=True):
        assert torch.equal(logprobs, rows.logprobs[0])
        assert (logprobs <= 0).all()
        worst("logprobs", (logprobs - exact.logprobs).abs(), LOGPROB_LIMIT + softcap_error(options))
        worst("entropy", (entropy - exact.entropy).abs(), ENTROPY_LIMIT)
    expected = logit_gradient(z.double(), tokens, torch.ones_like(tokens).bool(), c.double(), h.double(), options)
    limit = GRADIENT_LIMIT + softcap_error(options)
    for name, error in zip(("sampled", "other"), gradient_errors(rows.gradient, expected, tokens), strict=True):
        worst(f"gradient of the {name} tokens", error, limit)


@pytest.mark.parametrize("case", list(CASES))
def test_shards_put_together_are_the_whole(case: str, backend: str, device: torch.device) -> None:
    check(case, backend, device)


def test_what_is_nearly_certain_keeps_its_digits(backend: str, device: torch.device) -> None:
    """What is left of the row lies on another rank."""
    z = torch.full((1, 1, WIDTH), -torch.inf, device=device)
    z[..., 21:], z[..., 3] = 0.0, 40.0
    targets, nothing = torch.full((1, 1), 3, dtype=torch.int32, device=device), torch.zeros(1, 1, device=device)
    rows = put_together(z, targets, nothing, nothing, LogitTransform(), backend)
    odds = 40 * math.exp(-40)
    assert rows.logprobs[0].item() == pytest.approx(-math.log1p(odds), rel=1e-6)
    assert rows.entropies[0].item() == pytest.approx(odds * 41, rel=1e-6)


@pytest.mark.parametrize("where", ["token", "first column", "a whole shard", "a shard's only column"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("others", [0.0, -math.inf])
def test_nan_and_overflow_reach_the_loss(
    where: str, wrong: float, others: float, backend: str, device: torch.device
) -> None:
    """As they do without shards: none of them is taken for a shard without a token."""
    z = torch.full((1, 2, WIDTH), others, device=device)
    z[..., 0] = 0.0
    columns = {"token": 30, "first column": 21, "a whole shard": slice(21, None), "a shard's only column": 20}[where]
    z[0, 0, columns] = wrong
    z[0, 1, 30] = 0.0
    targets, c = torch.full((1, 2), 30, dtype=torch.int32, device=device), torch.ones(1, 2, device=device)
    rows = put_together(z, targets, c, 0.1 * c, LogitTransform(), backend)
    whole = SoftmaxStatistics(*torch.empty(4, 1, 2, device=device))
    ops.token_statistics(z, targets, LogitTransform(), whole, backend)
    for logprobs, entropy in zip(rows.logprobs, rows.entropies, strict=True):
        assert torch.equal(logprobs.isnan(), whole.logprobs.isnan())
        assert not logprobs[0, 0].isfinite()
        assert entropy[0, 0].isnan()
        assert logprobs[0, 1].isfinite()
    assert rows.gradient[0, 0].isnan().any()
    assert rows.gradient[0, 1].isfinite().all()


def test_rows_without_a_target_are_nan_and_have_no_gradient(backend: str, device: torch.device) -> None:
    targets = torch.tensor([[MASKED, SKIPPED, 20]], dtype=torch.int32, device=device)
    z, c = torch.full((1, 3, WIDTH), 0.5, device=device), torch.ones(1, 3, device=device)
    z[0, :2] = math.nan
    rows = put_together(z, targets, c, c, LogitTransform(), backend)
    for logprobs in rows.logprobs:
        assert logprobs.isnan().tolist() == [[True, True, False]]
    assert not rows.gradient[0, :2].any()
