"""The two paths of an L2D model as one object, which samplers, scoring, decoding and the training loss work with.

- `TwoPaths`: the frozen base (main path), the diffusion path over its keys and values, and the output head of both

It is not a module: `L2DForCausalLM` registers the base and the diffusion path under their names in checkpoints.
Legend: B rows, S positions, Q sites per row, N evaluations, V vocabulary, H hidden size, d diffusion dimension.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from l2d.config import L2DConfig
from l2d.network.attention import SiteLayout
from l2d.network.compiled import compile_layers
from l2d.network.diffusion_path import DiffusionPath, PathInputs
from l2d.network.main_path import Decoder, MainPathState, run_main_path
from l2d.network.merged_weights import DeltaMerger
from l2d.network.own_keys_values import keep


class TwoPaths:
    """The main path and the diffusion path.

    Attributes:
        config: the model's configuration; decoder: the parts of the base; path: the trained modules.
        whole: context in which the weights of `outside_layers` can be read, for trainers that spread weights.

    Raises `ValueError` for a base that is not supported.
    """

    def __init__(self, config: L2DConfig, base: PreTrainedModel):
        self.config = config
        self.decoder = Decoder(base)
        self.path = DiffusionPath(config, self.decoder)
        self._merger = DeltaMerger(self.path)
        self.whole: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def outside_layers(self) -> list[nn.Parameter]:
        """Frozen weights of embedding, final norm and output head, which the loss reads without calling the base."""
        modules = (self.decoder.embeddings, self.decoder.norm, self.decoder.lm_head)
        return list({id(p): p for module in modules for p in module.parameters()}.values())

    @property
    def device(self) -> torch.device:
        """Where states, times and tokens are: the device of the base's embeddings, if it is spread over several."""
        return self.decoder.embeddings.weight.device

    # ---- main path -----------------------------------------------------------------------------------------------

    def main_path(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
    ) -> MainPathState:
        """Run the base once over `input_ids` (B, S) and keep what the diffusion path needs; see `run_main_path`."""
        own = bool(self.config.own_keys_rank or self.config.own_values_rank)
        state = run_main_path(self.decoder, input_ids, attention_mask, position_ids, cache, keep_received=own)
        if own and cache is not None:
            for number, (part, layer) in enumerate(zip(self.path.layers, state.layers, strict=True), len(state.layers)):
                # In the same cache, behind the base's layers, which never look there.
                keep(layer, state.position_ids, part.own_keys, part.own_values, cache, number)
        return state

    def logits(self, hidden: torch.Tensor, plain: bool = True) -> torch.Tensor:
        """Output logits (..., V) for hidden states (..., H) of either path, taken before the final norm.

        `plain`: bit for bit as the base computes them; otherwise by the fastest product, equal to rounding.
        """
        return self.decoder.logits(hidden, plain)

    def base_logits(self, state: MainPathState, index: torch.Tensor | None = None) -> torch.Tensor:
        """The base's logits at all positions, (B, S, V), or at positions `index` (B, Q): (B, Q, V)."""
        hidden = state.hidden
        if index is not None:
            hidden = hidden.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return self.logits(hidden)

    # ---- diffusion path ------------------------------------------------------------------------------------------

    def path_hidden(
        self,
        state: MainPathState,
        rows: torch.Tensor,
        index: torch.Tensor,
        x: torch.Tensor,
        time: torch.Tensor,
        classes: torch.Tensor | None = None,
        carried: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fused and own hidden states, (N, H) each, of a flat batch: rows, index, time, classes (N,) and x (N, d).

        `carried` (N, H): the own hidden states of the previous evaluations at the same sites; see
        `DiffusionPath.forward`.
        """
        if torch.is_grad_enabled():
            self._merger.release()
        else:
            self._merger.release_stale()
        modulation = self.path.modulate(time.float(), classes)
        return self.path(x, modulation, SiteLayout(state, rows, index), carried)

    def path_logits(self, state: MainPathState, inputs: PathInputs) -> torch.Tensor:
        """Logits (B, Q, V) of one evaluation per site; zero at padding."""
        rows, columns = torch.nonzero(inputs.index >= 0, as_tuple=True)
        classes = None if inputs.classes is None else inputs.classes[rows, columns]
        hidden, _ = self.path_hidden(
            state, rows, inputs.index[rows, columns], inputs.x[rows, columns], inputs.time[rows, columns], classes
        )
        logits = self.logits(hidden)
        output = logits.new_zeros(*inputs.index.shape, logits.shape[-1])
        output[rows, columns] = logits
        return output

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (..., d) float32 of tokens (...) in the diffusion space, with gradients."""
        return self.path.embed_tokens(tokens)

    def vocabulary_table(self) -> torch.Tensor:
        """Embeddings of all tokens in the diffusion space, (V, d) float32, cached."""
        return self.path.vocabulary_table()

    # ---- compiled, and weights merged for inference --------------------------------------------------------------

    @torch.no_grad()
    def compile(self, backend: str) -> None:
        """Compile what follows attention in the path's layers, and try it; see `L2DForCausalLM.compile_path`."""
        self.prepare_inference()
        compile_layers(self.path.layers, backend)
        twin = self.path.layers[0].twin
        weight = twin.norm_weights()[1].repeat(2, 1)
        hidden = torch.zeros_like(weight[None], dtype=twin.stream_dtype(self.decoder.base.dtype))
        try:
            twin.transform(hidden, weight, weight)
        except Exception as error:  # of any kind: compilers are programs of others
            compile_layers(self.path.layers, None)
            reason = " ".join(str(error).strip().partition("\n\n")[0].split()).rstrip(".")
            raise ValueError(
                f"compile_path is not possible with this base, device and PyTorch ({reason}): leave it out."
            ) from error

    def prepare_inference(self) -> None:
        """Merge LoRA deltas into one product where that changes only the speed."""
        self._merger.prepare()

    def release_stale(self) -> None:
        """Separate merged deltas if a weight changed since they were merged."""
        self._merger.release_stale()

    def release(self) -> None:
        """Separate merged deltas."""
        self._merger.release()

    def forget(self) -> None:
        """Drop everything that was computed from the weights for inference."""
        self._merger.release()
        self.path.forget()
