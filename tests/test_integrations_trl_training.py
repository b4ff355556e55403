"""HPOTrainer through whole steps: windows, metrics and logging, processes, trainings like stock's."""

from __future__ import annotations

import math
from typing import Any

import pytest

pytest.importorskip("trl", minversion="1.15", reason="needs the trl extra")

import torch

import hpo_fused as hf
from hpo_fused.integrations.trl import HPOTrainer
from hpo_fused.integrations.trl import trainer as trainer_module

from .trl_ranks import run_trl_ranks
from .trl_stock import HEADS, SEQUENCE, slow, wrong_statistics
from .trl_tiny import differences, generation_batch, gradients, make_trainer, prompts, save_tiny, tiny_model, trained

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model on the disk."""
    return save_tiny(str(tmp_path_factory.mktemp("tiny")))


OWN = {
    "ahpo": "ahpo",
    "groups": {"preset": "hpo", "normalization": "group_mean_length"},
    "mhpo_ahpo": "mhpo_ahpo",
    "gspo": "gspo",
}


@pytest.mark.parametrize(
    "name", [*list(OWN)[:2], *(pytest.param(n, marks=slow) for n in [*list(OWN)[2:], *hf.Objective.presets()])]
)
def test_batches_split_anyhow_train_alike(path: str, name: str) -> None:
    """16 x 1, 8 x 2 and 4 x 4 through generation, shuffling and cutting: the same parameters after a step."""
    ends = []
    for size, steps in ((16, 1), (8, 2), (4, 4)):
        ours = trained(
            path, objective=OWN.get(name, name), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
            max_steps=1, learning_rate=1.0, num_iterations=1,
        )  # fmt: skip
        ends.append({n: p.detach() for n, p in ours.model.named_parameters()})
        if isinstance(ours.objective.weighting, hf.AdaptiveHysteretic):
            assert ours.state.log_history[0]["hpo/hysteretic_weight"] < 0.8
    begin = dict(tiny_model(path).named_parameters())
    moved = [{n: p - begin[n] for n, p in end.items()} for end in ends]
    assert all(float(p.norm()) > 0 for p in moved[0].values())
    for other in moved[1:]:
        # A parameter of size 1 is rounded to 6e-8, a step moves it by 1e-2.
        assert differences(other, moved[0]) < 1e-4


def test_counts_of_micro_batches_train_differently(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HPOTrainer, "_statistics", wrong_statistics)
    with pytest.raises(AssertionError):
        test_batches_split_anyhow_train_alike(path, "ahpo")


TRAININGS = {
    "dapo": {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 1,
        "mask_truncated_completions": True,
    },
    "kl": {"loss_type": "grpo", "beta": 0.1},
    "gspo": {"loss_type": "grpo", "epsilon": 0.003, **SEQUENCE},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0, "mask_truncated_completions": True},
    "long-window": {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "num_iterations": 1},
    "short-last-window": {
        "gradient_accumulation_steps": 3,
        "steps_per_generation": 2,
        "num_train_epochs": 1,
        "max_steps": -1,
    },
}


@pytest.mark.parametrize("name", TRAININGS)
@pytest.mark.parametrize("head", ["linear", *(pytest.param(head, marks=slow) for head in HEADS[1:])])
def test_trains_and_evaluates_as_stock(path: str, name: str, head: str) -> None:
    options = {"max_steps": 6, **TRAININGS[name]}
    stock, ours = trained(path, stock=True, **options), trained(path, head=head, **options)
    assert differences(dict(ours.model.named_parameters()), dict(stock.model.named_parameters())) < 2e-5
    skipped = ("time", "runtime", "per_second", "total_flos", "epoch", "step")
    for found, expected in zip(ours.state.log_history, stock.state.log_history, strict=True):
        for key, value in expected.items():
            if isinstance(value, float) and not any(part in key for part in skipped):
                assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    evaluated = []
    for each in (stock, ours):
        torch.manual_seed(0)
        evaluated.append(each.evaluate(prompts(4))["eval_loss"])
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-4, abs=1e-6)


def test_metrics_cost_one_collective_per_logging(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make_trainer(path, objective="mhpo_ahpo")
    batches = generation_batch(ours.model)
    calls: list[str] = []
    for name in ("gather", "reduce", "gather_for_metrics"):
        method = getattr(ours.accelerator, name)

        def counted(*args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
            calls.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(ours.accelerator, name, counted)
    _, _, logs = gradients(ours, batches)
    assert calls == ["gather"]
    # Those of both micro-batches together, against both calls' own.
    positive = sum(((b["advantages"] > 0) & b["completion_mask"].any(-1)).sum() for b in batches)
    signed = sum(((b["advantages"] != 0) & b["completion_mask"].any(-1)).sum() for b in batches)
    assert logs["hpo/positive_fraction"] == pytest.approx(float(positive / signed))
    assert logs["hpo/hysteretic_weight"] == pytest.approx(
        float((batches[0]["hpo_positive"] / batches[0]["hpo_negative"]).clamp(0.1, 1))
    )


def test_metrics_of_other_names_are_taken_first(path: str) -> None:
    """On-policy calls have no approx_kl: the two kinds are not added up."""
    ours = make_trainer(path, objective="ahpo")
    first, second = generation_batch(ours.model)[0], generation_batch(ours.model, on_policy=True, seed=1)[1]
    _, _, logs = gradients(ours, [first, second, second])
    ratios = {}
    for name, batch in (("off", first), ("on", second)):
        ratios[name] = gradients(ours, [batch])[2]
    assert logs["hpo/approx_kl"] == pytest.approx(ratios["off"]["hpo/approx_kl"])
    entropies = [ratios[name]["hpo/entropy"] for name in ("off", "on")]
    assert logs["hpo/entropy"] == pytest.approx(sum(entropies) / 2)
    assert logs["entropy"] == pytest.approx((ratios["off"]["entropy"] + 2 * ratios["on"]["entropy"]) / 3)


def test_long_waits_for_a_logging_are_cut(path: str) -> None:
    """Sums in float32 count no further than 2^24, and nothing grows without end where nobody logs."""
    ours = make_trainer(path)
    ours.model.train()
    batch = generation_batch(ours.model)[0]
    with torch.no_grad():
        for _ in range(257):
            ours.compute_loss(ours.model, dict(batch))
    assert len(ours._metrics["train"]["entropy"]) == 256


def test_skip_inactive_changes_metrics_alone(path: str) -> None:
    whole, part = (make_trainer(path, objective="ahpo", skip_inactive=skip) for skip in (False, True))
    batches = generation_batch(whole.model)
    (loss, expected, logs), (other, found, own) = gradients(whole, batches), gradients(part, batches)
    assert loss == other
    assert differences(found, expected) == 0
    assert "entropy" in logs
    assert "entropy" not in own
    assert own["hpo/entropy"] != logs["hpo/entropy"]
    for key in logs.keys() - {"entropy"}:
        assert key.startswith("hpo/") or own[key] == pytest.approx(logs[key]), key


def test_nothing_to_learn_from_is_a_zero_with_a_gradient(path: str) -> None:
    for head in HEADS:
        ours = make_trainer(path, objective="ahpo", head=head)
        batches = generation_batch(ours.model)
        batches[0]["completion_mask"] = torch.zeros_like(batches[0]["completion_mask"])
        batches[1]["advantages"] = torch.zeros_like(batches[1]["advantages"])
        total, found, logs = gradients(ours, batches)
        assert total == 0
        assert len(found) == len(list(ours.model.parameters()))
        assert not any(value.any() for value in found.values())
        assert "clip_ratio/low_min" in logs


def test_options_that_need_log_probabilities_first_say_so_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(trainer_module.logger, "warning", said.append)
    ours = make_trainer(path, top_entropy_quantile=0.5, skip_inactive=True)
    gradients(ours, generation_batch(ours.model))
    gradients(make_trainer(path, entropy_coef=0.1, beta=0.1), generation_batch(ours.model))
    sentence = "head='linear' runs as 'two_step', with one GEMM more, for top_entropy_quantile"
    assert said == [f"{sentence}; skip_inactive has no effect there"]


def test_two_processes(path: str) -> None:
    run_trl_ranks("ddp", path)


@pytest.mark.parametrize("part", ["every_head", "fsdp2"])
def test_two_processes_any_way(path: str, part: str) -> None:
    run_trl_ranks(part, path)


@slow
@pytest.mark.parametrize("preset", list(hf.Objective.presets()))
def test_fifty_steps(path: str, preset: str) -> None:
    ours = trained(path, objective=preset, max_steps=50, learning_rate=3e-2, max_grad_norm=1.0)
    assert all(p.isfinite().all() for p in ours.model.parameters())
    assert all(math.isfinite(row["loss"]) for row in ours.state.log_history if "loss" in row)
