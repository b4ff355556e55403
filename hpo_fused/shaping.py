"""Shapings: how an importance ratio and an advantage make a token's surrogate.

Everything here is a frozen, hashable description; no tensor is touched. The formulas that the classes name stand in
``surrogate.py`` (torch), ``kernels/surrogate.py`` (device) and ``reference.py`` (float64 oracle).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from .checks import check_number, plain_numbers


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
        plain_numbers(self)
        check_number("Clip.low", self.low, "a number in [0, 1]", low=0.0, high=1.0, open_high=False)
        check_number("Clip.high", self.high, "a finite number >= 0", low=0.0)
        if self.delta is not None:
            check_number("Clip.delta", self.delta, "a finite number > 0 or None", low=0.0, open_low=True)
        if self.dual is not None:
            check_number("Clip.dual", self.dual, "a finite number >= 1 or None", low=1.0)

    def lower(self) -> tuple[str, tuple[float, ...]]:
        """Kind and parameters as :class:`~hpo_fused.interface.LossSpec` orders them."""
        delta = math.inf if self.delta is None else float(self.delta)
        dual = math.inf if self.dual is None else float(self.dual)
        return "clip", (1.0 - self.low, 1.0 + self.high, delta, dual)


@dataclass(frozen=True)
class Hazard:
    """Cumulative Weibull hazards of MHPO (arXiv 2603.16929), one for each direction of a shift.

    (softplus(psi)/lambda_pos)^k_pos for upward shifts plus (softplus(-psi)/lambda_neg)^k_neg for downward ones.

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
        plain_numbers(self)
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            check_number(f"Hazard.{name}", getattr(self, name), "a finite number > 0", low=0.0, open_low=True)


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
        plain_numbers(self)
        check_number("LogFidelity.c", self.c, "a finite number > 0", low=0.0, open_low=True)
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
        plain_numbers(self)
        for name in ("tau_pos", "tau_neg"):
            check_number(f"SoftGate.{name}", getattr(self, name), "a finite number > 0", low=0.0, open_low=True)

    def lower(self) -> tuple[str, tuple[float, ...]]:
        """Kind and parameters as :class:`~hpo_fused.interface.LossSpec` orders them."""
        return "soft_gate", (float(self.tau_pos), float(self.tau_neg))


@dataclass(frozen=True)
class TruncatedRatio:
    """CISPO's truncated importance weight (MiniMax-M1, arXiv 2506.13585, eq. 4): s = sg[clip(r, low, high)] A logp.

    At a response's ratio each token's log-probability is weighed by the response's weight. Bounds of 1 and 1 are no
    weight: REINFORCE. Bounds per sign are TOPR's (arXiv 2503.14286): 1 and 1 for A > 0, 0 and 1 for A < 0.

    Args:
        high: upper bound of the ratio itself (not of r - 1), > 0.
        low: lower bound of the ratio, in [0, high]; None: none.
        outside: "clip" to the bounds, or "zero": a ratio outside them has weight 0.
        high_neg, low_neg: the bounds for A < 0; None: the same as for A > 0.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or outside its range.
    """

    high: float = 5.0
    low: float | None = None
    outside: Literal["clip", "zero"] = "clip"
    high_neg: float | None = None
    low_neg: float | None = None

    def __post_init__(self) -> None:
        plain_numbers(self)
        for suffix in ("", "_neg"):
            low, high = f"low{suffix}", f"high{suffix}"
            if getattr(self, high) is not None or not suffix:
                check_number(
                    f"TruncatedRatio.{high}", getattr(self, high), "a finite number > 0", low=0.0, open_low=True
                )
            upper = self.high if getattr(self, high) is None else getattr(self, high)
            expected = f"a number in [0, {high}={upper}] or None"
            if getattr(self, low) is not None:
                check_number(
                    f"TruncatedRatio.{low}", getattr(self, low), expected, low=0.0, high=upper, open_high=False
                )
        if self.bounds(negative=True)[0] > self.bounds(negative=True)[1]:
            raise ValueError(f"TruncatedRatio.high_neg: expected a number >= low={self.low}, got {self.high_neg!r}")
        if self.outside not in ("clip", "zero"):
            raise ValueError(f"TruncatedRatio.outside: expected 'clip' or 'zero', got {self.outside!r}")

    def bounds(self, *, negative: bool) -> tuple[float, float]:
        """(low, high) of the ratio for one sign of the advantage; low is 0 where there is none."""
        low, high = self.low, self.high
        if negative:
            low = low if self.low_neg is None else self.low_neg
            high = high if self.high_neg is None else self.high_neg
        return 0.0 if low is None else float(low), float(high)

    def lower(self) -> tuple[str, tuple[float, ...]]:
        """Kind and parameters as :class:`~hpo_fused.interface.LossSpec` orders them."""
        bounds = self.bounds(negative=False) + self.bounds(negative=True)
        return "truncated_ratio", (*bounds, 1.0 if self.outside == "clip" else 0.0)


@dataclass(frozen=True)
class GammaGate:
    """VESPO's gate (arXiv 2602.10693), shaped like a gamma density: s = sg[e^lambda r^k e^(-lambda r)] A logp.

    At r = 1 the weight is 1, whatever k and lambda; at r = k / lambda it is highest, and beyond float32 for k far above
    lambda. The paper's ratio is the whole response's product
    (``ratio_level="sequence_sum"``).

    Args:
        k_pos, lambda_pos: of advantages above 0; k >= 0, lambda > 0.
        k_neg, lambda_neg: of advantages below 0.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or outside its range.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("k_pos", "k_neg"):
            check_number(f"GammaGate.{name}", getattr(self, name), "a finite number >= 0", low=0.0)
        for name in ("lambda_pos", "lambda_neg"):
            check_number(f"GammaGate.{name}", getattr(self, name), "a finite number > 0", low=0.0, open_low=True)

    def lower(self) -> tuple[str, tuple[float, ...]]:
        """Kind and parameters as :class:`~hpo_fused.interface.LossSpec` orders them."""
        return "gamma_gate", (
            float(self.k_pos),
            float(self.lambda_pos),
            float(self.k_neg),
            float(self.lambda_neg),
        )


@dataclass(frozen=True)
class GeometricMean:
    """GMPO's clipping before the mean (arXiv 2507.20673): s = exp(x) A, x of log-ratios bounded token by token.

    A token's log-ratio enters x as min(log r, high) where A > 0 and as max(log r, -low) where A < 0; beyond its bound
    the token has no gradient of its own. With ``ratio_level="sequence"`` exp(x) is the geometric mean of the response's
    ratios.

    Args:
        low, high: bounds of the log-ratio, >= 0.

    Raises:
        TypeError, ValueError: a parameter of the wrong type or outside its range.
    """

    low: float = 0.4
    high: float = 0.4

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("low", "high"):
            check_number(f"GeometricMean.{name}", getattr(self, name), "a finite number >= 0", low=0.0)

    def lower(self) -> tuple[str, tuple[float, ...]]:
        """Kind and parameters as :class:`~hpo_fused.interface.LossSpec` orders them."""
        return "geometric_mean", (-float(self.low), float(self.high))


@dataclass(frozen=True)
class DRO:
    """Advantage times log-probability, less a quadratic penalty on the log-ratio: s = A logp - (beta / 2) (log r)^2.

    The per-token form of verl and Tinker of direct reward optimisation (arXiv 2405.19107, there a response's squared
    error with a value function) and of Kimi k1.5's objective (arXiv 2501.12599).
    The only shaping that is not proportional to A: tokens of advantage 0 have a gradient too, and count as active.
    Token weights, and hysteretic weights where A < 0, scale both terms.

    Args:
        beta: of the quadratic term, > 0.

    Raises:
        TypeError, ValueError: beta of the wrong type or outside its range.
    """

    beta: float

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_number("DRO.beta", self.beta, "a finite number > 0", low=0.0, open_low=True)

    def lower(self) -> tuple[str, tuple[float, ...]]:
        """Kind and parameters as :class:`~hpo_fused.interface.LossSpec` orders them."""
        return "dro", (float(self.beta),)


Shaping: TypeAlias = Clip | LogFidelity | SoftGate | TruncatedRatio | GammaGate | GeometricMean | DRO
SHAPINGS = get_args(Shaping)
