"""Trainers whose state is spread over processes, by FSDP2 or DeepSpeed ZeRO, and how it is saved whole.

- `ShardedCheckpoints`: mixed into a trainer, trained weights in float32, and checkpoints of them and nothing else
- `whole_loading`: weights are loaded whole and spread when training begins
- `gather_by_layer`: what ZeRO-3 gathers at a time of an L2D model
- `part_of`: what a process holds of a parameter

By themselves both save the frozen base with every checkpoint, and ZeRO would round trained weights to bfloat16 and
unpickle checkpoints to read them. Here trained weights stay in float32 under autocast, as they do in one process. A
checkpoint holds them whole, as the model's own files, and the optimizer: one file (`optimizer.bin`, FSDP), or each
process's share (`zero_RANK.pt`, DeepSpeed, tensors and plain values).
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import safetensors.torch
import torch
from accelerate.utils import save_fsdp_optimizer
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME

from l2d.network.quantized import is_quantized
from training.checkpointing.resume import check_same_model
from training.checks import check_launch
from training.optimization import Optimization


@contextlib.contextmanager
def whole_loading(training: Any) -> Iterator[None]:
    """Load weights whole inside, also for ZeRO-3, which would leave shards that no path can be built from."""
    plugin = training.deepspeed_plugin
    if plugin is not None:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            plugin.set_deepspeed_weakref()


def part_of(parameter: Any) -> torch.Tensor:
    """The elements of a parameter that this process holds."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter


def gather_by_layer(model: Any, device: torch.device) -> None:
    """Let ZeRO-3 gather an `L2DForCausalLM` one layer at a time, and once per loss what is used outside of layers.

    By itself it gathers what a module's call uses. The path also reads the base's norms, of which it gets copies, its
    embedding and its output head, the latter once per chunk of logits: processes have different numbers of these, and
    would wait for each other.
    """
    from deepspeed.utils import set_z3_leaf_modules  # an extra

    set_z3_leaf_modules(model, list({type(layer) for layer in (*model.paths.decoder.layers, *model.path.layers)}))
    for layer in model.path.layers:
        layer.twin.copy_norms(device)
    shared = model.paths.outside_layers()
    model.paths.whole = lambda: _zero().GatheredParameters(shared)


def _zero() -> Any:
    import deepspeed  # an extra

    return deepspeed.zero


class ShardedCheckpoints(Optimization):
    """A trainer that FSDP2 or DeepSpeed may spread over processes; without them it changes nothing.

    Raises `ValueError` for a launch that would not do what it was configured to do.
    """

    model: Any
    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        check_launch(self.accelerator.state)
        self._sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self._sharded:
            self._keep_float32()

    @property
    def _zero_stage(self) -> int:
        return self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0

    def _keep_float32(self) -> None:
        """Trained weights in float32, used under autocast, where the library would round them before they are used."""
        if self.args.fp16:
            raise ValueError("fp16=True with sharding would round the trained weights: use bf16: true.")
        if self._zero_stage == 3 and is_quantized(getattr(self.model, "base", self.model)):
            raise ValueError("ZeRO-3 cannot spread the weights of a quantized base: launch with fsdp2.yaml.")
        for _, parameter in self._trained():
            parameter.data = parameter.data.float()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
            return
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config
        if self.args.bf16:
            config["bf16"]["enabled"] = False
            # Without modules that it would be safe for, gradients are summed in float32.
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> contextlib.AbstractContextManager:
        """Autocast for models that are sharded; accelerate does it for all others."""
        if not (self._sharded and self.args.bf16):
            return contextlib.nullcontext()
        return torch.autocast(self.args.device.type, torch.bfloat16)

    def _trained(self) -> list[tuple[str, Any]]:
        """Names and weights, the latter as they are spread: FSDP keeps some whole after an evaluation."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return self._of_checkpoints()

    def _of_checkpoints(self) -> list[tuple[str, Any]]:
        """Names and weights of what a checkpoint holds."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def _whole(self, parameters: list[Any], change: bool = False) -> contextlib.AbstractContextManager:
        """Whole inside, also if ZeRO-3 spread them; with `change`, what the first process makes of them is kept."""
        if self._zero_stage != 3:
            return contextlib.nullcontext()
        return _zero().GatheredParameters(parameters, modifier_rank=0 if change else None)

    # ---- the model -----------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; of one that is spread, the trained tensors, gathered one by one."""
        if not self._sharded:
            super().save_model(output_dir, _internal_call)
            return
        whole = {}
        for name, parameter in self._trained():
            with self._whole([parameter]):
                tensor = parameter.detach()
                tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.args.should_save:
                    whole[name] = tensor.cpu().clone()
        self._save(output_dir, state_dict=whole)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def save_whole(self, model: Any, output_dir: str) -> None:
        """Write `model`, which is whole, as the trainer would write its own."""
        kept, self.model = self.model, model
        try:
            self._save(output_dir)
        finally:
            self.model = kept

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the trained tensors of a model that may be spread, all of them and nothing else."""
        names = (ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME)
        paths = [path for name in names if os.path.isfile(path := os.path.join(resume_from_checkpoint, name))]
        if not paths or not self._loads_by_name():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        check_same_model(resume_from_checkpoint, self.model)
        saved = safetensors.torch.load_file(paths[0])
        trained = {name.replace(".default.", "."): parameter for name, parameter in self._trained()}  # as PEFT saves
        if different := sorted(saved.keys() ^ trained.keys()):
            raise ValueError(
                f"{paths[0]} does not fit the recipe's model: {len(different)} tensors differ, {different[0]!r} first."
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                if isinstance(parameter, DTensor):  # every process has read the whole tensor, and keeps its shard
                    whole = saved[name].to(parameter.device, parameter.dtype)
                    mesh, placements = parameter.device_mesh, parameter.placements
                    parameter.copy_(distribute_tensor(whole, mesh, placements, src_data_rank=None))
                else:
                    parameter.copy_(saved[name])

    def _loads_by_name(self) -> bool:
        return self._sharded

    def _load_best_model(self) -> None:
        if not self._sharded:
            super()._load_best_model()
            return
        with self._whole([parameter for _, parameter in self._trained()], change=True):
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- the optimizer -------------------------------------------------------------------------------------------

    def _shares(self) -> tuple[Any, list[torch.Tensor]]:
        """DeepSpeed's optimizer that steps, and this process's flat shares of the weights, which it steps on."""
        zero: Any = self.optimizer.optimizer
        stage3 = getattr(zero, "fp32_partitioned_groups_flat", None)
        return zero.optimizer, stage3 if stage3 is not None else zero.single_partition_of_fp32_groups

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        os.makedirs(output_dir, exist_ok=True)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        else:
            optimizer, shares = self._shares()
            settings = [
                {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
            ]
            content = {"state": [dict(optimizer.state[share]) for share in shares], "settings": settings}
            torch.save(content, self._share_file(output_dir))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.is_deepspeed_enabled or checkpoint is None:
            return
        optimizer, shares = self._shares()
        content = torch.load(self._share_file(checkpoint), weights_only=True)  # every tensor to the device it was on
        for share, state in zip(shares, content["state"], strict=True):
            optimizer.state[share] = state
        for group, settings in zip(optimizer.param_groups, content["settings"], strict=True):
            group.update(settings)

    def _share_file(self, folder: str) -> str:
        return os.path.join(folder, f"zero_{self.args.process_index}.pt")

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """With DeepSpeed, a checkpoint's weights are loaded before it spreads them, its optimizer's state after."""
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared
