"""Random shapes, layouts, masks and settings (hypothesis): the oracle decides."""

from __future__ import annotations

from typing import get_args

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hpo_fused as hf
from hpo_fused.objective import KL, Normalization, RatioLevel

from .conftest import BACKENDS
from .equivalence import Case, check

shapings = st.one_of(
    st.builds(
        hf.Clip,
        low=st.sampled_from([0.0, 0.1, 0.2]),
        high=st.sampled_from([0.1, 0.28]),
        delta=st.sampled_from([None, 1.5, 4.0]),
        dual=st.sampled_from([None, 3.0]),
    ),
    st.builds(
        hf.LogFidelity,
        c=st.sampled_from([0.7, 1.5]),
        hazard=st.sampled_from([None, hf.Hazard(), hf.Hazard(1, 2, 3, 1)]),
    ),
    st.builds(hf.SoftGate, tau_pos=st.sampled_from([0.5, 1.0]), tau_neg=st.sampled_from([1.05, 3.0])),
    st.builds(
        hf.TruncatedRatio,
        high=st.sampled_from([1.5, 5.0]),
        low=st.sampled_from([None, 0.5]),
        outside=st.sampled_from(["clip", "zero"]),
        high_neg=st.sampled_from([None, 1.1]),
        low_neg=st.sampled_from([None, 0.2]),
    ),
    st.builds(hf.GammaGate, k_pos=st.sampled_from([0.0, 2.0]), lambda_neg=st.sampled_from([0.5, 2.0])),
    st.builds(hf.GeometricMean, low=st.sampled_from([3e-4, 0.4]), high=st.sampled_from([0.0, 0.4])),
    st.builds(hf.DRO, beta=st.sampled_from([0.013, 0.77])),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shaping = draw(shapings)
    level = draw(st.sampled_from(get_args(RatioLevel)))
    kinds = [kind for kind in get_args(KL) if not (kind == "k3_ratio" and isinstance(shaping, hf.GeometricMean))]
    objective = hf.Objective(
        level,
        shaping,
        draw(st.sampled_from([None, hf.Hysteretic(0.3), hf.AdaptiveHysteretic(0.2)])),
        draw(st.sampled_from(get_args(Normalization))),
        max_length=13,
        kl_coef=draw(st.sampled_from([0.0, 0.05])),
        kl=draw(st.sampled_from(kinds)),
        entropy_coef=draw(st.sampled_from([0.0, 0.01])),
    )
    temperature = draw(st.sampled_from(["", "call", "response", "token"]))
    transform = {} if temperature else {"temperature": draw(st.sampled_from([0.5, 1.0, 1.4]))}
    if draw(st.booleans()):
        transform["softcap"] = 8.0
    return Case(
        f"property-{draw(st.integers(0, 2**32))}",
        objective,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        layout=draw(st.sampled_from(["padded", "packed"])),
        vocabulary=draw(st.integers(2, 300)),
        responses=draw(st.integers(2, 6)),
        length=draw(st.integers(1, 7)),
        on_policy=draw(st.booleans()),
        # Tokens' advantages of both signs would cancel in a sequence's one coefficient: nothing relative is left.
        per_token_advantages=level in ("token", "sequence_token") and draw(st.booleans()),
        token_weights=draw(st.booleans()),
        entropy_weights=draw(st.sampled_from(["none", "none", "0-d", "response", "token"])),
        small_ratios=level != "token",
        micro_batch=draw(st.booleans()),
        temperature=temperature,
        options=transform,
    )


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), backend=st.sampled_from(BACKENDS), skip_inactive=st.booleans())
def test_any_combination(case: Case, backend: str, skip_inactive: bool, device: torch.device) -> None:
    check(case, backend, device, skip_inactive=skip_inactive)
