"""Two ranks of verl's engine: counts of an optimiser batch over its micro-batches and ranks.

A script that imports verl once, with its plug-ins off, and forks: the losses are registered by ``policy_loss._target_``
alone. What verl's engines do around the loss (split, model, backward, average) stands here in a few lines; the wrapped
``BaseEngine.train_batch`` and the real ``ppo_loss`` are verl's.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from functools import partial
from typing import Any

os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, distributed
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.engine.base import BaseEngine
from verl.workers.utils import losses

LENGTHS = torch.tensor([5, 2, 9, 4, 7, 3, 6, 1])
GENERATOR = torch.Generator().manual_seed(3)
OLD = -3 * torch.rand(8, 9, generator=GENERATOR)
LOGPROBS = OLD + 0.3 * torch.randn(8, 9, generator=GENERATOR)
ADVANTAGES = torch.tensor([1.0, -1, -1, -1, -1, -1, 2, -1])[:, None].expand(8, 9).contiguous()


def actor(**policy_loss: Any) -> Any:
    """An actor's configuration as a worker makes it."""
    target = "hpo_fused.integrations.verl.HPOPolicyLossConfig"
    return omega_conf_to_dataclass(
        {
            "_target_": "verl.workers.config.FSDPActorConfig",
            "rollout_n": 4,
            "ppo_micro_batch_size_per_gpu": 1,
            "policy_loss": {"_target_": target, **policy_loss},
        }
    )


def jagged(values: Tensor, rows: list[int]) -> Tensor:
    lengths = LENGTHS[rows].tolist()
    return torch.nested.as_nested_tensor(
        [values[row, :length] for row, length in zip(rows, lengths, strict=True)], layout=torch.jagged
    )


def batch(rows: list[int]) -> TensorDict:
    fields = {"old_log_probs": OLD, "advantages": ADVANTAGES, "response_mask": torch.ones(8, 9)}
    return TensorDict(
        {"row": torch.tensor(rows), **{name: jagged(value, rows) for name, value in fields.items()}},
        batch_size=len(rows),
    )


class Engine(BaseEngine):
    """A model whose log-probabilities are its parameters; gradients [8, 9], averaged over the ranks."""

    def __init__(self, micro_batch: int, fail: bool = False) -> None:
        self.micro_batch, self.fail = micro_batch, fail
        self.gradient = torch.zeros(8, 9)

    def get_data_parallel_group(self) -> Any:
        return distributed.group.WORLD

    def optimizer_zero_grad(self) -> None: ...

    def optimizer_step(self) -> float:
        distributed.all_reduce(self.gradient)
        self.gradient /= distributed.get_world_size()
        return 0.0

    def is_mp_src_rank_with_outputs(self) -> bool:
        return False

    def forward_backward_batch(self, data: TensorDict, loss_function: Any, forward_only: bool = False) -> None:
        assert not self.fail
        for rows in data["row"].split(self.micro_batch):
            micro = batch(rows.tolist())
            totals = {"batch_num_tokens": int(LENGTHS.sum()), "global_batch_size": 8}
            tensordict_utils.assign_non_tensor(micro, dp_size=distributed.get_world_size(), **totals)
            logprobs = LOGPROBS[rows, : int(LENGTHS[rows].max())].clone().requires_grad_()
            loss, _ = loss_function(model_output={"log_probs": logprobs}, data=micro)
            loss.backward()
            self.gradient[rows, : logprobs.shape[1]] += logprobs.grad


def expected(alpha: float) -> Tensor:
    """The gradient of the whole batch in one call, with a weight that is known."""
    import hpo_fused as hf

    objective = hf.Objective.preset("hpo", shaping=hf.Clip(0.2, 0.2, dual=3.0), weighting=hf.Hysteretic(alpha))
    logprobs = LOGPROBS.clone().requires_grad_()
    mask = torch.arange(9) < LENGTHS[:, None]
    hf.logprob_policy_loss(logprobs, ADVANTAGES, old_logprobs=OLD, mask=mask, objective=objective).loss.backward()
    return logprobs.grad


def counts(rank: int, ranks: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    assert "ahpo" not in POLICY_LOSS_REGISTRY
    config = actor(loss_mode="ahpo")
    assert "ahpo" in POLICY_LOSS_REGISTRY
    loss = partial(losses.ppo_loss, config=config)
    losses.no_padding_2_padding = lambda value, data: value  # log-probabilities are given padded here
    mine = batch([0, 3, 4, 6] if rank == 0 else [1, 2, 5, 7])  # both positive responses on the first rank
    for micro_batch in (4, 2, 1):
        engine = Engine(micro_batch)
        engine.train_batch(mine, loss)
        # Two of eight have a positive advantage. Rows are computed alike, up to roundings of the weights.
        torch.testing.assert_close(engine.gradient, expected(2 / 6), rtol=1e-6, atol=1e-9)
        assert not torch.allclose(engine.gradient, expected(1.0), rtol=0.1)

    with pytest.raises(AssertionError):
        Engine(4, fail=True).train_batch(mine, loss)
    with pytest.raises(RuntimeError, match=r"outside of it"):  # cleared, after an error too
        Engine(4).forward_backward_batch(mine, loss)
    engine = Engine(4)
    engine.train_batch(mine, partial(losses.ppo_loss, config=actor(loss_mode="hpo")))
    torch.testing.assert_close(engine.gradient, expected(0.6), rtol=1e-6, atol=1e-9)
    distributed.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=counts, args=(rank, 2, free)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
