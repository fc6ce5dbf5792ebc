"""What a training recipe may say: three dataclasses, each with its own defaults and checks.

- `ModelArguments`: the method, the base, and the shape of the diffusion path
- `DataArguments`: where the examples come from and which columns hold what
- `L2DTrainingConfig`: TRL's `SFTConfig` with the options of diffusion training and a few other defaults
- `option_types`, `unset_by_null`: of all options
- `one_of`, `at_least`, `named`, `check_file`, `mapping`: single values

`checks` has what must hold between them.
"""

import dataclasses
import json
import os
import typing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import SFTConfig

from l2d.config import L2DConfig

FILE_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
METHODS = ("l2d", "lora_sft", "full_sft")
L2D_SETTINGS = (
    "variant", "diffusion_dim", "noise_std", "input_width", "conditioning_width", "frequency_width", "min_noise",
    "guidance_classes", "carried_state", "noise_free", "sampler", "base_revision", "lora_rank", "lora_alpha",
)  # what ModelArguments hands to L2DConfig  # fmt: skip


@dataclass
class ModelArguments:
    """The method, the base, and the shape of the diffusion path (names and defaults of `L2DConfig`)."""

    method: str = field(default="l2d", metadata={"help": "l2d, lora_sft or full_sft."})
    base: str | None = field(default=None, metadata={"help": "Hub name or folder of the pre-trained causal LM."})
    base_revision: str | None = field(default=None, metadata={"help": "Revision of the base on the hub."})
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
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or flash_attention_2."})
    variant: str = field(default="lora", metadata={"help": "Trained part of the path's projections: lora or full."})
    lora_rank: int = field(default=32, metadata={"help": "Rank, for variant lora and for lora_sft."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Deltas are scaled by lora_alpha / lora_rank. Default: 32, lora_sft: 64."}
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that lora_sft adapts. Default: every linear layer."}
    )
    diffusion_dim: int = field(default=256, metadata={"help": "Dimension in which tokens are noised."})
    noise_std: float = field(default=64.0, metadata={"help": "Standard deviation of the noise at t = 0."})
    input_width: int = field(default=256, metadata={"help": "Hidden width of the projection of the noised token."})
    conditioning_width: int = field(default=256, metadata={"help": "Width of the time embedding."})
    frequency_width: int = field(default=256, metadata={"help": "Number of sinusoidal features of the time."})
    min_noise: float = field(default=0.0, metadata={"help": "Training times are drawn from [0, 1 - min_noise]."})
    guidance_classes: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes for classifier-free guidance."}
    )
    carried_state: bool = field(
        default=False,
        metadata={"help": "Hand the path's last hidden state to its next evaluation; needs rollout_evaluations."},
    )
    noise_free: bool = field(
        default=False,
        metadata={"help": "Control: the same path without noise, evaluated once (diffusion_budget=2,solver=euler)."},
    )
    sampler: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Inference defaults to store with the checkpoint, e.g. {budget: 15}."}
    )

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        if self.dtype is not None:
            one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        self.sampler = mapping("sampler", self.sampler)
        at_least("lora_rank", self.lora_rank, 1)
        if self.lora_alpha is None:
            self.lora_alpha = 64.0 if self.method == "lora_sft" else 32.0
        if self.base_config is not None and not os.path.isfile(self.base_config):
            raise ValueError(f"base_config={self.base_config!r} does not exist: give a JSON file, or leave it out.")
        if self.base is not None and os.path.isdir(self.base):
            self.base = os.path.abspath(self.base)
        if self.tokenizer is not None and os.path.isdir(self.tokenizer):
            self.tokenizer = os.path.abspath(self.tokenizer)

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


@dataclass
class DataArguments:
    """Where the examples come from and which columns hold what."""

    dataset: str | None = field(
        default=None,
        metadata={"help": "Hub name, or a local .json, .jsonl, .parquet or .csv file, or a folder (save_to_disk too)."},
    )
    dataset_config: list[str] | None = field(
        default=None, metadata={"help": "Configuration (subset) of the data set; several are concatenated."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices such as train[:1000] work."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Evaluation data; default: the same data set."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on. Default: no evaluation."})
    eval_holdout: int | None = field(
        default=None, metadata={"help": "Number of training examples to set aside for evaluation instead."}
    )
    columns: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What prompt and completion (or messages, or text) are made of: a column's name, or a text with "
            "columns in braces, e.g. {prompt: 'Question: {question}\\nAnswer:', completion: ' {answer}'}."
        },
    )
    exclude: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Rows to leave out: values by column, e.g. {category: [editing, planning]}."}
    )
    unroll: bool = field(
        default=False,
        metadata={"help": "Make an example of every assistant turn, with the conversation before it as its prompt."},
    )
    expected_examples: list[int] | None = field(
        default=None, metadata={"help": "Numbers of training and evaluation examples that should result; printed."}
    )
    guidance_column: list[str] | None = field(
        default=None,
        metadata={"help": "Column that holds each example's class; of several, the first one that guidance_map knows. "
                  "The column subset holds the name in dataset_config."},
    )  # fmt: skip
    guidance_map: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Class for each value of guidance_column; values left out have no class."}
    )
    guidance_class: str | None = field(default=None, metadata={"help": "One class for all examples."})

    def __post_init__(self) -> None:
        self.columns = mapping("columns", self.columns)
        self.guidance_map = mapping("guidance_map", self.guidance_map)
        self.exclude = mapping("exclude", self.exclude)
        if isinstance(self.guidance_column, str):
            self.guidance_column = [self.guidance_column]
        if self.expected_examples is not None and len(self.expected_examples) > 2:
            raise ValueError(f"expected_examples={self.expected_examples} must be one or two numbers.")
        if self.eval_holdout is not None:
            at_least("eval_holdout", self.eval_holdout, 1)
        if self.eval_holdout is not None and (self.eval_dataset or self.eval_split):
            raise ValueError(
                "eval_holdout sets training examples aside, and eval_dataset or eval_split name other ones: keep one."
            )
        if self.guidance_class is not None and self.guidance_column is not None:
            raise ValueError("guidance_class and guidance_column both give the examples' class: keep one of them.")
        if self.guidance_map is not None and self.guidance_column is None:
            raise ValueError("guidance_map maps the values of guidance_column, which is not set: set it.")

    @property
    def has_eval(self) -> bool:
        """Whether any evaluation data are named."""
        return bool(self.eval_dataset or self.eval_split or self.eval_holdout)


@dataclass
class L2DTrainingConfig(SFTConfig):
    """TRL's `SFTConfig` with the options of diffusion training.

    Other defaults than there: `max_length` (the base's own limit, and longer examples are an error, not cut),
    `assistant_only_loss` (on for conversations), `use_cpu` (on where there is no accelerator), `bf16` (on where there
    is one), and `ddp_find_unused_parameters` (off).
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
    total_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples per optimizer step over all processes; gradient_accumulation_steps follows."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Build everything without weights, print parameters, memory, examples and schedule, stop."},
    )
    chat_template_date: str | None = field(
        default=None, metadata={"help": "Date that a chat template which names one is to say, e.g. 26 Jul 2024."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Start afresh in an output_dir that already holds something."}
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
        if self.activation_checkpointing is None:  # TRL's default goes by the old name, of which transformers warns
            self.activation_checkpointing = self.gradient_checkpointing
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
        for name in ("guidance_dropout", "corruption_rate", "corruption_base_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a probability, from 0 to 1.")
        one_of("too_long", self.too_long, ("error", "drop", "truncate"))
        self._check_release_options()

    def _check_release_options(self) -> None:
        one_of("loss_average", self.loss_average, ("token", "example"))
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
        at_once = self.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        if self.gradient_accumulation_steps != 1:
            raise ValueError("total_batch_size determines gradient_accumulation_steps: keep one of them.")
        if self.total_batch_size % at_once:
            raise ValueError(
                f"total_batch_size={self.total_batch_size} is no multiple of the {at_once} examples that all processes "
                "take at once: change it, or per_device_train_batch_size."
            )
        self.gradient_accumulation_steps = self.total_batch_size // at_once


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not known: choose one of {', '.join(allowed)}.")


def at_least(name: str, value: Any, low: int) -> None:
    """Raise `ValueError` unless `value` is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}.")


def named(name: str, value: str | None) -> str:
    """`value`, which must be given; raises `ValueError` if it is not."""
    if value is None:
        raise ValueError(f"{name} is not set: give a folder, a file or a hub name.")
    return value


def check_file(name: str, source: str | None) -> None:
    """Raise `ValueError` if `source` names a data file that is not there or empty."""
    if source is None or os.path.splitext(source)[1] not in FILE_TYPES:
        return
    if not os.path.isfile(source):
        raise ValueError(f"{name}={source!r} does not exist: give a file, a folder or a hub name.")
    if os.path.getsize(source) == 0:
        raise ValueError(f"{name}={source!r} is empty: there is nothing to train on.")


def mapping(name: str, value: Any) -> dict[str, Any] | None:
    """A dictionary from a recipe, or from JSON on the command line; `ValueError` for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = [value]
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} must be a mapping: YAML in a recipe, JSON on the command line.")
    return value


def option_types() -> dict[str, Any]:
    """Name and type hint of every option that a recipe may set."""
    classes = (ModelArguments, DataArguments, L2DTrainingConfig)
    hints = [(dataclasses.fields(cls), typing.get_type_hints(cls)) for cls in classes]
    return {f.name: types[f.name] for fields, types in hints for f in fields if f.init}


def unset_by_null() -> set[str]:
    """Names of the options that null leaves at their default: it is the default, or nothing that their type allows."""
    nullable = {name for name, hint in option_types().items() if type(None) in typing.get_args(hint)}
    fields = [f for cls in (ModelArguments, DataArguments, L2DTrainingConfig) for f in dataclasses.fields(cls)]
    return {f.name for f in fields if f.default is None or f.name not in nullable}
