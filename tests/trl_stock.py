"""HPOTrainer held against TRL's own GRPOTrainer: limits, and the comparison."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import hpo_fused as hf

from .trl_tiny import differences, generation_batch, gradients, make_trainer

HEADS = ("linear", "two_step", "logprobs")
SEQUENCE = {"importance_sampling_level": "sequence"}
slow = pytest.mark.slow_trainers

# Float32 against float32: logits of size 3 are rounded to 2e-7, the sum of a response's 12 log-ratios in VESPO's gate
# to 1e-6 times k. A wrong rule is off by 1e-3 and more, as the mutants show.
LOSS, GRADIENT, METRIC = 5e-6, 1e-5, 1e-5


def with_sampler(trainer: Any, data: dict[str, Any]) -> Any:
    """What use_vllm=True sets, without vLLM."""
    if data.get("sampler"):
        trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    return trainer


def assert_like_stock(path: str, options: dict[str, Any], data: dict[str, Any], heads: tuple[str, ...] = HEADS) -> Any:
    """The last trainer, once loss, gradients and metrics are stock's with every head."""
    stock = with_sampler(make_trainer(path, stock=True, **options), data)
    batches = generation_batch(stock.model, **data)
    loss, expected, logs = gradients(stock, batches)
    for head in heads:
        ours = with_sampler(make_trainer(path, head=head, **options), data)
        total, found, own = gradients(ours, batches)
        assert total == pytest.approx(loss, rel=LOSS, abs=LOSS), head
        assert differences(found, expected) < GRADIENT, head
        for key, value in logs.items():
            assert own[key] == pytest.approx(value, rel=METRIC, abs=METRIC, nan_ok=True), (head, key)
    return ours, logs


def wrong_statistics(self: Any, inputs: dict[str, Any], mask: Tensor) -> hf.BatchStatistics:
    """The micro-batch taken for the optimiser batch, as without ``statistics``."""
    return hf.BatchStatistics.from_batch(inputs["advantages"], mask)
