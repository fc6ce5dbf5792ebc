"""The training loss of the diffusion path, as published and with three changes of what the path sees.

- `diffusion_loss`: main path, noised states, diffusion path, cross-entropy -> `L2DTrainingOutput`

As published, `x_t` is built from the true token, so training never shows the path a wrong guess. `corrupted` targets
build it from other tokens (the target stays the true one). A `rollout` builds it from the path's own guesses: it
starts from noise, moves towards the embedding of the token that the path just chose (at first the base's), and only
its last evaluations have a loss; a carried state is trained by backpropagation through these. `spared` targets are
left out where the base gives them `EASY` or more.

Legend: B rows, Q sites per row, K draws, J evaluations of a rollout, N evaluations, H hidden size, d diffusion
dimension.
"""

import dataclasses
import math
from typing import Any

import torch
from transformers.utils import ModelOutput

from l2d.network.cross_entropy import chunk_rows, chunked_cross_entropy
from l2d.network.diffusion_path import NoisedTargets
from l2d.network.embeddings import at_least_float32
from l2d.network.main_path import MainPathState
from l2d.network.two_paths import TwoPaths
from l2d.sampling.noise import draw_token

EASY = 0.9  # probability of a target under the base


@dataclasses.dataclass
class L2DTrainingOutput(ModelOutput):
    """nll (K, B, Q) float32, 0 at padding and where nothing is trained; correct (K, B, Q) bool: argmax is the target;
    valid (B, Q) bool: neither of these.

    For a rollout K counts every scored evaluation of every draw. `state` is the main path, for further targets over
    the same inputs.
    """

    nll: Any = None
    correct: Any = None
    valid: Any = None
    state: MainPathState | None = None


def diffusion_loss(paths: TwoPaths, state: MainPathState, noised: NoisedTargets) -> L2DTrainingOutput:
    """Cross-entropy of the targets under the diffusion path, per site and draw, with gradients to the trained weights.

    The main path `state` has no autograd state: sites are independent given its keys and values.
    Source: Cetin et al., 2025, section 3; corruption, rollout and spared targets are not part of it.
    """
    trained = noised.index >= 0
    if noised.spared is not None:
        trained = trained & ~_easy(paths, state, noised, trained & noised.spared)
        noised = dataclasses.replace(noised, index=noised.index.masked_fill(~_at_least_one(trained, noised.index), -1))
    # 1. The sites and their draws as one flat batch of evaluations.
    flat = _Flat(noised)
    # 2. The state x_t of each evaluation, 3. the path's hidden state there, 4. loss and most likely token.
    if noised.unscored is None:
        scored = [_noised(paths, state, noised, flat)]
    else:
        scored = _rolled_out(paths, state, noised, flat, noised.unscored)
    # 5. Back to (draws, rows, sites), zero at padding.
    nll = torch.cat([flat.padded(losses, noised.index) for losses, _ in scored])
    correct = torch.cat([flat.padded(chosen == flat.targets, noised.index) for _, chosen in scored])
    if noised.spared is not None:
        nll = nll * trained
    return L2DTrainingOutput(nll=nll, correct=correct, valid=trained, state=state)


@torch.no_grad()
def _easy(paths: TwoPaths, state: MainPathState, noised: NoisedTargets, asked: torch.Tensor) -> torch.Tensor:
    """(B, Q) bool: of the sites `asked` (B, Q), those to whose target the base gives `EASY` or more."""
    rows, columns = torch.nonzero(asked, as_tuple=True)
    if not len(rows):
        return asked
    hidden = _at(state.hidden, rows, noised.index[rows, columns])
    losses, _ = _cross_entropy(paths, hidden, noised.targets[rows, columns])
    easy = torch.zeros_like(noised.index, dtype=torch.bool)
    easy[rows, columns] = losses.to(easy.device) <= -math.log(EASY)
    return easy


def _at_least_one(trained: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`trained` (B, Q), or where that is no site the first one of index (B, Q): every call has gradients, if of 0."""
    if bool(trained.any()):
        return trained
    valid = index >= 0
    return valid & (valid.flatten().cumsum(0).view_as(valid) == 1)


def _noised(
    paths: TwoPaths, state: MainPathState, noised: NoisedTargets, flat: "_Flat"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and most likely token of every evaluation, (N,) each, at `x_t = (1 - t) x_0 + t z`."""
    time = flat.of(noised.time)
    if noised.sources is None:  # one embedding serves all draws of a site
        clean = paths.embed_tokens(noised.targets[flat.rows, flat.columns]).repeat_interleave(flat.draws, dim=0)
    else:
        clean = paths.embed_tokens(_sources(paths, state, flat, noised.sources, noised.uniforms))
    x = (1 - time)[:, None] * (flat.of(noised.noise) * paths.config.noise_std) + time[:, None] * clean
    hidden, _ = paths.path_hidden(state, flat.row, flat.index, x, time, flat.classes)
    return _cross_entropy(paths, hidden, flat.targets)


def _rolled_out(
    paths: TwoPaths, state: MainPathState, noised: NoisedTargets, flat: "_Flat", unscored: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Loss and most likely token, (N,) each, at every scored evaluation of a rollout; the states have no gradient."""
    learning = torch.is_grad_enabled()
    x = flat.of(noised.noise) * paths.config.noise_std
    with torch.no_grad():
        base = _at(state.hidden, flat.rows, noised.index[flat.rows, flat.columns])
        chosen = _argmax(paths, base).repeat_interleave(flat.draws)
    before, scored = torch.zeros_like(x[:, 0]), []
    carried = None if paths.path.carried_state is None else x.new_zeros(len(x), base.shape[-1])
    for number, every in enumerate(noised.time):
        time, counts = flat.of(every), number >= unscored
        with torch.no_grad():  # an Euler step towards the chosen token
            clean = paths.embed_tokens(chosen)
            x = x + ((time - before) / (1 - before))[:, None] * (clean - x)
        with torch.set_grad_enabled(learning and counts):
            hidden, own = paths.path_hidden(state, flat.row, flat.index, x, time, flat.classes, carried)
            if counts:
                scored.append(_cross_entropy(paths, hidden, flat.targets))
        chosen = scored[-1][1] if counts else _argmax(paths, hidden)
        carried, before = None if carried is None else own, time
    return scored


class _Flat:
    """Evaluations as (N,) in the order of rows, then sites, then draws: draws of one site are neighbours."""

    def __init__(self, noised: NoisedTargets):
        self.draws = noised.noise.shape[0]
        self.rows, self.columns = torch.nonzero(noised.index >= 0, as_tuple=True)
        self.row = self.rows.repeat_interleave(self.draws)
        self.index = noised.index[self.rows, self.columns].repeat_interleave(self.draws)
        self.targets = noised.targets[self.rows, self.columns].repeat_interleave(self.draws)
        self.classes = None if noised.classes is None else self.of(noised.classes)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """Values (K, B, Q, ...) of the evaluations, (N, ...)."""
        return values[:, self.rows, self.columns].transpose(0, 1).flatten(0, 1)

    def padded(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Values (N,) of the evaluations as (K, B, Q), zero at padding, for `like` (B, Q)."""
        output = values.new_zeros(self.draws, *like.shape)
        output[:, self.rows, self.columns] = values.view(-1, self.draws).t()
        return output


def _sources(
    paths: TwoPaths, state: MainPathState, flat: _Flat, tokens: torch.Tensor, uniforms: torch.Tensor | None
) -> torch.Tensor:
    """Tokens (N,) that `x_t` is built from: `tokens` (K, B, Q), at -1 a sample of the base's other tokens.

    That sample is of the base's own distribution without the target: what is drawn is never the true token.
    """
    sources = flat.of(tokens)
    sampled = torch.nonzero(sources < 0, as_tuple=True)[0]
    if uniforms is None:
        raise ValueError("sources need uniforms, which fix the tokens that are sampled: set both or neither.")
    uniforms, targets = flat.of(uniforms)[sampled], flat.targets[sampled]
    with torch.no_grad():
        hidden = _at(state.hidden, flat.row[sampled], flat.index[sampled])
        chunk = _chunk(paths, hidden)
        drawn = []
        for part, uniform, target in zip(hidden.split(chunk), uniforms.split(chunk), targets.split(chunk), strict=True):
            logits = at_least_float32(paths.logits(part).to(target.device)).scatter(-1, target[:, None], -torch.inf)
            drawn.append(draw_token(torch.softmax(logits, -1), uniform))
    return sources.index_copy(0, sampled, torch.cat(drawn))


def _cross_entropy(paths: TwoPaths, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and most likely tokens, (N,) each, where the targets are; computed where the output head is."""
    hidden = hidden.to(paths.decoder.lm_head.weight.device)
    losses, chosen = chunked_cross_entropy(hidden, targets.to(hidden.device), paths.logits, _chunk(paths, hidden))
    return losses.to(targets.device), chosen.to(targets.device)


def _at(values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Values (B, S, ...) at rows and columns (N,), which may be on another device."""
    return values[rows.to(values.device), columns.to(values.device)]


def _argmax(paths: TwoPaths, hidden: torch.Tensor) -> torch.Tensor:
    """Most likely tokens (N,) for hidden states (N, H)."""
    return torch.cat([paths.logits(part).argmax(-1) for part in hidden.split(_chunk(paths, hidden))])


def _chunk(paths: TwoPaths, hidden: torch.Tensor) -> int:
    return chunk_rows(paths.config.get_text_config().vocab_size, hidden.device)
