"""Time and memory of verl's fused LM head beside ours, on this machine: ``python docs/verl_head.py``, with verl.

Forward and backward of log-probabilities and entropies, each in a process of its own: what a training step does behind
the last hidden states.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time


def peak() -> float:
    """MiB that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(ours: bool, tokens: int, hidden_size: int, vocabulary: int) -> None:
    """One line: seconds, and MiB beyond inputs, head and their gradients."""
    import torch
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    from hpo_fused.integrations.verl import use_fused_head

    if ours:
        use_fused_head()
    torch.manual_seed(0)
    head = FusedLinearForPPO()
    hidden = torch.randn(1, tokens, hidden_size, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden_size) / hidden_size**0.5).requires_grad_()
    ids = torch.randint(vocabulary, (1, tokens))
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    first = head(hidden[:, :8].detach(), torch.randn(16384, hidden_size, requires_grad=True), ids[:, :8] % 16384)
    (first[0].sum() + first[1].sum()).backward()  # compiles, where something is compiled
    del first
    before, start = peak(), time.perf_counter()
    logprobs, entropy = head(hidden, weight, ids)
    (logprobs.sum() - 0.01 * entropy.sum()).backward()
    seconds = time.perf_counter() - start
    print(f"{'hpo_fused' if ours else 'verl'}: {seconds:.1f} s, {peak() - before:.0f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", type=int, nargs="*", default=[1024, 896, 151936])
    parser.add_argument("--only", choices=["verl", "hpo_fused"])
    options = parser.parse_args()
    if options.only:
        measure(options.only == "hpo_fused", *options.sizes)
    else:
        for name in ("verl", "hpo_fused"):
            subprocess.run([sys.executable, __file__, "--only", name, *map(str, options.sizes)], check=True)
