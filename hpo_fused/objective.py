"""Objectives: ratio level, shaping, weighting, normalisation, KL and entropy terms, and named presets.

Everything here is a frozen, hashable description; no tensor is touched. The formulas that the classes name stand
in ``surrogate.py`` (torch), ``kernels/surrogate.py`` (device) and ``reference.py`` (float64 oracle).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from .checks import check_integer, check_number, plain_numbers
from .interface import Batch, LossSpec
from .mapping import arguments_of, as_mapping
from .shaping import (
    SHAPINGS,
    Clip,
    GammaGate,
    GeometricMean,
    Hazard,
    LogFidelity,
    Shaping,
    SoftGate,
    TruncatedRatio,
)

RatioLevel: TypeAlias = Literal["token", "sequence", "sequence_token", "sequence_sum"]
Normalization: TypeAlias = Literal["response", "mean_length", "group_mean_length", "constant", "response_sum"]
KL: TypeAlias = Literal["k3", "k3_ratio", "k2", "k1", "k3+"]


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
        plain_numbers(self)
        check_number("Hysteretic.alpha", self.alpha, "a number in [0, 1]", low=0.0, high=1.0, open_high=False)


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
        plain_numbers(self)
        check_number(
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
        ratio_level: "token"; "sequence" for GSPO's length-normalised ratio of the response (arXiv 2507.18071, eq. 7);
            "sequence_token" for GSPO-token (eq. 13 there): the response's ratio in value, while each token has its own
            advantage and gradient; "sequence_sum" for the ratio of the whole responses' probabilities, the product of
            the tokens' ratios.
        shaping: one of :class:`Clip`, :class:`LogFidelity`, :class:`SoftGate`, :class:`TruncatedRatio`,
            :class:`GammaGate`, :class:`GeometricMean`, :class:`DRO`.
        weighting: :class:`Hysteretic`, :class:`AdaptiveHysteretic` or None for weight 1 everywhere.
        normalization: "response" (GRPO, arXiv 2402.03300, eq. 3), "mean_length" (HPO; DAPO's global token mean,
            arXiv 2503.14476, eq. 8), "group_mean_length" (the same per prompt), "constant" (Dr. GRPO,
            arXiv 2503.20783) or "response_sum": 1 / S, the mean over responses of their tokens' sum.
        max_length: tokens per response that "constant" divides by; required there, when the loss is called.
        max_log_ratio: log-ratios are clamped to +-max_log_ratio, with derivative zero outside.
        kl_coef: coefficient of the penalty on KL(policy || reference), >= 0.
        entropy_coef: coefficient of the entropy bonus (subtracted from the loss); any sign.
        kl: estimate of the KL divergence from d = log p_ref - log p (Schulman 2020, "Approximating KL divergence"):
            "k3": e^d - d - 1; "k2": d^2 / 2; "k1": -d; "k3+": k3's value with k2's gradient, which is that of the KL
            divergence itself on-policy; "k3_ratio": r k3, whose gradient is right off-policy too (DeepSeek-V3.2,
            arXiv 2512.02556, eq. 7; TRL's ``use_bias_correction_kl``). Its r is the response's ratio with
            ``ratio_level="sequence"``, else the token's own.

    Raises:
        TypeError, ValueError: a field of the wrong type or outside its range, or a combination without a meaning.

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
    kl: KL = "k3"

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.ratio_level not in get_args(RatioLevel):
            raise ValueError(f"ratio_level: expected one of {get_args(RatioLevel)}, got {self.ratio_level!r}")
        if not isinstance(self.shaping, SHAPINGS):
            names = ", ".join(shaping.__name__ for shaping in SHAPINGS)
            raise TypeError(f"shaping: expected one of {names}, got {self.shaping!r}")
        if self.weighting is not None and not isinstance(self.weighting, (Hysteretic, AdaptiveHysteretic)):
            raise TypeError(f"weighting: expected a Hysteretic, AdaptiveHysteretic or None, got {self.weighting!r}")
        if self.normalization not in get_args(Normalization):
            raise ValueError(f"normalization: expected one of {get_args(Normalization)}, got {self.normalization!r}")
        if self.max_length is not None and check_integer("max_length", self.max_length, "a positive int or None") < 1:
            raise ValueError(f"max_length: expected a positive int or None, got {self.max_length}")
        # exp(88.7) is the largest finite float32, and r * A and k3 have to stay finite as well.
        check_number(
            "max_log_ratio",
            self.max_log_ratio,
            "a number in (0, 80]",
            low=0.0,
            open_low=True,
            high=80.0,
            open_high=False,
        )
        check_number("kl_coef", self.kl_coef, "a finite number >= 0", low=0.0)
        check_number("entropy_coef", self.entropy_coef, "a finite number", open_low=True)
        if self.kl not in get_args(KL):
            raise ValueError(f"kl: expected one of {get_args(KL)}, got {self.kl!r}")
        if self.kl == "k3_ratio":
            if self.max_log_ratio > 40:
                raise ValueError(
                    "max_log_ratio: expected a number in (0, 40] for kl='k3_ratio', whose r k3 has to stay finite in "
                    f"float32, got {self.max_log_ratio}"
                )
            if isinstance(self.shaping, GeometricMean):
                raise ValueError(
                    "kl: expected another kind than 'k3_ratio' for GeometricMean, which bounds log-ratios before their "
                    "mean: no plain ratio is left to correct by"
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
        if name not in tuple(_PRESETS):
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
            >>> list(Objective.presets())  # doctest: +NORMALIZE_WHITESPACE
            ['grpo', 'dapo', 'dr_grpo', 'gspo', 'gspo_token', 'luspo', 'gmpo', 'sapo', 'cispo', 'vespo', 'topr',
             'reinforce', 'mhpo', 'hpo', 'ahpo', 'mhpo_ahpo']
        """
        return dict(_PRESETS)

    @classmethod
    def from_mapping(cls, value: str | Mapping[str, Any]) -> Objective:
        """An objective from plain values, as JSON, YAML and command lines give them; see docs/objectives.md.

        Args:
            value: a preset's name, or a mapping of fields by name; those not named are the ``"preset"``'s, if that key
                is there, else the defaults. ``shaping`` and ``weighting`` are mappings of their ``"kind"``, the class's
                name in snake case, and of its fields; ``hazard`` is one of its fields. Any of the three may be an
                instance, the latter two None.

        Raises:
            TypeError, ValueError: a key or kind that does not exist (the message lists those that do), or a value that
                its field refuses; the message begins with the path to it, as in ``shaping.low``.

        Examples:
            >>> drop = {"kind": "truncated_ratio", "low": 0.8, "high": 1.2, "outside": "zero"}
            >>> Objective.from_mapping({"preset": "cispo", "shaping": drop}).shaping
            TruncatedRatio(high=1.2, low=0.8, outside='zero', high_neg=None, low_neg=None)
            >>> Objective.from_mapping("grpo").to_mapping()["shaping"]
            {'kind': 'clip', 'low': 0.2, 'high': 0.2, 'delta': None, 'dual': None}
        """
        if isinstance(value, str):
            return cls.preset(value)
        if not isinstance(value, Mapping):
            raise TypeError(
                f"objective: expected a preset's name, a mapping or an Objective, got {value!r} of type "
                f"{type(value).__name__}"
            )
        arguments = arguments_of(cls, value, "", "preset")
        return cls.preset(value["preset"], **arguments) if "preset" in value else cls(**arguments)

    def to_mapping(self) -> dict[str, Any]:
        """Every field as plain values, of the types that JSON has; :meth:`from_mapping` reads them back."""
        return as_mapping(self)

    def lower(self, batch: Batch) -> LossSpec:
        """The plain values that a backend needs for a batch."""
        kind, parameters = self.shaping.lower()
        given = batch.response_log_ratios is not None
        return LossSpec(
            kind, parameters, float(self.max_log_ratio), given or batch.old_logprobs is not None,
            self.kl if self.kl_coef != 0 else "none", self.entropy_coef != 0 or batch.entropy_weights is not None,
            "sequence_token" if given else self.ratio_level,
        )  # fmt: skip


# What the loss functions take as their objective.
ObjectiveLike: TypeAlias = str | Mapping[str, Any] | Objective

_PRESETS: dict[str, Objective] = {
    "grpo": Objective("token", Clip(0.2, 0.2), None, "response"),
    "dapo": Objective("token", Clip(0.2, 0.28), None, "mean_length"),
    "dr_grpo": Objective("token", Clip(0.2, 0.2), None, "constant"),
    "gspo": Objective("sequence", Clip(3e-4, 4e-4), None, "response"),
    "gspo_token": Objective("sequence_token", Clip(3e-4, 4e-4), None, "response"),
    "luspo": Objective("sequence", Clip(2e-3, 2.5e-3), None, "response_sum"),
    "gmpo": Objective("sequence", GeometricMean(0.4, 0.4), None, "response"),
    "sapo": Objective("token", SoftGate(1.0, 1.05), None, "response"),
    "cispo": Objective("token", TruncatedRatio(high=5.0), None, "mean_length"),
    "vespo": Objective("sequence_sum", GammaGate(), None, "mean_length"),
    "topr": Objective("sequence_sum", TruncatedRatio(1.0, 1.0, low_neg=0.0), None, "response"),
    "reinforce": Objective("token", TruncatedRatio(1.0, 1.0), None, "response_sum"),
    "mhpo": Objective("token", LogFidelity(1.5, Hazard()), None, "response"),
    "hpo": Objective("token", Clip(0.2, 0.2), Hysteretic(0.6), "mean_length"),
    "ahpo": Objective("token", Clip(0.2, 0.2), AdaptiveHysteretic(0.1), "mean_length"),
    "mhpo_ahpo": Objective("token", LogFidelity(1.5, Hazard()), AdaptiveHysteretic(0.1), "mean_length"),
}


def resolve_objective(objective: ObjectiveLike) -> Objective:
    """The :class:`Objective` itself, or that of a preset's name or a mapping; ValueError or TypeError otherwise."""
    return objective if isinstance(objective, Objective) else Objective.from_mapping(objective)
