"""Two ranks of verl's FSDP2 engine on CPUs: a tiny model, micro-batches, ``ppo_loss``, and what it passes to a loss.

A script that imports verl once and forks. VERL_USE_EXTERNAL_PLUGINS=none has to be set: the losses are registered by
``policy_loss._target_`` alone. verl has no CPU platform; one of a few lines stands here, all else is verl's own.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from functools import partial
from typing import Any

import pytest
import torch
import verl.plugin.platform.platform_manager as platforms
from tensordict import TensorDict
from tokenizers import Tokenizer, models
from torch import Tensor, distributed
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.trainer.config import CheckpointConfig
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import FSDPEngineWithLMHead
from verl.workers.utils import losses

ROWS, TEMPERATURE = 8, 0.9
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = torch.tensor([2, 3, 4, 2, 3, 4, 2, 3])
LENGTHS = torch.tensor([5, 2, 7, 4, 6, 3, 6, 1])
IDS = [torch.randint(3, 64, (int(n),), generator=GENERATOR) for n in PROMPTS + LENGTHS]
OLD = -4.1 + 0.2 * torch.randn(ROWS, 7, generator=GENERATOR)
ADVANTAGES = torch.tensor([1.0, -1, -1, -1, -1, -1, 2, -1])
ALPHA = 2 / 6  # two of eight have a positive advantage, both on the first rank
SHARES = ([0, 3, 4, 6], [1, 2, 5, 7])


class Cpu(PlatformCUDA):
    """What verl asks a GPU, answered by a CPU."""

    device_name = vendor_name = "cpu"
    device_module = torch.cpu
    communication_backend_name = "gloo"

    def current_device(self) -> Any:
        return "cpu"

    def nothing(self, *_: Any) -> None: ...

    set_device = synchronize = empty_cache = nothing


def on_cpus() -> None:
    sys.modules["trl"] = None  # type: ignore[assignment]  # verl patches a class that newer ones have not
    platforms._current_platform = Cpu()
    torch.cpu.mem_get_info = lambda *_: (1, 1)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(torch.cpu, name, lambda *_: 0)
    for name in ("empty_cache", "ipc_collect"):
        setattr(torch.cpu, name, lambda: None)


def save_model(path: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_key_value_heads=1, **sizes)).save_pretrained(path)
    words = models.WordLevel({str(i): i for i in range(64)}, unk_token="0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="1", pad_token="2")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(path)


def engine_of(path: str, fused: bool) -> Any:
    model = HFModelConfig(
        path=path,
        use_remove_padding=fused,  # verl's backend triton wants it
        use_fused_kernels=fused,
        fused_kernel_options={"impl_backend": "triton"},
        enable_gradient_checkpointing=False,
        override_config={"attn_implementation": "eager"},
    )
    fp32 = dict.fromkeys(("param_dtype", "reduce_dtype", "buffer_dtype"), "fp32")
    sharding = FSDPEngineConfig(strategy="fsdp2", use_torch_compile=False, model_dtype="fp32", mixed_precision=fp32)
    optimizer = FSDPOptimizerConfig(lr=0.0, total_training_steps=10, clip_grad=1e9)
    engine = FSDPEngineWithLMHead(
        model_config=model, engine_config=sharding, optimizer_config=optimizer, checkpoint_config=CheckpointConfig()
    )
    engine.initialize()
    return engine


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


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def mini_batch(rows: list[int], micro_batch: int, fused: bool) -> TensorDict:
    """A rank's share of the optimiser batch, as verl's trainer hands it over."""
    ids, prompts, lengths = [IDS[row] for row in rows], PROMPTS[rows].tolist(), LENGTHS[rows].tolist()
    parts = list(zip(ids, prompts, strict=True))
    fields = {
        "input_ids": ids,
        "position_ids": [torch.arange(len(row)) for row in ids],
        "attention_mask": [torch.ones_like(row) for row in ids],
        "prompts": [row[:prompt] for row, prompt in parts],
        "responses": [row[prompt:] for row, prompt in parts],
        "loss_mask": [(torch.arange(len(row)) >= prompt).float() for row, prompt in parts],
        "response_mask": [torch.ones(length) for length in lengths],
        "old_log_probs": [OLD[row, :length] for row, length in zip(rows, lengths, strict=True)],
        "advantages": [ADVANTAGES[row].expand(length) for row, length in zip(rows, lengths, strict=True)],
    }
    data = TensorDict({name: jagged(value) for name, value in fields.items()}, batch_size=len(rows))
    tensordict_utils.assign_non_tensor(
        data, use_remove_padding=fused, use_dynamic_bsz=False, micro_batch_size_per_gpu=micro_batch,
        use_fused_kernels=fused, temperature=TEMPERATURE, global_batch_size=ROWS, calculate_entropy=False,
    )  # fmt: skip
    return data


def gradient_norm(path: str, alpha: float) -> float:
    """Of the whole batch in one call of the plain model, with a weight that is known."""
    import hpo_fused as hf

    model = Qwen2ForCausalLM.from_pretrained(path, attn_implementation="eager")
    shaping = hf.Clip(0.2, 0.2, dual=3.0)
    objective = hf.Objective.preset("hpo", shaping=shaping, weighting=hf.Hysteretic(alpha))
    tokens = int(LENGTHS.sum())
    statistics = hf.BatchStatistics(ROWS, tokens, 0, 0)
    for row in range(ROWS):
        prompt, length = int(PROMPTS[row]), int(LENGTHS[row])
        logits = model(IDS[row][None]).logits[:, prompt - 1 : -1]
        hf.policy_loss(
            logits, IDS[row][None, prompt:], ADVANTAGES[row, None], old_logprobs=OLD[row, None, :length],
            objective=objective, statistics=statistics, temperature=TEMPERATURE,
        ).loss.backward()  # fmt: skip
    return float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())


def run(rank: int, port: int, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    assert "ahpo" not in POLICY_LOSS_REGISTRY
    # Sums of some dozens of float32 products in another order; without alpha, or with a rank's own, 10 % and more.
    expected = {alpha: pytest.approx(gradient_norm(path, alpha), rel=1e-5) for alpha in (ALPHA, 0.6, 1.0)}
    for fused in (False, True):
        engine = engine_of(path, fused)

        def trained(loss_mode: str, micro_batch: int, engine: Any = engine, fused: bool = fused) -> Any:
            config = actor(loss_mode=loss_mode, fused_head=fused)
            loss = partial(losses.ppo_loss, config=config)
            with engine.train_mode():
                return engine.train_batch(mini_batch(SHARES[rank], micro_batch, fused), loss)["metrics"]["grad_norm"]

        for micro_batch in (4, 2, 1):
            assert trained("ahpo", micro_batch) == expected[ALPHA]
            assert trained("ahpo", micro_batch) != expected[1.0]
        assert trained("hpo", 2) == expected[0.6]
        assert trained("grpo", 2) == trained("vanilla", 2) == expected[1.0]

    loss = partial(losses.ppo_loss, config=actor(loss_mode="ahpo"))
    with pytest.raises(RuntimeError, match="outside of it"), engine.train_mode():  # the counts do not outlive a batch
        engine.forward_backward_batch(mini_batch(SHARES[rank], 4, True), loss)
    distributed.destroy_process_group()


if __name__ == "__main__":
    on_cpus()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=run, args=(rank, free, folder)) for rank in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
    assert [process.exitcode for process in processes] == [0, 0]
