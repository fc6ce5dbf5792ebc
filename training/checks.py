"""What must hold between the options of a recipe: what would be ignored, or fail later, is refused at once.

- `check_recipe`: all of it
- `refuse_ignored_by_l2d`, `check_objective`: what `L2DTrainer` checks too
- `longest_example`: what `max_length` may be
- `check_batches`, `check_best_model`, `check_packages`, `check_hub`: what would fail later
- `check_sharding`, `check_launch`: what `accelerate launch` was asked for is what the method, and this machine, can do

Options that others follow, such as those of optimizers and schedules, are left to them.

Each raises `ValueError` with one sentence that names the option.
"""

import os

import accelerate
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from huggingface_hub import constants, get_token
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from l2d.checkpoint.hub import looks_local
from l2d.checkpoint.opening import check_base
from l2d.checkpoint.quantization import QUANTIZATION, check_quantization, quantizing
from l2d.config import L2DConfig
from training.checkpointing.resume import NO_RESUME
from training.config import L2D_SETTINGS, CommandArguments, L2DTrainingConfig, ModelArguments
from training.console import RANK
from training.data.options import DataArguments, check_file, mapping, one_of

_PATH_ONLY = set(L2D_SETTINGS) - {"base_revision", "base_gguf_file", "lora_rank", "lora_alpha"}
L2D_ONLY = _PATH_ONLY | set(QUANTIZATION) | {
    "guidance_column", "guidance_class", "guidance_map",
    "draws", "max_evaluations_per_pass", "time_power", "corruption_rate", "corruption_base_share",
    "easy_target_rate",
    "rollout_evaluations", "rollout_window", "guidance_dropout", "eval_draws", "time_bins", "eval_budgets",
    "eval_budget_examples", "eval_samples", "eval_sample_tokens",
}  # fmt: skip
LORA_SFT_ONLY = {"lora_target_modules"}
_NO_METRICS = "evaluation measures losses and accuracies, and keeps no predictions"
ALWAYS_IGNORED = {
    "model_init_kwargs": "use base_revision, dtype and attn_implementation",
    "dataset_text_field": "use columns: {text: COLUMN}",
    "dataset_kwargs": "the examples are prepared before the trainer sees them",
    "truncation_mode": "use too_long: truncate",
    "pad_token": "set it in the base's tokenizer",
    "do_train": "training is what this command does",
    "do_eval": "use eval_strategy, or give eval data for one evaluation at the end",
    "do_predict": "evaluate the checkpoint with lm_eval",
    "label_names": "the labels are made here",
    "include_for_metrics": _NO_METRICS,
    "batch_eval_metrics": _NO_METRICS,
    "prediction_loss_only": _NO_METRICS,
    "eval_do_concat_batches": _NO_METRICS,
    "eval_accumulation_steps": _NO_METRICS,
    "enable_jit_checkpoint": "SIGTERM makes a run save a checkpoint anyway",
}
NEEDS = {  # what has no effect without another option
    "corruption_base_share": "corruption_rate",
    "guidance_dropout": "guidance_classes",
    "eval_budget_examples": "eval_budgets",
    "eval_sample_tokens": "eval_samples",
    "packing_strategy": "packing",
    "liger_kernel_config": "use_liger_kernel",
    "bnb_4bit_quant_type": "load_in_4bit",
    "bnb_4bit_compute_dtype": "load_in_4bit",
    "bnb_4bit_use_double_quant": "load_in_4bit",
    "dataloader_persistent_workers": "dataloader_num_workers",
}


def check_recipe(
    model: ModelArguments,
    data: DataArguments,
    training: L2DTrainingConfig,
    command: CommandArguments,
    set_options: set[str],
) -> None:
    """Refuse recipes that name what is not there or say something that would be ignored.

    Args:
        set_options: names of the options that the recipe or the command line sets.

    Raises `ValueError` with one sentence.
    """
    for name, remedy in ALWAYS_IGNORED.items():
        if name in set_options:
            raise ValueError(f"{name} would be ignored: {remedy}.")
    _refuse_foreign(model, set_options)
    options = {**vars(model), **vars(data), **vars(training)}
    for name, other in NEEDS.items():
        if name in set_options and options[name] and not options[other]:
            raise ValueError(f"{name} would be ignored: set {other} too, or leave it out.")
    _check_data(model, data, training)
    _check_loss_average(model, training)
    _check_quantization(model)
    if model.method == "l2d":
        _check_l2d(model, data, training)
    check_batches(training)
    check_best_model(model.method, training)
    check_sharding(model.method, set_options)
    if not command.dry_run:
        check_launch(training.distributed_state)
    if not command.dry_run:  # it makes no logger, sends nothing, and may run where others cannot
        check_packages(training)
        check_hub(training)


def _refuse_foreign(model: ModelArguments, set_options: set[str]) -> None:
    """Options of another method or variant."""
    foreign = set() if model.method == "l2d" else L2D_ONLY
    foreign = foreign | (set() if model.method == "lora_sft" else LORA_SFT_ONLY)
    if model.method == "full_sft" or (model.method == "l2d" and model.variant == "full"):
        foreign = foreign | {"lora_rank", "lora_alpha"}
    if ignored := sorted(foreign & set_options):
        kind = "variant full" if model.method == "l2d" else f"method {model.method}"
        raise ValueError(
            f"{', '.join(ignored)} would be ignored by {kind}: leave out, which --{ignored[0]} null does for one of "
            "a recipe, or choose another method."
        )


def _check_data(model: ModelArguments, data: DataArguments, training: L2DTrainingConfig) -> None:
    """Base and data: what is named must be there."""
    base = model.base or ""
    if os.path.isdir(base) or model.base_config is None:
        check_base(base, model.base_gguf_file)
    if model.tokenizer and looks_local(model.tokenizer) and not os.path.isdir(model.tokenizer):
        raise ValueError(f"tokenizer={model.tokenizer!r} is not a directory: give a directory or a hub name.")
    if model.base_revision is not None and os.path.isdir(base):
        raise ValueError(f"base_revision={model.base_revision!r} means nothing for a folder: leave it out.")
    check_file("eval_dataset", data.eval_dataset)
    for part, _ in data.entries():
        check_file("dataset", part.dataset)
        if part.dataset_config and os.path.isfile(str(part.dataset)):
            raise ValueError(f"dataset_config={part.dataset_config} means nothing for a file: leave it out.")
    if data.streaming and training.max_steps <= 0:
        raise ValueError("streaming=True reads data whose number is not known: set max_steps.")
    if data.streaming and training.packing:
        raise ValueError("packing=True needs all examples, and streaming reads them later: keep one.")
    if training.chat_template_path and not os.path.isfile(training.chat_template_path):
        raise ValueError(f"chat_template_path={training.chat_template_path!r} must be a Jinja file that exists.")
    if not data.has_eval and (training.eval_strategy != "no" or training.eval_on_start):
        raise ValueError("eval_strategy asks for evaluation, and there are no data: set eval_split or eval_holdout.")


def _check_quantization(model: ModelArguments) -> None:
    """What quantizes the base can be followed, by the variant and the launcher too."""
    check_quantization(vars(model))
    name = quantizing(vars(model))
    if name and model.variant == "full":
        raise ValueError(f"variant=full trains copies of the base's projections, and {name} quantizes them: use lora.")
    if name and sharded():
        raise ValueError(
            f"{name} was not tried with a sharded model: launch with training/accelerate_configs/ddp.yaml."
        )


def longest_example(config: PreTrainedConfig, base: str | None, max_length: int | None) -> int:
    """The longest example in tokens: `max_length`, or what a base of this `config` was made for."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    limit = max_length or longest
    if limit is None:
        raise ValueError(f"base={base!r} does not say how long its inputs may be: set max_length.")
    if longest is not None and limit > longest:
        raise ValueError(f"max_length={limit} is more than base={base!r} takes: use at most {longest}.")
    return limit


def _check_loss_average(model: ModelArguments, training: L2DTrainingConfig) -> None:
    """A baseline's loss is TRL's own, which knows no examples within a batch."""
    if model.method != "l2d" and training.loss_average == "example" and training.per_device_train_batch_size != 1:
        raise ValueError(
            f"loss_average=example with method {model.method} needs per_device_train_batch_size: 1, and it is "
            f"{training.per_device_train_batch_size}: set it (total_batch_size keeps the batch), or use token."
        )


def _check_l2d(model: ModelArguments, data: DataArguments, training: L2DTrainingConfig) -> None:
    refuse_ignored_by_l2d(training)
    for part, _ in data.entries():
        _check_guidance(model, part)
    _check_packing(model, training)
    config = model.l2d_config()
    check_objective(config, training)
    for budget in training.eval_budgets or []:
        config.check_sampler(config.default_sampler(budget=budget))
    if (training.eval_budgets or training.eval_samples) and not data.has_eval:
        raise ValueError("eval_budgets and eval_samples need evaluation data: set eval_split or eval_holdout.")


def refuse_ignored_by_l2d(training: L2DTrainingConfig) -> None:
    """Refuse trainer options that `L2DTrainer` would not follow, with a `ValueError` that names the flag."""
    switched_on = {
        "label_smoothing_factor": training.label_smoothing_factor != 0,
        "loss_type": training.loss_type != "nll",
        "neftune_noise_alpha": training.neftune_noise_alpha is not None,
        "activation_offloading": training.activation_offloading,
        "use_liger_kernel": training.use_liger_kernel,
        "router_aux_loss_coef": training.router_aux_loss_coef is not None,
        "eval_packing": bool(training.eval_packing),
        "activation_checkpointing_kwargs": bool(training.activation_checkpointing_kwargs),
        "torch_compile_mode": training.torch_compile_mode is not None,
        "bf16_full_eval": training.bf16_full_eval,
        "fp16_full_eval": training.fp16_full_eval,
        "model_init_kwargs": bool(training.model_init_kwargs),
        "truncation_mode": training.truncation_mode != "keep_start",
    }
    for name, on in switched_on.items():
        if on:
            also = " (gradient_checkpointing_kwargs)" if name == "activation_checkpointing_kwargs" else ""
            raise ValueError(f"{name}{also}={getattr(training, name)} cannot be followed by method l2d: leave it out.")
    if (training.eval_budgets or training.eval_samples) and sharded():
        raise ValueError("eval_budgets and eval_samples need the whole model on every device: not with sharding.")


def _check_packing(model: ModelArguments, training: L2DTrainingConfig) -> None:
    if not training.packing:
        return
    if training.max_length is None:
        raise ValueError("packing=True fills rows up to max_length, which is not set: set it.")
    if training.packing_strategy not in ("bfd", "bfd_split"):
        raise ValueError(
            f"packing_strategy={training.packing_strategy!r} lets one example see another: choose bfd for method l2d."
        )
    if model.guidance_classes:
        raise ValueError("packing=True keeps no class per example: use padding_free: true with guidance_classes.")


def _check_guidance(model: ModelArguments, data: DataArguments) -> None:
    classes = model.guidance_classes or []
    source = data.guidance_column or data.guidance_class is not None
    if source and not classes:
        raise ValueError("guidance_column and guidance_class need guidance_classes: list the names of the classes.")
    if classes and not source:
        raise ValueError(
            f"guidance_classes={classes} needs guidance_column or guidance_class: say which applies where."
        )
    mapped = mapping("guidance_map", data.guidance_map) or {}
    named = list(mapped.values()) if data.guidance_class is None else [data.guidance_class]
    for name in named:
        if name not in classes:
            raise ValueError(f"guidance class {name!r} is not among guidance_classes={classes}: add it, or correct it.")


def check_objective(config: L2DConfig, args: L2DTrainingConfig) -> None:
    """Refuse options that contradict each other or would have no effect, with a one-sentence `ValueError`."""
    rollout, window = args.rollout_evaluations, args.rollout_window
    if window is not None and rollout is None:
        raise ValueError(f"rollout_window={window} would be ignored: set rollout_evaluations too, or leave it out.")
    if window is not None and rollout is not None and window > rollout:
        raise ValueError(f"rollout_window={window} must be at most rollout_evaluations={rollout}.")
    if args.corruption_rate and rollout is not None:
        raise ValueError(
            f"corruption_rate={args.corruption_rate} changes the tokens that x_t is built from, and a rollout builds "
            "it from the path's own: leave corruption_rate or rollout_evaluations out."
        )
    if config.carried_state and rollout is None:
        raise ValueError("carried_state=True is trained over several evaluations: set rollout_evaluations, e.g. to 8.")
    if rollout is not None and args.time_power != 1:
        raise ValueError(f"time_power={args.time_power} would be ignored by a rollout, whose times are stratified.")
    if not config.noise_free:
        return
    useless = {
        "corruption_rate": args.corruption_rate != 0,
        "rollout_evaluations": rollout is not None,
        "draws": args.draws != 1,
        "eval_draws": args.eval_draws != 1,
        "time_power": args.time_power != 1,
        "min_noise": config.min_noise != 0,
    }
    for name, in_use in useless.items():
        if in_use:
            value = config.min_noise if name == "min_noise" else getattr(args, name)
            raise ValueError(f"{name}={value} has no effect on a path without noise: leave it out, or noise_free.")


# ---- what the trainer would find out later -----------------------------------------------------------------------


def check_batches(training: L2DTrainingConfig) -> None:
    """Batches stay as large as they were asked for, and there is something to resume from."""
    if training.auto_find_batch_size and training.total_batch_size is not None:
        raise ValueError("auto_find_batch_size changes the batch, and total_batch_size fixes it: keep one of them.")
    if training.save_only_model and training.resume_from_checkpoint not in NO_RESUME:
        raise ValueError("save_only_model saves nothing to resume from: leave it or resume_from_checkpoint out.")
    if training.accelerator_config.split_batches and training.total_batch_size is not None:
        raise ValueError("accelerator_config splits batches, and total_batch_size counts whole ones: keep one of them.")


def check_packages(training: L2DTrainingConfig) -> None:
    """The packages behind `report_to` are installed, and torch knows `torch_compile_backend`."""
    for name in training.report_to:
        one_of("report_to", name, ("none", *INTEGRATION_TO_CALLBACK))
        if name != "none":
            try:
                INTEGRATION_TO_CALLBACK[name]()
            except Exception as error:  # of any kind: loggers are packages of others
                raise ValueError(
                    f"report_to={name} cannot be followed: {str(error).rstrip('.')}; install what it needs, or set "
                    "report_to: none."
                ) from error
    if training.torch_compile:
        known = torch.compiler.list_backends(exclude_tags=())
        one_of("torch_compile_backend", training.torch_compile_backend, tuple(known))


def check_hub(training: L2DTrainingConfig) -> None:
    """What `push_to_hub` needs, as far as it can be seen from here: a hub to be reached, a name, a token."""
    if not training.push_to_hub:
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError("push_to_hub=True reaches no hub while HF_HUB_OFFLINE is set: unset one of them.")
    name = training.hub_model_id
    if name is None:  # as the trainer does
        name = os.path.basename(os.path.abspath(str(training.output_dir)))
    try:
        validate_repo_id(name)
    except ValueError as error:
        what = f"hub_model_id={name!r}" if training.hub_model_id is not None else f"the name of output_dir, {name!r},"
        raise ValueError(
            f"{what} cannot be a model's name for push_to_hub: set hub_model_id to OWNER/NAME, with letters, digits, "
            "'-', '_' and '.' only."
        ) from error
    if RANK == 0 and not (training.hub_token or get_token()):  # the others send nothing
        raise ValueError("push_to_hub=True needs a token: run hf auth login, or set HF_TOKEN or hub_token.")


def check_best_model(method: str, training: L2DTrainingConfig) -> None:
    """`load_best_model_at_end` has something to choose from, and `metric_for_best_model` is measured."""
    if training.load_best_model_at_end and training.eval_strategy == "no":
        raise ValueError("load_best_model_at_end would be ignored: set eval_strategy and save_strategy too.")
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    if method != "l2d" or metric in ("loss", "accuracy") or metric.startswith(("loss_t_", "accuracy_t_")):
        return
    budgets = [f"accuracy_budget_{budget}" for budget in training.eval_budgets or []]
    if metric not in budgets:
        raise ValueError(
            f"metric_for_best_model={training.metric_for_best_model!r} is not measured: choose one of "
            f"{', '.join(['loss', 'accuracy', *budgets])}, or one of a bin of time, such as loss_t_0.00_0.25."
        )


def sharded() -> bool:
    """Whether `accelerate launch` was asked to shard the model."""
    return any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))


def check_launch(state: PartialState | AcceleratorState) -> None:
    """Raise `ValueError` if accelerate's `state` of this process is not what `accelerate launch` was told to start.

    On CPUs accelerate turns a sharded launch into plain data parallel, or into processes that train alone. Only the
    `AcceleratorState` knows whether DeepSpeed is used.
    """
    processes, kind, device = int(os.environ.get("WORLD_SIZE", "1")), state.distributed_type, state.device.type
    unsharded = (DistributedType.NO, DistributedType.MULTI_CPU)
    kinds = {"FSDP": "FSDP"} | ({"DEEPSPEED": "DeepSpeed"} if isinstance(state, AcceleratorState) else {})
    for name, words in kinds.items():
        if os.environ.get(f"ACCELERATE_USE_{name}") == "true" and kind in unsharded:
            raise ValueError(
                f"the launch configuration asks for {words}, and accelerate {accelerate.__version__} does not shard on "
                f"this {device}: launch with training/accelerate_configs/cpu_2.yaml on CPUs."
            )
    if processes > 1 and (state.num_processes != processes or kind == DistributedType.NO):
        raise ValueError(
            f"accelerate launch started {processes} processes, and on this {device} each of them would train alone: "
            "set use_cpu: true on CPUs, or launch one process."
        )


def check_sharding(method: str, set_options: set[str]) -> None:
    """What the launcher asks for is what the method can do."""
    if launched := sorted({"fsdp", "fsdp_config", "deepspeed"} & set_options):
        raise ValueError(
            f"{launched[0]} is the launcher's: leave it out and use accelerate launch --config_file with one of "
            "training/accelerate_configs."
        )
    if method == "l2d" and sharded() and "max_evaluations_per_pass" in set_options:
        raise ValueError(
            "max_evaluations_per_pass would be ignored with sharding, where all evaluations go at once: leave it out."
        )
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    if os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT") != "FULL_STATE_DICT":
        raise ValueError("fsdp_state_dict_type would leave no model in output_dir: set it to FULL_STATE_DICT.")
    if (version := os.environ.get("FSDP_VERSION")) != "2":
        raise ValueError(f"fsdp_version={version} is not supported: set it to 2.")
