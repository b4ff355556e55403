"""What the linear path does and does not do: GEMMs counted, nothing copied whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import hpo_fused as hf
from hpo_fused.linear import head as linear_head

from .linear_counters import (
    ACTIVE,
    BATCH,
    STEPS,
    UNMASKED,
    VOCABULARY,
    WIDTH,
    Allocations,
    Gemms,
    arguments,
    call,
    requiring,
    warm,
)


@pytest.mark.parametrize("chunk_rows", [None, 5])
@pytest.mark.parametrize(
    ("name", "frozen", "products"),
    [
        ("grpo", (), 3),
        ("grpo", ("base",), 2),
        ("grpo", ("weight",), 2),
        ("grpo", ("base", "weight"), 1),  # the bias's gradient needs no product
        ("gspo", (), 4),
        ("gspo", ("base",), 3),
        ("gspo", ("weight",), 3),
        ("gspo", ("base", "weight"), 2),
    ],
)
def test_products_of_active_rows_only(
    name: str, frozen: tuple[str, ...], products: int, chunk_rows: int | None, device: torch.device
) -> None:
    values = requiring(arguments(device), *frozen)
    options = {"objective": name, "chunk_bytes": None if chunk_rows is None else chunk_rows * VOCABULARY * 4}
    warm(values, **options)
    with Gemms() as gemms:
        out = call(values, **options)
        forward = gemms.rows
        out.loss.backward()
    assert int(out.active.sum()) == ACTIVE
    assert gemms.rows == products * ACTIVE
    assert forward == (products if name == "grpo" else 1) * ACTIVE  # backward of a token-level objective only scales


@pytest.mark.parametrize(
    ("dtype", "options", "products"),
    [
        (torch.bfloat16, {}, 3),
        (torch.bfloat16, {"chunk_bytes": 5 * VOCABULARY * 2}, 3),
        (torch.bfloat16, {"logits_dtype": torch.float32}, 3),
        (torch.float16, {}, 4),  # the loss scaler's factor is known in backward only
        (torch.bfloat16, {"weight_grad": True}, 4),
    ],
)
def test_products_in_low_precision(
    dtype: torch.dtype, options: dict[str, Any], products: int, device: torch.device
) -> None:
    values = requiring(arguments(device, dtype))
    if "weight_grad" in options:
        options = {"weight_grad": torch.zeros(VOCABULARY, WIDTH, device=device)}
    warm(values, **options)
    with Gemms() as gemms:
        call(values, **options).loss.backward()
    assert gemms.rows == products * ACTIVE


@pytest.mark.parametrize(("name", "products"), [("grpo", 3), ("gspo", 4)])
def test_products_under_autocast(name: str, products: int, device: torch.device) -> None:
    values = requiring(arguments(device))
    with torch.autocast(device.type, torch.bfloat16):
        warm(values, objective=name)
        with Gemms() as gemms:
            call(values, objective=name).loss.backward()
    assert gemms.rows == products * ACTIVE


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_products_of_statistics(name: str, device: torch.device) -> None:
    """One product under no_grad, and one more for unmasked rows without a signal where they are asked for."""
    values = requiring(arguments(device))
    warm(values, objective=name)
    for skip, rows in ((True, ACTIVE), (False, UNMASKED)):
        with Gemms() as gemms, torch.no_grad():
            call(values, objective=name, skip_inactive=skip)
        assert gemms.rows == rows
    with Gemms() as gemms:
        call(values, objective=name, skip_inactive=False).loss.backward()
    assert gemms.rows == (3 if name == "grpo" else 4) * ACTIVE + UNMASKED - ACTIVE


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_rows_up_to_a_bound_cost_as_active_ones(name: str, device: torch.device) -> None:
    values = requiring(arguments(device))
    warm(values, objective=name)
    for count in (ACTIVE, ACTIVE + 4):
        with Gemms() as gemms:
            call(values, objective=name, active_count=count).loss.backward()
        assert gemms.rows == (3 if name == "grpo" else 4) * count


def test_products_of_log_probabilities(device: torch.device) -> None:
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


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("slack", [None, 4])
def test_masked_and_inactive_rows_are_never_read(
    name: str, poison: float, slack: int | None, device: torch.device
) -> None:
    """Whatever they hold: no operand of a product is touched by it, and no bit of a result."""
    results = []
    for garbage in (0.0, poison):
        values = arguments(device)
        active = call(values, objective=name).active
        values["base"][:, :-1][~active] = garbage
        values["base"][:, -1] = garbage
        values["old_logprobs"][~values["mask"]] = garbage
        count = None if slack is None else ACTIVE + slack
        with Gemms() as gemms:
            out = call(requiring(values), objective=name, active_count=count)
            out.loss.backward()
        assert gemms.finite
        assert torch.equal(out.active, active)
        results.append((out.loss.detach(), out.logprobs, *(values[leaf].grad for leaf in ("base", "weight", "bias"))))
    for clean, poisoned in zip(*results, strict=True):
        torch.testing.assert_close(poisoned, clean, rtol=0, atol=0, equal_nan=True)
    assert results[1][0].isfinite()
    assert all(gradient.isfinite().all() for gradient in results[1][2:])


@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("everything", [False, True], ids=["some", "all"])
def test_nothing_is_copied_whole(
    name: str, everything: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither strided hidden states nor logits: no tensor with more rows than a chunk is made from them.

    In bfloat16, because the torch backend works with a few float32 rows of its own, and on a processor that multiplies
    in it: others widen slices of the weight, whose memory test_linear_gemms.py looks at.
    """
    monkeypatch.setattr(linear_head, "multiplies_in", lambda *_: True)
    values = requiring(arguments(device, torch.bfloat16), "base", "weight")
    if everything:
        values["mask"] = torch.ones_like(values["mask"])
        values["tokens"] = values["tokens"].clamp(min=0)
        values["advantages"] = torch.ones_like(values["advantages"])
    options = {"objective": name, "chunk_bytes": 4 * VOCABULARY * 2}
    with Allocations() as made:
        out = call(values, **options)
        out.loss.backward()
    assert int(out.active.sum()) == (BATCH * STEPS if everything else ACTIVE)
    assert made.rows(WIDTH, torch.bfloat16) == 4
    assert made.rows(WIDTH, torch.float32) == 0
    assert made.rows(VOCABULARY, torch.bfloat16) == 4


def test_contiguous_rows_are_not_even_gathered(device: torch.device) -> None:
    values = requiring(arguments(device), "base", "weight")
    hidden, tokens = values["base"][:2, :3].detach().clone(), torch.zeros(2, 3, dtype=torch.long, device=device)
    advantages = torch.ones(2, device=device)
    with Allocations() as made:
        out = hf.linear_policy_loss(hidden, values["weight"], tokens, advantages, bias=values["bias"])
        out.loss.backward()
    assert made.rows(WIDTH, torch.float32) == 0


@pytest.mark.parametrize("frozen", [(), ("base",), ("weight",), ("bias",)])
def test_gradients_of_frozen_inputs_are_not_allocated(frozen: tuple[str, ...], device: torch.device) -> None:
    values = requiring(arguments(device), *frozen)
    hidden = values["base"][:, :-1].detach().requires_grad_("base" not in frozen)
    with Allocations() as made:
        out = hf.linear_policy_loss(
            hidden, values["weight"], values["tokens"], values["advantages"], bias=values["bias"], mask=values["mask"]
        )
        out.loss.backward()
    assert (made.shapes.count((BATCH, STEPS, WIDTH)) > 0) == ("base" not in frozen)
    assert (made.shapes.count((VOCABULARY, WIDTH)) > 0) == ("weight" not in frozen)
    # The bias's sum is the only one of its shape; in float32 its gradient is that sum.
    assert (made.shapes.count((VOCABULARY,)) > 0) == ("bias" not in frozen)


def test_stored_gradients_are_handed_over(device: torch.device) -> None:
    """What forward made becomes .grad: no copy of [V, H] in backward."""
    values = requiring(arguments(device, torch.bfloat16))
    hidden = values["base"].detach().requires_grad_()
    tokens = torch.zeros(BATCH, STEPS + 1, dtype=torch.long, device=device)
    out = hf.linear_policy_loss(hidden, values["weight"], tokens, torch.ones(BATCH, device=device), bias=values["bias"])
    pointers = [saved.data_ptr() for saved in out.loss.grad_fn.saved_tensors]
    out.loss.backward()
    assert [leaf.grad.data_ptr() for leaf in (hidden, values["weight"], values["bias"])] == pointers
