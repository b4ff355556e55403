"""Every backend against the float64 oracle, by table."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import hpo_fused as hf

from .equivalence import Case, check

PRESETS = {
    name: dataclasses.replace(objective, max_length=9 if objective.normalization == "constant" else None)
    for name, objective in hf.Objective.presets().items()
}


# One preset of each kind of surrogate and of path: in every dtype.
IN_EVERY_DTYPE = ("grpo", "dr_grpo", "gspo", "sapo", "cispo", "vespo", "mhpo_ahpo")


def presets() -> list[Case]:
    """Every preset in every layout."""
    return [
        Case(
            f"{name}-{str(dtype)[6:]}-{layout}", objective, dtype, layout,
            small_ratios=objective.ratio_level != "token",  # +inf and -inf in one response are NaN by right
        )
        for name, objective in PRESETS.items()
        for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if name in IN_EVERY_DTYPE else 1]
        for layout in ("padded", "packed")
    ]  # fmt: skip


def shapings() -> list[Case]:
    """Every branch of every shaping: all log-ratios x all signs, token by token, on enough rows to hold them."""
    kinds = {
        "clip": hf.Clip(0.2, 0.28),
        "clip-delta": hf.Clip(0.2, 0.2, delta=1.5),
        "clip-delta-below-high": hf.Clip(0.2, 2.0, delta=1.5),
        "clip-dual": hf.Clip(0.2, 0.2, dual=3.0),
        "fidelity": hf.LogFidelity(),
        "fidelity-sharp": hf.LogFidelity(0.4, hf.Hazard(2.5, 0.7, 0.8, 1.3)),
        "fidelity-bare": hf.LogFidelity(2.0, None),
        "gate": hf.SoftGate(1.0, 1.05),
        "gate-sharp": hf.SoftGate(4.0, 0.5),
        "truncated": hf.TruncatedRatio(5.0),
        "truncated-both": hf.TruncatedRatio(1.2, 0.8),
        "truncated-signs-zero": hf.TruncatedRatio(3.0, 0.9, "zero", high_neg=1.2, low_neg=0.1),
        "gamma": hf.GammaGate(2.0, 3.0, 3.0, 2.0),
        "gamma-wide": hf.GammaGate(0.5, 0.1, 1.0, 0.3),
        "geometric": hf.GeometricMean(0.23, 0.4),
        "dro": hf.DRO(0.13),  # no A equals beta x, where the gradient cancels
    }
    return [
        Case(
            f"shape-{name}",
            hf.Objective("token", shaping, hf.Hysteretic(0.6), "mean_length"),
            responses=11,
            length=6,
            per_token_advantages=True,
            ragged=False,
        )
        for name, shaping in kinds.items()
    ]


def sequences() -> list[Case]:
    """Ratios that a response's tokens share, in every level, with every shaping and KL kind that differs there."""
    kinds = {"clip": hf.Clip(3e-4, 4e-4), "fidelity": hf.LogFidelity(), "gate": hf.SoftGate(8.0, 9.0)}
    cases = [
        Case(f"sequence-{name}-{layout}-{per_token}",
             hf.Objective("sequence", shaping, hf.Hysteretic(0.6), "response"), layout=layout,
             small_ratios=True, per_token_advantages=per_token)
        for name, shaping in kinds.items() for layout in ("padded", "packed") for per_token in (False, True)
    ]  # fmt: skip
    others: list[tuple[Any, Any, Any, bool]] = [
        ("sequence", hf.TruncatedRatio(1.0003, 0.9997, "zero"), "k3_ratio", True),
        ("sequence", hf.GeometricMean(4e-4, 3e-4), "k2", True),
        ("sequence", hf.DRO(0.5), "k3_ratio", False),
        ("sequence_token", hf.Clip(3e-4, 4e-4), "k3_ratio", True),
        ("sequence_token", hf.LogFidelity(), "k1", True),
        ("sequence_sum", hf.GammaGate(), "k3_ratio", True),
        ("sequence_sum", hf.SoftGate(8.0, 9.0), "k3+", False),
        ("sequence_sum", hf.GeometricMean(4e-4, 3e-4), "k3", False),
    ]
    return cases + [
        Case(f"{level}-{type(shaping).__name__}-{kl}",
             hf.Objective(level, shaping, hf.Hysteretic(0.6), "response_sum", kl_coef=0.04, kl=kl),
             layout="packed" if per_token else "padded", small_ratios=True, per_token_advantages=per_token)
        for level, shaping, kl, per_token in others
    ]  # fmt: skip


def terms() -> list[Case]:
    """Penalties, weights, normalisers, statistics, transforms, alone and together."""
    preset = hf.Objective.preset
    both = {"kl_coef": 0.04, "entropy_coef": 0.02}
    cases = [
        Case("kl", preset("grpo", kl_coef=0.04)),
        Case("entropy", preset("hpo", entropy_coef=0.01)),
        Case("entropy-penalty", preset("hpo", entropy_coef=-0.5)),
        Case("kl-entropy-transform", preset("mhpo_ahpo", **both), options={"temperature": 0.7, "softcap": 6.0}),
        Case("kl-entropy-sequence", preset("gspo", **both), small_ratios=True, options={"temperature": 1.3}),
        Case("weights", preset("ahpo", **both), token_weights=True),
        Case("weights-packed", preset("mhpo", **both), token_weights=True, layout="packed"),
        Case("weights-sequence", preset("gspo"), token_weights=True, small_ratios=True),
        Case("temperature", preset("mhpo_ahpo"), options={"temperature": 0.6}),
        Case("softcap", preset("mhpo_ahpo"), options={"softcap": 5.0}),
        Case("temperature-of-the-call", preset("grpo"), temperature="call"),
        Case("temperatures-of-responses", preset("mhpo_ahpo", **both), temperature="response"),
        Case("temperatures-of-responses-packed", preset("grpo"), temperature="response", layout="packed"),
        Case("temperatures-of-tokens", preset("hpo"), temperature="token"),
        Case(
            "temperatures-of-tokens-packed",
            preset("mhpo_ahpo", **both),
            temperature="token",
            layout="packed",
            options={"softcap": 6.0},
        ),
        Case(
            "temperatures-sequence",
            preset("gspo", **both),
            small_ratios=True,
            temperature="response",
            options={"softcap": 6.0},
        ),
        Case("temperatures-half", preset("grpo"), torch.float16, temperature="token"),
        # The last response is fully masked, and so not counted: alpha is 1/2.
        Case("uncounted-response", preset("ahpo"), responses=4, advantages=(-1.0, -1.0, 1.0, 1.0)),
        Case("alpha-zero", hf.Objective("token", hf.Clip(), hf.Hysteretic(0.0), "mean_length")),
        Case("on-policy", preset("mhpo_ahpo"), on_policy=True),
        Case("on-policy-sequence", preset("gspo"), on_policy=True),
        Case("on-policy-cispo", preset("cispo"), on_policy=True),
        Case("narrow-clamp", preset("grpo", max_log_ratio=0.5, kl_coef=0.1)),
        Case("entropy-weight", preset("grpo"), entropy_weights="0-d"),
        Case("entropy-weights", preset("ahpo", **both), entropy_weights="response", micro_batch=True),
        Case("entropy-weights-packed", preset("cispo"), entropy_weights="token", layout="packed", token_weights=True),
        Case("entropy-weights-sequence", preset("gspo"), entropy_weights="response", small_ratios=True),
    ]
    cases += [  # every log-ratio to the reference, beyond the clamp too, beside every one to the old policy
        Case(f"kl-{kl}", preset("dapo", kl_coef=0.1, kl=kl), responses=11, length=6, ragged=False)
        for kl in ("k3_ratio", "k2", "k1", "k3+")
    ]
    cases.append(Case("kl-ratio-on-policy", preset("dapo", kl_coef=0.1, kl="k3_ratio"), on_policy=True))
    for normalization in ("response", "mean_length", "group_mean_length", "constant", "response_sum"):
        for layout in ("padded", "packed"):
            for micro_batch in (False, True):
                objective = preset("ahpo", normalization=normalization, max_length=5, kl_coef=0.02)
                cases.append(
                    Case(
                        f"{normalization}-{layout}-{micro_batch}",
                        objective,
                        layout=layout,
                        micro_batch=micro_batch,
                    )
                )
    return cases


def difficult_rows() -> list[Case]:
    """Rows that overflow, cancel or vanish in careless arithmetic."""
    plain, bonus = (hf.Objective.preset("mhpo_ahpo", entropy_coef=coef) for coef in (0.0, 0.01))
    # The entropy's gradient p_j (E - z_j) cancels on flat rows, and against c's on peaked ones: no relative error.
    kinds = [("peaked", plain), ("flat", plain), ("negative", bonus), ("minus_inf", bonus)]
    return [
        # On-policy: at saturated ratios the coefficient vanishes, and with it what is to be seen on peaked rows.
        Case(f"{rows}-{str(dtype)[6:]}", objective, dtype, rows=rows, on_policy=rows == "peaked")
        for rows, objective in kinds
        for dtype in (torch.float32, torch.bfloat16)
    ] + [
        Case("minus_inf-transform", bonus, rows="minus_inf", options={"temperature": 0.7, "softcap": 6.0}),
        Case("masked", bonus, rows="masked", options={"temperature": 0.7}),
        Case("masked-bfloat16", bonus, torch.bfloat16, rows="masked"),
        Case("masked-softcap", bonus, rows="masked", options={"softcap": 2.0}),  # -2 each, and together most of the sum
    ]


def vocabularies() -> list[Case]:
    """Sizes that no block divides, one entry, and real ones."""
    objective = hf.Objective.preset("mhpo_ahpo", entropy_coef=0.01)
    small = [
        Case(f"V{v}-{str(d)[6:]}", objective, d, vocabulary=v)
        for v in (1, 2, 17, 997)
        for d in (torch.float32, torch.bfloat16)
    ]
    return small + [
        Case(f"V{v}-{str(d)[6:]}", objective, d, vocabulary=v, responses=4, length=2)
        for v in (50257, 151936)
        for d in (torch.float32, torch.bfloat16)
    ]


CASES = presets() + shapings() + sequences() + terms() + difficult_rows() + vocabularies()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_oracle(case: Case, backend: str, device: torch.device) -> None:
    check(case, backend, device)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("mhpo_ahpo-bfloat16-padded", "weights", "sequence-clip-packed-True")],
    ids=str,
)
def test_all_statistics(case: Case, backend: str, device: torch.device) -> None:
    check(case, backend, device, skip_inactive=False)


@pytest.mark.parametrize("scale", [0.37, -3.0])
@pytest.mark.parametrize("name", ["grpo", "vespo"])
def test_upstream_gradient(name: str, scale: float, backend: str, device: torch.device) -> None:
    check(Case(f"upstream-{name}", PRESETS[name], small_ratios=name != "grpo"), backend, device, scale=scale)
