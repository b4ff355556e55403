"""``python -m hpo_fused.integrations.verl --check ARGUMENTS``: what a training command's arguments will run.

It composes verl's configuration from them, as ``python -m verl.trainer.main_ppo`` does, and makes the actor's. That
takes no GPU. Exit status 1 where the run would fail, or train with another loss than it says.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .config import HPOPolicyLossConfig, chosen_objective
from .losses import PREFIX
from .version import TESTED

PLUGINS = "VERL_USE_EXTERNAL_PLUGINS"

# (whether it is as it should be, a sentence)
Finding = tuple[bool, str]


def registered_by_verl() -> bool:
    """Whether verl registers the losses by itself, tried in a process that does not import hpo_fused."""
    code = f"from verl.trainer.ppo.core_algos import get_policy_loss_fn as get; get({PREFIX + 'ahpo'!r})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def installation(named: bool) -> Iterator[Finding]:
    """The version, and how the losses come into verl's registry; ``named``: by ``policy_loss._target_``."""
    import verl

    version = str(verl.__version__)
    yield version.startswith(f"{TESTED}."), f"verl {version}; tested with {TESTED}"
    found = registered_by_verl()
    if named:
        yield True, "policy_loss._target_ registers the losses in every worker"
    yield (
        found or named,
        f"verl {'registers' if found else 'does not register'} the losses by itself ({PLUGINS} is "
        f"{os.environ.get(PLUGINS, 'not set')})",
    )


def composed(config_name: str, arguments: Sequence[str]) -> Any:
    """verl's configuration with a command's arguments."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose(config_name, overrides=list(arguments))


def command(config: Any, actor: Any) -> Iterator[Finding]:
    """What a composed configuration trains with; ``actor`` is what verl made of its section."""
    objective = chosen_objective(actor)
    mode = actor.policy_loss.loss_mode
    if objective is None:
        yield False, f"loss_mode={mode} is not a loss of hpo_fused"
    else:
        yield True, f"loss_mode={mode}, loss_agg_mode={actor.loss_agg_mode}: {objective}"
    if (config.algorithm.get("rollout_correction") or {}).get("bypass_mode"):
        legacy = not config.trainer.get("use_v1", True)
        yield (
            not legacy,
            "bypass mode: the legacy trainer (trainer.use_v1=false) replaces loss_mode by 'bypass_mode'"
            if legacy
            else "bypass mode: old log-probabilities are the sampler's",
        )
    if actor.policy_loss.get("fused_head") and not config.actor_rollout_ref.model.use_fused_kernels:
        yield False, "policy_loss.fused_head=true: expected model.use_fused_kernels=true, whose head it replaces"


def check(arguments: Sequence[str], config_name: str) -> int:
    """Print the findings; 0 where all are as they should be."""
    findings: list[Finding] = []
    named = False
    if arguments:
        from verl.utils.config import omega_conf_to_dataclass

        config = composed(config_name, arguments)
        try:
            actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
            findings += command(config, actor)
            named = isinstance(actor.policy_loss, HPOPolicyLossConfig)
        except Exception as error:  # hydra's, around whatever a configuration raised
            findings.append((False, f"the actor's configuration is refused: {error}"))
    findings = [*installation(named), *findings]
    for good, sentence in findings:
        print("ok    " if good else "WRONG ", sentence)
    return 0 if all(good for good, _ in findings) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m hpo_fused.integrations.verl", description=__doc__)
    parser.add_argument("--check", action="store_true", required=True, help="check the installation and a command")
    parser.add_argument("--config-name", default="ppo_trainer", help="as the training command's")
    parser.add_argument("arguments", nargs="*", help="the training command's own, a.b=c")
    options = parser.parse_args(argv)
    return check(options.arguments, options.config_name)


if __name__ == "__main__":
    sys.exit(main())
