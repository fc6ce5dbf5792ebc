"""The path's layers: twins of the base's decoder layers with shared frozen weights and trained deltas or copies.

- `build_twin`: one `TwinLayer` per layer of the base, with LoRA injected or parameters cloned
- `TwinLayer`: attention and MLP of one layer with modulated norms, for every known layout of norms
- `ModulatedNorm`: a frozen norm of the base plus a trained scale and shift

No modelling code is copied: a structural copy of the base's own modules shares all their tensors, so a base that
transformers can run is a base that the path can follow, as long as its layout of norms is one of `_LAYOUTS`.
"""

import copy
import inspect
import itertools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from l2d.config import L2DConfig
from l2d.network.attention import IMPLEMENTATION, SiteLayout
from l2d.network.compiled import compiled, with_graphs
from l2d.network.embeddings import at_least_float32
from l2d.network.main_path import Decoder, LayerState
from l2d.network.quantized import FrozenLinear, known_linear, plain_tensor, quantized_linear

ADAPTER = "diffusion"
_UNUSED_PROJECTIONS = ("k_proj", "v_proj", "kv_a_proj_with_mqa", "kv_b_proj")  # the latter two: latent attention
_MLPS = ("mlp", "block_sparse_moe", "shared_mlp")
_ROUTERS = {"gate", "router"}
# What the path hands to attention, and what it may leave out.
_INPUTS = ("hidden_states", "position_embeddings", "attention_mask", "position_ids")
_OPTIONAL_INPUTS = ("past_key_values", "past_key_value", "use_cache", "cache_position", "output_attentions")
# Norms before and after attention, before and after the MLP, by the names that transformers gives them.
_LAYOUTS: tuple[tuple[str | None, str | None, str | None, str | None], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", None, "pre_feedforward_layernorm", None),
    ("attention_layernorm", None, "feedforward_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)
_ZEROS: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}  # one row each, for every unused projection
_NORMS = frozenset(name for layout in _LAYOUTS for name in layout if name is not None)


class NoProjection(nn.Module):
    """Replaces a projection whose result is not used, such as keys and values of the path: they are the main path's."""

    def __init__(self, features: int):
        super().__init__()
        self.features = features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Zeros (..., O) for (..., I)."""
        key = (hidden.device, hidden.dtype, self.features)
        if key not in _ZEROS:
            _ZEROS[key] = torch.zeros(self.features, device=hidden.device, dtype=hidden.dtype)
        return _ZEROS[key].expand(*hidden.shape[:-1], self.features)


def _normalised(x: torch.Tensor, eps: Any, centred: bool) -> torch.Tensor:
    normalise: Any = nn.functional.layer_norm if centred else nn.functional.rms_norm
    return normalise(at_least_float32(x), x.shape[-1:], eps=eps)


class ModulatedNorm:
    """`xhat * (g + scale) + b + shift` with the base's frozen weight `g` and bias `b`; xhat is the normalised input.

    RMS norms have no `b`, and the method is published for them; LayerNorm, whose xhat is centred, is our reading of it.
    Not a module: the weights stay the base's. What a norm computes (Gemma stores `g - 1`) is determined by a probe.
    """

    def __init__(self, norm: Any):
        self.norm = norm
        self.eps = next((getattr(norm, name) for name in ("variance_epsilon", "eps") if hasattr(norm, name)), None)
        self.centred, self.plus_one = self._kind(norm)

    def _kind(self, norm: Any) -> tuple[bool, bool]:
        """Whether it centres its input, and whether it stores `g - 1`."""
        own = dict(norm.named_parameters())
        if "weight" in own and own.keys() <= {"weight", "bias"} and self.eps is not None:
            x = torch.linspace(-1, 2, norm.weight.numel())
            memo: dict[int, object] = {id(p): nn.Parameter(x.cos() + i) for i, p in enumerate(own.values())}
            probe = _without_placement(copy.deepcopy(norm, {**memo, **_placement(norm)}))
            bias = probe.bias if "bias" in own else 0.0
            with torch.no_grad():
                result = probe(x)
                for centred, plus_one in itertools.product((False, True), repeat=2):
                    xhat = _normalised(x, self.eps, centred)
                    if torch.allclose(result, xhat * (probe.weight + plus_one) + bias, atol=1e-5):
                        return centred, plus_one
        raise ValueError(
            f"base models with {type(norm).__name__} norms are not supported: L2D modulates RMS norms and layer norms "
            "that have a weight."
        )

    def weight(self) -> torch.Tensor:
        """The frozen weight `g` (H,), to which a scale is added."""
        weight = at_least_float32(self.norm.weight)
        return weight + 1.0 if self.plus_one else weight

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Inputs, weights `g + scale` and shifts, each (..., H), to (..., H) in the dtype of `x`; in float32."""
        shift = at_least_float32(shift)
        if getattr(self.norm, "bias", None) is not None:
            shift = shift + at_least_float32(self.norm.bias)
        return torch.addcmul(shift, _normalised(x, self.eps, self.centred), weight).to(x.dtype)


class TwinLayer(nn.Module):
    """Attention and MLP of one base layer, as the diffusion path uses them."""

    def __init__(
        self,
        layer: nn.Module,
        slots: dict[str, nn.Module | None],
        attention: nn.Module,
        mlp: nn.Module,
        variant: str,
    ):
        super().__init__()
        self.self_attn, self.mlp, self.variant = attention, mlp, variant
        inner = (slots["attention_in"] or slots["attention_out"], slots["mlp_in"] or slots["mlp_out"])
        self._modulated = tuple(ModulatedNorm(norm) for norm in inner)
        self._before = (slots["attention_in"] is not None, slots["mlp_in"] is not None)
        # Frozen norms after the block where there is one before it too (Gemma 2 and 3); kept out of our parameters.
        self._after = tuple(
            slots[f"{name}_out"] if slots[f"{name}_in"] is not None else None for name in ("attention", "mlp")
        )
        self._multiplier = getattr(layer, "residual_multiplier", None)
        self.backend: str | None = None  # of torch.compile, for `transform`

    def stream_dtype(self, base_dtype: torch.dtype) -> torch.dtype:
        """Dtype of the hidden stream: the base's, or that of the trained copies where they are kept in float32."""
        copies = [p.dtype for p in self.parameters() if p.requires_grad] if self.variant == "full" else []
        return copies[0] if copies else base_dtype

    def copy_norms(self, device: torch.device) -> None:
        """From now on, modulate copies of the base's norms on `device`, for trainers that spread the base's weights."""
        self._modulated = tuple(ModulatedNorm(copy.deepcopy(one.norm).to(device)) for one in self._modulated)

    def modulated_norms(self) -> tuple[nn.Module, nn.Module]:
        """The base's norms that are modulated, of attention and MLP."""
        return self._modulated[0].norm, self._modulated[1].norm

    def norm_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Frozen weights (H,) of the two modulated norms."""
        return self._modulated[0].weight(), self._modulated[1].weight()

    def attend(
        self, hidden: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, layout: SiteLayout, layer: LayerState
    ) -> torch.Tensor:
        """What attention adds to the stream (..., H), evaluations in flat order, before its gate."""
        inputs = self._modulated[0](hidden, weight, shift) if self._before[0] else hidden
        answered = layout.answered
        output = self.self_attn(
            hidden_states=inputs.flatten(0, -2).unsqueeze(0),
            position_embeddings=layout.rotary(layer),
            position_ids=layout.position_ids(inputs.device),
            attention_mask=None,
            past_key_values=None,
            main_path=(layout, layer),
        )[0].view(inputs.shape)
        if layout.answered != answered + 1:
            raise ValueError(
                f"base models with {type(self.self_attn).__name__} are not supported: their attention is not one call "
                "of transformers' attention interface."
            )
        return self._finish(0, output, weight, shift)

    def transform(self, hidden: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """What the MLP adds to the stream (..., H), before its gate."""
        run: Any = TwinLayer._transform
        if self.backend is not None:
            run = compiled(run, self.backend, with_graphs(self.backend, hidden))
        return run(self, hidden, weight, shift)

    def _transform(self, hidden: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        inputs = self._modulated[1](hidden, weight, shift) if self._before[1] else hidden
        output = self.mlp(inputs.flatten(0, -2).unsqueeze(0))
        output = (output[0] if isinstance(output, tuple) else output).view(inputs.shape)
        return self._finish(1, output, weight, shift)

    def _finish(self, block: int, output: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        if not self._before[block]:
            output = self._modulated[block](output, weight, shift)
        elif (after := self._after[block]) is not None:
            output = after(output)
        return output if self._multiplier is None else output * self._multiplier


def _parts(layer: Any, model_type: str) -> tuple[nn.Module, nn.Module]:
    """Attention and MLP of a layer, of whatever kind the MLP is."""
    attention = getattr(layer, "self_attn", None)
    mlp = next((part for name in _MLPS if isinstance(part := getattr(layer, name, None), nn.Module)), None)
    if isinstance(attention, nn.Module) and mlp is not None:
        return attention, mlp
    raise ValueError(
        f"base model type {model_type!r} is not supported: its {type(layer).__name__} has no `self_attn` with an `mlp` "
        "(layers that mix positions otherwise, by a recurrence for example, have no keys and values to look at)."
    )


def _norm_slots(layer: nn.Module) -> dict[str, nn.Module | None]:
    """Which norms a layer has before and after its attention and its MLP."""
    norms: dict[str | None, nn.Module | None] = {
        name: part for name, part in layer.named_children() if name in _NORMS and part is not None
    }
    for layout in _LAYOUTS:
        if norms.keys() == set(layout) - {None}:
            slots = ("attention_in", "attention_out", "mlp_in", "mlp_out")
            return {slot: norms.get(name) for slot, name in zip(slots, layout, strict=True)}
    raise ValueError(
        f"base models with {type(layer).__name__} layers are not supported: L2D knows layers with norms before "
        "attention and MLP, around both, or after both, and this one has another layout (parallel blocks, for example)."
    )


def _unknown_inputs(module: nn.Module, known: tuple[str, ...]) -> list[str]:
    """Arguments of a module's forward that are not in `known`."""
    inputs = inspect.signature(module.forward).parameters.values()
    named = [p.name for p in inputs if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return [name for name in named if name not in known]


def _refuse_unknown_parts(layer: Any, known: list[nn.Module], model_type: str) -> None:
    """Raise `ValueError` for a layer that does more than its attention, its MLP and its norms, all `known`, do."""
    attention = known[0]
    covered = {id(parameter) for module in known for parameter in module.parameters()}
    parts = [name for name, parameter in layer.named_parameters() if id(parameter) not in covered]
    parts += [
        name
        for name, value in vars(layer).items()
        if isinstance(value, float) and name != "residual_multiplier" and "dropout" not in name
    ]
    parts += [f"input {name}" for name in _unknown_inputs(layer, _INPUTS + _OPTIONAL_INPUTS)]
    parts += [f"self_attn({name})" for name in _unknown_inputs(attention, _INPUTS + _OPTIONAL_INPUTS)]
    for name, part in attention.named_modules():  # parts with keys of their own, such as an indexer
        if name and "past_key_values" in inspect.signature(part.forward).parameters:
            parts.append(f"self_attn.{name}")
    takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(attention.forward).parameters.values())
    if not takes_more or not hasattr(attention, "config"):
        parts.append("self_attn")
    if parts:
        raise ValueError(
            f"base model type {model_type!r} is not supported: its {type(layer).__name__} has parts that the "
            f"diffusion path would leave out or cannot call ({', '.join(parts[:3])})."
        )


def structural_copy(module: nn.Module, config: PreTrainedConfig | None = None) -> nn.Module:
    """A copy of the module tree that shares every parameter and buffer with the original."""
    memo: dict[int, object] = {id(t): t for t in itertools.chain(module.parameters(), module.buffers())}
    memo |= {id(m): FrozenLinear(m) for m in module.modules() if quantized_linear(m)}
    memo |= _placement(module)
    original = getattr(module, "config", None)
    if original is not None:
        memo[id(original)] = config if config is not None else original
    return _without_placement(copy.deepcopy(module, memo))


def _placement(module: nn.Module) -> dict[int, object]:
    """Hooks by which accelerate moves inputs to a module's device, as a memo that keeps copies from copying them."""
    return {id(hook): hook for part in module.modules() if (hook := getattr(part, "_hf_hook", None)) is not None}


def _without_placement(module: nn.Module) -> Any:
    """A copy without such hooks: the path itself moves its stream to the device of each layer."""
    for part in module.modules():
        if vars(part).pop("_hf_hook", None) is not None:
            vars(part).pop("_old_forward", None)
            vars(part).pop("forward", None)
    return module


def _refuse_adapters(base: nn.Module) -> None:
    """Raise `ValueError` for a base with layers that PEFT has put its own around."""
    wrapped = [name for name, module in base.named_modules() if type(module).__module__.split(".")[0] == "peft"]
    if wrapped:
        raise ValueError(
            f"the base has adapters in it ({wrapped[0]}): give the adapter's folder or hub name as base, or merge it "
            "first with merge_and_unload() and save the result."
        )


def _refuse_unknown_linears(attention: nn.Module, mlp: nn.Module) -> None:
    """Raise `ValueError` for linear layers of a class on top of which nothing would be trained."""
    for module in (attention, mlp):
        part: Any
        for name, part in module.named_modules():
            multiplies = type(part).__name__.endswith("Linear") or isinstance(part, nn.Linear)
            multiplies |= hasattr(part, "in_features") and hasattr(part, "out_features")
            multiplies |= module is attention and name in _UNUSED_PROJECTIONS
            multiplies &= module is attention or _ROUTERS.isdisjoint(name.split("."))
            codes = not all(plain_tensor(parameter) for parameter in part.parameters(recurse=False))
            if (multiplies or codes) and not known_linear(part):
                kind = f"{type(part).__module__}.{type(part).__name__}"
                raise ValueError(
                    f"the base's {type(module).__name__} has a {name} of the class {kind}, which the diffusion path "
                    "cannot train on: load the base unquantized, or quantized by bitsandbytes or torchao."
                )


def _targets(attention: nn.Module, mlp: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the linear layers that the path trains: all but unused projections and routers.

    Experts whose weights are one tensor for all of them are no linear layers: the path uses the base's.
    """
    attention_names = [
        name for name, m in attention.named_modules() if isinstance(m, nn.Linear) and name not in _UNUSED_PROJECTIONS
    ]
    mlp_names = [
        name for name, m in mlp.named_modules() if isinstance(m, nn.Linear) and _ROUTERS.isdisjoint(name.split("."))
    ]
    return attention_names, mlp_names


def _inject_lora(module: nn.Module, names: list[str], config: L2DConfig) -> None:
    if not names:
        return
    # PEFT would look at the module's configuration and rename targets of mixture-of-experts models; these are named.
    holder = nn.ModuleDict({"module": module})
    first: Any = module.get_submodule(names[0])
    place = first.weight.device  # PEFT asks a parameter, and quantized layers have none here
    holder.register_parameter("place", nn.Parameter(torch.empty(0, device=place), requires_grad=False))
    from peft import LoraConfig, inject_adapter_in_model  # late: peft may be what imports us, through transformers

    from l2d.network.lora import fuse_products

    pattern = "|".join(name.replace(".", r"\.") for name in names)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=rf"module\.({pattern})",
        init_lora_weights="gaussian",
        lora_dropout=0.0,
    )
    try:
        inject_adapter_in_model(lora, holder, adapter_name=ADAPTER)
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"variant='lora' is not possible for {type(module).__name__}, to which PEFT adds no deltas ({error}): "
            "use variant='full'."
        ) from error
    fuse_products(module)


def _clone_parameters(module: nn.Module, names: list[str]) -> None:
    for name in names:
        linear = module.get_submodule(name)
        if isinstance(linear, FrozenLinear):
            raise ValueError(
                f"variant='full' trains copies of the base's projections, and {name} is quantized: use variant='lora', "
                "or load the base unquantized."
            )
        for key, parameter in list(linear.named_parameters(recurse=False)):
            setattr(linear, key, nn.Parameter(parameter.detach().clone()))


def build_twin(decoder: Decoder, base_config: PreTrainedConfig, config: L2DConfig) -> list[TwinLayer]:
    """Twins of all layers; only LoRA factors (`lora`) or cloned projections (`full`) are new tensors.

    Raises `ValueError` for a base whose layers are laid out in an unknown way.
    """
    _refuse_adapters(decoder.base)
    twins = []
    for layer in decoder.layers:
        base_attention, base_mlp = _parts(layer, base_config.model_type)
        _refuse_unknown_linears(base_attention, base_mlp)
        slots = _norm_slots(layer)
        norms = [norm for norm in slots.values() if norm is not None]
        _refuse_unknown_parts(layer, [base_attention, base_mlp, *norms], base_config.model_type)
        path_config: Any = copy.copy(base_attention.config)
        path_config._attn_implementation_internal = IMPLEMENTATION
        attention = structural_copy(base_attention, path_config)
        for name in _UNUSED_PROJECTIONS:
            projection = getattr(attention, name, None)
            if isinstance(projection, nn.Linear):
                setattr(attention, name, NoProjection(projection.out_features))
        mlp = structural_copy(base_mlp)
        attention_names, mlp_names = _targets(attention, mlp)
        if not attention_names:
            raise ValueError(
                f"{type(base_attention).__name__} has no linear layers that the path could train: use another base."
            )
        for module, names in ((attention, attention_names), (mlp, mlp_names)):
            if config.variant == "lora":
                _inject_lora(module, names, config)
            else:
                _clone_parameters(module, names)
        twins.append(TwinLayer(layer, slots, attention, mlp, config.variant))
    return twins
