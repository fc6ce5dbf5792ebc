"""What a training recipe may say, beside its data (`training.data.options`): dataclasses with defaults and checks.

- `ModelArguments`: the method, the base, and the shape of the diffusion path
- `L2DTrainingConfig`: TRL's `SFTConfig` with the options of diffusion training and a few other defaults
- `CommandArguments`: what only the command does
- `option_types`, `unset_by_null`: of all options

`checks` has what must hold between them.
"""

import dataclasses
import os
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import SFTConfig

from l2d.checkpoint.quantization import QUANTIZATION, quantizing
from l2d.checkpoint.settings import CheckpointSettings
from l2d.config import L2DConfig
from l2d.settings import declared
from training.data.options import DataArguments, at_least, mapping, one_of

METHODS = ("l2d", "lora_sft", "full_sft")


def of_checkpoint(name: str) -> Any:
    """A field with the default and the help that `CheckpointSettings` declares."""
    one = declared(CheckpointSettings)[name]
    return field(default=one.default, metadata={"help": f"{one.help[0].upper()}{one.help[1:]}."})


def of_quantization(name: str) -> Any:
    """A field with the default and the help that `QUANTIZATION` declares."""
    return field(default=QUANTIZATION[name].default, metadata={"help": f"{QUANTIZATION[name].help.capitalize()}."})


@dataclass
class ModelArguments:
    """The method, the base, and the shape of the diffusion path (names and defaults of `L2DConfig`)."""

    method: str = field(default="l2d", metadata={"help": "l2d, lora_sft or full_sft."})
    base: str | None = field(
        default=None, metadata={"help": "Hub name or folder of the pre-trained causal LM, or of a PEFT adapter."}
    )
    base_revision: str | None = of_checkpoint("base_revision")
    base_gguf_file: str | None = of_checkpoint("base_gguf_file")
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Hub name or folder of the tokenizer, where it is not the base's own (same vocabulary)."},
    )
    base_config: str | None = field(
        default=None,
        metadata={"help": "JSON file with the base's configuration, for --dry_run where the base is not at hand."},
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Weights of the frozen base: auto (as stored), float32, bfloat16 or float16. Default: auto under "
            "mixed precision, float32 otherwise and for full_sft. What is trained is always float32."
        },
    )
    load_in_4bit: bool = of_quantization("load_in_4bit")
    load_in_8bit: bool = of_quantization("load_in_8bit")
    bnb_4bit_quant_type: str = of_quantization("bnb_4bit_quant_type")
    bnb_4bit_compute_dtype: str | None = of_quantization("bnb_4bit_compute_dtype")
    bnb_4bit_use_double_quant: bool = of_quantization("bnb_4bit_use_double_quant")
    quantization_config: dict[str, Any] | str | None = of_quantization("quantization_config")
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or flash_attention_2."})
    variant: str = of_checkpoint("variant")
    lora_rank: int = field(default=32, metadata={"help": "Rank, for variant lora and for lora_sft."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Deltas are scaled by lora_alpha / lora_rank. Default: 32, lora_sft: 64."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that lora_sft adapts. Default: every linear layer."}
    )
    diffusion_dim: int = of_checkpoint("diffusion_dim")
    noise_std: float = of_checkpoint("noise_std")
    input_width: int = of_checkpoint("input_width")
    conditioning_width: int = of_checkpoint("conditioning_width")
    frequency_width: int = of_checkpoint("frequency_width")
    min_noise: float = of_checkpoint("min_noise")
    guidance_classes: list[str] | None = of_checkpoint("guidance_classes")
    carried_state: bool = of_checkpoint("carried_state")
    noise_free: bool = of_checkpoint("noise_free")
    warm_start: bool = of_checkpoint("warm_start")
    own_values_rank: int = of_checkpoint("own_values_rank")
    own_keys_rank: int = of_checkpoint("own_keys_rank")
    sampler: dict[str, Any] | str | None = of_checkpoint("sampler")

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        if self.dtype is not None:
            one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        self.sampler = mapping("sampler", self.sampler)
        self.quantization_config = mapping("quantization_config", self.quantization_config)
        for name, one in QUANTIZATION.items():
            setattr(self, name, one.check(getattr(self, name)))
        at_least("lora_rank", self.lora_rank, 1)
        if self.lora_alpha is None:
            self.lora_alpha = 64.0 if self.method == "lora_sft" else 32.0
        if self.base_config is not None and not os.path.isfile(self.base_config):
            raise ValueError(f"base_config={self.base_config!r} does not exist: give a JSON file, or leave it out.")
        if self.base is not None and os.path.isdir(self.base):
            self.base = os.path.abspath(self.base)
        if self.tokenizer is not None and os.path.isdir(self.tokenizer):
            self.tokenizer = os.path.abspath(self.tokenizer)

    def base_options(self) -> dict[str, Any]:
        """What names the base beside `base`, under the names of transformers' `from_pretrained`."""
        return {"revision": self.base_revision, "gguf_file": self.base_gguf_file}

    def quantization(self) -> dict[str, Any]:
        """The settings that quantize the base when it is loaded; empty where it stays as it is stored."""
        settings = {name: getattr(self, name) for name in QUANTIZATION}
        return {name: value for name, value in settings.items() if value is not None} if quantizing(settings) else {}

    def lora_config(self) -> Any:
        """PEFT's configuration for `lora_sft`, `None` for other methods."""
        if self.method != "lora_sft":
            return None
        from peft import LoraConfig  # late: a second

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            target_modules=self.lora_target_modules or "all-linear",
        )

    def l2d_config(self) -> L2DConfig:
        """The configuration of the model to be trained; raises `ValueError` for impossible values."""
        return L2DConfig(base_name_or_path=self.base, **{name: getattr(self, name) for name in L2D_SETTINGS})


L2D_SETTINGS = tuple(
    f.name
    for f in dataclasses.fields(ModelArguments)
    if f.name in declared(CheckpointSettings).keys() - {"base_config"}
)
"""What `ModelArguments` hands to `L2DConfig`."""


@dataclass
class CommandArguments:
    """What only the command does, and a trainer that is made in Python does not."""

    dry_run: bool = field(
        default=False,
        metadata={"help": "Build everything without weights, print parameters, memory, examples and schedule, stop."},
    )
    dry_run_examples: int = field(default=2, metadata={"help": "Examples that a dry run prints."})
    dry_run_json: str | None = field(
        default=None,
        metadata={
            "help": "File for a dry run to write every example to: its text, its targets, or why it is left out."
        },
    )

    def __post_init__(self) -> None:
        at_least("dry_run_examples", self.dry_run_examples, 0)
        if self.dry_run_json is not None and not self.dry_run:
            raise ValueError("dry_run_json would be ignored: set dry_run: true too, or leave it out.")


@dataclass
class L2DTrainingConfig(SFTConfig):
    """TRL's `SFTConfig` with the options of diffusion training.

    Other defaults than there: `max_length` (the base's own limit, and longer examples are an error, not cut),
    `assistant_only_loss` (on for conversations), `activation_checkpointing` (for L2D by an estimate of memory),
    `use_cpu` (on where there is no accelerator), `bf16` (on where there is one), `ddp_find_unused_parameters` (off).
    """

    if TYPE_CHECKING:  # theirs, which `__post_init__` settles
        activation_checkpointing: bool | None
        bf16: bool | None
        greater_is_better: bool | None
        gradient_accumulation_steps: int

    draws: int = field(default=1, metadata={"help": "Draws of (time, noise) per response position and step."})
    max_evaluations_per_pass: int | None = field(
        default=None,
        metadata={"help": "Evaluations (site and draw) that go through the path at a time, forward and backward. "
                  "Default: 4096, on a CPU 512 to 2048 by the model's size. Changes memory and speed, not the result."},
    )  # fmt: skip
    time_power: float = field(default=1.0, metadata={"help": "Times are u ** time_power with u uniform."})
    corruption_rate: float = field(
        default=0.0, metadata={"help": "Probability, per draw, of building x_t from a wrong token, never the true one."}
    )
    corruption_base_share: float = field(
        default=0.5,
        metadata={"help": "Share of these tokens that are samples of the base; the others are from the same answer."},
    )
    easy_target_rate: float = field(
        default=1.0,
        metadata={
            "help": "Probability, in a step, of training on a target to which the base gives 0.9 or more; the others "
            "are always trained on. One that is left out counts as a loss of 0 in the step's mean."
        },
    )
    rollout_evaluations: int | None = field(
        default=None,
        metadata={"help": "Train on the path's own trajectories of this many evaluations, instead of noised targets."},
    )
    rollout_window: int | None = field(
        default=None, metadata={"help": "Evaluations of a rollout, in a row, that are trained in a step. Default: 4."}
    )
    guidance_dropout: float = field(
        default=0.2, metadata={"help": "Probability, per token, of training it with no class."}
    )
    eval_draws: int = field(default=1, metadata={"help": "Draws of (time, noise) per position in evaluation."})
    eval_budgets: list[int] | None = field(
        default=None,
        metadata={"help": "In evaluation, also measure the accuracy of the sampler's greedy token at these budgets."},
    )
    eval_budget_examples: int = field(
        default=32, metadata={"help": "Evaluation examples, the first ones, that eval_budgets are measured on."}
    )
    eval_samples: int = field(
        default=0,
        metadata={"help": "Evaluation examples, the first ones, whose responses are generated at the base's and at "
                  "the last of eval_budgets and written to samples.jsonl."},
    )  # fmt: skip
    eval_sample_tokens: int = field(default=64, metadata={"help": "Most tokens of such a response."})
    time_bins: int = field(default=4, metadata={"help": "Loss and accuracy are reported in this many bins of time."})
    loss_average: str = field(
        default="token",
        metadata={
            "help": "What weighs the same in a step's loss: token (every target) or example (every example, as the "
            "release has it where its micro-batches are single examples)."
        },
    )
    warmup_shape: str = field(
        default="linear",
        metadata={"help": "Rise of the learning rate over warmup_steps: linear, or logarithmic as in the release."},
    )
    weight_decay_exempt: list[str] | None = field(
        default=None,
        metadata={"help": "Parts of names of parameters without weight decay. Default: biases and norms."},
    )
    too_long: str = field(
        default="error", metadata={"help": "Examples longer than max_length: error, drop or truncate."}
    )
    count_end_token: bool = field(
        default=True,
        metadata={
            "help": "Whether the end-of-sequence token after the last response, and what a template writes behind it, "
            "count towards max_length. In the release they do not."
        },
    )
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples per optimizer step over all processes; gradient_accumulation_steps follows."},
    )
    chat_template_date: str | None = field(
        default=None, metadata={"help": "Date that a chat template which names one is to say, e.g. 26 Jul 2024."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start afresh in an output_dir that already holds something."}
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Older name of activation_checkpointing. Default: yes, but for L2D that is not sharded only where "
            "memory for all activations may be short."
        },
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest example in tokens. Default: the base's own limit."}
    )
    assistant_only_loss: bool | None = field(
        default=None, metadata={"help": "Train on assistant turns only. Default: yes for conversations (messages)."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every trained parameter takes part in every step, so DDP need not look."}
    )

    def __post_init__(self) -> None:
        # Without this, several processes on a machine without accelerator would each train alone, unnoticed.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu
        if self.use_cpu:
            self.dataloader_pin_memory = False
        if self.bf16 and self.fp16:
            raise ValueError("bf16=True and fp16=True exclude each other: keep one of them.")
        if self.fp16 and self.use_cpu:
            raise ValueError("fp16=True would be ignored on a CPU: use bf16, or leave it out.")
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = "loss" not in self.metric_for_best_model  # also for the loss of a bin of time
        known = tuple(part.name for part in dataclasses.fields(AcceleratorConfig))
        for name in self.accelerator_config if isinstance(self.accelerator_config, dict) else ():
            one_of("accelerator_config", name, known)
        self._settle_checkpointing()
        self._follow_total_batch_size()
        super().__post_init__()
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world_size:
            raise ValueError(
                f"{launched} processes were launched and {self.world_size} would train together: "
                "start them with accelerate launch or torchrun."
            )
        at_least("eval_samples", self.eval_samples, 0)
        for name in ("draws", "eval_draws", "time_bins", "eval_budget_examples", "eval_sample_tokens"):
            at_least(name, getattr(self, name), 1)
        for name in ("rollout_evaluations", "rollout_window", "max_evaluations_per_pass"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if self.max_length is not None:
            at_least("max_length", self.max_length, 2)
        self._check_schedule()
        if not 0 < self.time_power < float("inf"):
            raise ValueError(f"time_power={self.time_power} must be a number above 0.")
        for name in ("guidance_dropout", "corruption_rate", "corruption_base_share", "easy_target_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a probability, from 0 to 1.")
        one_of("too_long", self.too_long, ("error", "drop", "truncate"))
        self._check_release_options()

    def _settle_checkpointing(self) -> None:
        """On, as in TRL, unless it is set; by the new name, as transformers warns of the old one."""
        chosen = self.gradient_checkpointing if self.activation_checkpointing is None else self.activation_checkpointing
        self.checkpointing_is_chosen = chosen is not None
        self.activation_checkpointing = True if chosen is None else chosen

    def _check_release_options(self) -> None:
        one_of("loss_average", self.loss_average, ("token", "example"))
        if not self.count_end_token and (self.too_long == "truncate" or self.packing):
            raise ValueError("count_end_token=False lets rows be longer than max_length: not with truncate or packing.")
        one_of("warmup_shape", self.warmup_shape, ("linear", "logarithmic"))
        if self.loss_average == "example" and (self.packing or self.padding_free):
            raise ValueError(
                "loss_average=example needs one example per row: leave out packing and padding_free, or use token."
            )
        if self.warmup_shape == "logarithmic" and self.lr_scheduler_type not in ("linear", "polynomial"):
            raise ValueError(
                f"warmup_shape=logarithmic is followed by a linear decay: lr_scheduler_type={self.lr_scheduler_type} "
                "must be linear or polynomial."
            )
        power = (mapping("lr_scheduler_kwargs", self.lr_scheduler_kwargs) or {}).get("power", 1.0)
        if self.warmup_shape == "logarithmic" and power != 1:
            raise ValueError(f"warmup_shape=logarithmic is followed by a linear decay: power={power} must be 1.")

    def _check_schedule(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            at_least(name, getattr(self, name), 1)
        if not 0 <= self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate} must be a number of at least 0.")
        for name in ("weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be a number of at least 0.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a number from 0 to below 1.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be a whole number from 0 to 2**32 - 1.")
        at_least("dataloader_num_workers", self.dataloader_num_workers, 0)
        if self.max_steps == 0:
            raise ValueError("max_steps=0 trains nothing: set it above 0, or leave it out to train num_train_epochs.")
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < float("inf"):
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be a number above 0, or set max_steps.")

    def _follow_total_batch_size(self) -> None:
        if self.total_batch_size is None:
            return
        at_least("total_batch_size", self.total_batch_size, 1)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        devices = 1 if self.use_cpu or processes > 1 else max(torch.cuda.device_count(), 1)  # of a process
        at_once = self.per_device_train_batch_size * processes * devices
        if self.gradient_accumulation_steps != 1:
            raise ValueError("total_batch_size determines gradient_accumulation_steps: keep one of them.")
        if self.total_batch_size % at_once:
            raise ValueError(
                f"total_batch_size={self.total_batch_size} is not divisible by {at_once}, the examples that all "
                "devices take at once: change it, or per_device_train_batch_size."
            )
        self.gradient_accumulation_steps = self.total_batch_size // at_once


OPTIONS = (ModelArguments, DataArguments, L2DTrainingConfig, CommandArguments)


def option_types() -> dict[str, Any]:
    """Name and type hint of every option that a recipe may set."""
    hints = [(dataclasses.fields(cls), typing.get_type_hints(cls)) for cls in OPTIONS]
    return {f.name: types[f.name] for fields, types in hints for f in fields if f.init}


def unset_by_null() -> set[str]:
    """Names of the options that null leaves at their default: it is the default, or nothing that their type allows."""
    nullable = {name for name, hint in option_types().items() if type(None) in typing.get_args(hint)}
    fields = [f for cls in OPTIONS for f in dataclasses.fields(cls)]
    return {f.name for f in fields if f.default is None or f.name not in nullable}
