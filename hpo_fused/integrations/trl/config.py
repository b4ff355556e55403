"""HPOConfig: GRPOConfig with an objective, and what its fields say as an Objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpo_fused.objective import Normalization, Objective
from hpo_fused.shaping import Clip, GammaGate, Shaping, SoftGate, TruncatedRatio

from .versions import check_trl

check_trl()

from trl import GRPOConfig  # noqa: E402

HEADS = ("linear", "two_step", "logprobs")

# What an objective says itself. GRPOConfig cannot tell a default from the same value given.
_OBJECTIVE_SAYS = (
    "loss_type", "importance_sampling_level", "epsilon", "epsilon_high", "delta", "sapo_temperature_pos",
    "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg",
)  # fmt: skip
_NORMALIZATIONS: dict[str, Normalization] = {
    "grpo": "response",
    "sapo": "response",
    "dr_grpo": "constant",
    "luspo": "response_sum",
    "bnpo": "mean_length",
    "dapo": "mean_length",
    "cispo": "mean_length",
    "vespo": "mean_length",
}


@dataclass
class HPOConfig(GRPOConfig):  # type: ignore[misc]  # Any: TRL's types are not followed
    """TRL's GRPOConfig and three fields more.

    Args:
        objective: None: ``loss_type`` and the fields that belong to it, as TRL has them. Or a preset's name, a mapping
            that :meth:`hpo_fused.Objective.from_mapping` reads (a JSON string on the command line), or an
            :class:`hpo_fused.Objective`, which becomes a mapping. ``beta``, ``entropy_coef`` and the options that make
            masks and weights go with it too; its ``max_length`` is ``max_completion_length`` unless it has one.
        head: "linear": loss and gradient from hidden states, three GEMMs; "two_step": log-probabilities first, four
            GEMMs, no logits either, which is also what "linear" runs as where an option needs them first; "logprobs":
            log-probabilities by TRL's own head.
        skip_inactive: leave tokens without a learning signal out of the head's GEMMs (``head="linear"``), and so out of
            the metrics: TRL's ``entropy`` is then missing, ``hpo/entropy`` is that of the others.

    Raises:
        TypeError, ValueError: an objective or key that does not exist, or a setting given twice, in the objective and
            in a field of TRL's; ``generation_batch_size`` and ``steps_per_generation`` that disagree.
    """

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "objective"]  # noqa: RUF012

    objective: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "hpo_fused's objective: a preset's name or a mapping (JSON). None: TRL's loss_type."},
    )
    head: str = field(
        default="linear",
        metadata={"help": "Way through the LM head: linear, two_step, or logprobs for TRL's own."},
    )
    skip_inactive: bool = field(
        default=False,
        metadata={"help": "Leave tokens without a learning signal out of the head's GEMMs and of the metrics."},
    )

    def __post_init__(self) -> None:
        given_size = self.generation_batch_size
        if self.steps_per_generation is not None:  # a saved config has both, which GRPOConfig refuses
            self.generation_batch_size: int | None = None
        super().__post_init__()
        if given_size not in (None, self.generation_batch_size):
            raise ValueError(
                f"generation_batch_size: expected {self.generation_batch_size} for steps_per_generation="
                f"{self.steps_per_generation} on {self.world_size} processes, or only one of the two, got {given_size}"
            )
        if self.head not in HEADS:
            raise ValueError(f"head: expected one of {', '.join(HEADS)}, got {self.head!r}")
        if self.skip_inactive and self.head != "linear":
            raise ValueError(f"skip_inactive: expected False beside head={self.head!r}, which has all tokens, got True")
        if self.skip_inactive and self.use_adaptive_entropy:
            raise ValueError(
                "skip_inactive: expected False beside use_adaptive_entropy, which takes every token's, got True"
            )
        given: object = self.objective
        if isinstance(given, Objective):  # the field's type is what command lines and files can say
            self.objective = given.to_mapping()
            if given.kl_coef == 0 and given.kl == Objective.kl:  # no more said of it than by a preset's name
                del self.objective["kl"]
        objective_of(self)


def objective_of(args: HPOConfig) -> Objective:
    """What the fields say, as one objective; TypeError or ValueError where they do not go together."""
    if args.objective is None:
        return _of_loss_type(args)
    defaults = {option.name: option.default for option in dataclasses.fields(GRPOConfig)}

    def given(name: str) -> bool:
        return bool(getattr(args, name) != defaults[name])

    def refuse(ours: str, theirs: str, also: str = "") -> None:
        raise ValueError(
            f"{theirs}: expected its default ({defaults[theirs]!r}){also} beside {ours}, which says it already, got "
            f"{getattr(args, theirs)!r}"
        )

    for name in _OBJECTIVE_SAYS:
        if given(name):
            refuse(f"objective={args.objective!r}", name)
    objective = Objective.from_mapping(args.objective)
    if objective.kl_coef != 0 and args.beta not in (0, objective.kl_coef):  # a trainer's own args have both
        refuse("objective.kl_coef", "beta", f" or {objective.kl_coef}")
    says_kl = objective.kl_coef != 0 or (isinstance(args.objective, Mapping) and "kl" in args.objective)
    if says_kl and given("use_bias_correction_kl"):
        refuse("objective.kl", "use_bias_correction_kl")
    if objective.entropy_coef != 0:
        for name in ("entropy_coef", "use_adaptive_entropy"):
            if given(name):
                refuse("objective.entropy_coef", name)
    changes: dict[str, Any] = {}
    if args.beta != 0:
        changes = {"kl_coef": args.beta} if says_kl else _penalty(args)
    if objective.normalization == "constant" and objective.max_length is None:
        changes["max_length"] = args.max_completion_length
    return dataclasses.replace(objective, **changes)


def _penalty(args: HPOConfig) -> dict[str, Any]:
    """TRL's KL term."""
    if args.beta == 0:
        return {}
    return {"kl_coef": args.beta, "kl": "k3_ratio" if args.use_bias_correction_kl else "k3"}


def _of_loss_type(args: HPOConfig) -> Objective:
    """TRL's ``loss_type`` with the fields that it reads."""
    if args.loss_type not in _NORMALIZATIONS:
        raise ValueError(f"loss_type: expected one of {', '.join(_NORMALIZATIONS)}, got {args.loss_type!r}")
    if args.importance_sampling_level not in ("token", "sequence"):
        raise ValueError(
            f"importance_sampling_level: expected token or sequence, got {args.importance_sampling_level!r}"
        )
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    level, normalization = args.importance_sampling_level, _NORMALIZATIONS[args.loss_type]
    shaping: Shaping
    if args.loss_type == "cispo":
        shaping = TruncatedRatio(high)
    elif args.loss_type == "sapo":
        shaping = SoftGate(args.sapo_temperature_pos, args.sapo_temperature_neg)
    elif args.loss_type == "vespo":
        level = "sequence_sum"
        shaping = GammaGate(args.vespo_k_pos, args.vespo_lambda_pos, args.vespo_k_neg, args.vespo_lambda_neg)
    else:  # a lower bound below 0 is none, as 0 is
        shaping = Clip(min(args.epsilon, 1.0), high, args.delta)
    length = args.max_completion_length if normalization == "constant" else None
    return Objective(level, shaping, None, normalization, length, **_penalty(args))
