"""GRPO without a trainer: sample groups, score them, take optimiser steps. ``python docs/grpo_loop.py``, half a minute.

A small recurrent model learns to count: after the digit 7 it has to say 7, 8, 9, 0 and stop. With a transformer the
loop is the same: ``hidden`` is what its last layer gives, ``head`` its LM head; the prompt is longer than a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hpo_fused as hf

END, LENGTH, TEMPERATURE = 10, 8, 1.0
GROUPS, GROUP_SIZE, MICRO_BATCH, EPOCHS = 16, 16, 128, 4


class Model(nn.Module):
    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(END + 1, size), nn.GRU(size, size, batch_first=True)
        self.head = nn.Linear(size, END + 1, bias=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, T, H]."""
        return self.body(self.embedding(tokens))[0]


@torch.no_grad()
def sample(model: Model, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt and response [B, 1 + T], and the response's mask [B, T]: all up to its first END."""
    tokens = prompts[:, None]
    for _ in range(LENGTH):
        logits = model.head(model.hidden(tokens)[:, -1])
        tokens = torch.cat([tokens, torch.multinomial((logits / TEMPERATURE).softmax(-1), 1)], dim=1)
    ends = tokens[:, 1:] == END
    return tokens, ends.cumsum(1) - ends.long() == 0


def rewards_of(tokens: Tensor) -> Tensor:
    """Share of the places, [B], at which a response [B, 1 + T] has the right token."""
    right = torch.cat([(tokens[:, :1] + torch.arange(4)) % 10, torch.full_like(tokens[:, :1], END)], dim=1)
    return (tokens[:, 1:6] == right).float().mean(1)


def train(steps: int = 80, objective: str | hf.Objective = "ahpo", seed: int = 0) -> list[float]:
    """Mean reward of each step."""
    torch.manual_seed(seed)
    model, history = Model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        tokens, mask = sample(model, torch.randint(10, (GROUPS,)).repeat_interleave(GROUP_SIZE))
        rewards = rewards_of(tokens).view(GROUPS, GROUP_SIZE)
        spread = rewards.std(1, keepdim=True)
        advantages = ((rewards - rewards.mean(1, keepdim=True)) / (spread + 1e-4)).flatten()
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        with torch.no_grad():  # under the policy that sampled
            old = hf.linear_token_logprobs(
                model.hidden(inputs), model.head.weight, targets, mask=mask, temperature=TEMPERATURE
            ).logprobs
        # Counted once for the whole batch: however it is split, the micro-batches' gradients add up to its own.
        statistics = hf.BatchStatistics.from_batch(advantages, mask)
        for _ in range(EPOCHS):
            for part in torch.arange(len(tokens)).split(MICRO_BATCH):
                out = hf.linear_policy_loss(
                    model.hidden(inputs[part]), model.head.weight, targets[part], advantages[part], mask=mask[part],
                    old_logprobs=old[part], statistics=statistics, temperature=TEMPERATURE, objective=objective,
                )  # fmt: skip
                out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        history.append(rewards.mean().item())
        print(f"step {step:3}  reward {history[-1]:.3f}")
    return history


if __name__ == "__main__":
    train()
