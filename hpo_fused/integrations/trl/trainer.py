"""HPOTrainer: GRPOTrainer whose loss, and whose way to it from the hidden states, are hpo_fused's."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging
from trl import GRPOTrainer

from hpo_fused.batch import BatchStatistics
from hpo_fused.linear import linear_policy_loss
from hpo_fused.losses import PolicyLossOutput, logprob_policy_loss
from hpo_fused.metrics import MetricSums
from hpo_fused.objective import AdaptiveHysteretic, Objective
from hpo_fused.shaping import Clip, GammaGate

from .config import HPOConfig, objective_of
from .head import LossCall, add_head, probe
from .metrics import StepMetrics, Unlogged, step_metrics
from .versions import check_trl

logger = logging.get_logger(__name__)

# What else a micro-batch has for the model, as GRPOTrainer names it.
_MEDIA = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class HPOTrainer(GRPOTrainer):  # type: ignore[misc]  # Any: TRL's types are not followed
    """TRL's GRPOTrainer with every objective of hpo_fused and a fused LM head.

    With ``args.objective=None`` the loss is TRL's ``loss_type`` with all its options. Normalisers are TRL's for every
    objective: the accumulation steps that the window really has, and for token means an average window of the
    generation batch. A-HPO's counts are the generation batch's over all ranks, the same in all its windows and
    iterations.

    TRL's metrics are logged under their keys, ours under "hpo/". docs/trl.md says what each way through the head costs.

    Args:
        model, reward_funcs and all others: as GRPOTrainer's.
        args: an :class:`HPOConfig`; None: its defaults.

    Raises:
        TypeError: another configuration, or a model without a recognisable LM head.
        ValueError: a model whose forward does more than that head.
    """

    # GRPOTrainer's controller of the entropy bonus
    entropy_coef: float
    _last_world_entropy: float
    _entropy_window_stats: Tensor | None

    def __init__(self, model: Any, reward_funcs: Any = None, args: HPOConfig | None = None, *rest: Any, **kwargs: Any):
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            args = HPOConfig(f"{name.split('/')[-1] or 'model'}-HPO")
        if not isinstance(args, HPOConfig):
            raise TypeError(f"args: expected an HPOConfig, got a {type(args).__name__}")
        self.objective = objective_of(args)
        if args.beta != self.objective.kl_coef:  # TRL keeps a reference where beta is set
            args = copy.copy(args)
            args.beta = self.objective.kl_coef
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        # By mode. Apart from TRL's _metrics, which wait for the device.
        self._unlogged: dict[str, Unlogged] = {}
        if args.head != "logprobs":
            base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
            add_head(base, self.temperature, args.cast_lm_head_to_fp32)
            with self.accelerator.autocast():  # as in training: attention in float32 is not every kernel's
                probe(base, self.temperature, self.accelerator.device)
        if self.accelerator.is_main_process:
            for message in (check_trl(), self._two_step_because()):
                if message is not None:
                    logger.warning(message)

    def _two_step_because(self) -> str | None:
        """What to say where ``head="linear"`` has to know log-probabilities before the loss."""
        needs = {
            "top_entropy_quantile": self.top_entropy_quantile < 1,
            "off_policy_mask_threshold": self.off_policy_mask_threshold is not None,
            "use_bias_correction_kl beside vespo, whose ratio is another one": self._penalty() is not self.objective,
        }
        reasons = [name for name, needed in needs.items() if needed]
        if self.args.head != "linear" or not reasons:
            return None
        ignored = "; skip_inactive has no effect there" if self.args.skip_inactive else ""
        return f"head='linear' runs as 'two_step', with one GEMM more, for {', '.join(reasons)}{ignored}"

    def _penalty(self) -> Objective:
        """The objective that holds the KL term: another one than the policy term's where their ratios differ.

        TRL's vespo puts the sampler's correction into its own ratio only, and takes the KL's from
        ``importance_sampling_level``.
        """
        objective, level = self.objective, self.args.importance_sampling_level
        if not isinstance(objective.shaping, GammaGate) or objective.kl_coef == 0 or objective.kl != "k3_ratio":
            return objective
        if level != "sequence" and not (self.use_vllm and self.vllm_importance_sampling_correction):
            return objective
        return dataclasses.replace(objective, ratio_level=level, shaping=Clip(), weighting=None, entropy_coef=0.0)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's generation batch with the counts that objectives need, before it is shuffled and cut."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mask = _loss_mask(output)
        if isinstance(self.objective.weighting, AdaptiveHysteretic):
            local = BatchStatistics.from_batch(output["advantages"], mask)
            counts = torch.stack([torch.as_tensor(local.positive), torch.as_tensor(local.negative)])
            output["hpo_positive"], output["hpo_negative"] = self.accelerator.reduce(counts, reduction="sum")
        if self.objective.normalization == "group_mean_length":
            size, first = self._group_size(), self.accelerator.process_index * len(mask)
            of_groups = self.accelerator.gather(mask.sum(-1)).view(-1, size).sum(-1).repeat_interleave(size)
            output["hpo_group_tokens"] = of_groups[first : first + len(mask)]
        return output

    def _group_size(self) -> int:
        return int(self.num_generations if self.model.training else self.num_generations_eval)

    def _steps(self) -> int:
        """Micro-batches of this accumulation window; evaluation accumulates nothing."""
        return int(self.current_gradient_accumulation_steps) if self.model.training else 1

    def _averages_window(self) -> bool:
        """Whether the normaliser is a whole window's, and not a micro-batch's times their number."""
        return self.objective.normalization == "mean_length" and not self._is_bnpo()

    def _is_bnpo(self) -> bool:
        """Whether each micro-batch is divided by its own tokens."""
        return self.args.objective is None and self.args.loss_type == "bnpo"

    def _statistics(self, inputs: dict[str, Any], mask: Tensor) -> BatchStatistics:
        """Totals whose normalisers are TRL's: those of an average window of the generation batch."""
        steps, processes, size = self._steps(), self.accelerator.num_processes, len(mask)
        share = steps / self.args.steps_per_generation if self.model.training else 1.0
        tokens, average = inputs["num_items_in_batch"] * share, float(processes)
        adaptive = isinstance(self.objective.weighting, AdaptiveHysteretic)
        positive, negative = (_counted(inputs, f"hpo_{sign}") if adaptive else 0 for sign in ("positive", "negative"))
        if self._is_bnpo():
            tokens, average = mask.sum() * steps, 1.0
        responses = size * steps * processes
        if self.objective.normalization != "group_mean_length":
            return BatchStatistics(responses, tokens, positive, negative, gradient_average=average)
        # As if each response were a group of its own: of the generation batch's groups and of their responses an
        # average window has as many as it has responses, over the group's size and times it.
        lengths = _counted(inputs, "hpo_group_tokens")
        alone = torch.arange(size, device=mask.device)
        average = self._group_size() / steps
        return BatchStatistics(responses, tokens, positive, negative, alone, lengths, gradient_average=average)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        objective, penalty, mask = self.objective, self._penalty(), _loss_mask(inputs)
        advantages: Tensor = inputs["advantages"]
        old: Tensor | None = inputs.get("old_per_token_logps")
        statistics = self._statistics(inputs, mask)
        ref = inputs["ref_per_token_logps"] if objective.kl_coef != 0 else None
        sampling = inputs.get("importance_sampling_ratio")
        weights, anchor = sampling, old
        if sampling is not None and old is not None and isinstance(objective.shaping, GammaGate):
            weights, anchor = None, _corrected(old, sampling, mask)
        given: dict[str, Any] = {"ref_logprobs": ref, "mask": mask, "statistics": statistics}
        given["groups"] = statistics.group_ids

        def run(hidden: Tensor, weight: Tensor, **head: Any) -> PolicyLossOutput:
            output: PolicyLossOutput = linear_policy_loss(
                hidden, weight, inputs["completion_ids"], advantages, old_logprobs=anchor, token_weights=weights,
                entropy_weights=self._entropy_weights(mask, statistics), objective=objective,
                skip_inactive=self.args.skip_inactive, **given, **head,
            )  # fmt: skip
            return output

        fused = self.args.head == "linear" and self._two_step_because() is None
        call, chosen = LossCall(mask.shape[1], run) if fused else None, mask
        loss: Tensor
        loss, logprobs, entropies, aux_loss = self._score(model, inputs, call)
        if call is None:
            chosen, weights = self._chosen(inputs, mask, weights, logprobs, entropies)
            apart = penalty is not objective
            out = logprob_policy_loss(
                logprobs, advantages, entropy=entropies, old_logprobs=anchor, token_weights=weights,
                entropy_weights=self._entropy_weights(chosen, statistics),
                objective=dataclasses.replace(objective, kl_coef=0.0) if apart else objective, **given,
            )  # fmt: skip
            loss = out.loss
            if apart:
                nothing = torch.zeros_like(advantages)
                loss = loss + logprob_policy_loss(logprobs, nothing, old_logprobs=old, objective=penalty, **given).loss
        else:
            if call.output is None:
                raise RuntimeError(
                    "model: expected HPOTrainer's forward, got another, which left the LM head out; something (another "
                    "trainer?) has bound model.forward since the trainer was made"
                )
            out = call.output
        logprobs, entropies = logprobs.detach(), entropies.detach()
        known = None if fused and self.args.skip_inactive else entropies
        step = step_metrics(objective, penalty.ratio_level, logprobs, known, mask, advantages, old, ref)
        if isinstance(objective.shaping, GammaGate) and known is not None:
            parameters = dataclasses.astuple(objective.shaping)
            change = torch.zeros_like(logprobs) if old is None else logprobs - old
            phi = self.get_gamma_weights(advantages.reshape(len(mask), -1), change, mask, sampling, *parameters)
            step.add_mean("vespo/phi_seq_mean", phi, mask)
        if self._entropy_bonus_enabled:
            self._log_entropy(step, loss.detach(), entropies, chosen, statistics)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / self._steps()
            step.add_call("aux_loss", aux_loss)
        self._keep(step, out.metric_sums())
        return loss

    def _score(self, model: Any, inputs: dict[str, Any], call: LossCall | None) -> tuple[Any, Tensor, Tensor, Any]:
        """Loss (where ``call`` makes one), log-probabilities, entropies and balancing loss of the completions."""
        outputs: list[Any] = []

        def forward(**arguments: Any) -> Any:
            outputs.append(model(**arguments) if call is None else model(**arguments, hpo=call))
            return outputs[-1]

        # TRL's own method makes the model's arguments, the images' slices above all.
        ids, attention = (torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask"))
        logprobs, entropies, aux_loss = self._get_per_token_logps_and_entropies(
            forward, ids, attention, inputs["completion_ids"].shape[1], compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled, **{name: inputs.get(name) for name in _MEDIA},
        )  # fmt: skip
        return outputs[0].loss, logprobs, entropies, aux_loss

    def _chosen(
        self, inputs: dict[str, Any], mask: Tensor, weights: Tensor | None, logprobs: Tensor, entropies: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens that an entropy bonus is for, and weights of the policy term, once log-probabilities are known."""
        chosen, factors = mask, [] if weights is None else [weights]
        if self.top_entropy_quantile < 1:
            chosen = mask * self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)
            factors.append(chosen)
        if self.off_policy_mask_threshold is not None:
            old = inputs.get("old_per_token_logps")
            sampled = inputs.get("sampling_per_token_logps", logprobs.detach() if old is None else old)
            advantages = inputs["advantages"].reshape(len(mask), -1)
            factors.append(
                self.get_off_policy_mask(advantages, logprobs, sampled, mask, self.off_policy_mask_threshold)
            )
        return chosen, math.prod(factors[1:], start=factors[0]).float() if factors else None

    def _entropy_weights(self, chosen: Tensor, statistics: BatchStatistics) -> Tensor | None:
        """TRL's bonus: a mean over the micro-batch's own chosen tokens, whatever the policy term is divided by."""
        if not self._entropy_bonus_enabled:
            return None
        waits = self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        coefficient = 0.0 if waits else self.entropy_coef
        return chosen * (coefficient / (chosen.sum().clamp(min=1) * (self._steps() * statistics.gradient_average)))

    def _log_entropy(
        self, step: StepMetrics, loss: Tensor, entropies: Tensor, chosen: Tensor, statistics: BatchStatistics
    ) -> None:
        """The policy term without the bonus; and the adaptive coefficient's next value, at the end of a window."""
        weights = self._entropy_weights(chosen, statistics)
        assert weights is not None
        policy = loss + statistics.gradient_average * torch.where(weights != 0, weights * entropies, 0).sum()
        step.add_call("policy_loss", policy if self._averages_window() else policy * self._steps())
        if not self.model.training:
            return
        if self.use_adaptive_entropy:
            sums = torch.stack([torch.where(chosen != 0, entropies, 0).sum(), chosen.sum()])
            before = self._entropy_window_stats
            self._entropy_window_stats = sums if before is None else before + sums
            if self.accelerator.sync_gradients:
                total, count = self.accelerator.reduce(self._entropy_window_stats, reduction="sum").tolist()
                self._last_world_entropy = total / max(count, 1.0)
                self._entropy_window_stats = None
                if self._last_world_entropy <= self.args.entropy_target:
                    self.entropy_coef = min(
                        self.entropy_coef + self.args.entropy_coef_delta, self.args.entropy_coef_max
                    )
                else:
                    self.entropy_coef = max(
                        self.entropy_coef - self.args.entropy_coef_delta, self.args.entropy_coef_min
                    )
        if self.accelerator.sync_gradients:
            self._metrics["train"]["entropy_coef"].append(self.entropy_coef)

    def _keep(self, step: StepMetrics, sums: MetricSums) -> None:
        mode = "train" if self.model.training else "eval"
        if mode in self._unlogged and not self._unlogged[mode].accepts(step, sums):
            self._take(mode)
        self._unlogged.setdefault(mode, Unlogged()).add(step, sums)

    def _take(self, mode: str) -> None:
        """Hand what is unlogged to TRL's metrics; every rank has to come here."""
        if mode in self._unlogged:
            for key, values in self._unlogged.pop(mode).take(self.accelerator.gather).items():
                self._metrics[mode][key].extend(values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """GRPOTrainer's, with the metrics of the loss calls since the last one."""
        self._take("train" if self.model.training else "eval")
        super().log(logs, start_time)


def _loss_mask(batch: dict[str, Any]) -> Tensor:
    """Completion tokens that the model wrote, int64 [B, T]: not those of its tools."""
    mask: Tensor = batch["completion_mask"]
    return mask if batch.get("tool_mask") is None else mask * batch["tool_mask"]


def _corrected(old: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities by which a response's ratio is that to the sampler, as TRL's vespo bounds and adds it up.

    Only the response's sum counts there, so that it is spread evenly, be the ratio [B, T] or [B, 1].
    """
    total = ratio.log().clamp(math.log(1e-8), 20.0).sum(-1, keepdim=True)
    return old - total / mask.sum(-1, keepdim=True).clamp(min=1)


def _counted(inputs: dict[str, Any], name: str) -> Tensor:
    """A count of the generation batch; ValueError where nobody counted."""
    if not isinstance(inputs.get(name), Tensor):
        raise ValueError(
            f"inputs: expected {name!r}, which HPOTrainer._generate_and_score_completions counts before the generation "
            f"batch is cut, got {sorted(inputs)}"
        )
    value: Tensor = inputs[name]
    return value
