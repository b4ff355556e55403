"""HPOConfig and HPOTrainer: TRL's GRPOTrainer with fused losses and every objective of hpo_fused; see docs/trl.md."""

from .config import HPOConfig
from .trainer import HPOTrainer

__all__ = ["HPOConfig", "HPOTrainer"]
