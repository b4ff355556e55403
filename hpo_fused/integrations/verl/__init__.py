"""Every preset as a policy loss of verl's, and verl's fused LM head computed by hpo_fused.

Importing this package imports verl and registers the losses; verl does so itself, in every process, for it is an
entry point of the group ``verl.plugins``. One argument then trains with A-HPO:

    actor_rollout_ref.actor.policy_loss.loss_mode=ahpo

``python -m hpo_fused.integrations.verl --check`` followed by a training command's arguments says what they will run.
docs/verl.md has the rest.
"""

from .config import HPOPolicyLossConfig, watch_configurations
from .counts import optimiser_batch
from .head import use_fused_head
from .losses import register

register()
watch_configurations()

__all__ = ["HPOPolicyLossConfig", "optimiser_batch", "use_fused_head"]
