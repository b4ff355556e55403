"""HPOTrainer on two processes against one process with everything: DDP, and FSDP2.

The processes are forked, unlike those of ranks.py: TRL's and transformers' imports alone take twenty seconds of two.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
import types
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, distributed

from hpo_fused.integrations.trl import trainer as trainer_module

from . import trl_tiny as tiny


def run_trl_ranks(part: str, path: str) -> None:
    """Run a part on two processes, and fail with the first that does."""
    if torch.cuda.is_initialized():
        pytest.skip("forks, which CUDA does not survive")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, port, part, path, errors)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
    assert errors.empty(), errors.get()
    assert [process.exitcode for process in ranks] == [0, 0]


def _rank(rank: int, port: str, part: str, path: str, errors: Any) -> None:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place, MASTER_PORT=port)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        {"ddp": ddp, "every_head": every_head, "fsdp2": fsdp2}[part](path)
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        errors.put(traceback.format_exc())
        os._exit(1)


CASES: dict[str, dict[str, Any]] = {
    "dapo": {"loss_type": "dapo"},
    "gspo-kl": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "beta": 0.1},
    "ahpo": {"objective": "ahpo"},
    "mhpo_ahpo": {"objective": "mhpo_ahpo"},
}


def share(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's half."""
    half, rank = len(batch["completion_ids"]) // 2, distributed.get_rank()
    return {k: v if v.dim() == 0 else v[rank * half : (rank + 1) * half] for k, v in batch.items()}


def backward(trainer: Any, model: Any, batches: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gradients of one window with their names inside the wrappers, gathered; and what is logged."""
    model.train()
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        if hasattr(model, "require_backward_grad_sync"):
            model.require_backward_grad_sync = last  # as accelerate does
        trainer.compute_loss(model, dict(batch)).backward()
    trainer._take("train")
    logs = {key: sum(values) / len(values) for key, values in trainer._metrics["train"].items()}
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}
    return {name: g.detach().clone() for name, g in whole.items()}, logs


def alone(trainer: Any) -> Any:
    """The trainer as it were on one process."""
    real = trainer.accelerator
    trainer.accelerator = types.SimpleNamespace(
        num_processes=1, process_index=0, gather=lambda value: value, reduce=lambda value, reduction: value,
        pad_across_processes=lambda value, **_: value, autocast=real.autocast, device=real.device,
        sync_gradients=True, is_main_process=False,
    )  # fmt: skip
    return trainer


def ddp(path: str, heads: tuple[str, ...] = ("linear",)) -> None:
    for name, options in CASES.items():
        for head in heads:
            ours, single = (tiny.make_trainer(path, head=head, ddp_backend="gloo", **options) for _ in range(2))
            whole = tiny.generation_batch(single.model, seed=4)
            expected, logs = backward(alone(single), single.model, whole)
            wrapped = torch.nn.parallel.DistributedDataParallel(ours.model, find_unused_parameters=head == "linear")
            found, own = backward(ours, wrapped, [share(batch) for batch in whole])
            assert tiny.differences(found, expected) < 1e-5, (name, head)
            for key in logs.keys() - {"policy_loss", "hpo/hysteretic_weight", "entropy_coef"}:
                assert abs(own[key] - logs[key]) < 1e-4, (name, key, own[key], logs[key])
    # One rank has nothing to learn from, the other nothing unmasked: nobody waits for a collective.
    ours = tiny.make_trainer(path, ddp_backend="gloo", objective="ahpo")
    batches = [share(batch) for batch in whole]
    name = "advantages" if distributed.get_rank() == 0 else "completion_mask"
    batches[1][name] = torch.zeros_like(batches[1][name])
    backward(ours, torch.nn.parallel.DistributedDataParallel(ours.model), batches)
    counts = ours._generate_and_score_completions(
        [{"prompt": row} for row in tiny.prompts(2)["prompt"] for _ in range(4)]
    )
    local = [((counts["advantages"] * sign > 0) & counts["completion_mask"].any(-1)).sum() for sign in (1, -1)]
    for count in local:
        distributed.all_reduce(count)
    assert [counts["hpo_positive"], counts["hpo_negative"]] == local
    assert sum(local) > 0


def every_head(path: str) -> None:
    ddp(path, ("linear", "two_step", "logprobs"))


def fsdp2(path: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    for name in ("dapo", "gspo-kl", "ahpo"):
        for head in ("linear", "two_step"):
            for own_unit in (False, True):
                options = {"head": head, "ddp_backend": "gloo", **CASES[name]}
                ours, single = (tiny.make_trainer(path, **options) for _ in range(2))
                whole = tiny.generation_batch(single.model, seed=4)
                expected, _ = backward(alone(single), single.model, whole)
                for layer in ours.model.model.layers:
                    fully_shard(layer)
                if own_unit:
                    fully_shard(ours.model.lm_head)
                fully_shard(ours.model)
                found, _ = backward(ours, ours.model, [share(batch) for batch in whole])
                assert tiny.differences(found, expected) < 1e-5, (name, head, own_unit)

    # Mixed precision rounds what it finds in a forward's arguments: old log-probabilities are not to be found there.
    ours = tiny.make_trainer(path, ddp_backend="gloo", objective="ahpo")
    whole = tiny.generation_batch(ours.model, seed=4)
    fully_shard(ours.model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True))
    seen, real = [], trainer_module.linear_policy_loss

    def watched(*args: Any, **options: Any) -> Any:
        seen.append(options["old_logprobs"])
        return real(*args, **options)

    trainer_module.linear_policy_loss = watched
    backward(ours, ours.model, [share(whole[0])])
    assert torch.equal(seen[0], share(whole[0])["old_per_token_logps"])
