"""The plug-in against the installed verl: `make test` runs this file in an environment that has it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hpo_fused as hf

pytest.importorskip("verl", minversion="0.9.1", reason="needs verl 0.9.1 or later, see the Makefile")

from omegaconf import OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY, get_policy_loss_fn
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig, FSDPActorConfig
from verl.workers.config.actor import PolicyLossConfig

BY_ENTRY_POINT = set(POLICY_LOSS_REGISTRY)  # before anything here imports the plug-in

from hpo_fused.integrations.verl import HPOPolicyLossConfig, optimiser_batch, use_fused_head  # noqa: E402
from hpo_fused.integrations.verl import __main__ as check  # noqa: E402
from hpo_fused.integrations.verl.version import check_version  # noqa: E402

from .samples import leaves  # noqa: E402

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
TOTALS: dict[str, dict[str, Any]] = {
    "micro-batch": {},
    "batch": {"dp_size": 1, "batch_num_tokens": 190, "global_batch_size": 24, "loss_scale_factor": 40},
    "ranks": {"dp_size": 4, "batch_num_tokens": 190, "global_batch_size": 24, "loss_scale_factor": None},
}


def actor(policy_loss: Any = None, totals: dict[str, Any] | None = None, **settings: Any) -> Any:
    config = FSDPActorConfig(
        rollout_n=4,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig() if policy_loss is None else policy_loss,
        **settings,
    )
    config.global_batch_info.update(totals or {})
    return config


class Batch:
    """A micro-batch [6, 17]: ratios beyond every bound, a rejected response, a hole, an advantage of 0."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.old = -4 * torch.rand(6, 17, generator=generator)
        self.logprobs = self.old + 0.5 * torch.randn(6, 17, generator=generator)
        self.logprobs[0, 3] += 30
        self.mask = torch.arange(17) < torch.tensor([17, 9, 0, 12, 2, 5])[:, None]
        self.mask[3, 5] = False
        self.advantages = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.0, 0.3])[:, None] * self.mask
        self.weights = 2 * torch.rand(6, 17, generator=generator)

    def loss(
        self, name: str, mode: str, config: Any, dtype: torch.dtype = torch.float32, weighted: bool = False
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Loss, gradient [6, 17] and metrics; advantages, old log-probabilities and weights in ``dtype``."""
        (logprobs,) = leaves(self.logprobs.to(dtype))
        weights = self.weights.to(dtype) if weighted else None
        loss, metrics = get_policy_loss_fn(name)(
            old_log_prob=self.old.to(dtype), log_prob=logprobs, advantages=self.advantages.to(dtype),
            response_mask=self.mask, loss_agg_mode=mode, config=config, rollout_is_weights=weights,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, logprobs)
        return loss.detach(), gradient, metrics


@pytest.mark.parametrize("totals", TOTALS)
@pytest.mark.parametrize("mode", MODES)
def test_loss_aggregation(mode: str, totals: str) -> None:
    """Ours is verl's own function of the same name in float64, whatever it divides by."""
    batch = Batch()
    pairs, one_side = {"grpo": "vanilla", "gspo_token": "gspo"}, {False: "clip_ratio_high", True: "clip_ratio_low"}
    for (ours, theirs), weighted in product(pairs.items(), (False, True)):
        config = actor(None, TOTALS[totals], clip_ratio_c=1.5, **{one_side[weighted]: 0.28})
        want, want_gradient, _ = batch.loss(theirs, mode, config, torch.float64, weighted)
        got, gradient, _ = batch.loss(ours, mode, config, weighted=weighted)
        scale = want_gradient.abs()
        assert abs(got - want) < 1e-6 * scale.sum()
        assert (gradient - want_gradient).abs().max() < 1e-6 * scale.max()
        for wrong in set(MODES) - {mode}:
            other = batch.loss(ours, wrong, config, weighted=weighted)[1]
            # Without a scale factor of the batch's, or with the micro-batch's, no two modes are the same.
            assert (other - want_gradient).abs().max() > 1e-3 * scale.max(), wrong


def test_every_preset_is_registered() -> None:
    """By verl itself, under its name where verl has none of that name; and each runs what the preset says."""
    for name, objective in hf.Objective.presets().items():
        assert f"hpo_fused_{name}" in BY_ENTRY_POINT
        assert (name in BY_ENTRY_POINT) or name in ("gspo", "sapo", "cispo")
        loss = get_policy_loss_fn(f"hpo_fused_{name}")
        assert isinstance(get_policy_loss_fn(name), type(loss)) == (name not in ("gspo", "sapo", "cispo"))
        batch, totals = Batch(), TOTALS["batch"]
        shaping = objective.shaping
        if isinstance(shaping, hf.Clip) and objective.ratio_level == "token":
            shaping = dataclasses.replace(shaping, dual=3.0)
        objective = dataclasses.replace(objective, shaping=shaping, normalization="mean_length")
        (logprobs,) = leaves(batch.logprobs)
        statistics = hf.BatchStatistics(24, 190, 5, 10)
        direct = hf.logprob_policy_loss(
            logprobs, batch.advantages, old_logprobs=batch.old, mask=batch.mask, objective=objective,
            statistics=statistics, token_weights=batch.weights,
        )  # fmt: skip
        direct.loss.backward()
        signs = torch.tensor([1.0] * 5 + [-1.0] * 10)
        with optimiser_batch(signs, torch.ones(15, 1)):
            got, gradient, _ = batch.loss(f"hpo_fused_{name}", "token-mean", actor(None, totals), weighted=True)
        torch.testing.assert_close((got, gradient), (direct.loss.detach(), logprobs.grad), rtol=0, atol=0)


SETTINGS: list[tuple[str, dict[str, Any], dict[str, Any], Any]] = [
    # preset, the actor's settings, policy_loss.objective, shaping or weighting
    ("ahpo", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 10.0}, {}, hf.Clip(0.1, 0.3, dual=10.0)),
    ("dapo", {}, {}, hf.Clip(0.2, 0.28, dual=3.0)),
    ("dapo", {"clip_ratio": 0.1, "clip_ratio_low": None, "clip_ratio_high": None}, {}, hf.Clip(0.1, 0.1, dual=3.0)),
    ("dapo", {"clip_ratio_low": 0.1}, {}, hf.Clip(0.1, 0.2, dual=3.0)),
    ("grpo", {"clip_ratio": 0.1, "clip_ratio_low": None, "clip_ratio_high": 0.3}, {}, hf.Clip(0.1, 0.3, dual=3.0)),
    ("gspo", {}, {}, hf.Clip(3e-4, 4e-4)),
    ("luspo", {"clip_ratio_high": 1e-3}, {}, hf.Clip(0.2, 1e-3)),
    ("sapo", {"tau_neg": 1.2}, {}, hf.SoftGate(1.0, 1.2)),
    ("sapo", {"tau_neg": 1.2}, {"shaping": {"kind": "soft_gate"}}, hf.SoftGate()),
    ("ahpo", {}, {"shaping": {"kind": "clip", "delta": 2.0}}, hf.Clip(delta=2.0)),
    ("ahpo", {}, {"weighting": {"kind": "adaptive_hysteretic", "alpha_min": 0.3}}, hf.AdaptiveHysteretic(0.3)),
    ("mhpo", {"clip_ratio_high": 0.3}, {}, hf.LogFidelity(1.5, hf.Hazard())),
]


@pytest.mark.parametrize(("preset", "settings", "fields", "expected"), SETTINGS)
def test_settings(preset: str, settings: dict[str, Any], fields: dict[str, Any], expected: Any) -> None:
    """verl's settings and ours, as hydra passes them."""
    config = omega_conf_to_dataclass(
        OmegaConf.create(
            {
                "_target_": "verl.workers.config.FSDPActorConfig",
                "rollout_n": 4,
                "ppo_micro_batch_size_per_gpu": 1,
                **settings,
                "policy_loss": {
                    "_target_": "hpo_fused.integrations.verl.HPOPolicyLossConfig",
                    "loss_mode": f"hpo_fused_{preset}",
                    "objective": fields or None,
                },
            }
        )
    )
    objective = check.chosen_objective(config)
    assert objective is not None
    assert expected in (objective.shaping, objective.weighting)


@pytest.mark.parametrize(
    ("policy_loss", "settings", "words"),
    [
        ({"objective": {"kl_coef": 0.1}}, {}, "objective.kl_coef: expected verl's own setting, use_kl_loss"),
        ({"objective": {"entropy_coef": 0.1}}, {}, "objective.entropy_coef: .* entropy_coeff .* got 0.1"),
        ({"objective": {"normalization": "response"}}, {}, "objective.normalization: .* loss_agg_mode"),
        ({"objective": {"preset": "hpo"}}, {}, "objective.preset: .* policy_loss.loss_mode"),
        ({"objective": {"alpha": 0.1}}, {}, "expected keys among .*ratio_level.* got 'alpha'"),
        ({"objective": {"shaping": {"kind": "clip", "low": 2}}}, {}, "shaping.low: expected a number in .*, got 2"),
        ({"objective": "hpo"}, {}, "policy_loss.objective: expected a mapping .* got 'hpo'"),
        ({"objective": {"shaping": {"kind": "clip"}}}, {"clip_ratio_high": 0.3}, "clip_ratio_high .* 0.2, 0.3 and 3.0"),
        ({"loss_mode": "vanilla", "objective": {"ratio_level": "token"}}, {}, "objective: expected none .*'vanilla'"),
        ({}, {"clip_ratio_low": 1.5}, r"low: expected a number in \[0, 1\]"),
    ],
)
def test_refused_configurations(policy_loss: dict[str, Any], settings: dict[str, Any], words: str) -> None:
    """When they are made: verl's driver and workers make one each, before they load a model."""
    with pytest.raises((TypeError, ValueError), match=words):
        actor(HPOPolicyLossConfig(**{"loss_mode": "ahpo", **policy_loss}), **settings)


def test_refused_calls() -> None:
    batch = Batch()
    for mode, missing in (("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")):
        with pytest.raises(ValueError, match=f"global_batch_info: expected {missing} for .* dp_size=2"):
            batch.loss("hpo", mode, actor(None, {"dp_size": 2}))
    with pytest.raises(ValueError, match=r"loss_agg_mode: expected one of token-mean, .* got 'mean'"):
        batch.loss("hpo", "mean", actor())
    with pytest.raises(TypeError, match="config: expected verl's ActorConfig"):
        batch.loss("hpo", "token-mean", None)
    with pytest.raises(RuntimeError, match=r"optimiser_batch\(advantages, mask, process_group\)"):
        batch.loss("ahpo", "token-mean", actor(HPOPolicyLossConfig(loss_mode="ahpo")))


def test_padding_and_metrics() -> None:
    """Masked positions may hold anything; every micro-batch, even an empty one, has the same metrics."""
    names = set()
    for name in ("hpo", "mhpo", "hpo_fused_gspo", "vespo"):
        batch, garbage, empty = Batch(), Batch(), Batch()
        for tensor, value in ((garbage.old, torch.nan), (garbage.logprobs, -torch.inf), (garbage.weights, torch.inf)):
            tensor[~batch.mask] = value
        garbage.advantages[~batch.mask] = torch.nan
        loss, gradient, metrics = batch.loss(name, "token-mean", actor(), weighted=True)
        got, got_gradient, got_metrics = garbage.loss(name, "token-mean", actor(), weighted=True)
        assert torch.equal(got, loss)
        assert torch.equal(got_gradient, gradient)
        assert got_metrics == metrics
        empty.mask[:] = False
        loss, gradient, nothing = empty.loss(name, "token-mean", actor(None, TOTALS["batch"]), weighted=True)
        assert loss == 0
        assert not gradient.any()
        assert nothing.keys() == metrics.keys()
        names |= metrics.keys()
        assert all(type(value) is float for value in [*metrics.values(), *nothing.values()])
        kl = ((batch.old - batch.logprobs) * batch.mask).sum() / batch.mask.sum()
        assert metrics["actor/ppo_kl"] == pytest.approx(kl.item(), rel=1e-5)
        assert metrics["actor/hpo/ratio_mean"] > 0.5
    assert {"actor/hpo/clip_fraction", "actor/hpo/hysteretic_weight", "actor/hpo/psi_mean"} < names
    assert [name for name in names if not name.startswith("actor/") or "min" in name or "max" in name] == []


def test_inside_verls_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl adds entropy bonus and KL to the returned tensor in place."""
    from verl.workers.utils import losses

    monkeypatch.setattr(losses, "no_padding_2_padding", lambda value, data: value)
    batch, generator = Batch(), torch.Generator().manual_seed(1)
    entropy, ref = (batch.logprobs + torch.randn(6, 17, generator=generator) for _ in range(2))
    data = TensorDict(
        {
            "response_mask": batch.mask, "old_log_probs": batch.old, "advantages": batch.advantages,
            "ref_log_prob": ref, "rollout_is_weights": batch.weights,
        }, batch_size=6,
    )  # fmt: skip
    tensordict_utils.assign_non_tensor(data, dp_size=2, batch_num_tokens=190, global_batch_size=24)
    results = []
    for name in ("vanilla", "grpo", "grpo"):
        settings = {"entropy_coeff": 0.05, "use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3"}
        config = actor(PolicyLossConfig(loss_mode=name), **settings)
        inputs = leaves(batch.logprobs, entropy)
        loss, metrics = losses.ppo_loss(config, {"log_probs": inputs[0], "entropy": inputs[1]}, data)
        results.append((loss.detach(), *torch.autograd.grad(loss, inputs)))
        assert {"actor/pg_loss", "actor/entropy_loss", "kl_loss"} < metrics.keys()
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-7)


def test_engine_on_two_ranks() -> None:
    """Micro-batches of 4, 2 and 1 in verl's FSDP2 engine, registered by policy_loss._target_ where plug-ins are off."""
    script = Path(__file__).with_name("verl_ranks.py")
    environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": "none"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr


def test_counts_of_a_batch() -> None:
    """A response of either sign counts once, one without tokens in neither; nested batches end."""
    batch = Batch()
    config = actor(HPOPolicyLossConfig(loss_mode="ahpo"))
    with optimiser_batch(torch.tensor([1.0, -1.0, -1.0, -1.0, -1.0, 3.0]), batch.mask):
        with optimiser_batch(torch.ones(6), batch.mask):
            assert batch.loss("ahpo", "token-mean", config)[2]["actor/hpo/hysteretic_weight"] == 1
        # 2 positive, and 3 negative, for the third has no token.
        weight = batch.loss("ahpo", "token-mean", config)[2]["actor/hpo/hysteretic_weight"]
    assert weight == pytest.approx(2 / 3)


def test_fused_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """FusedLinearForPPO as verl computes it; linear_cross_entropy, which needs a GPU there, with its shapes."""
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as module

    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 9, 16, generator=generator), torch.randn(61, 16, generator=generator) / 2
    tokens = torch.randint(61, (2, 9), generator=generator)
    up = torch.randn(2, 2, 9, generator=generator)

    def run(rows: slice | int, fused: Any) -> tuple[Tensor, ...]:
        x, w = leaves(hidden[rows], weight)
        logprobs, entropy = fused(x, w, tokens[rows], 0.8)
        loss = (logprobs.flatten() * up[0, rows].flatten() + entropy.flatten() * up[1, rows].flatten()).sum()
        return logprobs.detach(), entropy.detach(), *torch.autograd.grad(loss, [x, w])

    verls = FusedLinearForPPO(chunk_size=4)
    wanted = [run(rows, verls) for rows in (slice(None), 0)]
    calls = []
    monkeypatch.setattr(module, "linear_cross_entropy", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(FusedLinearForPPO, "forward", FusedLinearForPPO.forward)
    HPOPolicyLossConfig(fused_head=True)
    use_fused_head()
    for rows, want in zip((slice(None), 0), wanted, strict=True):
        torch.testing.assert_close(run(rows, verls), want, rtol=1e-5, atol=1e-5)
        got = run(rows, module.linear_cross_entropy)
        assert got[0].shape == got[1].shape == (tokens[rows].numel(),)  # as verl's kernels return them
        torch.testing.assert_close(got, (want[0].flatten(), want[1].flatten(), *want[2:]), rtol=1e-5, atol=1e-5)
    assert not calls
    group = object()  # a vocabulary in shards, and other reductions, are verl's
    module.linear_cross_entropy(hidden, weight, tokens, 0.8, "none", group)
    module.linear_cross_entropy(hidden, weight, tokens, 0.8, "sum")
    assert calls == [(hidden, weight, tokens, 0.8, "none", group), (hidden, weight, tokens, 0.8, "sum", None)]


@pytest.mark.parametrize("fused_kernels", ["torch", "triton"])
def test_fused_head_of_a_model(fused_kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """verl's forward of a model, whose logits never exist, against the model's own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl.models.transformers.monkey_patch import patch_forward_with_backends
    from verl.utils.experimental.torch_functional import FusedLinearForPPO
    from verl.utils.kernel import linear_cross_entropy as module

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=61, num_key_value_heads=1, **sizes))
    ids = torch.randint(61, (1, 12))
    logits = model(ids).logits / 0.7
    want = logits.log_softmax(-1).gather(-1, ids.roll(-1, -1)[..., None])[..., 0]
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)
    monkeypatch.setattr(module, "linear_cross_entropy", lambda *arguments: None)
    monkeypatch.setattr(FusedLinearForPPO, "forward", lambda *arguments: None)
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=fused_kernels)
    use_fused_head()
    out = model(ids, temperature=0.7, return_dict=True)
    torch.testing.assert_close(out.log_probs.reshape(-1), want.reshape(-1), rtol=1e-5, atol=1e-5)
    out.log_probs.sum().backward()
    assert model.model.embed_tokens.weight.grad.norm() > 0


ACTOR = "actor_rollout_ref.actor."
TARGET = f"{ACTOR}policy_loss._target_=hpo_fused.integrations.verl.HPOPolicyLossConfig"


@pytest.mark.parametrize(
    ("registered", "arguments", "status", "words"),
    [
        (True, ["loss_mode=ahpo"], 0, ["loss_mode=ahpo, loss_agg_mode=token-mean: Objective", "dual=3.0"]),
        (False, ["loss_mode=ahpo"], 1, ["WRONG  verl does not register", "VERL_USE_EXTERNAL_PLUGINS is none"]),
        (False, ["loss_mode=ahpo", TARGET], 0, ["_target_ registers the losses"]),
        (True, [], 1, ["WRONG  loss_mode=vanilla is not a loss of hpo_fused"]),
        (
            True,
            ["loss_mode=ahpo", "algorithm.rollout_correction.bypass_mode=true", "trainer.use_v1=false"],
            1,
            ["WRONG  bypass mode: the legacy trainer"],
        ),
        (True, ["loss_mode=hpo", "algorithm.rollout_correction.bypass_mode=true"], 0, ["are the sampler's"]),
        (True, ["loss_mode=hpo", TARGET, f"+{ACTOR}policy_loss.objective.kl_coef=0.1"], 1, ["refused", "use_kl_loss"]),
        (True, ["loss_mode=hpo", TARGET, f"+{ACTOR}policy_loss.fused_head=true"], 1, ["expected model.use_fused"]),
    ],
)
def test_check(
    registered: bool, arguments: list[str], status: int, words: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What ``python -m hpo_fused.integrations.verl --check`` says of a training command."""
    monkeypatch.setattr(check, "registered_by_verl", lambda: registered)
    monkeypatch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
    monkeypatch.setattr("hpo_fused.integrations.verl.config.use_fused_head", lambda: None)
    given = [f"{ACTOR}policy_loss.{word}" if word.startswith("loss_mode") else word for word in arguments]
    assert check.main(["--check", f"{ACTOR}ppo_micro_batch_size_per_gpu=1", *given]) == status
    shown = capsys.readouterr().out
    assert [word for word in words if word not in shown] == []


def test_versions() -> None:
    for version in ("0.9.1", "0.10.0.dev", "1.0.0"):
        check_version(version)
    with pytest.raises(ImportError, match=r"verl: expected version 0.9 or later, got 0.8.2"):
        check_version("0.8.2")


def test_configurations_of_other_losses_are_left_alone() -> None:
    """Neither verl's own losses nor its other configurations change by the plug-in's being there."""
    assert check.chosen_objective(actor()) is None
    assert check.chosen_objective(None) is None
    assert isinstance(actor(PolicyLossConfig(loss_mode="gspo")), ActorConfig)
    assert HPOPolicyLossConfig().loss_mode == "vanilla"
