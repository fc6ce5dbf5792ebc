"""The main path: the frozen base, run once, with what the diffusion path needs kept.

- `Decoder`: the layers, final norm and output head of a base; other layouts are refused
- `MainPathState`: keys, values and rotary embeddings of every layer, and the hidden state before the final norm
- `run_main_path`: one forward of the base's own decoder that fills such a state

The base's code is not copied or changed: hooks read what its own forward passes to each attention module.
Legend: B rows, S keys, L new positions (L = S without a cache), H hidden size, G key/value heads, D head size.
"""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from l2d.network.onednn import linear
from l2d.network.quantized import plain_tensor


class _DecoderOutput(BaseModelOutputWithPast):
    """A decoder's output with a hidden state; every other attribute that a base may read is `None`."""

    def __getattr__(self, name: str) -> None:
        return None


class Decoder:
    """Names for the parts of a decoder-only base.

    Attributes:
        model: the decoder stack; layers: its `ModuleList`; norm: the final norm; embeddings: the input embedding.

    Raises `ValueError` for a base without these parts.
    """

    def __init__(self, base: PreTrainedModel):
        self.base = base
        self.model: Any = base.get_decoder() if hasattr(base, "get_decoder") else None
        self.layers: Any = getattr(self.model, "layers", None)
        self.norm: Any = getattr(self.model, "norm", None)
        if self.norm is None:
            self.norm = getattr(self.model, "final_layernorm", None)
        self.embeddings = base.get_input_embeddings()
        self.lm_head: Any = base.get_output_embeddings()
        if not isinstance(self.layers, nn.ModuleList) or self.norm is None or self.lm_head is None:
            raise ValueError(
                f"base model type {base.config.model_type!r} is not supported: L2D needs a decoder-only model with "
                "`layers`, a final `norm` and an output head, for example Llama, Qwen2, Mistral or Gemma."
            )
        config = base.config.get_text_config()
        self._divide = getattr(config, "logits_scaling", None)
        self._multiply = getattr(config, "logit_scale", None)
        self._softcap = getattr(config, "final_logit_softcapping", None)
        self._settle_scales(config.hidden_size)

    def _settle_scales(self, hidden_size: int) -> None:
        """Determine by a probe whether the base divides or multiplies by `logits_scaling`."""
        weight = self.embeddings.weight
        for part in (weight, getattr(self.lm_head, "weight", weight)):
            if not isinstance(part, torch.Tensor) or not plain_tensor(part):
                head = f"{type(self.lm_head).__module__}.{type(self.lm_head).__name__}"
                raise ValueError(
                    f"the base's embedding or output head, a {head}, has quantized weights: leave these two layers as "
                    "they are, or load the base unquantized."
                )
            if part.is_meta or not part.numel():  # not loaded, or kept elsewhere (offloaded, ZeRO 3)
                return
        hidden = torch.linspace(-1, 1, hidden_size).to(weight)[None, None]
        own = self._own_logits(hidden)
        for scales in ((self._divide, self._multiply), (None, self._divide)):
            self._divide, self._multiply = scales
            if torch.allclose(self._head(hidden).to(own.device), own, rtol=0, atol=0.02 * float(own.abs().max())):
                return
        raise ValueError(
            f"base model type {self.base.config.model_type!r} is not supported: its logits are neither its output "
            "head's result nor that result scaled or softly capped by a known setting."
        )

    @torch.no_grad()
    def _own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The base's own logits (1, 1, V) for a normed hidden state (1, 1, H) in place of its decoder's result."""
        owner, forward, instance = threading.get_ident(), self.model.forward, vars(self.model)
        hooked = instance.get("forward")  # libraries that place weights put their own here

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner:
                return forward(*args, **kwargs)
            return _DecoderOutput(last_hidden_state=hidden)

        instance["forward"] = stand_in
        try:
            return self.base(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)).logits
        finally:
            del instance["forward"]
            if hooked is not None:
                instance["forward"] = hooked

    def logits(self, hidden: torch.Tensor, plain: bool = True) -> torch.Tensor:
        """Output logits (..., V) for hidden states (..., H) taken before the final norm.

        `plain`: bit for bit the base's own; otherwise by the fastest product, equal to rounding.
        """
        return self._head(self.norm.forward(hidden), plain)  # without hooks, which are of calls of the whole base

    def _head(self, hidden: torch.Tensor, plain: bool = True) -> torch.Tensor:
        if plain or type(self.lm_head) is not nn.Linear or "forward" in vars(self.lm_head):  # accelerate's, for example
            logits = self.lm_head.forward(hidden)
        else:
            logits = linear(hidden, self.lm_head.weight, self.lm_head.bias)
        if self._divide is not None:
            logits = logits / self._divide
        if self._multiply is not None:
            logits = logits * self._multiply
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits


@dataclasses.dataclass
class LayerState:
    """What one layer of the main path hands to the diffusion path.

    keys, values: (B, G, S, D); rotary: the layer's own rotary embeddings, each (B or 1, L, D), or `None` without.
    For a path with keys or values of its own: these, own_keys and own_values (B, G, S, D), or what they are made from,
    received (B, S, H), the input of attention.
    """

    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    rotary: tuple[torch.Tensor, ...] | None = None
    received: torch.Tensor | None = None
    own_keys: torch.Tensor | None = None
    own_values: torch.Tensor | None = None


@dataclasses.dataclass
class MainPathState:
    """Result of one main-path forward.

    Attributes:
        layers: one `LayerState` per layer.
        hidden: (B, L, H), the hidden state before the final norm at the new positions.
        key_mask: (B, S) bool, `None` where no key is padding.
        segments: (B, S) int64 document numbers of packed rows, `None` where rows hold one document.
        offset: keys that come before the first new position (S - L).
        position_ids: (B or 1, L) int64, the new positions' numbers where the base hands them to its attention.
        inputs: (B, L, H), what the first layer receives at the new positions.
    """

    layers: list[LayerState]
    hidden: torch.Tensor
    key_mask: torch.Tensor | None
    segments: torch.Tensor | None
    offset: int
    position_ids: torch.Tensor | None = None
    inputs: torch.Tensor | None = None

    @property
    def key_count(self) -> int:
        """Number of keys S."""
        return self.offset + self.hidden.shape[1]

    @classmethod
    def join(cls, states: "list[MainPathState]") -> "MainPathState":
        """Consecutive decoding steps of one cache as one state that has all their positions."""
        if len(states) == 1:
            return states[0]
        joined: dict[int, tuple[torch.Tensor, ...]] = {}  # layers of one kind go on sharing their rotary embeddings
        layers = []
        for steps in zip(*(state.layers for state in states), strict=True):
            rotary = steps[-1].rotary
            if rotary is not None:
                parts = zip(*(step.rotary for step in steps), strict=True)
                if id(rotary[0]) not in joined:
                    joined[id(rotary[0])] = tuple(torch.cat(part, dim=1) for part in parts)
                rotary = joined[id(rotary[0])]
            layers.append(dataclasses.replace(steps[-1], rotary=rotary))
        hidden = torch.cat([state.hidden for state in states], dim=1)
        numbers = [state.position_ids for state in states if state.position_ids is not None]
        position_ids = torch.cat(numbers, dim=1) if numbers else None
        embedded = [state.inputs for state in states if state.inputs is not None]
        inputs = torch.cat(embedded, dim=1) if embedded else None
        return cls(layers, hidden, states[-1].key_mask, None, states[0].offset, position_ids, inputs)

    def last(self) -> "MainPathState":
        """The same keys and values with the last new position alone, which decoding continues from."""
        cut: dict[int, tuple[torch.Tensor, ...]] = {}  # layers of one kind go on sharing their rotary embeddings
        layers = []
        for layer in self.layers:
            rotary = layer.rotary
            if rotary is not None:
                rotary = cut.setdefault(id(rotary[0]), tuple(part[:, -1:] for part in rotary))
            layers.append(dataclasses.replace(layer, rotary=rotary))
        position_ids = None if self.position_ids is None else self.position_ids[:, -1:]
        inputs = None if self.inputs is None else self.inputs[:, -1:]
        return MainPathState(
            layers, self.hidden[:, -1:], self.key_mask, self.segments, self.key_count - 1, position_ids, inputs
        )


class _Recorder:
    """Stands in for a cache: keeps a layer's keys and values and returns them unchanged."""

    def __init__(self, layers: list[LayerState]):
        self._layers = layers

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        self._layers[layer_idx].keys, self._layers[layer_idx].values = keys, values
        return keys, values


@contextlib.contextmanager
def _recording(
    decoder: Decoder, layers: list[LayerState], recorded: dict[str, Any], cached: bool, keep_received: bool
) -> Iterator[None]:
    recorder = _Recorder(layers)
    owner = threading.get_ident()  # other threads may run the same base meanwhile, and have hooks of their own

    def before_attention(number: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
            if threading.get_ident() != owner:
                return None
            rotary = kwargs.get("position_embeddings")
            layers[number].rotary = (rotary,) if isinstance(rotary, torch.Tensor) else rotary
            recorded["position_ids"] = kwargs.get("position_ids")
            if keep_received:
                layers[number].received = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return None if cached else (args, {**kwargs, "past_key_values": recorder})

        return hook

    def before_layers(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if threading.get_ident() == owner:
            recorded["inputs"] = args[0] if args else kwargs["hidden_states"]

    def before_norm(module: nn.Module, args: tuple):
        if threading.get_ident() == owner:
            recorded["hidden"] = args[0]

    handles = [
        layer.self_attn.register_forward_pre_hook(before_attention(number), with_kwargs=True)
        for number, layer in enumerate(decoder.layers)
    ]
    handles.append(decoder.layers[0].register_forward_pre_hook(before_layers, with_kwargs=True))
    handles.append(decoder.norm.register_forward_pre_hook(before_norm))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def run_main_path(
    decoder: Decoder,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: DynamicCache | None = None,
    keep_received: bool = False,
) -> MainPathState:
    """Run the base's decoder over `input_ids` (B, L).

    Args:
        attention_mask: (B, S), 0 at padding. `None`: nothing is padded; rows are then packed documents wherever
            `position_ids` (B, L) restart.
        cache: grows by the new positions; without one the keys and values are kept by this call alone.
        keep_received: also keep what every attention receives at the new positions.
    """
    layers = [LayerState() for _ in decoder.layers]
    recorded: dict[str, Any] = {}
    offset = cache.get_seq_length() if cache is not None else 0
    with _recording(decoder, layers, recorded, cache is not None, keep_received):
        decoder.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
        )
    if cache is not None:
        for layer, kept in zip(layers, cache.layers[: len(layers)], strict=True):
            layer.keys, layer.values = kept.keys, kept.values
    for layer, part in zip(layers, decoder.layers, strict=True):
        if hasattr(part.self_attn, "expand_kv"):  # latent attention caches a compressed form of keys and values
            layer.keys, layer.values = part.self_attn.expand_kv(layer.keys, layer.values)
    key_mask = segments = None
    if attention_mask is not None:
        nothing = not offset and bool(attention_mask.all())  # a decoding step need not wait for the answer
        key_mask = None if nothing else attention_mask.bool()
    elif position_ids is not None and cache is None:
        restarts = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
        if bool(restarts.any()):
            segments = restarts.cumsum(1).expand(input_ids.shape[0], -1)
    return MainPathState(
        layers, recorded["hidden"], key_mask, segments, offset, recorded["position_ids"], recorded["inputs"]
    )
