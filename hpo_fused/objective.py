"""Objectives: ratio level, shaping, weighting, normalisation, KL and entropy terms, and named presets.

Everything here is a frozen, hashable description; no tensor is touched. The formulas that the classes name stand
in ``surrogate.py`` (torch), ``kernels/surrogate.py`` (device) and ``reference.py`` (float64 oracle).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, TypeAlias, get_args

from .interface import LossSpec

RatioLevel: TypeAlias = Literal["token", "sequence"]
Normalization: TypeAlias = Literal["response", "mean_length", "group_mean_length", "constant"]


def _number(
    name: str,
    value: object,
    expected: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = True,
) -> None:
    """Raise unless ``value`` is a real number in the interval; ``expected`` words the interval for the message."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected {expected}, got {value!r} of type {type(value).__name__}")
    number = float(value)
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if not (above and below):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class Clip:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), with the two common extra bounds.

    s = min(min(r, delta) A, clip(r, 1-low, 1+high) A); for A < 0 additionally max(s, dual A) when ``dual`` is set
    (dual-clip PPO, Ye et al. 2020, arXiv 1912.09729, eq. 5). Asymmetric bounds are DAPO's clip-higher
    (arXiv 2503.14476, eq. 8); ``delta`` is the two-sided GRPO bound of INTELLECT-2 (arXiv 2505.07291, sec. 3.4).

    Args:
        low: 1 - low is the lower bound of the ratio; in [0, 1].
        high: 1 + high is the upper bound; >= 0.
        delta: upper bound of the ratio in the unclipped branch, > 0; None: none.
        dual: bound for negative advantages, >= 1; None: none.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or outside its range.
    """

    low: float = 0.2
    high: float = 0.2
    delta: float | None = None
    dual: float | None = None

    def __post_init__(self) -> None:
        _number("Clip.low", self.low, "a number in [0, 1]", low=0.0, high=1.0, open_high=False)
        _number("Clip.high", self.high, "a finite number >= 0", low=0.0)
        if self.delta is not None:
            _number("Clip.delta", self.delta, "a finite number > 0 or None", low=0.0, open_low=True)
        if self.dual is not None:
            _number("Clip.dual", self.dual, "a finite number >= 1 or None", low=1.0)

    def lower(self) -> tuple[str, tuple[float, ...]]:
        """Kind and parameters as :class:`~hpo_fused.interface.LossSpec` orders them."""
        delta = math.inf if self.delta is None else float(self.delta)
        dual = math.inf if self.dual is None else float(self.dual)
        return "clip", (1.0 - self.low, 1.0 + self.high, delta, dual)


@dataclass(frozen=True)
class Hazard:
    """Cumulative Weibull hazards of MHPO (arXiv 2603.16929): (softplus(psi)/lambda_pos)^k_pos for upward shifts
    plus (softplus(-psi)/lambda_neg)^k_neg for downward ones.

    Args:
        k_pos, k_neg: Weibull shapes, > 0.
        lambda_pos, lambda_neg: Weibull scales, > 0, in units of the bounded log-ratio.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or outside its range.
    """

    k_pos: float = 1.5
    lambda_pos: float = 1.0
    k_neg: float = 2.0
    lambda_neg: float = 0.8

    def __post_init__(self) -> None:
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            _number(f"Hazard.{name}", getattr(self, name), "a finite number > 0", low=0.0, open_low=True)


@dataclass(frozen=True)
class LogFidelity:
    """MHPO's log-fidelity modulation with hazard penalty (arXiv 2603.16929).

    s = exp(psi - sg[zeta]) A with psi = c tanh(x / c) and zeta the cumulative hazard of psi; sg stops the
    gradient. ``hazard=None`` drops zeta. Because softplus(0) = ln 2, zeta(x=0) = 1.32779 with the defaults:
    on-policy MHPO carries exp(-1.32779) = 0.26506 of GRPO's gradient. That is the published formula.

    Args:
        c: bound of the log-ratio, > 0.
        hazard: :class:`Hazard` or None.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or outside its range.
    """

    c: float = 1.5
    hazard: Hazard | None = field(default_factory=Hazard)

    def __post_init__(self) -> None:
        _number("LogFidelity.c", self.c, "a finite number > 0", low=0.0, open_low=True)
        if self.hazard is not None and not isinstance(self.hazard, Hazard):
            raise TypeError(f"LogFidelity.hazard: expected a Hazard or None, got {self.hazard!r}")

    def lower(self) -> tuple[str, tuple[float, ...]]:
        """Kind and parameters as :class:`~hpo_fused.interface.LossSpec` orders them."""
        hazard = self.hazard
        if hazard is None:  # a zero reciprocal scale makes each cumulative hazard (softplus * 0)^1 = 0
            return "log_fidelity", (float(self.c), 1.0, 0.0, 1.0, 0.0)
        return "log_fidelity", (
            float(self.c),
            float(hazard.k_pos),
            1.0 / hazard.lambda_pos,
            float(hazard.k_neg),
            1.0 / hazard.lambda_neg,
        )


@dataclass(frozen=True)
class SoftGate:
    """SAPO's soft gate (arXiv 2511.20347): s = (4 / tau) sigmoid(tau (r - 1)) A, tau = tau_pos if A > 0 else tau_neg.

    At r = 1, s = 2 A / tau and ds/dx = A.

    Args:
        tau_pos, tau_neg: gate temperatures, > 0.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or outside its range.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        for name in ("tau_pos", "tau_neg"):
            _number(f"SoftGate.{name}", getattr(self, name), "a finite number > 0", low=0.0, open_low=True)

    def lower(self) -> tuple[str, tuple[float, ...]]:
        """Kind and parameters as :class:`~hpo_fused.interface.LossSpec` orders them."""
        return "soft_gate", (float(self.tau_pos), float(self.tau_neg))


@dataclass(frozen=True)
class TruncatedRatio:
    """CISPO's truncated importance weight (MiniMax-M1, arXiv 2506.13585, eq. 4): s = sg[clip(r, low, high)] A logp.

    Args:
        high: upper bound of the ratio itself (not of r - 1), > 0.
        low: lower bound of the ratio, in [0, high]; None: none.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or outside its range.
    """

    high: float = 5.0
    low: float | None = None

    def __post_init__(self) -> None:
        _number("TruncatedRatio.high", self.high, "a finite number > 0", low=0.0, open_low=True)
        if self.low is not None:
            _number(
                "TruncatedRatio.low",
                self.low,
                f"a number in [0, high={self.high}] or None",
                low=0.0,
                high=self.high,
                open_high=False,
            )

    def lower(self) -> tuple[str, tuple[float, ...]]:
        """Kind and parameters as :class:`~hpo_fused.interface.LossSpec` orders them."""
        return "truncated_ratio", (0.0 if self.low is None else float(self.low), float(self.high))


Shaping: TypeAlias = Clip | LogFidelity | SoftGate | TruncatedRatio


@dataclass(frozen=True)
class Hysteretic:
    """Fixed hysteretic weight of HPO (arXiv 2605.30201): 1 where A >= 0, ``alpha`` where A < 0.

    Args:
        alpha: in [0, 1]; 1 is no weighting, 0 ignores negative advantages.

    Raises:
        TypeError, ValueError: alpha of the wrong type or outside [0, 1].
    """

    alpha: float = 0.6

    def __post_init__(self) -> None:
        _number("Hysteretic.alpha", self.alpha, "a number in [0, 1]", low=0.0, high=1.0, open_high=False)


@dataclass(frozen=True)
class AdaptiveHysteretic:
    """A-HPO's adaptive hysteretic weight (arXiv 2605.30201): alpha = clip(N+ / N-, alpha_min, 1).

    N+ and N- count the responses of the whole optimiser batch (all micro-batches, all data-parallel ranks) with
    positive and negative advantage. The clip and the counts are the paper's. Ours: the default of ``alpha_min``,
    zero advantages counting in neither, N- = 0 giving alpha = 1, and a response without any unmasked token
    counting in neither (its masked sum of advantages is 0, whichever layout the advantages come in).

    Args:
        alpha_min: lower bound of alpha, in [0, 1].

    Raises:
        TypeError, ValueError: alpha_min of the wrong type or outside [0, 1].
    """

    alpha_min: float = 0.1

    def __post_init__(self) -> None:
        _number(
            "AdaptiveHysteretic.alpha_min",
            self.alpha_min,
            "a number in [0, 1]",
            low=0.0,
            high=1.0,
            open_high=False,
        )


Weighting: TypeAlias = Hysteretic | AdaptiveHysteretic


@dataclass(frozen=True)
class Objective:
    """A policy objective: which ratio, how it is shaped, how signs and lengths are weighted, which penalties.

    The default is the preset ``mhpo_ahpo``. Equal objectives compare and hash equal.

    Args:
        ratio_level: "token", or "sequence" for GSPO's length-normalised sequence ratio (arXiv 2507.18071, eq. 7).
        shaping: :class:`Clip`, :class:`LogFidelity`, :class:`SoftGate` or :class:`TruncatedRatio`.
        weighting: :class:`Hysteretic`, :class:`AdaptiveHysteretic` or None for weight 1 everywhere.
        normalization: "response" (GRPO, arXiv 2402.03300, eq. 3), "mean_length" (HPO; DAPO's global token mean,
            arXiv 2503.14476, eq. 8), "group_mean_length" (the same per prompt) or "constant" (Dr. GRPO,
            arXiv 2503.20783).
        max_length: tokens per response that "constant" divides by; required there, when the loss is called.
        max_log_ratio: log-ratios are clamped to +-max_log_ratio, with derivative zero outside.
        kl_coef: coefficient of the k3 estimator of KL(policy || reference), >= 0.
        entropy_coef: coefficient of the entropy bonus (subtracted from the loss); any sign.

    Raises:
        TypeError, ValueError: a field of the wrong type or outside its range, or TruncatedRatio at sequence level.

    Examples:
        >>> Objective.preset("ahpo", kl_coef=0.01).weighting
        AdaptiveHysteretic(alpha_min=0.1)
        >>> Objective() == Objective.preset("mhpo_ahpo")
        True
    """

    ratio_level: RatioLevel = "token"
    shaping: Shaping = field(default_factory=LogFidelity)
    weighting: Weighting | None = field(default_factory=AdaptiveHysteretic)
    normalization: Normalization = "mean_length"
    max_length: int | None = None
    max_log_ratio: float = 20.0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.ratio_level not in get_args(RatioLevel):
            raise ValueError(f"ratio_level: expected one of {get_args(RatioLevel)}, got {self.ratio_level!r}")
        if not isinstance(self.shaping, (Clip, LogFidelity, SoftGate, TruncatedRatio)):
            raise TypeError(f"shaping: expected a Clip, LogFidelity, SoftGate or TruncatedRatio, got {self.shaping!r}")
        if self.weighting is not None and not isinstance(self.weighting, (Hysteretic, AdaptiveHysteretic)):
            raise TypeError(f"weighting: expected a Hysteretic, AdaptiveHysteretic or None, got {self.weighting!r}")
        if self.normalization not in get_args(Normalization):
            raise ValueError(f"normalization: expected one of {get_args(Normalization)}, got {self.normalization!r}")
        if self.max_length is not None:
            if isinstance(self.max_length, bool) or not isinstance(self.max_length, int):
                raise TypeError(f"max_length: expected a positive int or None, got {self.max_length!r}")
            if self.max_length < 1:
                raise ValueError(f"max_length: expected a positive int or None, got {self.max_length}")
        # exp(88.7) is the largest finite float32, and r * A and k3 have to stay finite as well.
        _number(
            "max_log_ratio",
            self.max_log_ratio,
            "a number in (0, 80]",
            low=0.0,
            open_low=True,
            high=80.0,
            open_high=False,
        )
        _number("kl_coef", self.kl_coef, "a finite number >= 0", low=0.0)
        _number("entropy_coef", self.entropy_coef, "a finite number", open_low=True)
        if self.ratio_level == "sequence" and isinstance(self.shaping, TruncatedRatio):
            raise ValueError(
                "shaping: TruncatedRatio weighs each token's own log-probability by its own truncated ratio; a "
                "sequence-level ratio has no token log-probability to weigh. Use ratio_level='token', or Clip, "
                "LogFidelity or SoftGate at sequence level"
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> Objective:
        """The named objective, with any field of :class:`Objective` replaced.

        Args:
            name: a key of :meth:`presets`.
            overrides: fields to replace, e.g. ``kl_coef=0.01``.

        Raises:
            ValueError: unknown name (the message lists the known ones), or a value that the field refuses.
            TypeError: an override that is not a field.
        """
        if name not in _PRESETS:
            raise ValueError(f"objective: expected one of {', '.join(_PRESETS)}, got {name!r}")
        if not overrides:  # the path that torch.compile traces, which cannot look into a class's fields
            return _PRESETS[name]
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(overrides.keys() - set(known))
        if unknown:
            raise TypeError(f"preset overrides: expected fields of Objective ({', '.join(known)}), got {unknown}")
        return dataclasses.replace(_PRESETS[name], **overrides)

    @classmethod
    def presets(cls) -> dict[str, Objective]:
        """Every preset by name, in the order of the documentation.

        Examples:
            >>> list(Objective.presets())
            ['grpo', 'dapo', 'dr_grpo', 'gspo', 'sapo', 'cispo', 'mhpo', 'hpo', 'ahpo', 'mhpo_ahpo']
        """
        return dict(_PRESETS)

    def lower(self, *, off_policy: bool = True) -> LossSpec:
        """The plain values that a backend needs; ``off_policy``: old log-probabilities are given."""
        kind, parameters = self.shaping.lower()
        return LossSpec(
            kind, parameters, float(self.max_log_ratio), off_policy, self.kl_coef != 0, self.entropy_coef != 0,
            self.ratio_level == "sequence",
        )  # fmt: skip


_PRESETS: dict[str, Objective] = {
    "grpo": Objective("token", Clip(0.2, 0.2), None, "response"),
    "dapo": Objective("token", Clip(0.2, 0.28), None, "mean_length"),
    "dr_grpo": Objective("token", Clip(0.2, 0.2), None, "constant"),
    "gspo": Objective("sequence", Clip(3e-4, 4e-4), None, "response"),
    "sapo": Objective("token", SoftGate(1.0, 1.05), None, "response"),
    "cispo": Objective("token", TruncatedRatio(high=5.0), None, "mean_length"),
    "mhpo": Objective("token", LogFidelity(1.5, Hazard()), None, "response"),
    "hpo": Objective("token", Clip(0.2, 0.2), Hysteretic(0.6), "mean_length"),
    "ahpo": Objective("token", Clip(0.2, 0.2), AdaptiveHysteretic(0.1), "mean_length"),
    "mhpo_ahpo": Objective("token", LogFidelity(1.5, Hazard()), AdaptiveHysteretic(0.1), "mean_length"),
}


def resolve_objective(objective: str | Objective) -> Objective:
    """The :class:`Objective` for a preset's name or an instance; ValueError/TypeError otherwise."""
    if isinstance(objective, Objective):
        return objective
    if isinstance(objective, str):
        return Objective.preset(objective)
    raise TypeError(f"objective: expected a preset's name or an Objective, got {type(objective).__name__}")
