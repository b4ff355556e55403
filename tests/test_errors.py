"""Wrong calls of every function that takes the argument: the error names it, what was expected and what came."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import hpo_fused as hf
from hpo_fused.checks import same_device

from .wrong_calls import (
    ADVANTAGES,
    BIAS,
    HEAD,
    IDS,
    LOGITS,
    LOGITS_PATH,
    LOSSES,
    ONES,
    TABLES,
    TOKENS,
    WEIGHT,
    call,
    token_at,
)


def wrong_calls() -> Iterator[Any]:
    for functions, table in TABLES:
        for function in functions:
            for name, wrong in table.items():
                yield pytest.param(function, *wrong, id=f"{function}-{name}")


def variants(function: str) -> list[dict[str, Any]]:
    """The ways through a function, which all check: by ratio level, with a mask and with rows not to be chosen."""
    if function in ("policy_loss", "linear_policy_loss"):
        return [{"objective": "grpo"}, {"objective": "gspo"}]
    return [{}, {"mask": ONES}] if "token_logprobs" in function else [{}]


@pytest.mark.parametrize(("function", "options", "error", "words"), [*wrong_calls()])
def test_wrong_call(function: str, options: dict[str, Any], error: type[Exception], words: str) -> None:
    for variant in variants(function):
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), pytest.raises(error, match=words):
                call(function, **{**variant, **options})


def test_wrong_backend_of_a_tensor() -> None:
    with pytest.raises(ValueError, match=r"backend: .*'gpu'"):
        hf.backend_for(LOGITS, "gpu")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor: expected a tensor, got str 'cuda'"):
        hf.backend_for("cuda")  # type: ignore[arg-type]


def test_a_device_without_an_index_is_any_of_its_type() -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert same_device(first, torch.device("cuda"))
    assert same_device(torch.device("cuda"), second)
    assert not same_device(first, second)
    assert not same_device(torch.device("cuda"), torch.device("cpu"))


def test_under_autocast() -> None:
    """Any of the three dtypes goes, and no other; float32 logits or the GEMMs' own."""
    with torch.autocast("cpu", torch.bfloat16):
        call(HEAD[0], weight=WEIGHT.half().requires_grad_(), bias=BIAS.bfloat16())
        with pytest.raises(TypeError, match=r"weight: .*float64"):
            call(HEAD[0], weight=WEIGHT.double())
        with pytest.raises(TypeError, match=r"logits_dtype: expected None, torch.float32 or torch.bfloat16, got .*16"):
            call(HEAD[0], logits_dtype=torch.float16)


@pytest.mark.parametrize("objective", ["grpo", "gspo"])
@pytest.mark.parametrize("options", [{"chunk_bytes": 1}, {"chunk_bytes": True}, {"active_count": 99}], ids=str)
def test_options_are_checked_without_an_active_row(objective: str, options: dict[str, Any]) -> None:
    """Or they would come up on the first batch that has one."""
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(options))}: "):
        call(HEAD[0], advantages=torch.zeros(2), objective=objective, **options)


@pytest.mark.parametrize("token", [-1, 11, 2**40, -100])
@pytest.mark.parametrize("function", [*LOGITS_PATH, *HEAD])
def test_token_ids(function: str, token: int, backend: str, device: torch.device) -> None:
    """Checked at all unmasked positions, though nothing may be computed there; not at masked ones.

    On the CPU an error; on a GPU an assert on the device, which would end this process: not provoked here.
    """
    if device.type == "cuda":
        pytest.skip("a device-side assert ends the process")
    losses = [{"objective": name, "advantages": a} for name in ("grpo", "gspo") for a in (ADVANTAGES, torch.zeros(2))]
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    for options in losses if function in LOSSES else [{}]:
        with pytest.raises(ValueError, match=f"tokens: .*{token}"):
            call(function, tokens=token_at(token), backend=backend, **options)
        call(function, tokens=token_at(token), mask=mask, backend=backend, **options)


def test_a_failed_call_leaves_the_buffer_alone() -> None:
    buffer = torch.ones(11, 4)
    with pytest.raises(ValueError, match="tokens"):
        call(HEAD[0], tokens=token_at(11), weight_grad=buffer)
    assert torch.equal(buffer, torch.ones(11, 4))


def test_masked_positions_may_hold_anything(backend: str, device: torch.device) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=device)
    tokens = torch.where(mask.bool(), TOKENS.to(device), torch.tensor([[0, 0, -100], [0, 10**12, -1]], device=device))
    garbage = torch.where(mask.bool(), 0.0, torch.nan)
    logits = (LOGITS.to(device) + garbage.unsqueeze(-1)).requires_grad_()
    objective = hf.Objective.preset("mhpo_ahpo", kl_coef=0.1, entropy_coef=0.1)
    out = hf.policy_loss(logits, tokens, ADVANTAGES.to(device)[:, None] + garbage, old_logprobs=garbage - 2,
                         ref_logprobs=garbage - 2, token_weights=garbage + 1, mask=mask, objective=objective,
                         temperature=garbage + 0.7, backend=backend)  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad[mask.bool()].abs().sum(-1).gt(0).all()
    assert not logits.grad[~mask.bool()].any()
    assert all(value.isfinite() for value in out.metrics().values())


def test_numbers_of_other_kinds() -> None:
    """What NumPy made is a number, and gives what Python's own gives; its bools are none."""
    numpy = pytest.importorskip("numpy")
    logprobs = {"old_logprobs": ONES - 3, "ref_logprobs": ONES - 2}

    def made(real: Any, integer: Any) -> list[Any]:
        clip = hf.Clip(real(0.125), real(0.25), delta=real(4), dual=integer(3))
        fade = hf.LogFidelity(real(1.5), hf.Hazard(real(1.5), integer(1), integer(2), real(0.75)))
        objectives = [
            hf.Objective("token", clip, hf.Hysteretic(real(0.5)), "constant", integer(3), real(20), real(0.125)),
            hf.Objective("token", fade, hf.AdaptiveHysteretic(real(0.25)), entropy_coef=real(-0.5)),
        ]
        counts = hf.BatchStatistics(integer(4), real(12.5), integer(1), integer(3), gradient_average=integer(2))
        given = {"temperature": real(0.5), "softcap": real(30), "loss_scale": real(0.25), "statistics": counts}
        numbered = hf.BatchStatistics.from_batch(ADVANTAGES, ONES, groups=IDS[:2] % 2, group_count=integer(2))
        return [
            *(call("policy_loss", objective=objective, **logprobs, **given).loss.item() for objective in objectives),
            *(call(f, active_count=integer(6), chunk_bytes=integer(88)) is not None for f in HEAD),
            *(repr(objective) + json.dumps(objective.to_mapping()) for objective in objectives),
            hf.linear_memory(integer(8), integer(4), integer(11), tokens=integer(9), chunk_bytes=integer(88)),
            repr((counts, numbered.group_lengths)),
        ]

    assert made(numpy.float32, numpy.int64) == made(float, int)
    wrong: dict[str, Any] = {
        "kl_coef": lambda value: hf.Objective(kl_coef=value),
        "max_length": lambda value: hf.Objective(max_length=value),
        "tokens": lambda value: hf.BatchStatistics(1, value, 1, 0),
        "softcap": lambda value: call("policy_loss", softcap=value),
        "loss_scale": lambda value: call("policy_loss", loss_scale=value),
        "chunk_bytes": lambda value: call(HEAD[0], chunk_bytes=value),
        "active_count": lambda value: call(HEAD[0], active_count=value),
    }
    for name, function in wrong.items():
        for value in (True, numpy.True_, "88", numpy.array([88, 88])):
            with pytest.raises(TypeError, match=f"^{name}: expected .* got "):
                function(value)


@pytest.mark.parametrize("chunk_bytes", [None, 100])
@pytest.mark.parametrize("sizes", [(0, 4, 11), (8, 0, 11), (8, 4, 0), (8, 0, 0), (0, 0, 0)])
def test_sizes_of_zero(sizes: tuple[int, int, int], chunk_bytes: int | None) -> None:
    """Nothing is held for nothing, or the size is refused by name; no arithmetic breaks down."""
    try:
        memory = hf.linear_memory(*sizes, chunk_bytes=chunk_bytes)
    except ValueError as error:
        message = str(error)
    else:
        rows, width, vocabulary = sizes
        assert memory.gradients == 2 * width * (rows + vocabulary)
        assert memory.peak >= memory.gradients
        return
    assert message.startswith(("rows: ", "hidden_size: ", "vocabulary: "))
