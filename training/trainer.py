"""`L2DTrainer`: TRL's `SFTTrainer` with the diffusion loss.

- `response_positions`: labels -> positions whose next token is a target
- `L2DTrainer.compute_loss`: draws times and noise there, evaluates the diffusion path, averages over targets and draws
- `L2DTrainer.evaluation_loop`: the same loss on held-out data, also by bin of time, with noise seeded per example

Legend: B rows, S positions, Q targets per row, K draws, d diffusion dimension, T time bins.
"""

import dataclasses
import functools
import os
from typing import Any

import torch
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from l2d.card.text import write_card
from l2d.modeling import L2DForCausalLM, L2DTrainingOutput
from l2d.network.compiled import compile_layers
from l2d.network.diffusion_path import NoisedTargets
from training.budget_metrics import budget_accuracy, write_samples
from training.checkpointing.atomic import SafeCheckpoints
from training.checkpointing.sharding import gather_by_layer
from training.checks import check_objective, longest_example, refuse_ignored_by_l2d, sharded
from training.config import L2DTrainingConfig
from training.console import say
from training.data.ready import for_encoded_data, ready
from training.data.tokenizer import base_of, prepare_tokenizer
from training.draws import default_evaluations, evaluation_targets, split_targets, training_targets, window_length
from training.optimization import target_weights
from training.planning.estimates import without_checkpointing


class L2DTrainer(SafeCheckpoints, SFTTrainer):
    """Trains the diffusion path of an `L2DForCausalLM`; the base stays as it is.

    Takes what `SFTTrainer` takes. Data sets with `prompt` and `completion`, `messages` or `text` are prepared here, as
    the configuration says; those with `input_ids` are taken as they are. The configuration and the tokenizer that are
    given stay unchanged: the trainer works with copies.

    Raises `ValueError` for arguments that would have no effect, and for examples that cannot be trained on.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the targets of the whole accumulated batch
    _tag_names = ["l2d"]
    _name = "L2D"
    data_collator: Any
    _signature_columns: Any

    def __init__(self, model: L2DForCausalLM, args: L2DTrainingConfig, **kwargs: Any):
        if not isinstance(model, L2DForCausalLM):
            raise ValueError(f"model is a {type(model).__name__}: give an L2DForCausalLM, see its from_base.")
        if not isinstance(args, L2DTrainingConfig):
            raise ValueError(f"args is a {type(args).__name__}: give an L2DTrainingConfig, which takes what it takes.")
        for name in ("peft_config", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} has no effect with method l2d: leave it out.")
        refuse_ignored_by_l2d(args)
        check_objective(model.config, args)
        if kwargs.get("processing_class") is None:
            raise ValueError("processing_class is missing: give the base's tokenizer.")
        self._take_data(model, args, kwargs)
        args = for_encoded_data(args, self._limit)
        self._settle_checkpointing(model, args, kwargs["train_dataset"])
        if args.rollout_evaluations is not None or model.config.noise_free:
            model.path.vocabulary.requires_grad_(False)  # no gradient would reach it
        backend = take_compile(args)
        own_collator = kwargs.get("data_collator") is None
        super().__init__(model=model, args=args, **kwargs)
        if args.max_evaluations_per_pass is None:
            mixed = args.bf16 or args.fp16
            args.max_evaluations_per_pass = default_evaluations(
                model.base.config.get_text_config(), 2 if mixed else 4, args.device.type
            )
        if self.is_fsdp_enabled:  # the base stays whole on every device: the path's layers read its weights, too
            self.accelerator.state.fsdp_plugin.ignored_modules = [model.base]
        # TRL replaces `forward` by one that computes a cross-entropy of its own; ours comes from the diffusion path.
        self.model.__dict__.pop("forward", None)
        # So that `num_items_in_batch` is counted at all, over labels[:, 1:], which are the targets.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        if self._zero_stage == 3:
            gather_by_layer(model, args.device)
        if own_collator:
            self.data_collator = GuidanceCollator(**vars(self.data_collator))
        if backend is not None:
            compile_layers(model.path.layers, backend)  # the whole model would be compiled anew for most batches
        self._sums = torch.zeros(args.time_bins, 3, dtype=torch.float64, device=args.device)
        self._batch_of_step = (-1, 0)  # step, and number of the batch within its accumulation

    def _take_data(self, model: L2DForCausalLM, args: L2DTrainingConfig, kwargs: dict[str, Any]) -> None:
        """Prepare the tokenizer and the data sets among `kwargs` as the configuration says. Raises `ValueError`."""
        name = str(model.config.base_name_or_path or "the model's base")
        self._limit = longest_example(model.base.config, name, args.max_length)
        self._base = base_of(model.base.config, model.generation_config)
        tokenizer = prepare_tokenizer(kwargs["processing_class"], args, name)
        formatting = kwargs.pop("formatting_func", None)
        self._ready = functools.partial(
            ready, tokenizer=tokenizer, training=args, limit=self._limit, base=self._base, formatting=formatting
        )
        with args.main_process_first(desc="preparing data"):
            for name in ("train_dataset", "eval_dataset"):
                kwargs[name] = self._ready(kwargs.get(name), name=name.removesuffix("_dataset"))
        kwargs["processing_class"] = tokenizer

    def _settle_checkpointing(self, model: L2DForCausalLM, args: L2DTrainingConfig, train: Any) -> None:
        """Keep all activations where memory is plenty, and say so, unless the configuration or sharding decides."""
        if args.checkpointing_is_chosen or sharded() or args.fsdp or args.fsdp_config or args.deepspeed:
            return
        enough, line = without_checkpointing(model, args, train, self._limit)
        if enough:
            args.activation_checkpointing = args.gradient_checkpointing = False
            say(line)

    # ---- loss ----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy over targets and draws, of the whole accumulated batch in all processes.

        With `loss_average="example"` it is the mean over examples of the mean over each one's targets and draws.
        In training, all microbatches but the last (`max_evaluations_per_pass` evaluations each) also go through the
        backward pass here: evaluations are independent given the main path, so nothing is computed twice and little is
        kept. Sharded weights are gathered for every pass, and processes would need equally many: one pass has them all.
        """
        # 1. The sites of the batch and their targets, 2. with fresh times, noise and classes.
        index, targets = response_positions(inputs["labels"])
        noised = self._draw(inputs, index, targets)
        # 3. What each loss weighs in the mean.
        weights = target_weights(index >= 0, self.args.loss_average)
        count = (weights * (index >= 0)).sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        scored = 1 if self.args.rollout_evaluations is None else window_length(self.args)
        scale = 1 / (count.clamp(min=1) * self.args.draws * scored)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            scale = scale * self.accelerator.num_processes  # the count is over all processes; DDP averages gradients
        # 4. Microbatch by microbatch: the main path once, then `l2d.loss.diffusion_loss` and its backward pass.
        split = torch.is_grad_enabled() and num_items_in_batch is not None
        batches = self._microbatches(noised) if split else [noised]
        state, done = None, torch.zeros((), device=index.device)
        for batch in batches[:-1]:
            with self.accelerator.no_sync(model):
                loss, state = self._scaled_loss(model, inputs, batch, state, scale * weights)
                self.accelerator.backward(loss)
            done += loss.detach()
        # 5. The backward pass of the last one is the caller's.
        return self._scaled_loss(model, inputs, batches[-1], state, scale * weights)[0] + done

    def _microbatches(self, noised: NoisedTargets) -> list[NoisedTargets]:
        return [noised] if self._sharded else split_targets(noised, self.args.max_evaluations_per_pass)

    def _scaled_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], noised: NoisedTargets, state: Any, scale: torch.Tensor
    ) -> tuple[torch.Tensor, Any]:
        """Loss of some evaluations, scaled row by row (B, 1), which are counted for the log, and the main path."""
        output = self._outputs(model, inputs, noised, state)
        self._sums += sums_by_bin(output, noised.scored_time, self.args.time_bins).sum(0)
        return (output.nll * scale).sum(), output.state

    def _outputs(
        self, model: torch.nn.Module, inputs: dict[str, Any], noised: NoisedTargets, state: Any = None
    ) -> L2DTrainingOutput:
        return model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs.get("attention_mask"),
            position_ids=inputs.get("position_ids"),
            noised_targets=noised,
            state=state,
        )

    def _draw(self, inputs: dict[str, torch.Tensor], index: torch.Tensor, targets: torch.Tensor) -> NoisedTargets:
        """Fresh times, noise and class dropout: a function of seed, process, step and batch within the step.

        So a resumed run draws what an uninterrupted one would, and no two batches see the same noise.
        """
        step = self.state.global_step
        self._batch_of_step = (step, self._batch_of_step[1] + 1 if self._batch_of_step[0] == step else 0)
        key, process = (self.args.seed, *self._batch_of_step), self.args.process_index
        classes = classes_at(inputs["guidance_class"], index) if "guidance_class" in inputs else None
        return training_targets(self.model.config, self.args, index, targets, classes, key, process)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add accuracy, and loss and accuracy by time bin, of the steps since the last training log."""
        if "loss" in logs:
            logs.update(self._take_metrics())
        super().log(logs, start_time)

    def _take_metrics(self, prefix: str = "") -> dict[str, float]:
        sums = self.accelerator.reduce(self._sums, "sum").cpu()
        self._sums = torch.zeros_like(self._sums)
        return metrics_by_bin(sums, prefix)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Losses and accuracies, of `eval_dataset` too, which may be tokenized or not."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._ready(eval_dataset, name="eval")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Evaluation batches are padded, one example per row: noise belongs to an example."""
        kept = self.data_collator
        if getattr(kept, "padding_free", False):
            self.data_collator = dataclasses.replace(kept, padding_free=False)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = kept

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Loss of one batch; its sums by time bin are added to those of the evaluation."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums, state = torch.zeros(()), None
            for batch in self._microbatches(self.evaluation_targets(inputs)):
                output = self._outputs(model, inputs, batch, state)
                state = output.state
                sums = sums + sums_by_bin(output, batch.scored_time, self.args.time_bins)  # (B, T, 3)
        # Processes get equally many examples, some of them twice; gathering leaves the second ones out.
        self._evaluation_sums += self.accelerator.gather_for_metrics(sums).sum(0)
        return sums[..., 0].sum() / sums[..., 2].sum().clamp(min=1), None, None

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and accuracy over all targets, whole and by time bin; leaves the training's random stream alone."""
        self._evaluation_sums = torch.zeros_like(self._sums)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
            output.metrics.update(budget_accuracy(self, dataloader.dataset, f"{metric_key_prefix}_"))
            write_samples(self, dataloader.dataset)
        sums = self._evaluation_sums.cpu()
        output.metrics[f"{metric_key_prefix}_loss"] = (sums[:, 0].sum() / sums[:, 2].sum()).item()
        output.metrics.update(metrics_by_bin(sums, f"{metric_key_prefix}_"))
        return output

    def evaluation_targets(self, inputs: dict[str, torch.Tensor]) -> NoisedTargets:
        """Targets of a padded batch whose noise depends on the seed and each example alone; see `draws`."""
        index, targets = response_positions(inputs["labels"])
        masks = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        examples = [ids[mask].tolist() for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
        classes = classes_at(inputs["guidance_class"], index) if "guidance_class" in inputs else None
        return evaluation_targets(self.model.config, self.args, index, targets, classes, examples)

    # ---- checkpoints and data ------------------------------------------------------------------------------------

    def _of_checkpoints(self) -> list[tuple[str, Any]]:
        """All of the path, also a vocabulary that no gradient reaches."""
        return list(self.model.trained_parameters())

    def _loads_by_name(self) -> bool:
        return True

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write a README.md: what the checkpoint is, how to use it, and how it came about."""
        if self.is_world_process_zero():
            write_card(self.args.output_dir, self.args.hub_model_id)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "guidance_class" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "guidance_class"]

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        """Not counted: `Trainer`'s formula is for a model whose every weight sees every token."""
        return 0


@dataclasses.dataclass
class GuidanceCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which also keeps each example's `guidance_class` (B,), or without padding each token's (1, S)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad and stack the examples."""
        batch = super().torch_call(examples)
        if "guidance_class" in examples[0]:
            classes = torch.tensor([example["guidance_class"] for example in examples])
            if self.padding_free:
                lengths = torch.tensor([len(example["input_ids"]) for example in examples])
                classes = classes.repeat_interleave(lengths)
                classes = torch.nn.functional.pad(classes, (0, batch["input_ids"].shape[1] - len(classes)))[None]
            batch["guidance_class"] = classes
        return batch


def response_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions whose next token is a target, in order, and these tokens: labels (B, S) to two (B, Q).

    Padding is -1 among the positions and 0 among the tokens; Q is at least 1.
    """
    following = labels[:, 1:]
    is_target = following != -100
    most = max(int(is_target.sum(1).max()), 1)
    index = is_target.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    valid = is_target.gather(1, index)
    targets = following.gather(1, index).masked_fill(~valid, 0)
    return index.masked_fill(~valid, -1), targets


def classes_at(classes: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Classes (B, Q) of positions (B, Q), from one per row (B,) or one per token (B, S)."""
    return classes[:, None].expand_as(index) if classes.dim() == 1 else classes.gather(1, index.clamp(min=0))


def take_compile(args: L2DTrainingConfig) -> str | None:
    """The backend that `torch_compile` asks for, which `Trainer` is then not told of: see `l2d.network.compiled`."""
    if not args.torch_compile:
        return None
    backend = args.torch_compile_backend
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        os.environ.pop(name, None)
    return backend


def sums_by_bin(output: L2DTrainingOutput, time: torch.Tensor, bins: int) -> torch.Tensor:
    """(B, T, 3) float64: sums of loss, of correct answers, and of (target, draw) pairs, per row and time bin."""
    draws, rows, _ = time.shape
    row = torch.arange(rows, device=time.device)[None, :, None]
    slot = row * bins + (time * bins).long().clamp(max=bins - 1)  # (K, B, Q)
    valid = output.valid.expand(draws, -1, -1)
    values = torch.stack([output.nll.detach(), output.correct & valid, valid], dim=-1).double()  # (K, B, Q, 3)
    sums = torch.zeros(rows * bins, 3, dtype=torch.float64, device=time.device)
    return sums.index_add_(0, slot.flatten(), values.flatten(0, 2)).view(rows, bins, 3)


def metrics_by_bin(sums: torch.Tensor, prefix: str) -> dict[str, float]:
    """Accuracy, and loss and accuracy of every time bin that was drawn, from sums (T, 3)."""
    bins = len(sums)
    metrics = {f"{prefix}accuracy": (sums[:, 1].sum() / sums[:, 2].sum().clamp(min=1)).item()}
    for number, (loss, correct, count) in enumerate(sums.tolist()):
        if count:
            name = f"t_{number / bins:.2f}_{(number + 1) / bins:.2f}"
            metrics[f"{prefix}loss_{name}"] = loss / count
            metrics[f"{prefix}accuracy_{name}"] = correct / count
    return metrics
