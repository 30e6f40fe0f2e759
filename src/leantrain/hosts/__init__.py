"""What other people's training loops need beside an optimizer. Most need nothing: see docs/hosts.md."""

from leantrain.hosts.trainer import TrueGradNorm, trainer_optimizer

__all__ = ["TrueGradNorm", "trainer_optimizer"]
