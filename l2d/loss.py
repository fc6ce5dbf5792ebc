"""The training loss of the diffusion path at given places, as published and with two changes of what it sees.

- `training_output`: losses of `NoisedTargets`, plain, corrupted or rolled out

As published, `x_t` is built from the true token, so that training never shows the path a wrong guess. `corrupted`
targets build it from other tokens (the target stays the true one). A `rollout` builds it from the path's own guesses:
it starts from noise, moves towards the embedding of what the path just chose (at first of what the base says), and
only its last evaluations count; what a carried state does is learned by backpropagation through these.

Legend: B rows, Q queries per row, K draws, J evaluations of a rollout, N flat queries, H hidden size, d diffusion
dimension.
"""

from typing import TYPE_CHECKING

import torch

from l2d.network.cross_entropy import chunk_rows, chunked_cross_entropy
from l2d.network.diffusion_path import NoisedTargets
from l2d.network.embeddings import at_least_float32
from l2d.network.main_path import MainPathState
from l2d.sampling.noise import draw_token

if TYPE_CHECKING:
    from l2d.modeling import L2DForCausalLM


class _Flat:
    """Queries as (N,) in the order of rows, then positions, then draws: draws of one position are neighbours."""

    def __init__(self, queries: NoisedTargets):
        self.draws = queries.noise.shape[0]
        self.rows, self.slots = torch.nonzero(queries.index >= 0, as_tuple=True)
        self.row = self.rows.repeat_interleave(self.draws)
        self.index = queries.index[self.rows, self.slots].repeat_interleave(self.draws)
        self.targets = queries.targets[self.rows, self.slots].repeat_interleave(self.draws)
        self.classes = None if queries.classes is None else self.of(queries.classes)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Values (K, B, Q, ...) of the queries, (N, ...)."""
        return values[:, self.rows, self.slots].transpose(0, 1).flatten(0, 1)

    def padded(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Values (N,) of the queries as (K, B, Q), zero at padding, for `like` (B, Q)."""
        output = values.new_zeros(self.draws, *like.shape)
        output[:, self.rows, self.slots] = values.view(-1, self.draws).t()
        return output


def training_output(
    model: "L2DForCausalLM", state: MainPathState, queries: NoisedTargets
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (K', B, Q) float32, with gradients, and whether the target was chosen (K', B, Q) bool; 0 at padding.

    K' is K, or for a rollout K times the number of its scored evaluations, ordered as `NoisedTargets.scored_time`.
    Source: Cetin et al., 2025, section 3; corruption and rollout are not part of it.
    """
    flat = _Flat(queries)
    if queries.unscored is None:
        scored = [_noised(model, state, queries, flat)]
    else:
        scored = _rolled_out(model, state, queries, flat, queries.unscored)
    losses = torch.cat([flat.padded(losses, queries.index) for losses, _ in scored])
    return losses, torch.cat([flat.padded(chosen == flat.targets, queries.index) for _, chosen in scored])


def _noised(
    model: "L2DForCausalLM", state: MainPathState, queries: NoisedTargets, flat: _Flat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and chosen token of every query, (N,) each, at `x_t = (1 - t) x_0 + t z`."""
    time = flat.of(queries.time)
    if queries.sources is None:  # one embedding serves all draws of a position
        clean = model.path.embed_tokens(queries.targets[flat.rows, flat.slots]).repeat_interleave(flat.draws, dim=0)
    else:
        clean = model.path.embed_tokens(_sources(model, state, flat, queries.sources, queries.uniforms))
    x = (1 - time)[:, None] * (flat.of(queries.noise) * model.config.noise_std) + time[:, None] * clean
    hidden, _ = model.path_hidden(state, flat.row, flat.index, x, time, flat.classes)
    return _cross_entropy(model, hidden, flat.targets)


def _sources(
    model: "L2DForCausalLM", state: MainPathState, flat: _Flat, given: torch.Tensor, uniforms: torch.Tensor | None
) -> torch.Tensor:
    """Tokens (N,) that `x_t` is built from: those `given` (K, B, Q), at -1 a sample of the base's other tokens.

    That sample is of the base's own distribution without the target: what is drawn is never the true token.
    """
    sources = flat.of(given)
    sampled = torch.nonzero(sources < 0, as_tuple=True)[0]
    if uniforms is None:
        raise ValueError("sources need uniforms, which fix the tokens that are sampled.")
    uniforms, targets = flat.of(uniforms)[sampled], flat.targets[sampled]
    with torch.no_grad():
        hidden = state.hidden[flat.row[sampled], flat.index[sampled]]
        chunk = _chunk(model, hidden)
        drawn = []
        for part, uniform, target in zip(hidden.split(chunk), uniforms.split(chunk), targets.split(chunk), strict=True):
            logits = at_least_float32(model._decoder.logits(part)).scatter(-1, target[:, None], -torch.inf)
            drawn.append(draw_token(torch.softmax(logits, -1), uniform))
    return sources.index_copy(0, sampled, torch.cat(drawn))


def _rolled_out(
    model: "L2DForCausalLM", state: MainPathState, queries: NoisedTargets, flat: _Flat, unscored: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and chosen token of every query, (N,) each, at every scored evaluation; the states have no gradient."""
    learning = torch.is_grad_enabled()
    x = flat.of(queries.noise) * model.config.noise_std
    with torch.no_grad():
        base = state.hidden[flat.rows, queries.index[flat.rows, flat.slots]]
        chosen = _argmax(model, base).repeat_interleave(flat.draws)
    before, scored = torch.zeros_like(x[:, 0]), []
    carried = None if model.path.carried_state is None else x.new_zeros(len(x), base.shape[-1])
    for number, every in enumerate(queries.time):
        time, counts = flat.of(every), number >= unscored
        with torch.no_grad():
            clean = model.path.embed_tokens(chosen)
            x = x + ((time - before) / (1 - before))[:, None] * (clean - x)
        with torch.set_grad_enabled(learning and counts):
            hidden, own = model.path_hidden(state, flat.row, flat.index, x, time, flat.classes, carried)
            if counts:
                scored.append(_cross_entropy(model, hidden, flat.targets))
        chosen = scored[-1][1] if counts else _argmax(model, hidden)
        carried, before = None if carried is None else own, time
    return scored


def _cross_entropy(
    model: "L2DForCausalLM", hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and most likely tokens, (N,) each."""
    return chunked_cross_entropy(hidden, targets, model._decoder.logits, _chunk(model, hidden))


def _argmax(model: "L2DForCausalLM", hidden: torch.Tensor) -> torch.Tensor:
    """Most likely tokens (N,) for hidden states (N, H)."""
    parts = hidden.split(_chunk(model, hidden))
    return torch.cat([model._decoder.logits(part).argmax(-1) for part in parts])


def _chunk(model: "L2DForCausalLM", hidden: torch.Tensor) -> int:
    return chunk_rows(model.config.get_text_config().vocab_size, hidden.device)
