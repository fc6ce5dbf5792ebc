"""Checkpoints that are whole or not there, and a clean stop on SIGTERM; for every training method.

- `SafeCheckpoints`: mixed into a trainer, writes each checkpoint under another name and renames it when it is complete
- `BaselineTrainer`: TRL's `SFTTrainer` with it
- `StopOnSignal`: on SIGTERM all processes finish the step, save a checkpoint and end

A checkpoint also keeps what the next log line will be made of, so that the loss curve of a resumed run is that of an
unbroken one, also where a checkpoint lies between two log lines.
"""

import contextlib
import json
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from training.checkpointing.disk_errors import Interrupted, writing
from training.checkpointing.resume import (
    UNFINISHED,
    check_output_dir,
    check_sharding_of,
    choose_checkpoint,
    clear_output_dir,
    clear_unfinished,
    write_checksums,
)
from training.checkpointing.sharding import ShardedCheckpoints
from training.console import one_bar, say


class SafeCheckpoints(ShardedCheckpoints):
    """A trainer's checkpoints, atomic: a kill leaves an `unfinished-checkpoint-N`, never half of one."""

    resumed_from: str | None = None
    began_at = 0  # step

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        folder = self.args.output_dir
        self._own = not (os.path.isdir(folder) and os.listdir(folder))  # what will be in output_dir is of this trainer
        self.stop = StopOnSignal(self)
        self.add_callback(self.stop)
        self.add_callback(_Beginning(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, from the beginning or from a complete checkpoint of a run that was launched alike.

        Args:
            resume_from_checkpoint: a folder, true for the newest in `output_dir`, or "auto" for the newest if there is
                one; default: what the configuration says.
            kwargs: of `Trainer.train`.

        Raises `ValueError` if there is none to go on from exactly, or `output_dir` holds something that is neither
        continued nor to be overwritten, `Interrupted` for a checkpoint of another sharding.
        """
        setting = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        folder, overwrite = self.args.output_dir, getattr(self.args, "overwrite_output_dir", False)
        if not self._own:
            check_output_dir(folder, setting, overwrite, str(self._base_name()))
        checkpoint, why = choose_checkpoint(setting, folder, self.args.world_size)
        say(why)
        if checkpoint:
            sharding = "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else "no sharding"
            check_sharding_of(checkpoint, sharding)
        if self.args.should_save:
            (clear_output_dir if overwrite and not self._own else clear_unfinished)(folder)
        self.accelerator.wait_for_everyone()
        self.resumed_from, self._own = checkpoint, True
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _base_name(self) -> str | None:
        return getattr(self.accelerator.unwrap_model(self.model).config, "base_name_or_path", None)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer; `Interrupted` in one sentence where its options cannot be followed."""
        with _followed(self.args, "optim", "optim_args", "optim_target_modules"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The schedule of the learning rate; `Interrupted` in one sentence where its options cannot be followed."""
        with _followed(self.args, "lr_scheduler_type", "lr_scheduler_kwargs"):
            return super().create_scheduler(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """An epoch, unless all steps were made before: a run may be killed between its last checkpoint and its end."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    @property
    def made_steps(self) -> bool:
        """Whether the training of this process made a step; all may have been made before it was started."""
        return self.state.global_step > self.began_at

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; where no step was made there is no loss and no speed to sum up."""
        if "train_runtime" not in logs or self.made_steps:
            super().log(logs, start_time)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        final = os.path.join(self.args.output_dir, name)
        partial = os.path.join(self.args.output_dir, UNFINISHED + name)
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while it saved
        self.accelerator.wait_for_everyone()
        try:
            with writing(self.args.output_dir), one_bar():
                self._write_checkpoint(partial, final)
                self._publish(partial, final)
        except Interrupted:
            shutil.rmtree(partial, ignore_errors=True)  # it only takes room
            raise
        if self.args.push_to_hub:
            self._push_from_checkpoint(final)
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint, True)

    def _write_checkpoint(self, partial: str, final: str) -> None:
        self.store_flos()
        self.save_model(partial, _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(partial)
            self._save_scaler(partial)
            self._save_rng_state(partial)
            self._save_curve(partial)
        if self.state.best_global_step:
            best = os.path.join(self.args.output_dir, f"checkpoint-{self.state.best_global_step}")
            if best == final or os.path.isdir(best):
                self.state.best_model_checkpoint = best
        if self.args.should_save:
            self._export_callbacks()
            self.state.save_to_json(os.path.join(partial, "trainer_state.json"))

    def _publish(self, partial: str, final: str) -> None:
        """Rename once every process has written its part; on nodes with a disk of their own, once on each."""
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            replace_folder(partial, final)
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0 and os.path.isdir(partial):
            replace_folder(partial, final)
        self.accelerator.wait_for_everyone()

    def _export_callbacks(self) -> None:
        for part in [*self.callback_handler.callbacks, self.control]:
            if isinstance(part, ExportableState):
                name, known = type(part).__name__, self.state.stateful_callbacks
                if isinstance(known.get(name), list):
                    known[name].append(part.state())
                else:
                    known[name] = part.state()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)

    def _curve_file(self, folder: str) -> str:
        return os.path.join(folder, f"curve_{self.args.process_index}.json")

    def _save_curve(self, folder: str) -> None:
        """Write what this process has summed since the last log line."""
        sums = getattr(self, "_sums", None)
        content = {
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "sums": None if sums is None else sums.tolist(),
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "tokens": getattr(self, "_total_train_tokens", 0),
        }
        with open(self._curve_file(folder), "w", encoding="utf-8") as file:
            json.dump(content, file)

    def restore_curve(self, folder: str) -> None:
        """Go on with the sums that `_save_curve` wrote, where they are there."""
        if not os.path.isfile(self._curve_file(folder)):
            return
        with open(self._curve_file(folder), encoding="utf-8") as file:
            content = json.load(file)
        self._tr_loss.fill_(content["loss"])
        self._total_loss_scalar = -content["loss"]  # the mean that is reported at the end is of this call's steps
        self._globalstep_last_logged = content["last_logged"]
        if content["sums"] is not None:
            self._sums.copy_(torch.tensor(content["sums"], dtype=self._sums.dtype))
        for name, values in content["metrics"].items():
            self._metrics["train"][name].extend(values)
        if hasattr(self, "_total_train_tokens"):
            self._total_train_tokens = content["tokens"]


def replace_folder(partial: str, final: str) -> None:
    """Put a folder that was written completely in the place of `final`, after its content has reached the disk."""
    write_checksums(partial)
    old = f"{partial}-old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.isdir(final):
        os.rename(final, old)
    os.rename(partial, final)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Raise `Interrupted` for files that hold more than tensors and plain values, or that are damaged."""
    try:
        yield
    except (pickle.UnpicklingError, EOFError) as error:
        raise Interrupted(
            f"resume_from_checkpoint={checkpoint!r} holds files that are damaged or not of this program, and are not "
            "loaded: choose another checkpoint, or auto after moving this one away."
        ) from error


@contextlib.contextmanager
def _followed(args: TrainingArguments, *names: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any kind: optimizers and schedules are packages of others
        options = ", ".join(f"{name}={getattr(value := getattr(args, name), 'value', value)}" for name in names)
        raise Interrupted(f"{options} cannot be followed: {str(error).rstrip('.')}; correct these options.") from error


class _Beginning(TrainerCallback):
    def __init__(self, trainer: SafeCheckpoints):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        self.trainer.began_at = state.global_step
        if self.trainer.resumed_from:
            self.trainer.restore_curve(self.trainer.resumed_from)


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends the training after the step in which any process was sent SIGTERM.

    Attributes:
        stopped: whether training was ended that way before its last step.
    """

    def __init__(self, trainer: SafeCheckpoints):
        self.trainer, self.requested, self.stopped = trainer, False, False
        self.before: Any = None  # what SIGTERM did before

    def _request(self, *args: Any) -> None:
        self.requested = True

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """From here on there is something to lose. Signals reach the main thread only."""
        if self.before is None and threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._request)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """The final evaluation and saving may be interrupted: the last checkpoint is there."""
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)
            self.before = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Stop where all processes agree that one was asked to; evaluation is left out, time may be short."""
        requested = torch.tensor(float(self.requested), device=args.device)
        if args.world_size > 1:
            requested = self.trainer.accelerator.reduce(requested, "sum")
        if requested.item() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False
        return control


class BaselineTrainer(SafeCheckpoints):
    """TRL's `SFTTrainer` with safe checkpoints and the options of `Optimization`."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; with `loss_average="example"` that of one example, divided by the examples of the step."""
        if num_items_in_batch is not None and self.args.loss_average == "example":
            num_items_in_batch = num_items_in_batch * (inputs["labels"][:, 1:] != -100).sum().clamp(min=1)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
