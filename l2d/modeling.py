"""`L2DForCausalLM`: a frozen base with a trained diffusion path beside it.

- `from_base`: a new model; `from_pretrained`, `save_pretrained`: only trained tensors are on disk
- `forward`: the base's logits, or the training loss at given sites
- `generate`, `score`, `solve`: see `generation.py`, `scoring.py` and `sampling/solve.py`

It is what transformers sees; the computation is in `TwoPaths`, the model's attribute `paths`.
Legend: B rows, S positions, Q sites per row, V vocabulary, d diffusion dimension.
"""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from l2d.checkpoint import bases
from l2d.checkpoint.loading import load_parts, refuse_offloaded
from l2d.checkpoint.opening import Checkpoint
from l2d.config import L2DConfig, SamplerConfig
from l2d.generation import generate
from l2d.integrity import fingerprint, tensors_digest
from l2d.loss import L2DTrainingOutput, diffusion_loss
from l2d.network.attention import leave_out_cudnn
from l2d.network.diffusion_path import NoisedTargets
from l2d.network.main_path import MainPathState
from l2d.network.two_paths import TwoPaths
from l2d.sampling.solve import Solution, solve
from l2d.scoring import ScoreOutput, score

__all__ = ["L2DConfig", "L2DForCausalLM", "L2DTrainingOutput"]
logger = logging.get_logger(__name__)


class L2DForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal LM that can spend a chosen budget of evaluations on every token.

    Build it with `from_base` (fresh path) or `from_pretrained` (trained path); `base` is never changed.
    """

    config_class = L2DConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules: list[str] = ["DiffusionLayer"]

    def __init__(self, config: L2DConfig, base: PreTrainedModel | None = None):
        if base is None:
            raise ValueError(
                "L2DForCausalLM needs its base model: use L2DForCausalLM.from_base(base) for a fresh path or "
                "L2DForCausalLM.from_pretrained(folder) for a trained one."
            )
        if isinstance(base, L2DForCausalLM):
            raise ValueError("base is itself an L2D model; give the model that it was built on (its attribute `base`).")
        super().__init__(config)
        refuse_offloaded(base)
        leave_out_cudnn()
        self.base = base.requires_grad_(False).eval()
        self.paths = TwoPaths(config, base)
        self.path = self.paths.path
        frozen = {id(parameter) for parameter in base.parameters()}
        self._trained_names = tuple(
            name for name, parameter in self.path.named_parameters("path") if id(parameter) not in frozen
        )
        device = base.get_input_embeddings().weight.device
        for layer in self.path.layers:  # on the device of the base's layer
            for part in layer.own_parts():
                part.to(next(layer.twin.parameters()).device)
        for name, parameter in self.trained_parameters():
            placed = parameter.data if name.startswith("path.layers.") else parameter.data.to(device)
            parameter.data = placed.float()
            parameter.requires_grad_(True)
        if devices := getattr(base, "hf_device_map", None):  # each layer of the path is on the device of the base's
            self.hf_device_map = {f"base.{name}".rstrip("."): device for name, device in devices.items()}
        self.generation_config = copy.deepcopy(base.generation_config)
        for module in self.modules():  # nothing here may be initialised a second time
            module._is_hf_initialized = True
        self.post_init()

    # ---- building, loading, saving -------------------------------------------------------------------------------

    @classmethod
    def from_base(
        cls, base: PreTrainedModel | str | os.PathLike, config: L2DConfig | None = None, **load_kwargs: Any
    ) -> "L2DForCausalLM":
        """A fresh model around `base`, which is loaded with `load_kwargs` where it is a hub name or a folder.

        It may be a model, an adapter of PEFT, which is merged into its base, or with `gguf_file` a file of the folder;
        `load_in_4bit=True` and the like quantize it, see `QUANTIZATION`.
        At initialisation the path changes nothing: every budget gives the base's own logits.
        """
        config = copy.deepcopy(config) if config is not None else L2DConfig()
        if not isinstance(base, (PreTrainedModel, str, os.PathLike)):
            raise ValueError(
                f"base is a {type(base).__name__}: give a model of transformers (compile it afterwards; with an "
                "adapter merged), a hub name or a folder, which may be an adapter's."
            )
        if not isinstance(base, PreTrainedModel):
            for name, recorded in (("revision", "base_revision"), ("gguf_file", "base_gguf_file")):
                load_kwargs[name] = load_kwargs.get(name, getattr(config, recorded))
                setattr(config, recorded, load_kwargs[name])
            base = bases.load_base(base, **load_kwargs)
        config.base_name_or_path = config.base_name_or_path or bases.base_name(base)
        bases.describe_base(config, base)
        refuse_offloaded(base)
        config.base_fingerprint = None if next(base.parameters()).is_meta else fingerprint(base)
        model = cls(config, base=base)
        if config.base_name_or_path:  # one without a name may get it before it is saved
            model.warn_of_lost_base()
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Checkpoint | str | os.PathLike,
        *model_args: Any,
        base: PreTrainedModel | str | os.PathLike | None = None,
        config: L2DConfig | None = None,
        **kwargs: Any,
    ) -> "L2DForCausalLM":
        """Load a trained checkpoint (open, a folder or a name on the hub) and its base.

        Args:
            base: the base, where it is not in its recorded place: a folder, hub name or loaded model of equal weights.
            kwargs: `dtype`, `device_map`, `trust_remote_code`, ... for the base; `token`, `cache_dir`,
                `local_files_only` and `force_download` for both, `revision` and `subfolder` for the checkpoint.

        Raises `ValueError` for arguments that would have no effect, where the base is missing or another one, where a
        tensor is missing, unexpected, of another shape or not finite, and where the tensors are not those that were
        saved (see `digest`).
        """
        parts = load_parts(pretrained_model_name_or_path, base=base, config=config, **kwargs)
        model = cls(parts.config, base=parts.base)
        parts.fill(dict(model.trained_parameters()))
        if parts.config.variant == "full":  # copies of the base's projections run in the base's dtype
            for name, parameter in model.trained_parameters():
                if ".twin." in name:
                    parameter.data = parameter.data.to(parts.base.dtype)
        if parts.generation_config is not None:
            model.generation_config = parts.generation_config
        model.name_or_path = parts.name
        return model.eval()

    def save_pretrained(self, save_directory: str | os.PathLike, state_dict: dict | None = None, **kwargs: Any) -> None:
        """Write `config.json`, `generation_config.json` and the trained tensors (safetensors), never the base.

        `config.json` records a digest of the tensors, which is compared when they are loaded. Raises `OSError` where
        the disk is full.
        """
        full = self.state_dict() if state_dict is None else state_dict
        missing = [name for name in self._trained_names if name not in full]
        if missing:
            raise ValueError(f"state_dict lacks {len(missing)} trained tensors, {missing[0]!r} first.")
        trained = {name: full[name].contiguous() for name in self._trained_names}
        if kwargs.get("is_main_process", True):
            self.warn_of_lost_base()
            if os.path.isfile(save_directory):
                raise ValueError(f"save_directory={os.fspath(save_directory)!r} is a file: give a folder.")
            self.config.tensors_digest = tensors_digest(trained, self.config.warm_start)
        try:
            super().save_pretrained(save_directory, state_dict=trained, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"save_directory={os.fspath(save_directory)!r} could not be written to its end ({error}): make room "
                "and save again, what is there now will not load."
            ) from error

    def warn_of_lost_base(self) -> None:
        """Warn, once for each reason, where the base that is recorded is not this one or could not be loaded."""
        if reason := bases.cannot_come_back(self.config, self.base):
            logger.warning_once(f"A checkpoint of this L2D model will not load by itself: {reason}.")

    def trained_parameters(self):
        """Iterate over (name, parameter) of all trained weights, in a fixed order."""
        for name in self._trained_names:
            yield name, self.get_parameter(name)

    def _init_weights(self, module: nn.Module) -> None:
        """Everything is initialised where it is built."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """The base ties its own weights."""

    def train(self, mode: bool = True) -> "L2DForCausalLM":
        """Set the path's mode; the base stays in evaluation mode.

        Everything that was computed from the weights for inference is dropped, so changes of `parameter.data` count.
        """
        super().train(mode)
        self.base.eval()
        self.paths.forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """State for pickles and copies, of which packed weights cannot be a part."""
        self.paths.release()
        return super().__getstate__()

    def _refuse_change(self, *args: Any, **kwargs: Any) -> Any:
        """Raise `ValueError`: the base is frozen, and its twin and fingerprint belong to it as it is."""
        raise ValueError(
            "the base of an L2D model cannot be changed (resized embeddings, added adapters, other modules): change "
            "the base by itself, save it, and start from it with L2DForCausalLM.from_base."
        )

    resize_token_embeddings = set_input_embeddings = set_output_embeddings = _refuse_change
    add_adapter = load_adapter = _refuse_change

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = torch_checkpoint, every_n_layers: int = 1
    ) -> None:
        """Recompute the diffusion path's layers in the backward pass; the main path keeps nothing anyway."""
        self.path.checkpointing = (gradient_checkpointing_func, every_n_layers) if enable else None

    def enable_input_require_grads(self) -> None:
        """Nothing to do: gradients start in the diffusion path."""

    def disable_input_require_grads(self) -> None:
        """Nothing to do: gradients start in the diffusion path."""

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether the path's layers are recomputed in the backward pass."""
        return self.path.checkpointing is not None

    def get_input_embeddings(self) -> nn.Module:
        """The base's input embedding."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The base's output head."""
        return self.base.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        """The base's decoder stack."""
        return self.base.get_decoder()

    # ---- forward --------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        noised_targets: NoisedTargets | None = None,
        state: MainPathState | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | L2DTrainingOutput:
        """The base's output, bit for bit (t = 0), or with `noised_targets` the loss of the diffusion path.

        Args:
            input_ids, attention_mask, position_ids: (B, S); without a mask, restarting positions are packed documents.
            noised_targets: targets at response positions; the main path then runs without autograd state.
            state: the main path of these inputs, from the output of an earlier call; it is then not run again.
        """
        if noised_targets is None:
            return self.base(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        if state is None:
            if input_ids is None:
                raise ValueError("noised_targets need input_ids, or the state of an earlier call: pass one of them.")
            state = self.paths.main_path(input_ids, attention_mask, position_ids)
        with self.paths.whole():
            return diffusion_loss(self.paths, state, noised_targets)

    # ---- inference -----------------------------------------------------------------------------------------------

    def compile_path(self, backend: str = "inductor") -> None:
        """Compile what follows attention in every layer of the path; on CUDA in half precision as CUDA graphs.

        Results are equal to rounding, and so are tokens where rounding does not decide them. It takes some seconds,
        here and at the first calls, and memory for merged weights if there is room; it lasts as long as the model.
        Raises `ValueError` where nothing can be compiled, for example without a C++ compiler.
        """
        self.paths.compile(backend)

    def sampler(self, sampler: SamplerConfig | dict[str, Any] | None = None) -> SamplerConfig:
        """Sampler settings: the checkpoint's defaults overridden by `sampler`, as this model can follow them."""
        requested = self.config.default_sampler(sampler)
        used = self.config.check_sampler(requested)
        if requested.speculation and not used.speculation and not used.is_base:
            logger.warning_once(
                "This model carries a state from one evaluation to the next: evaluations run in sequence, and "
                "speculation along the trajectory is off."
            )
        return used

    def solve(
        self,
        state: MainPathState,
        index: torch.Tensor,
        x0: torch.Tensor,
        sampler: SamplerConfig | dict[str, Any] | None = None,
        classes: torch.Tensor | None = None,
        record: bool = True,
        uniforms: torch.Tensor | None = None,
    ) -> Solution:
        """Integrate from start noise `x0` (B, Q, d) at positions `index` (B, Q) of `paths.main_path`; see `solve`."""
        return solve(self.paths, state, index, x0, self.sampler(sampler), classes, record, uniforms)

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        sampler: SamplerConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Decode token by token with the L2D sampler; see `generation.generate` for all arguments.

        `sampler` overrides the checkpoint's settings; `{"budget": 1}` is the base model.
        """
        return generate(self, self.paths, self.sampler(sampler), inputs, **kwargs)

    def score(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        sampler: SamplerConfig | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> ScoreOutput:
        """Log-probabilities of given continuations; see `scoring.score` for all arguments."""
        return score(self.paths, self.sampler(sampler), input_ids, attention_mask, **kwargs)


AutoModelForCausalLM.register(L2DConfig, L2DForCausalLM, exist_ok=True)
