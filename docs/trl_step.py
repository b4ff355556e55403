"""Time and memory of a GRPO training step, TRL's own and HPOTrainer's, and the picture docs/trl_step.png of them.

``python docs/trl_step.py`` runs each way in a process of its own, two rounds of all of them, and keeps the least;
``--plot`` draws what the last run left in docs/trl_step.json. Needs the extras ``trl`` and ``bench``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "trl_step.json", HERE / "trl_step.png"
WAYS: dict[str, dict[str, Any]] = {
    "TRL": {},
    'head="logprobs"': {"head": "logprobs"},
    'head="two_step"': {"head": "two_step"},
    'head="linear"': {"head": "linear"},
    'head="linear", half without signal': {"head": "linear"},
    'head="linear", half without signal, skip_inactive': {"head": "linear", "skip_inactive": True},
    "TRL, all of full length": {},
    'head="linear", all of full length': {"head": "linear"},
}
# The head of Qwen2.5-0.5B, on one layer: what the step of a small model spends on the vocabulary.
VOCABULARY, WIDTH, RESPONSES, PROMPT, COMPLETION = 151936, 896, 8, 32, 128


def trainer_and_batch(way: str) -> tuple[Any, dict[str, Any]]:
    """The trainer, and a micro-batch as generation would have left it."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from hpo_fused.integrations.trl import HPOConfig, HPOTrainer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4864, num_hidden_layers=1, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    kind, settings = (GRPOTrainer, GRPOConfig) if way.startswith("TRL") else (HPOTrainer, HPOConfig)
    made = kind(
        Qwen2ForCausalLM(config), lambda **_: [0.0],
        settings(
            tempfile.gettempdir(), use_cpu=not torch.cuda.is_available(), bf16=False, report_to="none",
            per_device_train_batch_size=RESPONSES, max_completion_length=COMPLETION, num_iterations=2,
            gradient_checkpointing=False, **WAYS[way],
        ),
        train_dataset=Dataset.from_dict({"prompt": ["<unk>"] * 8}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"),
    )  # fmt: skip
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    ids = torch.randint(3, VOCABULARY, (RESPONSES, PROMPT + COMPLETION))
    advantages, mask = torch.randn(RESPONSES), torch.ones_like(ids)
    if "full" not in way:  # 16 to 128 tokens
        mask[:, PROMPT:] = torch.arange(COMPLETION) < torch.randint(16, COMPLETION + 1, (RESPONSES, 1))
    if "half" in way:
        advantages[::2] = 0
    batch = {
        "prompt_ids": ids[:, :PROMPT], "prompt_mask": mask[:, :PROMPT], "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask[:, PROMPT:], "advantages": advantages, "num_items_in_batch": mask[:, PROMPT:].sum(),
        "old_per_token_logps": torch.full((RESPONSES, COMPLETION), -11.9),
    }  # fmt: skip
    return made, {name: value.to(made.accelerator.device) for name, value in batch.items()}


def measure(way: str) -> dict[str, float]:
    """Loss and gradient of a micro-batch: MiB of the first step's peak beyond the model, seconds of a later one.

    On a CPU these are processor seconds, summed over threads: other work on the machine adds little to them.
    """
    import torch

    with contextlib.redirect_stdout(io.StringIO()):
        trainer, batch = trainer_and_batch(way)
    gpu = trainer.accelerator.device.type == "cuda"

    def step() -> float:
        trainer.model.zero_grad(set_to_none=True)
        clock = time.perf_counter if gpu else time.process_time
        begin = clock()
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        if gpu:
            torch.cuda.synchronize()
        return clock() - begin

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    before = torch.cuda.memory_allocated() if gpu else pages * os.sysconf("SC_PAGE_SIZE")
    step()
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": min(step() for _ in range(5 if gpu else 1)), "mebibytes": (peak - before) / 2**20}


def run(rounds: int) -> None:
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, results in found.items():
            command = [sys.executable, __file__, "--one", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(way, results[-1], flush=True)
    least = {way: {name: round(min(row[name] for row in rows), 3) for name in rows[0]} for way, rows in found.items()}
    RESULTS.write_text(json.dumps(least, indent=2) + "\n", encoding="utf-8")


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 2.9), sharey=True, layout="constrained", facecolor="#f6f8fa")
    labels = [way.replace(", half", "\nhalf") for way in found]
    for axes, name, title in zip(panels, ("seconds", "mebibytes"), ("seconds", "peak in MiB"), strict=True):
        values = [row[name] for row in found.values()]
        bars = axes.barh(labels, values, color=["#8c959f", *["#0969da"] * (len(values) - 1)], height=0.62)
        axes.bar_label(
            bars, labels=[f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values], padding=3, fontsize=8
        )
        axes.set_title(f"{title} of loss and gradient", fontsize=9)
        axes.set_xlim(0, 1.15 * max(values))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_facecolor("none")
    panels[0].invert_yaxis()
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--plot", action="store_true")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
    else:
        if not arguments.plot:
            run(arguments.rounds)
        plot()
