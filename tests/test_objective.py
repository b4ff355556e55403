"""Objectives: presets, equality, validation; every shaping against an independent table (make_objectives.py)."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

import hpo_fused as hf
from hpo_fused import reference
from hpo_fused.interface import ADVANTAGE, KL_WEIGHT, OLD_LOGPROB, POLICY_WEIGHT, REF_LOGPROB, TERMS
from hpo_fused.mapping import kind_of
from hpo_fused.shaping import SHAPINGS
from hpo_fused.surrogate import token_loss

from .samples import lowered

VECTORS = json.loads((Path(__file__).parent / "objectives.json").read_text())


TABLED = {name: hf.Objective.preset(name) for name in ("grpo", "dapo", "sapo", "cispo", "mhpo")}
TABLED |= {  # a token alone is its response: the ratio's level makes no difference
    name: hf.Objective(shaping=shaping, weighting=None)
    for name, shaping in {
        "clip_delta_dual": hf.Clip(0.2, 0.2, delta=1.5, dual=3.0),
        "truncated_ratio_zero": hf.TruncatedRatio(2.0, 0.6, "zero"),
        "truncated_ratio_signs": hf.TruncatedRatio(3.0, 0.5, high_neg=0.9, low_neg=0.05),
        "vespo": hf.GammaGate(2.0, 3.0, 3.0, 2.0),
        "gmpo": hf.GeometricMean(0.4, 0.4),
        "dro": hf.DRO(0.3),
    }.items()
}


def preset_vectors(name: str) -> list[torch.Tensor]:
    rows = [row for row in VECTORS["rows"] if row["objective"] == name]
    assert len(rows) == (105 if name == "dro" else 84)
    return [
        torch.tensor([row[key] for row in rows], dtype=torch.float64)
        for key in ("log_ratio", "advantage", "loss", "dloss_dlogp")
    ]


def terms(log_ratio: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Of tokens of weight 1 whose log-probability is -1."""
    values = log_ratio.new_full((TERMS, *log_ratio.shape), torch.nan)
    values[ADVANTAGE], values[POLICY_WEIGHT], values[OLD_LOGPROB] = advantages, 1.0, -1 - log_ratio
    return values


@pytest.mark.parametrize("name", TABLED)
def test_shapings_match_the_table(name: str) -> None:
    x, advantage, loss, derivative = preset_vectors(name)
    ours = token_loss(lowered(TABLED[name]), terms(x, advantage), torch.full_like(x, -1.0), None)
    torch.testing.assert_close(ours.losses, loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.logprob_coefficients, derivative, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("name", TABLED)
def test_reference_matches_the_table(name: str) -> None:
    x, advantage, loss, derivative = preset_vectors(name)
    for i in range(len(x)):
        logp = torch.full((1, 1), -1.0, dtype=torch.float64, requires_grad=True)
        # One token: every normaliser is 1.
        value = reference.logprob_policy_loss(
            logp, advantage[i : i + 1], old_logprobs=logp.detach() - x[i], objective=TABLED[name]
        )
        (gradient,) = torch.autograd.grad(value, logp)
        torch.testing.assert_close(value, loss[i], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient.squeeze(), derivative[i], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kl", ["k3", "k3_ratio", "k2", "k1", "k3+"])
def test_kl_estimates_match_the_table(kl: Any) -> None:
    """Torch's closed form and the oracle."""
    rows = [row for row in VECTORS["penalties"] if row["kl"] == kl]
    assert len(rows) == (60 if kl == "k3_ratio" else 12)
    d, x, value, slope = (
        torch.tensor([row[key] for row in rows], dtype=torch.float64)
        for key in ("log_ratio_to_reference", "log_ratio", "value", "slope")
    )
    objective, logp = hf.Objective.preset("reinforce", kl_coef=1.0, kl=kl), torch.full_like(x, -1.0)
    values = terms(x, torch.zeros_like(x))
    values[KL_WEIGHT], values[REF_LOGPROB] = 1.0, logp + d
    ours = token_loss(lowered(objective), values, logp, None)
    leaf, close = logp.reshape(-1, 1).requires_grad_(), {"rtol": 1e-11, "atol": 1e-14}
    # Responses of one token each, of whose sum "response_sum" takes the mean.
    loss = reference.logprob_policy_loss(
        leaf, torch.zeros_like(x), old_logprobs=leaf.detach() - x[:, None], ref_logprobs=leaf.detach() + d[:, None],
        objective=objective,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss * len(x), leaf)
    torch.testing.assert_close(ours.losses, value, **close)
    torch.testing.assert_close(ours.logprob_coefficients, slope, **close)
    torch.testing.assert_close(loss, value.mean(), **close)
    # In autograd's sum of r k3 and r (1 - e^d) the terms r e^d cancel.
    allowed = 1e-11 * slope.abs() + 1e-14 + 8 * 2.0**-53 * (x + d).exp() * (kl == "k3_ratio")
    assert ((gradient.squeeze(-1) - slope).abs() <= allowed).all()


def test_presets_are_the_published_settings() -> None:
    presets = hf.Objective.presets()
    assert presets["grpo"] == hf.Objective("token", hf.Clip(0.2, 0.2), None, "response")
    assert presets["dapo"] == hf.Objective("token", hf.Clip(0.2, 0.28), None, "mean_length")
    assert presets["dr_grpo"] == hf.Objective("token", hf.Clip(0.2, 0.2), None, "constant")
    assert presets["gspo"] == hf.Objective("sequence", hf.Clip(3e-4, 4e-4), None, "response")
    assert presets["gspo_token"] == hf.Objective("sequence_token", hf.Clip(3e-4, 4e-4), None, "response")
    assert presets["luspo"] == hf.Objective("sequence", hf.Clip(2e-3, 2.5e-3), None, "response_sum")
    assert presets["gmpo"] == hf.Objective("sequence", hf.GeometricMean(0.4, 0.4), None, "response")
    assert presets["vespo"] == hf.Objective("sequence_sum", hf.GammaGate(2, 3, 3, 2), None, "mean_length")
    topr = hf.TruncatedRatio(1.0, 1.0, low_neg=0.0, high_neg=1.0)
    assert presets["topr"].shaping.lower() == topr.lower()
    assert (presets["topr"].ratio_level, presets["topr"].normalization) == ("sequence_sum", "response")
    assert presets["reinforce"] == hf.Objective("token", hf.TruncatedRatio(1.0, 1.0), None, "response_sum")
    assert presets["sapo"] == hf.Objective("token", hf.SoftGate(1.0, 1.05), None, "response")
    assert presets["cispo"] == hf.Objective("token", hf.TruncatedRatio(5.0), None, "mean_length")
    assert presets["mhpo"] == hf.Objective(
        "token", hf.LogFidelity(1.5, hf.Hazard(1.5, 1.0, 2.0, 0.8)), None, "response"
    )
    assert presets["hpo"] == hf.Objective("token", hf.Clip(0.2, 0.2), hf.Hysteretic(0.6), "mean_length")
    assert presets["ahpo"] == hf.Objective("token", hf.Clip(0.2, 0.2), hf.AdaptiveHysteretic(0.1), "mean_length")
    assert presets["mhpo_ahpo"] == hf.Objective()


def test_equal_objectives_hash_equal() -> None:
    one, two = (hf.Objective.preset("mhpo", kl_coef=0.1) for _ in range(2))
    assert one == two
    assert hash(one) == hash(two)
    assert one != hf.Objective.preset("mhpo")
    with pytest.raises(AttributeError):
        one.kl_coef = 0.2  # type: ignore[misc]


def test_mhpo_on_policy_carries_a_quarter_of_the_gradient() -> None:
    # zeta(0) = (ln 2)^1.5 + (ln 2 / 0.8)^2: the published formula's property, stated in the README.
    zeta = math.log(2) ** 1.5 + (math.log(2) / 0.8) ** 2
    assert zeta == pytest.approx(1.32779, abs=5e-6)
    assert math.exp(-zeta) == pytest.approx(0.26506, abs=5e-6)
    logits = torch.randn(1, 4, 9, dtype=torch.float64).float()
    gradients = {}
    for name in ("grpo", "mhpo"):
        leaf = logits.clone().requires_grad_()
        hf.policy_loss(leaf, torch.arange(4).reshape(1, 4), torch.tensor([1.0]), objective=name).loss.backward()
        gradients[name] = leaf.grad
    torch.testing.assert_close(gradients["mhpo"], math.exp(-zeta) * gradients["grpo"], rtol=1e-5, atol=0)


def test_mhpo_multiplier_peaks_near_a_ratio_of_1_78() -> None:
    x = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    spec = lowered(hf.Objective.preset("mhpo"))
    out = token_loss(spec, terms(x, torch.ones_like(x)), torch.full_like(x, -1.0), None)
    peak = (-out.logprob_coefficients).max(0)
    assert peak.values.item() == pytest.approx(0.396, abs=5e-4)
    assert x[peak.indices].exp().item() == pytest.approx(1.78, abs=5e-3)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: hf.Objective.preset("ppo2"), ValueError, "objective: expected one of grpo, .*'ppo2'"),
        (lambda: hf.Objective.preset("grpo", klcoef=1), TypeError, "expected fields of Objective.*klcoef"),
        (lambda: hf.Objective(ratio_level="word"), ValueError, "ratio_level.*'word'"),
        (lambda: hf.Objective(normalization="max"), ValueError, "normalization.*'max'"),
        (lambda: hf.Objective(shaping="clip"), TypeError, "shaping.*'clip'"),
        (lambda: hf.Objective(weighting=0.5), TypeError, "weighting.*0.5"),
        (lambda: hf.Objective(kl_coef=-0.1), ValueError, "kl_coef.*-0.1"),
        (lambda: hf.Objective(kl_coef="0.1"), TypeError, "kl_coef.*str"),
        (lambda: hf.Objective(entropy_coef=math.nan), ValueError, "entropy_coef.*nan"),
        (lambda: hf.Objective(max_log_ratio=0.0), ValueError, "max_log_ratio.*0.0"),
        (lambda: hf.Objective(max_log_ratio=1e3), ValueError, "max_log_ratio.*1000"),
        (lambda: hf.Objective(max_length=0), ValueError, "max_length.*0"),
        (lambda: hf.Objective(max_length=1.5), TypeError, "max_length.*1.5"),
        (lambda: hf.Objective(kl="k4"), ValueError, "kl: expected one of .*k3_ratio.*'k4'"),
        (lambda: hf.Objective(kl=None), ValueError, "kl: .*None"),
        (
            lambda: hf.Objective(kl="k3_ratio", max_log_ratio=60),
            ValueError,
            r"max_log_ratio: .*\(0, 40\].*k3_ratio.*60",
        ),
        (lambda: hf.Objective.preset("gmpo", kl="k3_ratio"), ValueError, "kl: .*'k3_ratio' for GeometricMean"),
        (lambda: hf.Clip(low=1.5), ValueError, r"Clip.low.*\[0, 1\].*1.5"),
        (lambda: hf.Clip(high=-0.1), ValueError, "Clip.high"),
        (lambda: hf.Clip(delta=0.0), ValueError, "Clip.delta"),
        (lambda: hf.Clip(dual=0.5), ValueError, "Clip.dual"),
        (lambda: hf.LogFidelity(c=0), ValueError, "LogFidelity.c"),
        (lambda: hf.LogFidelity(hazard=1.0), TypeError, "LogFidelity.hazard"),
        (lambda: hf.Hazard(k_pos=-1), ValueError, "Hazard.k_pos"),
        (lambda: hf.Hazard(lambda_neg=math.inf), ValueError, "Hazard.lambda_neg"),
        (lambda: hf.SoftGate(tau_pos=0.0), ValueError, "SoftGate.tau_pos"),
        (lambda: hf.TruncatedRatio(high=0.0), ValueError, "TruncatedRatio.high"),
        (lambda: hf.TruncatedRatio(high=None), TypeError, "TruncatedRatio.high: .*None"),
        (lambda: hf.TruncatedRatio(high=1.0, low=2.0), ValueError, "TruncatedRatio.low"),
        (lambda: hf.TruncatedRatio(low="a"), TypeError, r"TruncatedRatio.low: .*\[0, high=5.0\].*'a' of type str"),
        (lambda: hf.TruncatedRatio(outside="drop"), ValueError, "TruncatedRatio.outside: .*'clip' or 'zero'.*'drop'"),
        (lambda: hf.TruncatedRatio(high_neg=-1.0), ValueError, "TruncatedRatio.high_neg: .*-1.0"),
        (lambda: hf.TruncatedRatio(low=0.5, high_neg=0.2), ValueError, "TruncatedRatio.high_neg: .*>= low=0.5.*0.2"),
        (lambda: hf.TruncatedRatio(low_neg=6.0), ValueError, r"TruncatedRatio.low_neg: .*5.0\].*6.0"),
        (lambda: hf.TruncatedRatio(high_neg=2.0, low_neg=3.0), ValueError, r"TruncatedRatio.low_neg: .*2.0\].*3.0"),
        (lambda: hf.GammaGate(k_pos=-1.0), ValueError, "GammaGate.k_pos: .*>= 0.*-1.0"),
        (lambda: hf.GammaGate(lambda_neg=0), ValueError, "GammaGate.lambda_neg: .*> 0.*0"),
        (lambda: hf.GeometricMean(low=-0.4), ValueError, "GeometricMean.low: .*>= 0.*-0.4"),
        (lambda: hf.GeometricMean(high=math.nan), ValueError, "GeometricMean.high: .*nan"),
        (lambda: hf.DRO(0.0), ValueError, "DRO.beta: .*> 0.*0.0"),
        (lambda: hf.DRO("1"), TypeError, "DRO.beta: .*'1' of type str"),
        (lambda: hf.Hysteretic(1.2), ValueError, r"Hysteretic.alpha.*\[0, 1\].*1.2"),
        (lambda: hf.Hysteretic(True), TypeError, "Hysteretic.alpha"),
        (lambda: hf.AdaptiveHysteretic(-0.1), ValueError, "AdaptiveHysteretic.alpha_min"),
    ],
)
def test_bad_settings(build, error, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=words):
        build()


OBJECTIVES = [
    *hf.Objective.presets().values(),
    hf.Objective(shaping=hf.Clip(0.1, 0.3, delta=4.0, dual=3), weighting=hf.Hysteretic(0.5), normalization="response"),
    hf.Objective(shaping=hf.LogFidelity(2.0, hf.Hazard(lambda_neg=0.5)), normalization="constant", max_length=64),
    hf.Objective("sequence_token", hf.LogFidelity(hazard=None), kl="k3+", kl_coef=0.1, entropy_coef=-0.01),
    hf.Objective(shaping=hf.TruncatedRatio(2.0, 0.5, "zero", 3.0, 0.25), weighting=None, max_log_ratio=10),
    hf.Objective(shaping=hf.DRO(0.1)),
]
DROP = {"kind": "truncated_ratio", "low": 0.8, "high": 1.2, "outside": "zero"}
FORMS: list[tuple[Any, hf.Objective]] = [
    ("gspo", hf.Objective.preset("gspo")),
    ({"preset": "gspo"}, hf.Objective.preset("gspo")),
    ({"preset": "cispo", "shaping": DROP}, hf.Objective.preset("cispo", shaping=hf.TruncatedRatio(1.2, 0.8, "zero"))),
    ({"preset": "ahpo", "weighting": None, "kl_coef": 1}, hf.Objective.preset("dapo", shaping=hf.Clip(), kl_coef=1)),
    ({"preset": "grpo", "shaping": hf.DRO(2)}, hf.Objective.preset("grpo", shaping=hf.DRO(2))),
    ({}, hf.Objective()),
    ({"shaping": {"kind": "log_fidelity", "hazard": None}}, hf.Objective(shaping=hf.LogFidelity(hazard=None))),
    (
        {"shaping": {"kind": "log_fidelity", "hazard": {"k_neg": 3}}},
        hf.Objective(shaping=hf.LogFidelity(hazard=hf.Hazard(k_neg=3))),
    ),
    ({"weighting": {"kind": "hysteretic", "alpha": 0.5}}, hf.Objective(weighting=hf.Hysteretic(0.5))),
]


def read_only(value: Any) -> Any:
    """A mapping of another type than dict, as configuration libraries have them."""
    return MappingProxyType({k: read_only(v) for k, v in value.items()}) if isinstance(value, dict) else value


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: objective.shaping.__class__.__name__)
def test_plain_values_and_back(objective: hf.Objective) -> None:
    plain = json.loads(json.dumps(objective.to_mapping()))
    assert plain == objective.to_mapping()
    assert list(plain) == [field.name for field in dataclasses.fields(hf.Objective)]
    assert hf.Objective.from_mapping(read_only(plain)) == objective


@pytest.mark.parametrize(("form", "objective"), FORMS)
def test_from_mapping(form: Any, objective: hf.Objective) -> None:
    assert hf.Objective.from_mapping(read_only(form)) == objective


def test_kinds_are_those_that_backends_know() -> None:
    named = {kind_of(shaping) for shaping in SHAPINGS}
    assert named == {objective.shaping.lower()[0] for objective in OBJECTIVES}
    assert len(named) == len(SHAPINGS)


def test_numbers_of_other_kinds_become_plain() -> None:
    numpy = pytest.importorskip("numpy")
    for number in (numpy.float32(0.5), numpy.float64(0.5), numpy.int64(1)):
        objective = hf.Objective(shaping=hf.Clip(high=number), kl_coef=number)
        plain = objective.to_mapping()
        assert type(plain["kl_coef"]) is type(plain["shaping"]["high"]) is type(number.item())
        assert hf.Objective.from_mapping(json.loads(json.dumps(plain))) == objective


@pytest.mark.parametrize("objective", OBJECTIVES[::5], ids=str)
def test_copies_after_use(objective: hf.Objective) -> None:
    """Whatever a loss call does with an objective, its fields alone make another."""
    twin = dataclasses.replace(objective)
    hf.logprob_policy_loss(
        torch.zeros(2, 3), torch.ones(2), ref_logprobs=torch.zeros(2, 3), objective=objective
    ).metrics()
    copies = [hf.Objective(**objective.__dict__), dataclasses.replace(objective), pickle.loads(pickle.dumps(objective))]
    for copy in (*copies, hf.Objective.from_mapping(objective.to_mapping())):
        assert copy == twin == objective
        assert hash(copy) == hash(twin) == hash(objective)
    assert dataclasses.replace(objective, kl_coef=0.5) == hf.Objective(**{**objective.__dict__, "kl_coef": 0.5})


def test_losses_take_mappings() -> None:
    hidden, weight, tokens = torch.randn(2, 3, 4), torch.randn(7, 4), torch.zeros(2, 3, dtype=torch.long)
    advantages, options = torch.tensor([1.0, -1.0]), {"old_logprobs": torch.full((2, 3), -2.0)}
    for form in ({"preset": "sapo", "shaping": DROP}, "sapo"):
        objective = hf.Objective.from_mapping(form)
        for function, inputs in (
            (hf.policy_loss, (hidden @ weight.t(), tokens)),
            (hf.linear_policy_loss, (hidden, weight, tokens)),
            (hf.logprob_policy_loss, (hidden[..., 0],)),
        ):
            ours, plain = (function(*inputs, advantages, objective=o, **options).loss for o in (form, objective))
            assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (3, TypeError, "^objective: expected a preset's name, a mapping or an Objective, got 3 of type int"),
        (None, TypeError, "^objective: .*None"),
        ({"preset": "ppo2"}, ValueError, "^objective: expected one of grpo, .*'ppo2'"),
        ({"preset": ["grpo"]}, ValueError, r"^objective: expected one of grpo, .*\['grpo'\]"),
        ({"preset": None}, ValueError, "^objective: expected one of grpo, .*None"),
        ({"presets": "grpo"}, ValueError, "^objective: expected keys among preset, ratio_level, .*kl, got 'presets'"),
        ({1: 2}, ValueError, "^objective: expected keys among .*got 1"),
        ({"kl_coef": "1e-3"}, TypeError, r"^kl_coef: expected a number, got the string '1e-3' .*3.0e-4"),
        ({"kl_coef": "low"}, TypeError, "^kl_coef: .*'low' of type str"),
        ({"kl_coef": {}}, TypeError, "^kl_coef: .* of type dict"),
        ({"kl_coef": True}, TypeError, "^kl_coef: .*True of type bool"),
        ({"max_length": 4096.0}, TypeError, "^max_length: .*4096.0"),
        ({"max_length": "4096"}, TypeError, "^max_length: expected a number, got the string '4096'"),
        ({"ratio_level": ["token"]}, ValueError, r"^ratio_level: .*\['token'\]"),
        ({"shaping": "clip"}, TypeError, "^shaping: expected a mapping with a kind, one of clip, .*dro, got 'clip'"),
        ({"shaping": None}, TypeError, "^shaping: .*None"),
        ({"shaping": {}}, ValueError, "^shaping.kind: expected one of clip, log_fidelity, .*dro, got None"),
        ({"shaping": {"kind": "Clip"}}, ValueError, "^shaping.kind: expected one of clip, .*'Clip'"),
        ({"shaping": {"kind": ["clip"]}}, ValueError, r"^shaping.kind: .*\['clip'\]"),
        ({"shaping": {"kind": "hysteretic"}}, ValueError, "^shaping.kind: .*'hysteretic'"),
        (
            {"shaping": {"kind": "clip", "upper": 1}},
            ValueError,
            "^shaping: expected keys among kind, low, high, delta, dual, got 'upper'",
        ),
        ({"shaping": {"kind": "clip", "low": "3e-4"}}, TypeError, "^shaping.low: expected a number.*'3e-4'"),
        ({"shaping": {**DROP, "low": [0.8]}}, TypeError, r"^shaping.low: expected .*\[0.8\] of type list"),
        ({"shaping": {**DROP, "low": 2.0}}, ValueError, r"^shaping.low: expected a number in \[0, high=1.2\].*2.0"),
        ({"shaping": {**DROP, "outside": "drop"}}, ValueError, "^shaping.outside: .*'drop'"),
        ({"shaping": {"kind": "dro"}}, ValueError, "^shaping.beta: expected a value"),
        (
            {"shaping": {"kind": "log_fidelity", "hazard": 1.0}},
            TypeError,
            "^shaping.hazard: expected a mapping of k_pos, lambda_pos, k_neg, lambda_neg, got 1.0",
        ),
        (
            {"shaping": {"kind": "log_fidelity", "hazard": {"kind": "hazard"}}},
            ValueError,
            "^shaping.hazard: expected keys among k_pos, .*got 'kind'",
        ),
        (
            {"shaping": {"kind": "log_fidelity", "hazard": {"k_pos": None}}},
            TypeError,
            "^shaping.hazard.k_pos: .*None of type NoneType",
        ),
        ({"weighting": 0.6}, TypeError, "^weighting: expected a mapping with a kind, one of hysteretic, adaptive_hys"),
        ({"weighting": {"kind": "hysteretic", "alpha": 2}}, ValueError, r"^weighting.alpha: .*\[0, 1\], got 2"),
        ({"weighting": hf.Clip()}, TypeError, "^weighting: .*Clip"),
        ({"kl": "k3_ratio", "max_log_ratio": 60}, ValueError, "^max_log_ratio: .*60"),
    ],
)
def test_bad_mapping(value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        hf.Objective.from_mapping(value)
