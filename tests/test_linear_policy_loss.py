"""The linear path against the float64 oracle, by table; and what it does that no comparison covers."""

from __future__ import annotations

import math
import os
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import linear_head
from hpo_fused.compiled_rows import ENVIRONMENT_VARIABLE, MINIMUM_WIDTH
from hpo_fused.linear_head import Float32Gemms

from .equivalence import Case, worst
from .linear_equivalence import LinearCase, build_linear, check_linear
from .test_equivalence import PRESETS, difficult_rows, sequences, shapings, terms
from .test_linear_gemms import Gemms

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOTH = {"kl_coef": 0.04, "entropy_coef": 0.02}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def small(name: str, objective: hf.Objective, dtype: torch.dtype = torch.float32, **options: Any) -> LinearCase:
    """A case of few rows: Triton's interpreter takes 20 ms for each."""
    if objective.ratio_level == "sequence":  # of this shape one response has no advantage
        return LinearCase(name, objective, dtype, responses=6, length=3, small_ratios=True, **options)
    return LinearCase(name, objective, dtype, responses=4, length=4, **options)


def covering() -> list[LinearCase]:
    """Every preset in every dtype; layouts, biases, chunks and frozen sides in turn, so that each meets each dtype."""
    frozen = ((), (), ("hidden",), (), ("weight",))
    chunks = (3, None, 1, 3)
    cases = []
    for i, dtype in enumerate(DTYPES):
        for j, (name, objective) in enumerate(PRESETS.items()):
            k = 3 * j + i
            cases.append(
                small(
                    f"{name}-{short(dtype)}",
                    objective,
                    dtype,
                    layout=("padded", "packed")[j % 2],
                    bias=k % 3 != 0,
                    chunk_rows=chunks[k % 4],
                    frozen=frozen[k % 5],
                )
            )
    return cases


def presets() -> list[LinearCase]:
    """Every preset in every dtype, layout and way to cut chunks: 3 rows end inside responses."""
    return [
        LinearCase(
            f"{name}-{short(dtype)}-{layout}-{rows}",
            objective,
            dtype,
            layout,
            small_ratios=name == "gspo",
            bias=(i + j // 2 + j) % 2 == 0,
            chunk_rows=rows,
        )
        for i, (name, objective) in enumerate(PRESETS.items())
        for dtype in DTYPES
        for j, (layout, rows) in enumerate((("padded", None), ("padded", 3), ("packed", 1), ("packed", 3)))
    ]


def further() -> list[LinearCase]:
    """The logits' tables: shapings, sequences, penalties, weights, normalisers, statistics, transforms, hard rows."""
    table = [case for case in terms() + sequences() + shapings() if case.dtype == torch.float32]
    return [
        LinearCase.of(case, short(dtype), dtype=dtype, bias=i % 2 == 0, chunk_rows=(4, None)[i // 2 % 2])
        for i, case in enumerate(table)
        for dtype in (torch.float32, torch.bfloat16)
    ] + [
        # A product of hidden states and a head has no -inf.
        LinearCase.of(case, "linear", bias=True, chunk_rows=4)
        for case in difficult_rows()
        if case.rows != "minus_inf"
    ]


def frozen() -> list[LinearCase]:
    """Every combination of sides without a gradient."""
    sides = ("hidden", "weight", "bias")
    subsets = [tuple(side for bit, side in enumerate(sides) if number >> bit & 1) for number in range(1, 8)]
    return [
        LinearCase(
            f"frozen-{'-'.join(subset)}-{name}-{short(dtype)}",
            PRESETS[name],
            dtype,
            small_ratios=name == "gspo",
            bias=True,
            frozen=subset,
            chunk_rows=rows,
        )
        for subset in subsets
        for name, dtype, rows in (("mhpo_ahpo", torch.bfloat16, 3), ("gspo", torch.float32, None))
    ]


def variations() -> list[LinearCase]:
    """What only the linear path has: float32 logits, autocast, a caller's buffer, a known number of rows."""
    cases = []
    for name in ("mhpo_ahpo", "gspo"):
        for dtype in DTYPES:
            # With penalties no unmasked row is inactive.
            objective = hf.Objective.preset(name, **(BOTH if dtype == torch.bfloat16 else {}))
            for rows in (None, 3):
                head = f"{name}-{short(dtype)}-{rows}"
                options = {"bias": True, "chunk_rows": rows}
                cases.append(small(f"{head}-float32-logits", objective, dtype, logits_dtype=torch.float32, **options))
                cases.append(small(f"{head}-main-grad", objective, dtype, weight_grad=True, **options))
                cases.append(small(f"{head}-exact", objective, dtype, slack=0, **options))
                if dtype != torch.float32:
                    stored = torch.float32
                    cases.append(small(f"{head}-autocast", objective, dtype, stored=stored, **options))
        cases.append(small(f"{name}-autocast-half", PRESETS[name], torch.bfloat16, stored=torch.float16, chunk_rows=3))
        cases.append(
            small(f"{name}-all", PRESETS[name], torch.bfloat16, stored=torch.float32, logits_dtype=torch.float32,
                  weight_grad=True, slack=2, chunk_rows=3, frozen=("hidden",))
        )  # fmt: skip
    return cases


@pytest.mark.parametrize("case", covering(), ids=str)
def test_matches_the_oracle(case: LinearCase, backend: str, device: torch.device) -> None:
    check_linear(case, backend, device)


@pytest.mark.parametrize("case", presets() + further() + frozen() + variations(), ids=str)
def test_matches_the_oracle_at_large(case: LinearCase, device: torch.device) -> None:
    """With the backend that serves the device by itself: the tables are too long for Triton's interpreter."""
    check_linear(case, "auto", device)


@pytest.mark.parametrize(
    "case",
    [
        small("hard-token", hf.Objective.preset("mhpo_ahpo", **BOTH), torch.bfloat16, bias=True, chunk_rows=3,
              token_weights=True, options={"temperature": 0.7, "softcap": 6.0}),
        small("hard-sequence", hf.Objective.preset("gspo", **BOTH), torch.bfloat16, layout="packed", micro_batch=True,
              chunk_rows=3, options={"temperature": 1.3}),
        small("hard-groups", hf.Objective.preset("ahpo", normalization="group_mean_length"), micro_batch=True,
              chunk_rows=1),
        small("float32-logits", PRESETS["mhpo_ahpo"], torch.bfloat16, logits_dtype=torch.float32, bias=True),
        small("main-grad", PRESETS["mhpo_ahpo"], torch.bfloat16, weight_grad=True, chunk_rows=3),
        small("autocast", PRESETS["mhpo_ahpo"], torch.bfloat16, stored=torch.float32, chunk_rows=3, bias=True),
        small("bound-token", PRESETS["mhpo_ahpo"], torch.bfloat16, slack=6, chunk_rows=4, bias=True),
        small("bound-sequence", PRESETS["gspo"], torch.bfloat16, slack=6, chunk_rows=4, bias=True),
    ],
    ids=str,
)  # fmt: skip
def test_options_match_the_oracle(case: LinearCase, backend: str, device: torch.device) -> None:
    check_linear(case, backend, device)


@pytest.mark.parametrize("able", [Float32Gemms(True, False), Float32Gemms(True, True)], ids=["writes", "adds"])
@pytest.mark.parametrize("case", [
    small("elsewhere-token", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, chunk_rows=3),
    small("elsewhere-sequence", PRESETS["gspo"], torch.bfloat16, bias=True, chunk_rows=3),
    small("elsewhere-main-grad", PRESETS["mhpo_ahpo"], torch.bfloat16, chunk_rows=3, weight_grad=True),
    small("elsewhere-logits", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, logits_dtype=torch.float32),
    small("elsewhere-half", PRESETS["mhpo_ahpo"], torch.float16, bias=True, chunk_rows=3),
    small("elsewhere-autocast", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, stored=torch.float32),
], ids=str)  # fmt: skip
def test_where_gemms_write_float32(case: LinearCase, able: Float32Gemms, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: chunks are then not rounded before they are added, and the bounds say so."""
    stand_in = Gemms(able)
    monkeypatch.setattr(linear_head, "float32_gemms", lambda *_: able)
    monkeypatch.setattr(torch, "mm", stand_in.mm)
    monkeypatch.setattr(torch, "addmm", stand_in.addmm)
    check_linear(case, "torch", torch.device("cpu"))
    assert stand_in.written + stand_in.added > 0


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
@pytest.mark.parametrize("slack", [None, 0, 4])
def test_all_statistics(name: str, slack: int | None, backend: str, device: torch.device) -> None:
    case = small(f"statistics-{name}", PRESETS[name], torch.bfloat16, slack=slack, chunk_rows=3)
    check_linear(case, backend, device, skip_inactive=False)


@pytest.mark.parametrize(("case", "scale"), [
    (small("upstream-token", PRESETS["mhpo_ahpo"], torch.bfloat16, bias=True, chunk_rows=3), 0.37),
    (small("upstream-sequence", PRESETS["gspo"], torch.bfloat16, bias=True, chunk_rows=3), -3.0),
], ids=str)  # fmt: skip
def test_upstream_gradient(case: LinearCase, scale: float, backend: str, device: torch.device) -> None:
    check_linear(case, backend, device, scale=scale)


@pytest.mark.parametrize("scale", [0.37, -3.0])
@pytest.mark.parametrize("case", [
    small("upstream-float32", PRESETS["hpo"], bias=True),
    small("upstream-autocast", PRESETS["hpo"], torch.bfloat16, stored=torch.float32),
    small("upstream-half", PRESETS["mhpo_ahpo"], torch.float16, bias=True),
    small("upstream-main-grad", PRESETS["ahpo"], torch.bfloat16, bias=True, weight_grad=True, chunk_rows=3),
], ids=str)  # fmt: skip
def test_upstream_gradient_of_variations(case: LinearCase, scale: float, device: torch.device) -> None:
    check_linear(case, "auto", device, scale=scale)


@pytest.mark.parametrize("scale", [2.0**8, 2.0**16])
@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
@pytest.mark.parametrize("rows", [None, 3])
def test_loss_scale(name: str, scale: float, rows: int | None, device: torch.device) -> None:
    """2^16 would overflow float16 here, were the statistics' normaliser not as large as a real batch's."""
    statistics = hf.BatchStatistics(responses=2**9, tokens=2**13, positive=2, negative=3)
    case = LinearCase(f"scale-{name}", PRESETS[name], torch.float16, small_ratios=name == "gspo", chunk_rows=rows,
                      bias=True, options={"statistics": statistics})  # fmt: skip
    check_linear(case, "auto", device, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, 3])
def test_compiled_vocabulary(
    dtype: torch.dtype, rows: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary that is not small: on the CPU the sweeps are compiled there."""
    if device.type == "cpu" and any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "1")  # a compilation that fails is to be seen
    objective = hf.Objective.preset("mhpo_ahpo", **BOTH)
    case = small("compiled", objective, dtype, vocabulary=MINIMUM_WIDTH + 5, chunk_rows=rows, bias=True)
    check_linear(case, "auto", device)


@pytest.mark.parametrize("vocabulary", [1, 2, 17, 997])
def test_vocabularies(vocabulary: int, device: torch.device) -> None:
    objective = hf.Objective.preset("mhpo_ahpo", **BOTH)
    for dtype in (torch.float32, torch.bfloat16):
        check_linear(
            LinearCase(f"V{vocabulary}", objective, dtype, vocabulary=vocabulary, chunk_rows=4), "auto", device
        )


# ---------------------------------------------------------------------------------------------------------------
# behaviour


def arguments(
    device: torch.device, vocabulary: int = 211, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [5, 4, 24], weight, tokens, advantages (one of them 0) and old log-probabilities."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 4, 24, generator=generator)
    weight = torch.randn(vocabulary, 24, generator=generator) / 3
    tokens = torch.randint(vocabulary, (5, 4), generator=generator)
    old = hf.token_logprobs(hidden @ weight.t(), tokens).logprobs + 0.2 * torch.randn(5, 4, generator=generator)
    advantages = torch.tensor([1.0, -1.0, 0.0, 0.5, -2.0])
    return hidden.to(device, dtype), weight.to(device, dtype), tokens.to(device), advantages.to(device), old.to(device)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize(("name", "dtype"), [("mhpo_ahpo", torch.bfloat16), ("gspo", torch.float32)])
def test_bitwise_reproducible(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    values, weights, tokens, advantages, old = arguments(device, 97, dtype)
    results = []
    for _ in range(2):
        hidden, weight, bias = leaves(values[:, :2], weights, weights[:, 0])
        out = hf.linear_policy_loss(hidden, weight, tokens[:, :2], advantages, bias=bias, old_logprobs=old[:, :2],
                                    objective=name, chunk_bytes=5 * 97 * dtype.itemsize, backend=backend)  # fmt: skip
        out.loss.backward()
        results.append((out.loss.detach(), out.logprobs, out.entropy, hidden.grad, weight.grad, bias.grad))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*PRESETS, "group_mean_length"])
def test_same_as_from_logits(name: str, device: torch.device) -> None:
    """In float32 nothing lies between the two but the GEMMs' own rounding."""
    objective = hf.Objective.preset("ahpo", normalization=name) if name == "group_mean_length" else PRESETS[name]
    groups = torch.tensor([3, 3, 1, 1, 1], device=device) if name == "group_mean_length" else None
    hidden, weight, tokens, advantages, old = arguments(device)
    results = []
    for linear in (False, True):
        x, w = leaves(hidden, weight)
        options: dict[str, Any] = {"old_logprobs": old, "objective": objective, "groups": groups}
        if linear:
            out = hf.linear_policy_loss(x, w, tokens, advantages, **options, chunk_bytes=3 * 211 * 4)
        else:
            out = hf.policy_loss(x @ w.t(), tokens, advantages, **options)
        out.loss.backward()
        results.append((out.loss.detach(), out.logprobs, out.entropy, out.active, x.grad, w.grad))
    for ours, logits in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_inactive_rows_are_loud(device: torch.device) -> None:
    hidden, weight, tokens, advantages, old = arguments(device)
    lazy, full = (
        hf.linear_policy_loss(hidden, weight, tokens, advantages, old_logprobs=old, skip_inactive=skip)
        for skip in (True, False)
    )
    assert lazy.active.tolist() == full.active.tolist() == [[b != 2] * 4 for b in range(5)]
    assert lazy.entropy is not None
    assert full.entropy is not None
    for some, all_ in ((lazy.logprobs, full.logprobs), (lazy.entropy, full.entropy)):
        assert some[2].isnan().all()
        assert all_.isfinite().all()
        torch.testing.assert_close(some[lazy.active], all_[lazy.active])


def test_without_entropy(device: torch.device) -> None:
    hidden, weight, tokens, advantages, old = arguments(device)
    for name in ("mhpo_ahpo", "gspo"):
        for skip in (True, False):
            out = hf.linear_policy_loss(
                hidden, weight, tokens, advantages, old_logprobs=old, objective=name, entropy=False,
                skip_inactive=skip,
            )  # fmt: skip
            assert out.entropy is None
    bonus = hf.Objective.preset("grpo", entropy_coef=0.1)
    out = hf.linear_policy_loss(hidden, weight, tokens, advantages, objective=bonus, entropy=False)
    assert out.entropy is not None  # the objective needs it


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_metrics(name: str, device: torch.device) -> None:
    hidden, weight, tokens, advantages, old = arguments(device)
    ours = hf.linear_policy_loss(hidden, weight, tokens, advantages, old_logprobs=old, objective=name).metrics()
    logits = hf.policy_loss(hidden @ weight.t(), tokens, advantages, old_logprobs=old, objective=name).metrics()
    assert ours.keys() == logits.keys()
    for key, value in ours.items():
        assert value.dim() == 0
        torch.testing.assert_close(value, logits[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_stays_in_its_row(name: str, poison: float, device: torch.device) -> None:
    """A broken active row breaks the head's gradient, as it must, but no other row's hidden gradient."""
    values, weight, tokens, advantages, old = arguments(device)
    gradients = []
    for value in (0.0, poison):
        hidden, head = leaves(values, weight)
        with torch.no_grad():
            hidden[1, 2, 7] += value
        out = hf.linear_policy_loss(
            hidden, head, tokens, advantages, old_logprobs=old, objective=name, chunk_bytes=4 * 211 * 4,
        )  # fmt: skip
        out.loss.backward()
        gradients.append((hidden.grad, head.grad))
    assert out.loss.isnan()
    assert gradients[1][0][1, 2].isnan().any()
    assert gradients[1][1].isnan().any()
    spared = torch.ones(5, 4, dtype=torch.bool)
    spared[1, 2 if name == "mhpo_ahpo" else slice(None)] = False  # one ratio serves the whole response in GSPO
    torch.testing.assert_close(gradients[1][0][spared], gradients[0][0][spared], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_any_integer_tokens(dtype: torch.dtype, device: torch.device) -> None:
    hidden, weight, tokens, advantages, old = arguments(device, 100)
    losses = [
        hf.linear_policy_loss(hidden, weight, ids, advantages, old_logprobs=old).loss
        for ids in (tokens, tokens.to(dtype))
    ]
    assert losses[0].item() == losses[1].item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_does_not_matter(dtype: torch.dtype, device: torch.device) -> None:
    values = arguments(device)
    results = []
    for default in (torch.float32, dtype):
        hidden, weight = leaves(*values[:2])
        torch.set_default_dtype(default)
        try:
            out = hf.linear_policy_loss(
                hidden, weight, *values[2:4], old_logprobs=values[4], temperature=0.7, chunk_bytes=4 * 211 * 4,
            )  # fmt: skip
            out.loss.backward()
            metrics = out.metrics()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((out.loss.detach(), out.logprobs, hidden.grad, weight.grad, metrics["ratio_mean"]))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo", "sapo"])
@pytest.mark.parametrize("splits", [[3, 2], [1, 4]])
def test_micro_batches_add_up(name: str, splits: list[int], device: torch.device) -> None:
    """Accumulated over calls with the totals of the optimiser batch, in one .grad: one big call's gradient."""
    values, weights, tokens, advantages, old = arguments(device)
    mask = (torch.arange(4) < torch.tensor([4, 2, 3, 0, 1])[:, None]).to(device)
    statistics = hf.BatchStatistics.from_batch(advantages, mask)
    results = []
    for parts in ([5], splits):
        hidden, weight = leaves(values, weights)
        total = 0.0
        for rows in torch.arange(5, device=device).split(parts):
            out = hf.linear_policy_loss(
                hidden[rows], weight, tokens[rows], advantages[rows], old_logprobs=old[rows], mask=mask[rows],
                objective=name, statistics=statistics if parts == splits else None, chunk_bytes=3 * 211 * 4,
            )  # fmt: skip
            out.loss.backward()
            total += out.loss.item()
        results.append((hidden.grad, weight.grad, torch.tensor(total)))
    for whole, added in zip(*results, strict=True):
        torch.testing.assert_close(added, whole, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# nothing to do


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["masked", "inactive", "no-rows", "no-steps", "packed"])
def test_no_active_row(name: str, dtype: torch.dtype, kind: str, backend: str, device: torch.device) -> None:
    """Loss 0, attached to every input; gradients of zeros, not None: data-parallel collectives must not hang."""
    shape = {"no-rows": (0, 4), "no-steps": (3, 0), "packed": (0,)}.get(kind, (3, 4))
    hidden, weight, bias = leaves(
        torch.randn(*shape, 8, device=device, dtype=dtype),
        torch.randn(11, 8, device=device, dtype=dtype),
        torch.randn(11, device=device, dtype=dtype),
    )
    tokens = torch.zeros(shape, dtype=torch.long, device=device)
    options: dict[str, Any] = {}
    if kind == "packed":
        options["cu_seqlens"] = torch.zeros(3, dtype=torch.long, device=device)
    if kind == "masked":
        options["mask"] = torch.zeros_like(tokens)
    advantages = torch.full((2 if kind == "packed" else shape[0],), 0.0 if kind == "inactive" else 1.0, device=device)
    out = hf.linear_policy_loss(
        hidden, weight, tokens, advantages, bias=bias, objective=name, backend=backend, **options
    )
    assert out.loss.item() == 0
    assert out.loss.requires_grad
    assert not out.active.any()
    assert out.logprobs.shape == tokens.shape
    assert all(value.isfinite() for value in out.metrics().values())
    out.loss.backward()
    for leaf in (hidden, weight, bias):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_no_active_row_with_a_bound(name: str, backend: str, device: torch.device) -> None:
    """Rows that only fill up: GEMMs run, over zeros."""
    hidden, weight = leaves(torch.full((3, 4, 8), torch.nan, device=device), torch.randn(11, 8, device=device))
    tokens = torch.zeros(3, 4, dtype=torch.long, device=device)
    for count in (0, 5, 12):
        out = hf.linear_policy_loss(
            hidden, weight, tokens, torch.zeros(3, device=device), objective=name, active_count=count, backend=backend
        )
        gradients = torch.autograd.grad(out.loss, (hidden, weight))
        assert out.loss.item() == 0
        assert out.logprobs.isnan().all()
        assert not any(gradient.any() for gradient in gradients)


# ---------------------------------------------------------------------------------------------------------------
# rows counted by the caller


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_active_count_changes_nothing(name: str, backend: str, device: torch.device) -> None:
    """Exact or a bound, up to all rows, with NaN in every row that is not active."""
    made = build_linear(small(f"count-{name}", PRESETS[name], bias=True), device)
    count, total = int(made.active.sum()), made.active.numel()
    assert 0 < count < total
    results = []
    for given in (None, count, count + 1, total):
        hidden, weight, bias = leaves(made.hidden, made.weight, made.bias)
        out = hf.linear_policy_loss(
            hidden, weight, *made.positional, bias=bias, **made.keywords, active_count=given, backend=backend,
            chunk_bytes=3 * 97 * 4,
        )  # fmt: skip
        out.loss.backward()
        results.append((out.loss.detach(), out.logprobs, out.entropy, hidden.grad, weight.grad, bias.grad))
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("name", ["mhpo_ahpo", "gspo"])
def test_active_count_too_small(name: str, device: torch.device) -> None:
    """An error, never a gradient dropped in silence (a device-side assert on a GPU, which would end this process)."""
    if device.type != "cpu":
        pytest.skip("a device-side assert ends the process")
    hidden, weight, tokens, advantages, old = arguments(device)
    for given in (15, 0):
        with pytest.raises(ValueError, match=f"active_count: expected at least the 16 active rows, got {given}"):
            hf.linear_policy_loss(
                hidden, weight, tokens, advantages, old_logprobs=old, objective=name, active_count=given,
            )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# float32 logits, float16


def test_float32_logits_match_a_float32_sampler(device: torch.device) -> None:
    """bfloat16 hidden states and head: log-probabilities of the product itself, not of its rounding."""
    hidden, weight, tokens, advantages, old = arguments(device, 997, torch.bfloat16)
    exact = hf.reference.token_logprobs(hidden.double() @ weight.double().t(), tokens)
    errors = []
    for logits_dtype in (torch.float32, None):
        out = hf.linear_policy_loss(
            hidden, weight, tokens, advantages, old_logprobs=old, logits_dtype=logits_dtype, skip_inactive=False,
        )  # fmt: skip
        alone = hf.linear_token_logprobs(hidden, weight, tokens, logits_dtype=logits_dtype)
        errors.append([(result.logprobs - exact.logprobs).abs() for result in (out, alone)])
    for unrounded, rounded in zip(*errors, strict=True):
        worst("logprobs", unrounded, 1e-5)
        assert rounded.max() > 1e-3  # what it is for


@pytest.mark.parametrize("name", ["dapo", "gspo"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_float16_survives_a_loss_scaler(name: str, chunks: int, device: torch.device) -> None:
    """Gradients of 1e-8 vanish in float16; multiplied by 2^16 first, they do not."""
    values, weights, tokens, _, _ = arguments(device, 53, torch.float16)
    advantages = 2e-5 * torch.ones(5, device=device)

    def gradients(dtype: torch.dtype, scale: float) -> list[Tensor]:
        hidden, weight = leaves(values.to(dtype), weights.to(dtype))
        out = hf.linear_policy_loss(
            hidden, weight, tokens, advantages, objective=name, chunk_bytes=-(-20 // chunks) * 53 * dtype.itemsize,
        )  # fmt: skip
        (out.loss * scale).backward()
        return [leaf.grad.double() / scale for leaf in (hidden, weight)]

    scaled, plain, right = gradients(torch.float16, 2**16), gradients(torch.float16, 1), gradients(torch.float32, 1)
    for good, lost, expected in zip(scaled, plain, right, strict=True):
        size = expected.square().mean().sqrt()
        # Three roundings of 2^-11, and the logits' own.
        assert (good - expected).square().mean().sqrt() < 5e-3 * size
        assert (lost - expected).square().mean().sqrt() > 5e-2 * size  # it would otherwise show nothing


@pytest.mark.parametrize(
    "case", [Case("inference", PRESETS["mhpo_ahpo"]), Case("inference-s", PRESETS["gspo"])], ids=str
)
def test_no_gradient_wanted(case: Case, device: torch.device) -> None:
    hidden, weight, tokens, advantages, old = arguments(device)
    hidden.requires_grad_()

    def run() -> Tensor:
        return hf.linear_policy_loss(
            hidden, weight, tokens, advantages, old_logprobs=old, objective=case.objective, chunk_bytes=5 * 211 * 4,
        ).loss  # fmt: skip

    with torch.no_grad():
        quiet = run()
    with torch.inference_mode():
        inference = run()
    assert not quiet.requires_grad
    assert quiet.item() == inference.item() == run().item()
