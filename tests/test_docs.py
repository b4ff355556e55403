"""Examples in docstrings and documents run and say what they claim."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hpo_fused as hf

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGE = Path(hf.__file__).parent
MODULES = [
    ".".join(("hpo_fused", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_every_public_function_has_an_example() -> None:
    for name in hf.__all__:
        value = getattr(hf, name)
        assert not hasattr(value, "__code__") or ">>> " in (value.__doc__ or ""), name


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def scope() -> dict[str, Any]:
    """What the documents' examples take as given; the same for each."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 50, bias=False), torch.randn(4, 6, 8, generator=generator)
    return {
        "hf": hf, "torch": torch, "hidden": hidden, "lm_head": head, "logits": head(hidden), "temperature": 0.9,
        "tokens": torch.randint(50, (4, 6), generator=generator), "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "old_logprobs": -4 + 0.5 * torch.randn(4, 6, generator=generator),
        "mask": torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None],
    }  # fmt: skip


def test_readme_code_runs_and_agrees() -> None:
    """A trainer's lines before and after: whatever assigns ``loss`` is the same loss."""
    results = []
    for code in python_blocks(README):
        variables = scope()
        exec(code, variables)
        if "loss" in variables:
            (gradient,) = torch.autograd.grad(variables["loss"], variables["lm_head"].weight)
            logprobs = torch.where(variables["mask"], variables["logprobs"].detach(), 0.0)
            results.append((variables["loss"].detach(), logprobs, gradient))
    assert len(results) >= 2
    for other in results[1:]:
        for plain, ours in zip(results[0], other, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_example_of_the_linear_path_runs() -> None:
    (code,) = python_blocks((ROOT / "docs" / "linear.md").read_text(encoding="utf-8"))
    variables = scope() | {"lm_head": torch.nn.Linear(8, 50)}
    exec(code, variables)
    assert variables["lm_head"].weight.grad.isfinite().all()
    assert variables["lm_head"].bias.grad.isfinite().all()


def test_readme_names_every_preset() -> None:
    rows = re.findall(r"^\| `(\w+)`", README, flags=re.MULTILINE)
    assert rows == list(hf.Objective.presets())


@pytest.mark.parametrize("document", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_documents_are_linked_and_link_to_what_exists(document: str) -> None:
    assert f"docs/{document}" in README
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (ROOT / "docs" / target).exists(), target
