"""HPOTrainer's settings: what is refused by name, where objectives come from, the document's example."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl", minversion="1.15", reason="needs the trl extra")

import trl
from transformers import AutoProcessor, AutoTokenizer

import hpo_fused as hf
from hpo_fused.integrations.trl import HPOConfig, HPOTrainer, versions
from hpo_fused.integrations.trl import trainer as trainer_module

from .trl_stock import SEQUENCE
from .trl_tiny import generation_batch, make_trainer, prompts, rare_success, save_tiny, tiny_model, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on the disk."""
    return save_tiny(str(tmp_path_factory.mktemp("tiny")))


def test_forward_keeps_the_classes_signature(path: str) -> None:
    ours = make_trainer(path)
    expected = list(inspect.signature(type(ours.model).forward).parameters)[1:]
    assert list(inspect.signature(ours.model.forward).parameters) == expected
    assert "logits_to_keep" in expected  # without it generate() would make the whole prompt's logits


GIVEN = "expected its default"
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "preset": ({"objective": "ppo"}, "objective: expected one of grpo, .*got 'ppo'"),
    "key": ({"objective": {"preset": "ahpo", "eps": 0.1}}, "objective: expected keys among .*got 'eps'"),
    "value": ({"objective": {"shaping": {"kind": "clip", "low": 2.0}}}, "shaping.low: expected a number in"),
    "head": ({"head": "fused"}, "head: expected one of linear, two_step, logprobs, got 'fused'"),
    "loss_type": ({"objective": "ahpo", "loss_type": "grpo"}, f"loss_type: {GIVEN} .'dapo'. beside objective='ahpo'"),
    "epsilon": ({"objective": "ahpo", "epsilon": 0.1}, f"epsilon: {GIVEN}"),
    "epsilon_high": ({"objective": "ahpo", "epsilon_high": 0.1}, f"epsilon_high: {GIVEN}"),
    "delta": ({"objective": "ahpo", "delta": 2.0}, f"delta: {GIVEN}"),
    "sapo": ({"objective": "sapo", "sapo_temperature_neg": 2.0}, f"sapo_temperature_neg: {GIVEN}"),
    "vespo": ({"objective": "vespo", "vespo_k_pos": 1.0}, f"vespo_k_pos: {GIVEN}"),
    "level": ({"objective": "gspo", **SEQUENCE}, f"importance_sampling_level: {GIVEN}"),
    "beta": ({"objective": {"preset": "ahpo", "kl_coef": 0.1}, "beta": 0.2}, f"beta: {GIVEN} .*objective.kl_coef"),
    "kl": (
        {"objective": {"kl": "k2"}, "beta": 0.1, "use_bias_correction_kl": False},
        f"use_bias_correction_kl: {GIVEN} .*objective.kl",
    ),
    "entropy": (
        {"objective": {"entropy_coef": 0.1}, "entropy_coef": 0.1},
        f"entropy_coef: {GIVEN} .*objective.entropy_coef",
    ),
    "adaptive": ({"objective": {"entropy_coef": 0.1}, "use_adaptive_entropy": True}, f"use_adaptive_entropy: {GIVEN}"),
    "gmpo": ({"objective": "gmpo", "beta": 0.1}, "kl: expected another kind than 'k3_ratio' for GeometricMean"),
    "steps": (
        {"generation_batch_size": 24, "steps_per_generation": 2},
        "generation_batch_size: expected 16 for steps_per_generation=2 on 1 processes, .*got 24",
    ),
    "unknown loss": ({"loss_type": "ppo"}, "loss_type: expected one of .*got 'ppo'"),
    "skip head": ({"skip_inactive": True, "head": "two_step"}, "skip_inactive: expected False beside head='two_step'"),
    "skip": ({"skip_inactive": True, "use_adaptive_entropy": True}, "skip_inactive: expected False beside use_adapt"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_settings_are_refused_by_name(name: str) -> None:
    options, message = REFUSALS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        HPOConfig("out", use_cpu=True, bf16=False, **options)


def test_models_and_versions_are_refused_by_name(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    headless, doubled = tiny_model(path), tiny_model(path)
    monkeypatch.setattr(headless, "get_output_embeddings", lambda: None)
    with pytest.raises(TypeError, match=r"model: expected an LM head .*Qwen2ForCausalLM.*got none"):
        make_trainer(path, model=headless)

    def louder(*args: Any, **kwargs: Any) -> Any:
        output = type(doubled).forward(doubled, *args, **kwargs)
        output.logits = 1.1 * output.logits
        return output

    doubled.forward = louder
    with pytest.raises(ValueError, match=r"model: expected Qwen2ForCausalLM.forward to give the LM head's logits"):
        make_trainer(path, model=doubled)
    make_trainer(path, model=doubled, head="logprobs")
    with pytest.raises(TypeError, match="args: expected an HPOConfig, got a GRPOConfig"):
        HPOTrainer(model=tiny_model(path), args=trl.GRPOConfig("out", use_cpu=True, bf16=False))
    for found, expected in (
        ("1.14.2", ImportError),
        ("2.0.0", ImportError),
        ("1.15.0", None),
        ("1.99.0", "newer than"),
    ):
        monkeypatch.setattr(versions, "version", lambda name, found=found: found)
        if expected is ImportError:
            with pytest.raises(ImportError, match=rf"expected trl >= 1.15, < 2.0, found trl {found}"):
                versions.check_trl()
        else:
            assert expected is None or expected in str(versions.check_trl())


def test_a_batch_that_nobody_counted_is_refused(path: str) -> None:
    ours = make_trainer(path, objective="ahpo")
    batch = generation_batch(ours.model)[0]
    del batch["hpo_negative"]
    with pytest.raises(ValueError, match="inputs: expected 'hpo_negative'"):
        ours.compute_loss(ours.model, batch)


@pytest.mark.parametrize(
    "value", ["ahpo", {"preset": "mhpo", "kl_coef": 0.01, "shaping": {"kind": "log_fidelity", "c": 2.0}}]
)
def test_objectives_come_from_command_lines_and_files(tmp_path: Any, value: Any) -> None:
    import yaml
    from transformers import HfArgumentParser

    text = value if isinstance(value, str) else json.dumps(value)
    common = ["--output_dir", "out", "--use_cpu", "true", "--bf16", "false"]
    parsed = HfArgumentParser(HPOConfig).parse_args_into_dataclasses(
        [*common, "--objective", text, "--head", "two_step"]
    )
    (tmp_path / "run.yaml").write_text(
        yaml.safe_dump({"objective": value, "head": "two_step", "output_dir": "out", "use_cpu": True, "bf16": False})
    )
    read = trl.TrlParser(HPOConfig).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
    given = HPOConfig("out", use_cpu=True, bf16=False, objective=hf.Objective.from_mapping(value), head="two_step")
    for config in (*parsed, *read, given):
        assert hf.Objective.from_mapping(config.objective) == hf.Objective.from_mapping(value)
        assert config.head == "two_step"
        assert json.loads(config.to_json_string())["objective"] == config.objective


def test_objectives_take_what_trl_says_elsewhere(path: str) -> None:
    def objective(**options: Any) -> hf.Objective:
        return trainer_module.objective_of(HPOConfig("out", use_cpu=True, bf16=False, **options))

    clip = {"kind": "clip", "low": 0.2, "high": 0.28}
    for loss_type, same in {
        "grpo": {"preset": "grpo", "shaping": clip},
        "dapo": {"preset": "dapo", "shaping": clip},
        "dr_grpo": {"preset": "dr_grpo", "shaping": clip},
        "cispo": {"preset": "cispo", "shaping": {"kind": "truncated_ratio", "high": 0.28}},
        "sapo": "sapo",
        "vespo": "vespo",
    }.items():
        assert objective(objective=same) == objective(loss_type=loss_type, epsilon_high=0.28)
    assert objective(objective={"preset": "gspo", "shaping": clip}) == objective(
        loss_type="grpo", epsilon_high=0.28, **SEQUENCE
    )
    assert objective(objective="dr_grpo", max_completion_length=77).max_length == 77
    assert objective(objective={"preset": "dr_grpo", "max_length": 9}).max_length == 9
    assert (objective(objective="ahpo", beta=0.1).kl, objective(objective="ahpo", beta=0.1).kl_coef) == (
        "k3_ratio",
        0.1,
    )
    assert objective(objective="ahpo", beta=0.1, use_bias_correction_kl=False).kl == "k3"
    for beta in ({"beta": 0.1}, {"beta": 0.1, "use_bias_correction_kl": False}):
        assert objective(objective=hf.Objective.preset("ahpo"), **beta) == objective(objective="ahpo", **beta)
    assert objective(objective=hf.Objective.preset("ahpo", kl="k2"), beta=0.1).kl == "k2"
    assert objective(objective={"preset": "ahpo", "kl": "k2"}, beta=0.1).kl == "k2"


def test_configs_survive_their_round_trips(path: str, tmp_path: Any) -> None:
    """What a trainer saves with a checkpoint, too, whose args have the objective's KL coefficient as ``beta``."""
    import yaml

    common: dict[str, Any] = {"output_dir": "out", "use_cpu": True, "bf16": False}
    ours = make_trainer(path, objective={"preset": "ahpo", "kl_coef": 0.1})
    assert ours.ref_model is not None
    assert (ours.beta, ours.args.beta) == (0.1, 0.1)
    torch.save(ours.args, tmp_path / "training_args.bin")
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert make_trainer(path, **saved.to_dict()).objective == ours.objective
    for config in (
        ours.args,
        saved,
        HPOConfig(**common),
        HPOConfig(**common, objective=hf.Objective.preset("gspo", entropy_coef=0.1), beta=0.1),
        HPOConfig(**common, loss_type="grpo", epsilon_high=0.28, beta=0.1, steps_per_generation=4),
    ):
        plain = config.to_dict()
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(json.loads(config.to_json_string())))
        (read,) = trl.TrlParser(HPOConfig).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])
        again = (HPOConfig(**plain), HPOConfig(**json.loads(config.to_json_string())), read)
        for found in again:
            assert found.to_dict() == plain
            assert trainer_module.objective_of(found) == trainer_module.objective_of(config)


def test_two_lines_of_a_script_change(path: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """docs/trl.md's example, on a model that trains in a second."""
    text = (Path(__file__).parent.parent / "docs" / "trl.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert "max_steps" not in block
    quick = ", max_steps=2, max_completion_length=8, use_cpu=True, report_to='none', logging_steps=1, num_generations=4"
    ours = block.replace('output_dir="out"', f'output_dir="{tmp_path}"{quick}')
    model = tiny_model(path)
    scope = {"model": model, "reward": rare_success, "dataset": prompts()}
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer())
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: tokenizer())
    with contextlib.redirect_stdout(io.StringIO()):
        exec(ours, scope)
    history = scope["trainer"].state.log_history
    assert {"clip_ratio/low_mean", "entropy", "hpo/hysteretic_weight"} <= history[0].keys()
