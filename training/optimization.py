"""What the release does differently from `Trainer` in an optimizer step; each is an option of `L2DTrainingConfig`.

- `warmup_shape: logarithmic`: the learning rate rises as DeepSpeed's `WarmupDecayLR` lets it
- `weight_decay_exempt`: which parameters have no weight decay, by parts of their names
- `loss_average: example`: every example of a step weighs the same, whatever its number of targets

Source: configuration files of SakanaAI/L2D.
"""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from trl import SFTTrainer


class Optimization(SFTTrainer):
    """Mixed into a trainer, follows these three options."""

    lr_scheduler: Any

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The schedule of the learning rate; with a logarithmic warm-up, then linear to `lr_end`."""
        if self.lr_scheduler is None and self.args.warmup_shape == "logarithmic":
            warmup = self.args.get_warmup_steps(num_training_steps)
            last = (self.args.lr_scheduler_kwargs or {}).get("lr_end", 0.0) / self.args.learning_rate
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer, lambda step: logarithmic_warmup(step, warmup, num_training_steps, last)
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Names of the parameters that weight decay applies to."""
        exempt = self.args.weight_decay_exempt
        if exempt is None:
            return super().get_decay_parameter_names(model)
        return [name for name, _ in model.named_parameters() if not any(part in name for part in exempt)]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """What the loss of a step is divided by: its targets, or its examples that have any."""
        if self.args.loss_average == "example":
            batch_samples = [{"labels": first_targets(batch["labels"])} for batch in batch_samples]
        return super()._get_num_items_in_batch(batch_samples, device)


def logarithmic_warmup(step: int, warmup: int, steps: int, last: float) -> float:
    """Learning rate at `step` (from 0) in units of its peak, which it reaches after `warmup` of `steps` steps.

    It rises from `last` with log(step + 1) / log(warmup), and then falls linearly to `last`.
    """
    if step < warmup:
        share = math.log(step + 1) / math.log(max(2, warmup))
    else:
        share = max(0.0, (steps - step) / max(1, steps - warmup))
    return last + (1 - last) * share


def first_targets(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, S) with the first target of every row alone; what stands at position 0 is no target."""
    targets = labels != -100
    targets[:, 0] = False
    return labels.masked_fill(~(targets & (targets.cumsum(1) == 1)), -100)


def target_weights(valid: torch.Tensor, average: str) -> torch.Tensor:
    """Weight (B, 1) float32 of each target in the sum over a step, for targets `valid` (B, Q) bool.

    One for `loss_average="token"`; for "example" one over the row's number of targets.
    """
    counts = valid.sum(1, keepdim=True).clamp(min=1).float()
    return 1 / counts if average == "example" else torch.ones_like(counts)
