"""Losses of TRL, Liger and verl are objectives: their own code, run in float64, against ours in float32.

Each row of a table names options of one package and what says the same here (docs/trainers.md); a package that is not
installed is skipped.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf
from hpo_fused import Clip, Objective, SoftGate, TruncatedRatio

from .samples import leaves

LENGTHS = torch.tensor([6, 3, 4, 1, 5, 0, 6, 4])
CLIP, REINFORCE = Clip(0.2, 0.28), TruncatedRatio(1.0, 1.0)


class Batch:
    """Log-probabilities and what belongs to them, [8, 6]: a response without tokens, a hole, an advantage of 0.

    About a third of the ratios lies outside [0.8, 1.28], on either side.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.logprobs = -2 * torch.rand(8, 6, generator=generator)
        self.old, self.ref = (self.logprobs + 0.3 * normal(8, 6) for _ in range(2))
        self.mask = torch.arange(6) < LENGTHS[:, None]
        self.mask[4, 2] = False
        self.advantages, self.token_advantages = normal(8), normal(8, 6) * self.mask
        self.advantages[2] = 0
        self.advantages[5] = 0  # the losses of TRL's GMPO and RLOO contain that of a response without tokens
        self.entropy = normal(8, 6).exp()
        self.weights = (0.5 * normal(8, 6)).exp()
        self.high = self.entropy > 0.7


BATCH = Batch()


def gradient(loss: Tensor, *inputs: Tensor) -> Tensor:
    """By log-probabilities and, where they were in reach, entropies: [1, 8, 6] or [2, 8, 6]."""
    return torch.stack(torch.autograd.grad(loss, inputs, materialize_grads=True, allow_unused=True))


@dataclasses.dataclass
class Row:
    """Options of a package, the objective that says the same, and the rest of the call."""

    name: str
    options: dict[str, Any]
    objective: Objective
    call: dict[str, Any] = dataclasses.field(default_factory=dict)

    def ours(self, objective: Objective) -> tuple[Tensor, Tensor]:
        logprobs, entropy = leaves(BATCH.logprobs, BATCH.entropy)
        call = {"advantages": BATCH.advantages, "old_logprobs": BATCH.old, "ref_logprobs": BATCH.ref, **self.call}
        loss = hf.logprob_policy_loss(
            logprobs, mask=BATCH.mask, objective=objective, entropy=entropy, backend="torch", **call
        ).loss
        return loss.detach(), gradient(loss, logprobs, entropy)

    def wrong(self) -> Iterator[Objective]:
        """Objectives that differ in one field which matters to the row."""
        right, off_policy = self.objective, self.call.get("old_logprobs", BATCH.old) is not None
        shaping: Any = right.shaping
        changes: list[dict[str, Any]] = [
            {"normalization": "response" if right.normalization != "response" else "mean_length"},
            {"shaping": Clip() if isinstance(shaping, SoftGate) else SoftGate()},
        ]
        if off_policy and shaping != REINFORCE:
            parameters = {name: value for name, value in vars(shaping).items() if isinstance(value, float)}
            smaller = ({name: 0.8 * value} for name, value in parameters.items())
            changes += [{"shaping": dataclasses.replace(shaping, **parameter)} for parameter in smaller]
            if not isinstance(shaping, hf.GeometricMean):
                levels = ("token", "sequence", "sequence_sum")
                changes += [{"ratio_level": level} for level in levels if level != right.ratio_level]
        if right.kl_coef:
            # On-policy the value and the gradient of "k3_ratio" and "k3+" are the same.
            same = {right.kl} if off_policy else {right.kl, "k3+", "k3_ratio"}
            if isinstance(shaping, hf.GeometricMean):  # has no ratio
                same.add("k3_ratio")
            changes += [{"kl": kl} for kl in {"k1", "k2", "k3", "k3+", "k3_ratio"} - same]
        return (dataclasses.replace(right, **change) for change in changes)

    def check(self, loss: Tensor, logprobs: Tensor, entropy: Tensor) -> None:
        """Ours has this loss and its gradient to 1e-6; objectives with one field changed have not."""
        wanted, wanted_gradient = loss.detach(), gradient(loss, logprobs, entropy)

        def close(objective: Objective) -> bool:
            got, got_gradient = self.ours(objective)
            scale = wanted_gradient.abs()  # of a token's gradient and, as all are of order 1, of its loss
            error, gradient_error = (got.double() - wanted).abs(), (got_gradient.double() - wanted_gradient).abs()
            return bool((error < 1e-6 * (wanted.abs() + scale.sum())) & (gradient_error.max() < 1e-6 * scale.max()))

        assert close(self.objective)
        for objective in self.wrong():
            assert not close(objective), objective


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


# TRL: a window of 2 micro-batches of this size on each of 2 processes, a generation batch of 4 with 101 tokens in all.
WINDOW, PROCESSES, GENERATION, TOKENS = 2, 2, 4, 101
TRL_STATISTICS = hf.BatchStatistics(
    len(LENGTHS) * WINDOW * PROCESSES, TOKENS * WINDOW / GENERATION, 0, 0, gradient_average=PROCESSES
)
LOCAL_STATISTICS = hf.BatchStatistics(len(LENGTHS) * WINDOW, BATCH.mask.sum() * WINDOW, 0, 0)
TRL_LOSSES: dict[str, tuple[Any, hf.objective.Normalization]] = {
    "grpo": (CLIP, "response"),
    "bnpo": (CLIP, "mean_length"),
    "dr_grpo": (CLIP, "constant"),
    "dapo": (CLIP, "mean_length"),
    "luspo": (CLIP, "response_sum"),
    "cispo": (TruncatedRatio(high=1.28), "mean_length"),  # epsilon_high is the bound itself
    "sapo": (SoftGate(1.0, 1.05), "response"),
    "vespo": (hf.GammaGate(), "mean_length"),
}
LEVELS: tuple[hf.objective.RatioLevel, ...] = ("token", "sequence")
KLS: dict[str, dict[str, Any]] = {
    "": {"beta": 0.0},
    "k3": {"beta": 0.1, "use_bias_correction_kl": False},
    "k3_ratio": {"beta": 0.1, "use_bias_correction_kl": True},
}


def kl_fields(kl: str) -> dict[str, Any]:
    return {"kl_coef": 0.1, "kl": kl} if kl else {}


def grpo_row(loss: str, level: hf.objective.RatioLevel, kl: str, **call: Any) -> Row:
    """A loss of GRPOTrainer's, which Liger computes too."""
    shaping, normalization = TRL_LOSSES[loss]
    level_of_loss = "sequence_sum" if loss == "vespo" else level
    length = 9 if loss == "dr_grpo" else None
    objective = Objective(level_of_loss, shaping, None, normalization, max_length=length, **kl_fields(kl))
    options = {"loss_type": loss, "importance_sampling_level": level, **KLS[kl]}
    return Row(f"{loss}-{level}-{kl}", options, objective, call)


def trl_rows() -> Iterator[Row]:
    for loss, level, kl in product(TRL_LOSSES, LEVELS, KLS):
        if loss != "vespo" or level == "token":  # to VESPO the level is that of k3_ratio's ratio alone: of no use
            call = {"statistics": LOCAL_STATISTICS} if loss == "bnpo" else {}
            yield grpo_row(loss, level, kl, **call)
    grpo = Objective("token", CLIP, None, "response")
    kept = (BATCH.advantages >= 0) | (((BATCH.old - BATCH.logprobs) * BATCH.mask).sum(-1) <= 0.05 * BATCH.mask.sum(-1))
    per_process = 0.05 / (WINDOW * PROCESSES)
    high = BATCH.high.float()
    yield from (
        Row("delta", {"delta": 1.4}, dataclasses.replace(grpo, shaping=Clip(0.2, 0.28, delta=1.4))),
        Row("on-policy", KLS["k3_ratio"], dataclasses.replace(grpo, **kl_fields("k3_ratio")), {"old_logprobs": None}),
        Row("token-advantages", {}, grpo, {"advantages": BATCH.token_advantages}),
        Row(
            "sampler", {"use_vllm": True, "vllm_importance_sampling_correction": True, **KLS["k3"]},
            dataclasses.replace(grpo, **kl_fields("k3")), {"token_weights": BATCH.weights},
        ),
        Row(  # the sampler's ratio belongs to the response's
            "vespo-sampler", {"loss_type": "vespo", "use_vllm": True, "vllm_importance_sampling_correction": True},
            Objective.preset("vespo"), {"old_logprobs": BATCH.old - BATCH.weights.log()},
        ),
        Row("off-policy-mask", {"off_policy_mask_threshold": 0.05}, grpo, {"token_weights": kept.float()}),
        Row(
            "entropy", {"_entropy_bonus_enabled": True, "entropy_coef": 0.05}, grpo,
            {"entropy_weights": per_process / BATCH.mask.sum()},
        ),
        Row(
            "top-entropy", {"_entropy_bonus_enabled": True, "entropy_coef": 0.05, "top_entropy_quantile": 0.5}, grpo,
            {"token_weights": high, "entropy_weights": per_process * high / (BATCH.mask * BATCH.high).sum()},
        ),
        Row("GMPOTrainer", {"epsilon_low": 0.2}, Objective("sequence", hf.GeometricMean(0.2, 0.28), None, "response")),
        Row(
            "GMPOTrainer-k3", {"epsilon_low": 0.2, "beta": 0.1},
            Objective("sequence", hf.GeometricMean(0.2, 0.28), None, "response", **kl_fields("k3")),
        ),
        Row(  # which leaves the division by the window to the Trainer
            "RLOOTrainer", {}, Objective("sequence_sum", CLIP, None, "response"),
            {"statistics": hf.BatchStatistics(8, 1, 0, 0)},
        ),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in trl_rows()])
def test_trl(row: Row) -> None:
    """A trainer's own ``_compute_loss``, called with log-probabilities in the place of a model."""
    pytest.importorskip("trl", minversion="1.16")
    from trl.experimental.gmpo import GMPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer
    from trl.trainer.rloo_trainer import RLOOTrainer

    row.call.setdefault("statistics", TRL_STATISTICS)
    logprobs, entropy = leaves(BATCH.logprobs.double(), BATCH.entropy.double())
    options = {"loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, **row.options}
    accelerator = SimpleNamespace(
        num_processes=PROCESSES, reduce=lambda value, reduction: value, gather=lambda value: value, sync_gradients=False
    )
    arguments = SimpleNamespace(
        delta=options.get("delta"), sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, steps_per_generation=GENERATION,
        use_bias_correction_kl=options.get("use_bias_correction_kl"),
    )  # fmt: skip
    attributes = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (logprobs, entropy, None),
        "_metrics": {"train": defaultdict(list)}, "_entropy_bonus_enabled": False, "accelerator": accelerator,
        "args": arguments, "aux_loss_enabled": False, "current_gradient_accumulation_steps": WINDOW,
        "epsilon_high": 1.28 if options["loss_type"] == "cispo" else 0.28, "epsilon_low": 0.2,
        "get_gamma_weights": GRPOTrainer.get_gamma_weights, "get_high_entropy_mask": lambda *_: BATCH.high.double(),
        "get_off_policy_mask": GRPOTrainer.get_off_policy_mask, "max_completion_length": 9,
        "model": SimpleNamespace(training=True), "off_policy_mask_threshold": None, "top_entropy_quantile": 1.0,
        "use_adaptive_entropy": False, "use_vllm": False,
    }  # fmt: skip
    mask, old = BATCH.mask.long(), row.call.get("old_logprobs", BATCH.old)
    batch = {
        "prompt_ids": mask[:, :1], "prompt_mask": mask[:, :1], "completion_ids": mask, "completion_mask": mask,
        "advantages": row.call.get("advantages", BATCH.advantages).double(), "ref_per_token_logps": BATCH.ref.double(),
        "old_per_token_logps": None if old is None else BATCH.old.double(), "num_items_in_batch": torch.tensor(TOKENS),
        "old_logps": (BATCH.old.double() * mask).sum(-1),
    }  # fmt: skip
    if "use_vllm" in options:  # with 1 at padding, over which VESPO sums as well
        batch["importance_sampling_ratio"] = torch.where(BATCH.mask, BATCH.weights, 1.0).double()
    trainers = {"GMPOTrainer": GMPOTrainer, "RLOOTrainer": RLOOTrainer}
    trainer = trainers.get(row.name.partition("-")[0], GRPOTrainer)
    loss = trainer._compute_loss(SimpleNamespace(**{**attributes, **options}), None, batch)
    row.check(loss, logprobs, entropy)


def liger_rows() -> Iterator[Row]:
    for loss, level, kl in product(TRL_LOSSES, LEVELS, KLS):
        if loss in ("cispo", "sapo", "vespo") and level == "sequence":
            continue  # refused
        if loss == "luspo" and (level == "token" or kl):
            continue  # counts padding, unlike TRL and the paper
        tokens = BATCH.mask.sum() if loss == "bnpo" else TOKENS
        yield grpo_row(loss, level, kl, statistics=hf.BatchStatistics(len(LENGTHS), tokens, 0, 0))
    grpo = Objective("token", CLIP, None, "mean_length")
    call = {"statistics": hf.BatchStatistics(len(LENGTHS), TOKENS, 0, 0)}
    options = {"loss_type": "dapo"}
    delta = dataclasses.replace(grpo, shaping=Clip(0.2, 0.28, delta=1.4))
    yield Row("delta", {"delta": 1.4, **options}, delta, call)
    yield Row("sampler", {"vllm_is_ratio": BATCH.weights, **options}, grpo, {"token_weights": BATCH.weights, **call})


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in liger_rows()])
def test_liger(row: Row) -> None:
    """The loss of the chunked LM head, which is plain PyTorch behind the head."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

    logprobs, entropy = leaves(BATCH.logprobs.double(), BATCH.entropy.double())
    mask = BATCH.mask.double()
    options = {"beta": 0.0, **{name: double(value) for name, value in row.options.items()}}
    loss, _ = LigerFusedLinearGRPOFunction.ppo_loss_fn(
        logprobs, mask, BATCH.advantages.double(), mask, ref_per_token_logps=BATCH.ref.double(),
        old_per_token_logps=BATCH.old.double(), epsilon_low=0.2,
        epsilon_high=1.28 if options["loss_type"] == "cispo" else 0.28, max_completion_length=9,
        num_items_in_batch=torch.tensor(float(TOKENS)), **options,
    )  # fmt: skip
    row.check(loss, logprobs, entropy)


VERL_TOTALS = {"dp_size": 2, "batch_num_tokens": TOKENS, "global_batch_size": 12, "loss_scale_factor": 40}
VERL_MODES: dict[str, tuple[hf.objective.Normalization, int]] = {  # with the tokens that the normalisation counts
    "token-mean": ("mean_length", TOKENS),
    "token-sum": ("mean_length", 1),
    "seq-mean-token-sum": ("response_sum", TOKENS),
    "seq-mean-token-mean": ("response", TOKENS),
    "seq-mean-token-sum-norm": ("constant", TOKENS),
}
VERL_LOSSES: dict[str, tuple[hf.objective.RatioLevel, Any]] = {
    "vanilla": ("token", Clip(0.2, 0.28, dual=1.5)),
    "gspo": ("sequence_token", CLIP),
    "sapo": ("token", SoftGate(1.0, 1.05)),
    "cispo": ("token", TruncatedRatio(1.28, 0.8)),
    "gpg": ("token", REINFORCE),
    "dro": ("token", hf.DRO(0.3)),
    "dppo_tv": ("token", TruncatedRatio(1.5)),
    "dppo_kl": ("token", TruncatedRatio(1.5)),
}


def trusted(loss: str) -> Tensor:
    """Tokens within DPPO's trust region, which a caller who knows the log-probabilities passes as weights."""
    rises = BATCH.token_advantages > 0
    p, q = BATCH.logprobs.exp(), BATCH.old.exp()
    if loss == "dppo_tv":
        return torch.where(rises, p - q <= 0.28, p - q >= -0.2)
    divergence = q * (BATCH.old - BATCH.logprobs) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
    return torch.where(rises, (divergence <= 0.28) | (p <= q), (divergence <= 0.2) | (p >= q))


def verl_rows() -> Iterator[Row]:
    """Every loss with an advantage and a rollout weight of each token."""
    for (loss, (level, shaping)), (mode, (normalization, tokens)) in product(VERL_LOSSES.items(), VERL_MODES.items()):
        if loss == "sapo" and normalization != "response":
            continue  # the only one that it has
        objective = Objective(level, shaping, None, normalization, max_length=40)
        weights = BATCH.weights * trusted(loss) if loss.startswith("dppo") else BATCH.weights
        call = {
            "advantages": BATCH.token_advantages, "token_weights": weights,
            "statistics": hf.BatchStatistics(12, tokens, 0, 0, gradient_average=2),
        }  # fmt: skip
        yield Row(f"{loss}-{mode}", {"loss_mode": loss, "loss_agg_mode": mode}, objective, call)
        if loss == "vanilla" and mode == "token-mean":
            for kl in ("k1", "k2", "k3", "k3+"):
                options = {"loss_mode": loss, "loss_agg_mode": mode, "kl_penalty": kl}
                yield Row(f"{loss}-{kl}", options, dataclasses.replace(objective, **kl_fields(kl)), call)
    log_weights = (BATCH.weights.log() * BATCH.mask).sum(-1) / BATCH.mask.sum(-1).clamp(min=1)
    yield Row(
        "geo_mean", {"loss_mode": "geo_mean"}, Objective("sequence", hf.GeometricMean(0.2, 0.28), None, "response"),
        {"token_weights": log_weights.exp(), "statistics": hf.BatchStatistics(8, 1, 0, 0)},
    )  # fmt: skip


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in verl_rows()])
def test_verl(row: Row) -> None:
    """The registered policy losses, and the penalty that verl adds to them."""
    pytest.importorskip("verl", minversion="0.9.1")
    from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
    from verl.workers.config import ActorConfig
    from verl.workers.config.actor import PolicyLossConfig

    mode = row.options.get("loss_agg_mode", "token-mean")
    config = ActorConfig(
        strategy="fsdp", rollout_n=4, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2, clip_ratio_high=0.28,
        clip_ratio_c=1.5, policy_loss=PolicyLossConfig(dro_beta=0.3),
    )  # fmt: skip
    config.global_batch_info.update(VERL_TOTALS)
    logprobs, entropy = leaves(BATCH.logprobs.double(), BATCH.entropy.double())
    advantages = row.call.get("advantages", BATCH.advantages[:, None].expand_as(logprobs)).double()
    loss, _ = get_policy_loss_fn(row.options["loss_mode"])(
        BATCH.old.double(), logprobs, advantages, BATCH.mask, mode, config, BATCH.weights.double()
    )
    if "kl_penalty" in row.options:
        kl = kl_penalty(logprobs, BATCH.ref.double(), row.options["kl_penalty"])
        loss = loss + 0.1 * agg_loss(kl, BATCH.mask, mode, **VERL_TOTALS)
    row.check(loss, logprobs, entropy)
