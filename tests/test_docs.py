"""Examples in docstrings and documents run and say what they claim, and what documents name exists."""

from __future__ import annotations

import doctest
import importlib
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import hpo_fused as hf

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
WITH_EXAMPLES = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "hpo_fused").rglob("*.py") if ">>> " in path.read_text("utf-8")
)


def blocks(document: str, start: str = "") -> list[str]:
    """The Python code of a document, from a heading on."""
    text = (ROOT / document).read_text(encoding="utf-8")
    text = text[text.index(start) :]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize("file", WITH_EXAMPLES)
def test_docstring_examples(file: str) -> None:
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_function_has_an_example() -> None:
    for name in ("policy_loss", "logprob_policy_loss", "token_logprobs", "linear_policy_loss", "linear_token_logprobs"):
        assert ">>> " in getattr(hf, name).__doc__, name


def test_readme_code_runs_and_agrees() -> None:
    """The trainer's lines before and after, and those without logits, are the same loss: what the README says."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    hidden = torch.randn(4, 6, 8, generator=generator)
    scope: dict[str, Any] = {
        "hf": hf,
        "torch": torch,
        "hidden": hidden,
        "lm_head": head,
        "tokens": torch.randint(50, (4, 6), generator=generator),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "old_logprobs": -4 + 0.5 * torch.randn(4, 6, generator=generator),
        "mask": torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None],
        "temperature": 0.9,
    }
    before, after, without_logits, own = blocks("README.md")
    results = []
    for code in (before, after, f"{without_logits}\nloss, logprobs, entropy = out.loss, out.logprobs, out.entropy"):
        variables = dict(scope, logits=head(hidden))
        exec(code, variables)
        (gradient,) = torch.autograd.grad(variables["loss"], head.weight)
        tokens = (variables[name].detach() * scope["mask"] for name in ("logprobs", "entropy"))
        results.append((variables["loss"].detach(), *tokens, gradient))
    assert results[0][-1].norm() > 0.01
    for ours in results[1:]:
        torch.testing.assert_close(ours, results[0], rtol=1e-5, atol=1e-6)
    exec(own, scope)
    assert scope["objective"].shaping == hf.Clip(0.2, 0.28, dual=3.0)


def test_example_of_the_linear_path_runs() -> None:
    head = torch.nn.Linear(8, 50)
    scope = {
        "hf": hf, "torch": torch, "lm_head": head, "hidden": torch.randn(4, 6, 8),
        "tokens": torch.randint(50, (4, 6)), "mask": torch.ones(4, 6), "advantages": torch.tensor([1.0, -1.0, 0, 0.5]),
    }  # fmt: skip
    tokens = torch.nn.functional.one_hot(scope["tokens"], 50).bool()
    scope["scores"] = torch.where((torch.rand(4, 6, 50) < 0.2) | tokens, 0.0, -torch.inf)
    for code in blocks("docs/linear.md"):
        exec(code, scope)
    ours, same = (torch.autograd.grad(scope[name].loss, head.weight)[0] for name in ("out", "same"))
    torch.testing.assert_close(ours, same, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scope["out"].logprobs, scope["same"].logprobs, rtol=1e-5, atol=1e-6, equal_nan=True)
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def test_loop_without_a_trainer_learns() -> None:
    file = ROOT / "docs" / "grpo_loop.py"
    assert len(file.read_text(encoding="utf-8").splitlines()) < 80
    rewards = runpy.run_path(str(file))["train"](steps=25)
    assert rewards[0] < 0.2
    assert sum(rewards[-5:]) / 5 > 0.45


def test_examples_of_other_trainers_run() -> None:
    """TRL's totals (which tests/test_trainers.py holds against TRL), a KL with a mean of its own, and two steps."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    logprobs = -torch.rand(4, 6, generator=generator)
    old, ref = logprobs + 0.2 * torch.randn(4, 6, generator=generator), logprobs - 0.3
    mask, advantages = torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None], torch.tensor([1.0, -1.0, 0.5, -0.5])
    scope: dict[str, Any] = {
        "hf": hf, "torch": torch, "mask": mask, "advantages": advantages, "lm_head": head, "logprobs": logprobs,
        "hidden": torch.randn(4, 6, 8, generator=generator), "tokens": torch.randint(50, (4, 6), generator=generator),
        "old_logprobs": old, "ref_logprobs": ref, "rewards": torch.tensor([1, 0, 1, 0]), "num_items_in_batch": 40,
    }  # fmt: skip
    trl, means, two_steps = blocks("docs/trainers.md")
    exec(trl, scope)
    assert scope["loss"].isfinite()
    exec(means, scope)
    alone = hf.logprob_policy_loss(logprobs, advantages, old_logprobs=old, mask=mask, objective="gspo").loss
    d = (ref - logprobs)[mask]
    torch.testing.assert_close(scope["loss"], alone + 0.01 * (d.exp() - d - 1).mean())
    exec(two_steps, scope)
    scope["loss"].backward()
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()


def test_examples_of_mappings_run() -> None:
    codes = blocks("docs/objectives.md", "## From a file or a command line")
    assert len(codes) == 3
    exec("\n".join(codes), {"hf": hf, "torch": torch})


def test_examples_of_the_objectives_run() -> None:
    """Entropy with a mean of its own; responses in parts and added metrics as in one call; a sampled logit of -inf."""
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(4, 6, 50, generator=generator)).requires_grad_()
    tokens, mask = torch.randint(50, (4, 6), generator=generator), torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None]
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5])
    now = hf.token_logprobs(logits, tokens)
    old_logprobs = now.logprobs.detach() + 0.0003 * torch.randn(4, 6, generator=generator)
    arguments: dict[str, Any] = {"old_logprobs": old_logprobs, "mask": mask, "objective": "gspo"}

    def call(rows: slice) -> hf.PolicyLossOutput:
        parts = {"old_logprobs": old_logprobs[rows], "mask": mask[rows]}
        return hf.policy_loss(logits[rows], tokens[rows], advantages[rows], **{**arguments, **parts})

    whole = call(slice(None))
    scope: dict[str, Any] = {
        "hf": hf, "torch": torch, "logits": logits, "tokens": tokens, "mask": mask, "advantages": advantages,
        "old_logprobs": old_logprobs, "logprobs": now.logprobs, "entropy": now.entropy, "window": 2,
        "micro_batches": [call(slice(0, 1)), call(slice(1, 4))],
    }  # fmt: skip

    def example(word: str) -> dict[str, Any]:
        (code,) = (code for code in blocks("docs/objectives.md") if word in code)
        variables = dict(scope)
        exec(code, variables)
        return variables

    results = example("entropy_weights=")
    chosen = results["chosen"]
    plain = hf.logprob_policy_loss(now.logprobs, advantages, **{**arguments, "objective": "grpo"}).loss
    assert now.entropy is not None
    torch.testing.assert_close(results["out"].loss, plain - 0.01 * now.entropy[chosen].mean() / 2)
    assert 0 < chosen.sum() < mask.sum()

    (expected,) = torch.autograd.grad(whole.loss, logits)
    assert bool((expected[:3].abs().amax((1, 2)) > 0).any())
    example("response_mean_log_ratios=")
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-8)

    metrics = example(".extremes")["metrics"]
    assert metrics == {name: pytest.approx(value.item(), rel=1e-6) for name, value in whole.metrics().items()}

    impossible = logits.detach().clone()
    impossible[0, 1, tokens[0, 1]] = -torch.inf
    assert example("sampled =")["mask"].equal(mask)
    scope["logits"] = impossible.requires_grad_()
    repaired = example("sampled =")["mask"]
    assert (mask ^ repaired).nonzero().tolist() == [[0, 1]]
    for kept, silent in ((mask, True), (repaired, False)):
        loss = hf.policy_loss(impossible, tokens, -advantages, **{**arguments, "mask": kept}).loss
        (gradient,) = torch.autograd.grad(loss, impossible)
        assert bool((gradient[0] == 0).all()) == silent


def test_what_a_sampled_logit_of_minus_inf_does() -> None:
    """Log-probability -inf with a finite old one: whose gradient is left, by the sign of A; and of the KL terms."""

    def gradients(objective: hf.Objective | str, advantage: float, **arguments: Any) -> list[float]:
        logprobs = torch.tensor([[-1.0, -torch.inf, -2.0]], requires_grad=True)
        old = torch.tensor([[-1.01, -3.0, -2.01]])
        loss = hf.logprob_policy_loss(
            logprobs, torch.tensor([advantage]), objective=objective, **{"old_logprobs": old, **arguments}
        ).loss
        (gradient,) = torch.autograd.grad(loss, logprobs)
        return gradient[0].tolist()

    for advantage in (1.0, -1.0):
        for name in ("gspo", "gspo_token", "luspo"):
            assert gradients(name, advantage) == [0, 0, 0]
        for name in ("grpo", "mhpo", "sapo"):
            first, impossible, last = gradients(name, advantage)
            assert impossible == 0
            assert abs(first) > 0.05
            assert abs(last) > 0.05
        assert 0 < max(map(abs, gradients("vespo", advantage))) < 1e-16
    assert gradients("gmpo", 1.0) == [0, 0, 0]
    first, impossible, last = gradients("gmpo", -1.0)
    assert impossible == 0
    assert first == last > 0.1
    for kl, old, least, most in (
        ("k3", None, 0, 0),
        ("k3_ratio", None, 1e8, 2e8),
        ("k3_ratio", torch.zeros(1, 3), 0, 0),
    ):
        objective = hf.Objective.preset("grpo", kl=kl, kl_coef=1.0)
        assert least <= gradients(objective, 0.0, old_logprobs=old, ref_logprobs=torch.zeros(1, 3))[1] <= most


def test_readme_names_every_preset() -> None:
    section = README.partition("## Objectives")[2].partition("## ")[0]
    assert re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE) == list(hf.Objective.presets())


def test_readme_shows_the_committed_result() -> None:
    found = re.search(r"<!-- cpu (\S+) -->\n\| logits \| (.*?) \|\n.*?\n(.*?)\n<!-- end", README, flags=re.DOTALL)
    assert found is not None
    name, heading, body = found.groups()
    measured = {
        (row["case"]["shape"]["name"], row["provider"]): f"{row['over_ours']:#.3g}"
        for row in json.loads((ROOT / name).read_text(encoding="utf-8"))["rows"]
        if row["over_ours"] and row["case"]["operation"] == "policy_loss" and not row["case"]["inactive"]
    }
    for line in body.splitlines():
        shape, *shown = line.strip("| ").split(" | ")
        assert shown == [measured.get((shape, provider), "–") for provider in heading.split(" | ")]


def test_the_bytes_on_the_wire_are_the_command_s() -> None:
    testing = pytest.importorskip("typer.testing", reason="needs the bench extra")
    from hpo_fused.bench.commands import app

    text = (ROOT / "docs/distributed.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- hpo-fused-bench (wire .*?) -->\n(.*?\n)<!-- end of wire -->", text, flags=re.DOTALL)
    assert shown is not None
    assert testing.CliRunner().invoke(app, shown[1].split()).output == shown[2]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_names_exists(document: str) -> None:
    """Links, paths of the checkout, targets of make and commands of the benchmark."""
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / document).parent.joinpath(target).exists(), target
    for path in re.findall(r"\b(?:kernels|hpo_fused|bench|tests|docs)/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for target in re.findall(r"(?:`|^)make ([\w-]+)", text, flags=re.MULTILINE):
        assert target in targets, target
    commands = pytest.importorskip("hpo_fused.bench.commands", reason="needs the bench extra").app.registered_commands
    known = [command.name or command.callback.__name__ for command in commands]
    for command in re.findall(r"hpo-fused-bench (\w+)", text):
        assert command in known, command


def test_the_tests_that_faults_name_exist() -> None:
    named = re.findall(r"(tests/\w+\.py)::(\w+)", (ROOT / "docs/faults.md").read_text(encoding="utf-8"))
    assert named
    for file, name in named:
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_every_document_is_reached_from_the_readme() -> None:
    assert [document for document in DOCUMENTS[1:] if f"({document})" not in README] == []
