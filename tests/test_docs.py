"""Examples in docstrings and the README run and say what they claim."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch

import hpo_fused as hf

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = (
    "backend",
    "linear_plan",
    "linear_policy_loss",
    "linear_token_logprobs",
    "objective",
    "policy_loss",
    "token_logprobs",
)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(f"hpo_fused.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_code_runs_and_agrees() -> None:
    """The trainer's lines before and after are the same loss: what the README says they are."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (4, 6), generator=generator)
    variables = {
        "hf": hf,
        "torch": torch,
        "logits": torch.randn(4, 6, 50, generator=generator, requires_grad=True),
        "tokens": tokens,
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "old_logprobs": -4 + 0.5 * torch.randn(4, 6, generator=generator),
        "mask": torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None],
        "temperature": 0.9,
    }
    start, before, after, linear, own = python_blocks()
    exec(start, dict(variables))
    losses = []
    for code in (before, after):
        scope = dict(variables)
        exec(code, scope)
        (gradient,) = torch.autograd.grad(scope["loss"], scope["logits"])
        losses.append((scope["loss"].detach(), scope["logprobs"].detach() * variables["mask"], gradient))
    for plain, ours in zip(*losses, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)
    head = torch.nn.Linear(8, 50, bias=False)
    hidden = torch.randn(4, 6, 8, generator=generator)
    results = []
    for code in (after, linear):
        scope = dict(variables, hidden=hidden, lm_head=head, logits=head(hidden))
        exec(code, scope)
        (gradient,) = torch.autograd.grad(scope["loss"], head.weight)
        results.append((scope["loss"].detach(), scope["logprobs"], scope["entropy"], gradient))
    for from_logits, from_hidden in zip(*results, strict=True):
        torch.testing.assert_close(from_hidden, from_logits, rtol=1e-5, atol=1e-6)
    scope = dict(variables)
    exec(own, scope)
    assert scope["objective"].shaping == hf.Clip(0.2, 0.28, dual=3.0)


def test_example_of_the_linear_path_runs() -> None:
    text = (ROOT / "docs" / "linear.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    scope = {
        "hf": hf, "torch": torch, "lm_head": torch.nn.Linear(8, 50), "hidden": torch.randn(4, 6, 8),
        "tokens": torch.randint(50, (4, 6)), "mask": torch.ones(4, 6), "advantages": torch.tensor([1.0, -1.0, 0, 0.5]),
    }  # fmt: skip
    exec(code, scope)
    assert scope["lm_head"].weight.grad.isfinite().all()
    assert scope["lm_head"].bias.grad.isfinite().all()


def test_readme_names_every_preset() -> None:
    rows = re.findall(r"^\| `(\w+)`", README, flags=re.MULTILINE)
    assert rows == list(hf.Objective.presets())


@pytest.mark.parametrize("document", ["README.md", "docs/linear.md"])
def test_tables_are_the_commands_output(document: str) -> None:
    files = pytest.importorskip("hpo_fused.bench.files", reason="needs the bench extra")
    from hpo_fused.bench import all_report

    text = (ROOT / document).read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- report (\S+)( --summary)? -->\n(.*?)\n<!-- end of report -->", text, flags=re.DOTALL)
    assert blocks
    for name, summary, block in blocks:
        result = files.read(ROOT / name)
        assert block.strip() == (all_report.short if summary else files.markdown)(result).strip()


def test_the_committed_report_is_the_commands_output() -> None:
    files = pytest.importorskip("hpo_fused.bench.files", reason="needs the bench extra")
    folder = ROOT / "bench" / "results" / "cpu"
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert report.strip() == files.markdown(files.read(folder / "result.json")).strip()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", report)
    assert pictures
    assert all((folder / name).stat().st_size > 1000 for name in pictures)


@pytest.mark.parametrize("document", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_documents_are_linked_and_link_to_what_exists(document: str) -> None:
    assert f"docs/{document}" in README
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / "docs" / target).exists(), target


def test_example_of_a_provider_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named module:Class on the command line, checked and timed on every operation and mode that it has."""
    testing = pytest.importorskip("typer.testing", reason="needs the bench extra")
    from hpo_fused.bench.commands import app
    from hpo_fused.bench.results import Result

    text = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"<!-- provider -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = [
        "speed", "--op", "logits", "--op", "logprobs", "--mode", "forward", "--mode", "gradient", "--mode", "both",
        "--shape", "custom:V=97", "--shape", "custom:V=97,softcap=20", "--tokens", "32", "--repeats", "3", "--device",
        "cpu", "--provider", "eager", "--provider", "mine:Logsumexp", "--output", "r.json",
    ]  # fmt: skip
    done = testing.CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    mine = [row for row in Result.read(tmp_path / "r.json").rows if row.provider == "mine:Logsumexp"]
    assert len(mine) == 12
    for row in mine:
        capped = row.case.shape.softcap is not None
        assert (row.status, row.note) == (("skipped", "has no softcap") if capped else ("ok", ""))
        assert len(row.samples_s) == (0 if capped else 3)
