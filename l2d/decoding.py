"""The decoding loop: a main-path step, a diffusion solve, a choice of the output token.

- `DecodingLoop`: the loop, for transformers' `generate` to call
- `DecodeRecord`: evaluations requested and computed, passes and changes, for every generated token

All randomness belongs to (seed, request, position), so a row's tokens do not depend on batch-mates or their order. A
token's noise does not depend on the budget either: budgets are compared on the same noise.

Speculation along the text (`SamplerConfig.draft_tokens`): the base drafts a few tokens, whose keys and values are
needed anyway if they are right, and one solve decides all these positions. Tokens are kept up to the first one that
differs from the draft, and the cache is cut back to them: the result is that of deciding one by one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
)

from l2d.network.main_path import MainPathState
from l2d.network.transfers import upload
from l2d.network.two_paths import TwoPaths
from l2d.sampler_config import SamplerConfig
from l2d.sampling.noise import RequestNoise, default_keys, draw_token
from l2d.sampling.sites import SiteSolution
from l2d.sampling.solve import solve_next, speculates
from l2d.sampling.speculation import evaluations_per_pass

UNUSED_SETTINGS = {
    "num_beams": "the L2D sampler decodes greedily or samples; leave num_beams at 1",
    "constraints": "the L2D sampler decodes greedily or samples; leave constraints out",
    "force_words_ids": "the L2D sampler decodes greedily or samples; leave force_words_ids out",
    "penalty_alpha": "the L2D sampler decodes greedily or samples; leave penalty_alpha out",
    "dola_layers": "the L2D sampler decodes greedily or samples; leave dola_layers out",
    "prompt_lookup_num_tokens": "the L2D sampler drafts with the base; set draft_tokens in sampler instead",
    "assistant_early_exit": "the L2D sampler drafts with the base; set draft_tokens in sampler instead",
    "use_mtp": "the L2D sampler drafts with the base; set draft_tokens in sampler instead",
    "token_healing": "prompts are continued as they are; leave token_healing out",
    "guidance_scale": "guidance belongs to the L2D sampler; set guidance_scale and guidance_class in sampler instead",
    "output_attentions": "the sampler keeps no attention weights; leave output_attentions out",
    "output_hidden_states": "the sampler keeps no hidden states; leave output_hidden_states out",
}
"""Settings of transformers' `generate` that this sampler cannot follow, and what to do instead."""
_STATEFUL = (PrefixConstrainedLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)


def refuse(arguments: Mapping[str, Any], reasons: Mapping[str, str]) -> None:
    """Raise `ValueError` if an argument that `reasons` names is set to anything but its neutral value."""
    for name, reason in reasons.items():
        value = arguments.get(name)
        neutral = value is None or value is False or (name in ("num_beams", "guidance_scale") and value == 1)
        if not neutral and not (name == "penalty_alpha" and value == 0):
            raise ValueError(f"{name} cannot be used: {reason}.")


@dataclasses.dataclass
class DecodeRecord:
    """Cost of every generated token: `nfe_requested[row][i]` and so on for token i of a row.

    nfe_requested: evaluations requested (T); nfe_computed: evaluations computed by the network; passes: batched passes
    of the path; changes: how often the chosen token changed along the trajectory; capped: solves that reached
    `max_evaluations`.
    """

    nfe_requested: list[list[int]]
    nfe_computed: list[list[int]]
    passes: list[list[int]]
    changes: list[list[int]]
    capped: int = 0

    @classmethod
    def empty(cls, rows: int) -> "DecodeRecord":
        """A record of no tokens for `rows` rows."""
        counts: list[list[list[int]]] = [[[] for _ in range(rows)] for _ in range(4)]
        return cls(counts[0], counts[1], counts[2], counts[3])

    def add(self, rows: list[int], solved: SiteSolution, accepted: int) -> None:
        """Append `accepted` tokens to each of `rows`; what was computed for positions after them counts to the last."""
        shape = (len(rows), -1)
        columns = [
            c.view(shape).tolist() for c in (solved.nfe_requested, solved.nfe_computed, solved.passes, solved.changes)
        ]
        for row, nfe_requested, nfe_computed, passes, changes in zip(rows, *columns, strict=True):
            wasted = sum(nfe_computed[accepted:])
            for number in range(accepted):
                extra = wasted if number == accepted - 1 else 0
                self.nfe_requested[row].append(nfe_requested[number])
                self.nfe_computed[row].append(nfe_computed[number] + extra)
                self.passes[row].append(passes[number])
                self.changes[row].append(changes[number])
        self.capped += int(solved.capped.view(shape)[:, :accepted].sum())

    def _repr_html_(self) -> str:
        names = ("nfe_requested", "nfe_computed", "passes", "changes")
        lines = ["<tr><th>row</th><th>tokens</th>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
        for row, tokens in enumerate(self.nfe_requested):
            sums = [sum(getattr(self, name)[row]) for name in names]
            cells = "".join(f"<td>{value} ({value / max(1, len(tokens)):.2f} each)</td>" for value in sums)
            lines.append(f"<tr><td>{row}</td><td>{len(tokens)}</td>{cells}</tr>")
        capped = f"<p>{self.capped} solves reached max_evaluations.</p>" if self.capped else ""
        return f"<table>{''.join(lines)}</table>{capped}"


class DraftLength:
    """How many tokens to draft: `most` while all rows mostly agree with the base, fewer or none where they do not.

    It follows the share of drafted tokens that were kept, so it depends on the text alone and never on a clock.
    """

    def __init__(self, most: int):
        self.most, self._kept, self._waited = most, 0.75, 0

    def choose(self, rows: int) -> int:
        """Tokens to draft for `rows` rows, which must all agree for a drafted token to be kept."""
        chance = self._kept**rows
        if chance < 0.5:  # not worth it; try one now and then
            self._waited += 1
            return min(self.most, 1) if rows == 1 and self._waited % 8 == 0 else 0
        return self.most if chance >= 0.7 else min(self.most, 1)

    def learn(self, kept: bool) -> None:
        """One drafted token was kept by a row, or was not."""
        self._kept += 0.15 * (float(kept) - self._kept)


class DecodingLoop:
    """State of one call of `generate`. Legend: B rows, L length so far, V vocabulary, P positions decided together.

    Args:
        request_keys: one key per row, or `None` for the prompts themselves.
        noise: (steps, B, d) start noise in place of the requests' own, or `None`.
        streamer: gets every token, once its cost is in the record, which its `follow` gets before, if it has one.
    """

    def __init__(
        self,
        paths: TwoPaths,
        sampler: SamplerConfig,
        request_keys: list[bytes | str | int] | None,
        noise: torch.Tensor | None,
        streamer: Any,
    ):
        self.paths, self.sampler, self.request_keys = paths, sampler, request_keys
        self.given_noise, self.streamer = noise, streamer
        self.record = DecodeRecord.empty(0)

    @torch.no_grad()
    def run(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Decode from prompts (B, L) that transformers' `generate` prepared; the paths are those of `model`."""
        refuse(vars(generation_config), UNUSED_SETTINGS)
        mask = model_kwargs.get("attention_mask")
        present = torch.ones(input_ids.shape, dtype=torch.int64) if mask is None else mask.cpu()
        if not bool(present[:, -1].all()):
            raise ValueError("attention_mask marks the end of a prompt as padding: pad prompts on the left.")
        # Without padding there is no mask, and the base need not look into it.
        self.mask = None if bool(present.all()) else mask
        self.ids, self.lengths, self.step = input_ids, present.sum(1).tolist(), 0
        self.processor, self.stopping, self.config = logits_processor, stopping_criteria, generation_config
        self.guesser = _stateless(logits_processor)
        self.noises = [RequestNoise(self.sampler.seed, key) for key in self._keys(present)]
        self._check_noise()
        self.record = DecodeRecord.empty(len(input_ids))
        if hasattr(self.streamer, "follow"):
            self.streamer.follow(self.record)
        self.unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        self.running = list(range(len(input_ids)))  # rows that are unfinished, as the host knows them
        self.cache = DynamicCache()
        self.drafting = DraftLength(0 if self.sampler.is_base else self.sampler.draft_tokens)
        self.scores: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []
        new_ids, positions = input_ids, upload((present.cumsum(1) - 1).clamp(min=0), input_ids.device)
        while self.running:
            # 1. The main path over the new tokens: their keys and values join the cache.
            state = self.paths.main_path(new_ids, self.mask, positions, self.cache).last()
            # 2. The base drafts tokens: P positions to decide, P - 1 drafted tokens between them.
            state, drafts = self._draft(state)
            # 3. One solve of the diffusion path gives the logits at all P positions.
            solved, logits = self._solve(state)
            # 4. Output tokens are chosen one by one, up to the first that differs from its draft.
            self._accept(solved, logits, drafts)
            # 5. The last of them is what the main path has not seen yet.
            new_ids, positions = self.ids[:, -1:], self._positions(-1)
        if self.streamer is not None:
            self.streamer.end()
        return self._package()

    def _positions(self, ahead: int) -> torch.Tensor:
        """Positions (B, 1) of the token that comes `ahead` of the next one in every row."""
        return upload(torch.tensor(self.lengths)[:, None] + ahead, self.ids.device)

    def _keys(self, present: torch.Tensor) -> Sequence[bytes | str | int]:
        keys: Sequence[bytes | str | int] | None = self.request_keys
        if keys is None:
            rows = zip(self.ids.tolist(), present.tolist(), strict=True)
            keys = default_keys([[t for t, m in zip(*row, strict=True) if m] for row in rows])
        count, copies = len(self.ids), self.config.num_return_sequences or 1
        if copies > 1 and len(keys) * copies == count:
            keys = [f"{key!r}#{copy}" for key in keys for copy in range(copies)]
        if len(keys) != count:
            raise ValueError(f"request_keys has {len(keys)} entries for {count} rows: give one key per row.")
        return keys

    def _check_noise(self) -> None:
        if self.given_noise is None or self.sampler.is_base:
            return
        rows, dim = len(self.ids), self.paths.config.diffusion_dim
        steps = 1 if self.config.max_length is None else self.config.max_length - self.ids.shape[1]
        shape = tuple(self.given_noise.shape)
        if len(shape) != 3 or shape[1:] != (rows, dim) or shape[0] < steps:
            raise ValueError(f"noise has shape {shape}: give ({steps} or more steps, {rows} rows, {dim} dimensions).")

    def _draft(self, state: MainPathState) -> tuple[MainPathState, torch.Tensor]:
        """Let the base draft tokens (B, P - 1); returns the main path at all P positions, and the draft."""
        rows = len(self.running)
        count = min(self.drafting.choose(rows), self._room(state, rows))
        if self.config.max_length is not None:
            count = min(count, self.config.max_length - self.ids.shape[1] - 1)
        states, ids, mask = [state], self.ids, self.mask
        ends = self.config._eos_token_tensor
        for number in range(count):
            logits = self.paths.logits(states[-1].hidden[:, -1], plain=False).float().to(self.ids.device)
            token = self._choose(self.guesser(ids, logits), number)
            if ends is not None and bool((torch.isin(token, ends.to(token.device)) | ~self.unfinished).all()):
                break  # nothing comes after it
            ids = torch.cat([ids, token[:, None]], dim=1)
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(token), 1)], dim=1)
            states.append(self.paths.main_path(token[:, None], mask, self._positions(number), self.cache))
        return MainPathState.join(states), ids[:, self.ids.shape[1] :]

    def _room(self, state: MainPathState, rows: int) -> int:
        """How many drafted positions fit into the pass that the next position needs anyway."""
        branches = 2 if self.sampler.guided else 1
        each = self.sampler.budget if speculates(self.paths, self.sampler) else 1
        return evaluations_per_pass(state.hidden) // (rows * branches * each) - 1

    def _solve(self, state: MainPathState) -> tuple[SiteSolution, torch.Tensor]:
        """Solve the P positions of unfinished rows: logits (B, P, V) float32, zeros for rows that are finished."""
        rows, width = torch.tensor(self.running), state.hidden.shape[1]
        index, spread = torch.arange(width).repeat(len(rows)), rows.repeat_interleave(width)
        numbers = [self.lengths[row] + ahead for row in self.running for ahead in range(width)]
        noises = [self.noises[row] for row in spread.tolist()]
        start = None
        if self.given_noise is not None and not self.sampler.is_base:
            start = upload(self.given_noise.cpu()[self.step + index, spread].double(), self.paths.device)
        solved, logits = solve_next(self.paths, state, self.sampler, spread, index, numbers, noises, start)
        logits = logits.unflatten(0, (len(rows), width)).to(self.ids.device)
        if len(rows) == len(self.ids):
            return solved, logits
        everywhere = logits.new_zeros(len(self.ids), *logits.shape[1:])
        return solved, everywhere.index_copy_(0, upload(rows, logits.device), logits)

    def _accept(self, solved: SiteSolution, logits: torch.Tensor, drafts: torch.Tensor) -> None:
        """Append tokens up to the first that differs from the draft in any row, and cut the cache back to them."""
        rows, width = self.running, logits.shape[1]
        pad = self.config._pad_token_tensor
        for number in range(width):
            scores = self.processor(self.ids, logits[:, number])
            token = self._choose(scores, 0)
            kept = token == drafts[:, number] if number + 1 < width else torch.zeros_like(token, dtype=torch.bool)
            if pad is None and len(rows) < len(token):
                raise ValueError("pad_token_id is not set, and rows that end before others need it: set pad_token_id.")
            if pad is not None and len(rows) < len(token):
                token = torch.where(self.unfinished, token, pad.to(token.device))
            if self.config.output_scores:
                self.scores.append(scores)
            if self.config.output_logits:
                self.logits.append(logits[:, number])
            agreed = self._append(token, kept)
            if number + 1 < width:
                for row in rows:
                    self.drafting.learn(agreed[row])
            if number + 1 == width or len(self.running) < len(rows) or not all(agreed[row] for row in rows):
                break
        self.record.add(rows, solved, number + 1)
        self._stream(number + 1)
        for layer in self.cache.layers if number + 1 < width else ():
            length = layer.keys.shape[-2] - (width - number - 1)
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]

    def _stream(self, count: int) -> None:
        """Hand the last `count` tokens of every row to the streamer."""
        if self.streamer is not None:
            for token in self.ids[:, -count:].cpu().unbind(1):
                self.streamer.put(token)

    def _append(self, token: torch.Tensor, kept: torch.Tensor) -> list[bool]:
        """Append one token to every row; returns which rows `kept` (B,) their draft, as the host knows it."""
        self.ids = torch.cat([self.ids, token[:, None]], dim=1)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(token), 1)], dim=1)
        self.lengths, self.step = [length + 1 for length in self.lengths], self.step + 1
        scores = tuple(self.scores) if self.config.output_scores else None
        self.unfinished = self.unfinished & ~self.stopping(self.ids, scores)
        agreed, unfinished = torch.stack([kept, self.unfinished]).tolist()  # the host waits here, once a token
        self.running = [row for row in self.running if unfinished[row]]
        return agreed

    def _choose(self, scores: torch.Tensor, ahead: int) -> torch.Tensor:
        """Output tokens (B,) for scores (B, V) at the position `ahead` of the next one."""
        if not self.config.do_sample:
            return scores.argmax(-1)
        uniforms = [noise.output(length + ahead) for noise, length in zip(self.noises, self.lengths, strict=True)]
        uniform = upload(torch.tensor(uniforms, dtype=torch.float64), scores.device)
        return draw_token(torch.softmax(scores, dim=-1), uniform)

    def _package(self) -> Any:
        if not self.config.return_dict_in_generate:
            return self.ids
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(
            sequences=self.ids,
            scores=tuple(self.scores) if self.config.output_scores else None,
            logits=tuple(self.logits) if self.config.output_logits else None,
            past_key_values=self.cache,
        )


def _stateless(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those of `processors` that keep no state, and so may see drafts that are discarded later.

    A user's own may count its calls, and a watermark remembers what it was shown.
    """
    known = [p for p in processors if type(p).__module__ == LogitsProcessorList.__module__]
    return LogitsProcessorList(p for p in known if not isinstance(p, _STATEFUL))
