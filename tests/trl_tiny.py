"""Tiny models, a tokenizer and generation batches for TRL's trainers, offline; every loss against stock."""

from __future__ import annotations

import contextlib
import io
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl", minversion="1.15", reason="needs the trl extra")

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

from hpo_fused.integrations.trl import HPOConfig, HPOTrainer

disable_progress_bar()

VOCABULARY = 60
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.15,
}  # fmt: skip
STEPS = 2  # micro-batches of a generation batch, and of a window


def save_tiny(folder: str, kind: Any = Qwen2ForCausalLM, config: Any = None, tie: bool = False) -> str:
    """A config-built model in a folder, from which a reference model can be loaded; its path."""
    torch.manual_seed(0)
    if config is None:
        config = Qwen2Config(**SIZES, tie_word_embeddings=tie)
    kind(config).save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(3, VOCABULARY)} | {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="left", **special)


def prompts(count: int = 16) -> Dataset:
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (int(n),), generator=g) for n in torch.randint(2, 7, (count,), generator=g)]
    return Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row.tolist()) for row in ids]})


def rare_success(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """About a quarter succeeds, so that A-HPO's weight lies below 1."""
    return [float(ids[0] % 4 == 0) for ids in completion_ids]


def tiny_model(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def make_trainer(path: str, *, stock: bool = False, model: Any = None, **options: Any) -> Any:
    """A trainer of the tiny model with the options; ``stock``: TRL's own."""
    trainer, config = (GRPOTrainer, GRPOConfig) if stock else (HPOTrainer, HPOConfig)
    defaults: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(), "use_cpu": True, "bf16": False, "report_to": "none",
        "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": STEPS,
        "max_completion_length": 12, "max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
        "seed": 3, "optim": "sgd", "max_grad_norm": 0.0, "disable_tqdm": True, "temperature": 0.9,
        "lr_scheduler_type": "constant", "num_iterations": 2, "gradient_checkpointing": False,
    }  # fmt: skip
    rest = {name: options.pop(name) for name in ("peft_config", "callbacks") if name in options}
    if model is None:
        model = tiny_model(path)
    # A random model hardly ever ends: all completions would have the same length, and all normalisers would be alike.
    model.generation_config.eos_token_id = [1, *range(10, VOCABULARY, 10)]
    made = trainer(
        model=model, reward_funcs=options.pop("reward", rare_success), args=config(**{**defaults, **options}),
        train_dataset=prompts(), processing_class=tokenizer(), **rest,
    )  # fmt: skip
    made.current_gradient_accumulation_steps = STEPS
    return made


def generation_batch(
    model: Any, *, seed: int = 0, spread: float = 0.35, on_policy: bool = False, tools: bool = False,
    sampler: str | None = None, per_token: bool = False, temperature: float = 0.9,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Micro-batches as GRPOTrainer makes them: 2 of 8 responses, 2 to 12 tokens, one masked for being truncated, one
    with advantage 0, ratios on both sides of both bounds."""
    g, batches = torch.Generator().manual_seed(seed), []
    size, width, length = 8, 6, 12
    for _ in range(STEPS):
        prompt_mask = (torch.arange(width) >= torch.randint(0, width - 1, (size, 1), generator=g)).long()
        written = (torch.arange(length) < torch.randint(2, length + 1, (size, 1), generator=g)).long()
        completion_mask = written.clone()
        completion_mask[2] = 0
        prompt_ids = torch.randint(3, VOCABULARY, (size, width), generator=g) * prompt_mask
        completion_ids = torch.randint(3, VOCABULARY, (size, length), generator=g) * written
        advantages = torch.randn(size, generator=g)
        advantages[5] = 0
        if per_token:
            advantages = advantages[:, None] + 0.5 * torch.randn(size, length, generator=g)
        with torch.no_grad():
            ids, attention = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, completion_mask], 1)
            logits = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1].float() / temperature
            logps = logits.log_softmax(-1).gather(-1, completion_ids.unsqueeze(-1)).squeeze(-1)

        def noise(scale: float) -> Tensor:
            return scale * torch.randn(size, length, generator=g)

        batch = {
            "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": completion_ids,
            "completion_mask": completion_mask, "advantages": advantages, "ref_per_token_logps": logps + noise(0.3),
        }  # fmt: skip
        if not on_policy:
            batch["old_per_token_logps"] = logps + noise(spread)
        if tools:
            batch["tool_mask"] = (torch.rand(size, length, generator=g) < 0.8).long()
        if sampler is not None:
            batch["sampling_per_token_logps"] = batch["old_per_token_logps"] + noise(0.2)
            diff = batch["old_per_token_logps"] - batch["sampling_per_token_logps"]
            diff = diff * completion_mask * batch.get("tool_mask", 1)
            ratio = (diff.sum(-1, keepdim=True) if sampler.startswith("sequence") else diff).exp()
            cut = ratio.clamp(max=1.3) if sampler.endswith("truncate") else ratio.masked_fill(ratio > 1.3, 0.0)
            batch["importance_sampling_ratio"] = cut
        batches.append(batch)
    masks = [batch["completion_mask"] * batch.get("tool_mask", 1) for batch in batches]
    signs = [
        torch.where(mask.any(-1), b["advantages"].reshape(size, -1)[:, 0].sign(), 0)
        for b, mask in zip(batches, masks, strict=True)
    ]
    for batch in batches:
        batch["num_items_in_batch"] = torch.stack(masks).sum()
        batch["hpo_positive"], batch["hpo_negative"] = (torch.stack(signs) > 0).sum(), (torch.stack(signs) < 0).sum()
    return batches


def gradients(
    trainer: Any, batches: list[dict[str, Tensor]], model: Any = None
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    """Loss and gradients of one window, and the metrics it logs."""
    model = trainer.model if model is None else model
    model.train()
    model.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        total += loss.item()
    logs: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.log(logs)
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, logs


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference of a parameter's gradient."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - g).norm() / g.norm().clamp(min=1e-12)) for n, g in expected.items())


def trained(path: str, **options: Any) -> Any:
    """A trainer after train()."""
    made = make_trainer(path, **options)
    with contextlib.redirect_stdout(io.StringIO()):
        made.train()
    return made
