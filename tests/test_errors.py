"""Bad input, one by one: the error names the argument, what was expected and what came."""

from __future__ import annotations

import math

import pytest
import torch

import hpo_fused as hf

LOGITS, TOKENS, ADVANTAGES = torch.randn(2, 3, 11), torch.randint(11, (2, 3)), torch.tensor([1.0, -1.0])
PACKED, PACKED_TOKENS, CU = torch.randn(6, 11), torch.randint(11, (6,)), torch.tensor([0, 2, 6])


def loss(logits=LOGITS, tokens=TOKENS, advantages=ADVANTAGES, **options):  # type: ignore[no-untyped-def]
    return hf.policy_loss(logits, tokens, advantages, **options)


def packed(cu_seqlens=CU, **options):  # type: ignore[no-untyped-def]
    return hf.policy_loss(PACKED, PACKED_TOKENS, ADVANTAGES, cu_seqlens=cu_seqlens, **options)


def token_at(value: int) -> torch.Tensor:
    tokens = TOKENS.clone()
    tokens[1, 2] = value
    return tokens


BAD = {
    "logits-list": (lambda: loss(logits=[1.0]), TypeError, "logits: expected a float16.*list"),
    "logits-float64": (lambda: loss(logits=LOGITS.double()), TypeError, r"logits: .*float64 \[2, 3, 11\]"),
    "logits-dims": (lambda: loss(logits=LOGITS[0, 0]), ValueError, r"logits: .*\[11\]"),
    "logits-empty": (lambda: loss(logits=LOGITS[..., :0]), ValueError, r"logits: .*V > 0.*\[2, 3, 0\]"),
    "logits-strided": (lambda: loss(logits=LOGITS[..., ::2]), ValueError, "logits: .*contiguous last dimension"),
    "tokens-shape": (lambda: loss(tokens=TOKENS[:, :2]), ValueError, r"tokens: expected shape \[2, 3\].*\[2, 2\]"),
    "tokens-dtype": (lambda: loss(tokens=TOKENS.float()), TypeError, "tokens: expected an integer.*float32"),
    "tokens-high": (lambda: loss(tokens=token_at(11)), ValueError, "tokens: .*11"),
    "tokens-negative": (lambda: loss(tokens=token_at(-1)), ValueError, "tokens: .*-1"),
    "tokens-ignored-id": (lambda: loss(tokens=token_at(-100), objective="gspo"), ValueError, "tokens: .*-100"),
    "advantages-shape": (lambda: loss(advantages=torch.ones(3)), ValueError, r"advantages: .*\[2\].*\[3\]"),
    "advantages-type": (lambda: loss(advantages=1.0), TypeError, "advantages: .*float"),
    "advantages-bool": (lambda: loss(advantages=torch.ones(2).bool()), TypeError, "advantages: .*bool"),
    "advantages-device": (lambda: loss(advantages=torch.ones(2, device="meta")), ValueError, "advantages: .*cpu.*meta"),
    "old-shape": (lambda: loss(old_logprobs=torch.zeros(2)), ValueError, r"old_logprobs: .*\[2, 3\].*\[2\]"),
    "old-dtype": (lambda: loss(old_logprobs=TOKENS), TypeError, "old_logprobs: .*int64"),
    "ref-missing": (
        lambda: loss(objective=hf.Objective.preset("grpo", kl_coef=0.1)),
        ValueError,
        "ref_logprobs: .*kl_coef=0.1.*None",
    ),
    "ref-shape": (lambda: loss(ref_logprobs=torch.zeros(3, 2)), ValueError, "ref_logprobs"),
    "mask-shape": (lambda: loss(mask=torch.ones(2, 4)), ValueError, r"mask: .*\[2, 3\].*\[2, 4\]"),
    "mask-type": (lambda: loss(mask=[1]), TypeError, "mask: .*list"),
    "mask-fractional": (lambda: loss(mask=torch.full((2, 3), 0.5)), ValueError, "mask: .*0 and 1.*token_weights"),
    "mask-complex": (lambda: loss(mask=torch.ones(2, 3, dtype=torch.complex64)), TypeError, "mask: .*complex"),
    "weights-shape": (lambda: loss(token_weights=torch.ones(3)), ValueError, r"token_weights: .*\[3\]"),
    "cu-missing": (lambda: packed(None), ValueError, "cu_seqlens: expected response boundaries.*None"),
    "cu-padded": (lambda: loss(cu_seqlens=CU), ValueError, "cu_seqlens: expected None"),
    "cu-falling": (lambda: packed(torch.tensor([0, 5, 4, 6])), ValueError, r"cu_seqlens: .*\[0, 5, 4, 6\]"),
    "cu-start": (lambda: packed(torch.tensor([1, 2, 6])), ValueError, "cu_seqlens: .*from 0 to N = 6"),
    "cu-end": (lambda: packed(torch.tensor([0, 2, 5])), ValueError, "cu_seqlens: .*from 0 to N = 6"),
    "cu-none": (lambda: packed(torch.tensor([0])), ValueError, "cu_seqlens: .*at least for N = 6, got one entry"),
    "cu-dtype": (lambda: packed(CU.float()), TypeError, "cu_seqlens: .*float32"),
    "cu-dims": (lambda: packed(CU[None]), ValueError, r"cu_seqlens: .*\[B \+ 1\].*\[1, 3\]"),
    "cu-type": (lambda: packed([0, 2, 6]), TypeError, "cu_seqlens: .*list"),
    "groups-missing": (
        lambda: loss(objective=hf.Objective.preset("ahpo", normalization="group_mean_length")),
        ValueError,
        "groups: .*group_mean_length.*None",
    ),
    "groups-shape": (
        lambda: loss(objective=hf.Objective.preset("ahpo", normalization="group_mean_length"), groups=CU),
        ValueError,
        r"groups: .*\[2\].*\[3\]",
    ),
    "groups-unseen": (
        lambda: loss(
            objective=hf.Objective.preset("ahpo", normalization="group_mean_length"),
            groups=torch.tensor([1, 2]),
            statistics=hf.BatchStatistics(2, 6, 1, 1, torch.tensor([1, 1]), torch.tensor([3, 3])),
        ),
        ValueError,
        "groups: .*seen",
    ),
    "groups-uncounted": (
        lambda: loss(
            objective=hf.Objective.preset("ahpo", normalization="group_mean_length"),
            groups=torch.tensor([1, 2]),
            statistics=hf.BatchStatistics(2, 6, 1, 1),
        ),
        ValueError,
        "statistics: .*group",
    ),
    "max-length": (lambda: loss(objective="dr_grpo"), ValueError, "max_length: .*constant.*None"),
    "objective-name": (lambda: loss(objective="grpoo"), ValueError, "objective: expected one of grpo.*'grpoo'"),
    "objective-type": (lambda: loss(objective=3), TypeError, "objective: .*int"),
    "statistics-device": (
        lambda: loss(statistics=hf.BatchStatistics(2, 6, 1, torch.tensor(1, device="meta"))),
        ValueError,
        "statistics: expected negative on cpu.*meta",
    ),
    "statistics-type": (lambda: loss(statistics={}), TypeError, "statistics: expected a BatchStatistics.*dict"),
    "temperature-zero": (lambda: loss(temperature=0.0), ValueError, "temperature: .*> 0.*0.0"),
    "temperature-nan": (lambda: loss(temperature=math.nan), ValueError, "temperature: .*nan"),
    "temperature-inf": (lambda: loss(temperature=math.inf), ValueError, "temperature: .*inf"),
    "temperature-type": (lambda: loss(temperature="1"), TypeError, "temperature: .*str"),
    "softcap-negative": (lambda: loss(softcap=-30.0), ValueError, "softcap: .*-30"),
    "backend-name": (lambda: loss(backend="cuda"), ValueError, "backend: expected one of .*'cuda'"),
    "inplace-leaf": (
        lambda: loss(logits=LOGITS.clone().requires_grad_(), inplace=True),
        ValueError,
        "inplace: .*leaf",
    ),
    "inplace-view-of-leaf": (
        lambda: loss(logits=torch.randn(2, 4, 11, requires_grad=True)[:, :-1], inplace=True),
        ValueError,
        "inplace: .*leaf",
    ),
    "inplace-expanded": (
        lambda: loss(logits=(torch.randn(1, 3, 11, requires_grad=True) * 2).expand(2, 3, 11), inplace=True),
        ValueError,
        "inplace: .*strides",
    ),
    "logprobs-dtype": (lambda: hf.logprob_policy_loss(TOKENS, ADVANTAGES), TypeError, "logprobs: .*int64"),
    "logprobs-dims": (lambda: hf.logprob_policy_loss(LOGITS, ADVANTAGES), ValueError, r"logprobs: .*\[2, 3, 11\]"),
    "entropy-missing": (
        lambda: hf.logprob_policy_loss(torch.zeros(2, 3), ADVANTAGES, objective=hf.Objective(entropy_coef=0.1)),
        ValueError,
        "entropy: .*entropy_coef=0.1.*None",
    ),
    "entropy-shape": (
        lambda: hf.logprob_policy_loss(torch.zeros(2, 3), ADVANTAGES, entropy=torch.zeros(2)),
        ValueError,
        r"entropy: .*\[2, 3\]",
    ),
    "token-logprobs-tokens": (lambda: hf.token_logprobs(LOGITS, token_at(99)), ValueError, "tokens: .*99"),
    "token-logprobs-mask": (lambda: hf.token_logprobs(LOGITS, TOKENS, mask=torch.ones(2)), ValueError, "mask: "),
    "backend-for": (lambda: hf.backend_for(LOGITS, "gpu"), ValueError, "backend: .*'gpu'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, error, words = BAD[name]
    with pytest.raises(error, match=words):
        call()


def test_masked_positions_may_hold_anything(backend: str, device: torch.device) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=device)
    tokens = torch.where(mask.bool(), TOKENS.to(device), torch.tensor([[0, 0, -100], [0, 10**12, -1]], device=device))
    garbage = torch.where(mask.bool(), 0.0, torch.nan)
    logits = (LOGITS.to(device) + garbage.unsqueeze(-1)).requires_grad_()
    objective = hf.Objective.preset("mhpo_ahpo", kl_coef=0.1, entropy_coef=0.1)
    out = hf.policy_loss(logits, tokens, ADVANTAGES.to(device)[:, None] + garbage, old_logprobs=garbage - 2,
                         ref_logprobs=garbage - 2, token_weights=garbage + 1, mask=mask, objective=objective,
                         backend=backend)  # fmt: skip
    out.loss.backward()
    assert out.loss.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad[mask.bool()].abs().sum(-1).gt(0).all()
    assert not logits.grad[~mask.bool()].any()
    assert all(value.isfinite() for value in out.metrics().values())


@pytest.mark.parametrize("token", [-1, 11, 2**40, -100])
def test_token_ids_are_checked(token: int, backend: str, device: torch.device) -> None:
    """On the CPU an error; on a GPU an assert on the device, which would end this process: not provoked here."""
    if device.type == "cuda":
        pytest.skip("a device-side assert ends the process")
    for objective in ("grpo", "gspo"):
        with pytest.raises(ValueError, match=f"tokens: .*{token}"):
            hf.policy_loss(LOGITS, token_at(token), ADVANTAGES, objective=objective, backend=backend)
    with pytest.raises(ValueError, match=f"tokens: .*{token}"):
        hf.token_logprobs(LOGITS, token_at(token), backend=backend)
    with pytest.raises(ValueError, match=f"tokens: .*{token}"):  # unmasked, though nothing is computed there
        hf.policy_loss(LOGITS, token_at(token), torch.zeros(2), backend=backend)


def test_numpy_scalars_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    objective = hf.Objective.preset("grpo", kl_coef=numpy.float32(0.125))
    ours = loss(objective=objective, ref_logprobs=torch.zeros(2, 3) - 1, temperature=numpy.float32(0.5))
    plain = loss(
        objective=hf.Objective.preset("grpo", kl_coef=0.125), ref_logprobs=torch.zeros(2, 3) - 1, temperature=0.5
    )
    assert ours.loss.item() == plain.loss.item()
