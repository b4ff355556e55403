"""The recipes of docs/distributed.md, run as they stand, against one process that has the whole batch."""

from __future__ import annotations

import ast
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import hpo_fused as hf

from .ranks import Part, worst

VOCABULARY, WIDTH = 31, 16
ADVANTAGES = torch.tensor([1.0, -0.5, -0.5, 0.3, -2.0, 0.0, 0.3])
MASK = torch.arange(5) < torch.tensor([5, 2, 3, 4, 0, 5, 2])[:, None]
# The responses in each rank's two micro-batches: one has nothing to learn from, one no response.
SHARES = ((slice(0, 4), slice(4, 6)), (slice(6, 7), slice(7, 7)))
VOCABULARY_RECIPE = "Vocabulary parallelism in training"
DOCUMENT = Path(__file__).parent.parent / "docs" / "distributed.md"


class Body(nn.Module):
    """Hidden states as transformers' models return them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))

    def forward(self, ids: Tensor, position_ids: Tensor | None = None) -> Any:
        places = torch.arange(ids.shape[1]) if position_ids is None else position_ids
        hidden = self.embedding(ids) + self.places(places)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return SimpleNamespace(last_hidden_state=hidden)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.lm_head = Body(), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.device = torch.device("cpu")


def whole_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (len(ADVANTAGES), 6), generator=generator)
    old = -3.4 + 0.3 * torch.randn(MASK.shape, generator=generator)
    return {"ids": ids, "advantages": ADVANTAGES, "old_logprobs": old, "mask": MASK}


def recipes() -> dict[str, list[str]]:
    """The blocks of each recipe by its heading."""
    section = DOCUMENT.read_text(encoding="utf-8").partition("\n## Recipes\n")[2].partition("\n## ")[0]
    _, *parts = re.split(r"^### (.*)$", section, flags=re.MULTILINE)
    found = zip(parts[::2], parts[1::2], strict=True)
    return {name: re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) for name, text in found}


def run(name: str, rank: int, world: int) -> dict[str, float]:
    """Execute a recipe's block on a model, and compare its gradients with one process's."""
    from torch.distributed.tensor import DTensor

    blocks, batch = recipes()[name], whole_batch()
    divided = name in ("Context parallelism", VOCABULARY_RECIPE)  # each rank has all responses
    shares = (slice(0, 3), slice(3, None)) if divided else SHARES[rank]
    alone, codes = Model(), [blocks[0]]
    if name == VOCABULARY_RECIPE:  # once as it stands, and once with the call from logits
        call = re.search(r"^    out = hf\.linear_policy_loss\(.*?^    \)\n", blocks[0], flags=re.DOTALL | re.MULTILINE)
        assert call is not None
        codes.append(blocks[0].replace(call[0], re.sub("^", "    ", blocks[1], flags=re.MULTILINE).rstrip(" ")))
        assert "hf.policy_loss(" in codes[1]
    logits = alone.lm_head(alone.model(batch["ids"][:, :-1]).last_hidden_state)
    given = {name: batch[name] for name in ("advantages", "old_logprobs", "mask")}
    objective = "gspo" if "gspo" in blocks[0] else "mhpo_ahpo"
    hf.policy_loss(logits, batch["ids"][:, 1:], **given, objective=objective).loss.backward()

    difference = 0.0
    for code in codes:
        model, parts = Model(), [{key: value[part] for key, value in batch.items()} for part in shares]
        scope: dict[str, Any] = {"model": model, "micro_batches": parts}
        if name in ("FSDP2", "accelerate"):
            policy = [node for node in ast.parse(recipes()["DDP"][0]).body if isinstance(node, ast.ClassDef)]
            scope.update(hf=hf, torch=torch)
            exec(compile(ast.Module([*policy], []), str(DOCUMENT), "exec"), scope)
        exec(code, scope)
        for (parameter, expected), ours in zip(alone.named_parameters(), model.parameters(), strict=True):
            assert expected.grad is not None
            assert ours.grad is not None
            gradient = ours.grad.full_tensor() if isinstance(ours.grad, DTensor) else ours.grad
            found = worst(gradient, expected.grad)
            assert found <= 2e-6, f"{name}: {parameter} off by {found}"
            difference = max(difference, found)
    return {f"recipe: {name}": difference}


def accelerated(rank: int, world: int) -> dict[str, float]:
    """The recipe in the surroundings that torchrun makes."""
    pytest.importorskip("accelerate", reason="the recipe's library, which the package does not need")
    launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}
    with mock.patch.dict(os.environ, launched | address):
        return run("accelerate", rank, world)


PARTS: dict[str, Part] = {
    f"recipe_{name.split()[0].lower()}": (2, accelerated if name == "accelerate" else partial(run, name))
    for name in recipes()
}
