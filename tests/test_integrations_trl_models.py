"""HPOTrainer with other models than the plain one: heads, precisions, adapters, ties, compilation."""

from __future__ import annotations

import types
from typing import Any

import pytest

pytest.importorskip("trl", minversion="1.15", reason="needs the trl extra")

import torch
import transformers
from torch import Tensor

from hpo_fused.integrations.trl import head as head_module

from .trl_stock import GRADIENT, HEADS, LOSS, SEQUENCE, assert_like_stock, slow
from .trl_tiny import SIZES, differences, generation_batch, gradients, make_trainer, save_tiny, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on the disk."""
    return save_tiny(str(tmp_path_factory.mktemp("tiny")))


def architectures() -> list[Any]:
    """Heads with a softcap, a scale, a bias, tied to the embeddings; mixtures of experts with their balancing loss."""
    softcap = {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "output_router_logits": True}
    made = {
        "Gemma2": softcap,
        "Cohere": {"logit_scale": 0.25},
        "Granite": {"logits_scaling": 3.0},
        "Phi": {},
        "Qwen2Moe": {**experts, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True},
    }
    return [pytest.param(*row, id=row[0]) for row in made.items()]


@pytest.mark.parametrize(("name", "changes"), architectures())
def test_other_heads(tmp_path: Any, name: str, changes: dict[str, Any]) -> None:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "eos_token_id": 1, "bos_token_id": 1, **changes})
    path = save_tiny(str(tmp_path), getattr(transformers, f"{name}ForCausalLM"), config)
    experts = {"router_aux_loss_coef": 0.1} if "num_experts_per_tok" in changes else {}
    for options in ({"beta": 0.1}, {"loss_type": "grpo", "epsilon": 0.05, **SEQUENCE}):
        _, logs = assert_like_stock(path, options | experts, {})
        assert ("aux_loss" in logs) == bool(experts)


def test_a_head_without_its_cap_is_noticed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Gemma2Config(**SIZES, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2.0)
    path = save_tiny(str(tmp_path), transformers.Gemma2ForCausalLM, config)
    monkeypatch.setattr(head_module, "_transform", lambda config, temperature: {"temperature": temperature})
    with pytest.raises(ValueError, match=r"model: expected Gemma2ForCausalLM.forward to give the LM head's logits"):
        make_trainer(path)


def test_a_model_on_one_gpu_is_probed() -> None:
    """accelerate calls the only process's GPU "cuda", its parameters say "cuda:0"."""

    def lies(device: str, *places: str, size: int = 1) -> bool:
        parts = [types.SimpleNamespace(device=torch.device(place), numel=lambda: size) for place in places]
        return head_module.lies_on(types.SimpleNamespace(parameters=lambda: parts), torch.device(device))

    assert lies("cuda", "cuda:0", "cuda:0")
    assert lies("cuda:1", "cuda:1")
    assert lies("cpu", "cpu")
    assert not lies("cuda", "cuda:0", "cuda:1")
    assert not lies("cuda:1", "cuda:0")
    assert not lies("cuda", "cpu")
    assert not lies("cuda", "cuda:0", size=0)  # ZeRO-3's parts


@pytest.mark.parametrize("precise", [False, pytest.param(True, marks=slow)])
def test_bfloat16_is_as_near_as_stock(path: str, precise: bool) -> None:
    """The whole gradient's distance from float32's, under autocast."""
    options = {"beta": 0.1, "cast_lm_head_to_fp32": precise}
    batches = generation_batch(tiny_model(path))

    def whole(**more: Any) -> Tensor:
        return torch.cat([g.flatten() for g in gradients(make_trainer(path, **options, **more), batches)[1].values()])

    exact = whole(stock=True)
    stock, *ours = (float((whole(**more) - exact).norm()) for more in (
        {"stock": True, "bf16": True}, *({"bf16": True, "head": head} for head in HEADS)
    ))  # fmt: skip
    assert all(error < 1.1 * stock for error in ours), (stock, ours)


@pytest.mark.parametrize("kind", ["lora", "lora-tied", "saved-head", "prompt", "prefix"])
def test_adapters(tmp_path: Any, kind: str) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    path = save_tiny(str(tmp_path), tie=kind == "lora-tied")
    task = {"task_type": "CAUSAL_LM"}
    lora = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "init_lora_weights": False,
        **task,
    }
    adapter = {
        "lora": lambda: peft.LoraConfig(**lora),
        "lora-tied": lambda: peft.LoraConfig(**lora),
        "saved-head": lambda: peft.LoraConfig(**lora, modules_to_save=["lm_head"]),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **task),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **task),
    }[kind]

    def made(**more: Any) -> Any:
        torch.manual_seed(0)
        return make_trainer(path, peft_config=adapter(), beta=0.1 if "lora" in kind else 0.0, **more)

    stock = made(stock=True)
    batches = generation_batch(stock.model)
    loss, expected, _ = gradients(stock, batches)
    for head in HEADS:
        total, found, _ = gradients(made(head=head), batches)
        assert total == pytest.approx(loss, rel=LOSS, abs=LOSS)
        assert differences(found, expected) < GRADIENT


def test_tied_and_checkpointed_and_compiled(tmp_path: Any) -> None:
    path = save_tiny(str(tmp_path), tie=True)
    assert_like_stock(path, {"beta": 0.1, "gradient_checkpointing": True}, {})
    expected, batches = None, generation_batch(tiny_model(path))
    for compiled in (False, True):
        ours = make_trainer(path, objective="ahpo")
        model = torch.compile(ours.model, backend="eager") if compiled else ours.model
        _, found, _ = gradients(ours, batches, model)
        found = {name.removeprefix("_orig_mod."): g for name, g in found.items()}
        expected = expected or found
        assert differences(found, expected) < GRADIENT
