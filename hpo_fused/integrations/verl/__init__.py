"""Every preset as a policy loss of verl's, and verl's fused LM head computed by hpo_fused.

Importing this package imports verl and registers the losses; verl does so itself, in every process, for it is an
entry point of the group ``verl.plugins``. One argument then trains with A-HPO:

    actor_rollout_ref.actor.policy_loss.loss_mode=ahpo

``python -m hpo_fused.integrations.verl --check`` followed by a training command's arguments says what they will run.
docs/verl.md has the rest.
"""

import verl

from .version import check_version

check_version(verl.__version__)  # before the imports that other versions refuse

from .config import HPOPolicyLossConfig, watch_configurations  # noqa: E402
from .counts import optimiser_batch  # noqa: E402
from .head import use_fused_head  # noqa: E402
from .losses import register  # noqa: E402

register()
watch_configurations()

__all__ = ["HPOPolicyLossConfig", "optimiser_batch", "use_fused_head"]
