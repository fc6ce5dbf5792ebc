"""How tokens form: every evaluation of every generated token, as data.

- `trace_prompt`: generate, then record each token's candidates over time -> `Trace`
- `Trace`; what it holds is in `trace_data`

The answer is what `generate` gives; its trajectories are solved again from the same noise, all positions at once.

Legend: N generated tokens, E velocity evaluations (the output is read at evaluation E), d diffusion dimension.
"""

from collections.abc import Callable
from typing import Any

from l2d.cli.session import Session, decoding_options
from l2d.cli.trace_data import Candidate, TokenTrace, TraceData
from l2d.sampler_config import SamplerConfig

USUAL_LENGTH = 64
"""Most tokens of an answer where nothing else is asked for."""
SHOWN = 6
"""Most candidates of a token."""
_BATCH = 512  # evaluations whose logits are computed at a time


class Trace(TraceData):
    """A prompt's answer and how its tokens formed; notebooks show it as the page of `python -m l2d trace`."""

    def _repr_html_(self) -> str:
        from html import escape

        from l2d.cli.trace_page import html_page

        page = escape(html_page(self), quote=True)  # in a frame: its style and script stay its own
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 820px; border: 0"></iframe>'


def trace_prompt(
    session: Session,
    prompt: str,
    sampler: dict[str, Any] | None = None,
    temperature: float = 0.0,
    max_new_tokens: int | None = None,
    wait: Callable[[str], Any] = lambda words: None,
) -> Trace:
    """Generate an answer to `prompt` and record how each of its tokens formed; `wait` is told what goes on.

    Raises `ValueError` for adaptive solvers, whose evaluations differ from token to token, and for too long prompts.
    """
    import torch

    model = session.model
    settings = model.sampler(sampler)
    refuse_untraceable(settings)
    ids = session.encode(prompt)
    longest = session.answer_length(max_new_tokens, USUAL_LENGTH)
    if len(ids) + longest > session.longest:
        raise ValueError(
            f"prompt has {len(ids)} tokens and max_new_tokens is {longest}: the base takes {session.longest} in all."
        )
    options = decoding_options(temperature, longest)
    sequences, record = model.generate(
        torch.tensor([ids], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=model.device),
        sampler=settings,
        return_record=True,
        streamer=_Count(wait, longest),
        **session.ending(),
        **options,
    )
    wait(f"solving the trajectories of {sequences.shape[1] - len(ids)} tokens again ...")
    times, chosen, probabilities = _trajectories(session, sequences, len(ids), settings)
    new = sequences[0, len(ids) :].tolist()
    pieces = session.pieces(new)
    tokens = []
    for place, (token, piece) in enumerate(zip(new, pieces, strict=True)):
        cost = {name: getattr(record, name)[0][place] for name in ("nfe_requested", "nfe_computed", "passes")}
        found = _token_trace(session, token, piece, chosen[place], probabilities[place])
        tokens.append(TokenTrace(position=len(ids) + place, token=token, text=piece, **found, **cost))
    return Trace(
        model=str(model.config._name_or_path or model.config.base_name_or_path),
        sampler=settings.to_dict(),
        decoding=options,
        prompt=prompt,
        prompt_tokens=ids,
        answer="".join(pieces),
        times=times,
        tokens=tokens,
    )


class _Count:
    """A streamer that tells how many tokens have come."""

    def __init__(self, wait: Callable[[str], Any], most: int):
        self.wait, self.most, self.count = wait, most, -1

    def put(self, tokens: Any) -> None:
        self.count += 1  # the prompt comes first
        read = f"reading {tokens.numel():,} tokens" if not self.count else f"token {self.count} of at most {self.most}"
        self.wait(f"{read} ...")

    def end(self) -> None:
        pass


def refuse_untraceable(settings: SamplerConfig) -> None:
    """Raise `ValueError` for adaptive solvers."""
    if settings.adaptive and not settings.is_base:
        raise ValueError(
            f"solver={settings.solver!r} has no fixed evaluation times: trace a fixed-grid solver instead."
        )


def _trajectories(session: Session, sequences: Any, start: int, settings: Any) -> tuple[list[float], Any, Any]:
    """Evaluation times, chosen tokens (N, E), and probabilities (N, E + 1, V), of tokens `start` to the last."""
    import torch

    from l2d.sampling.fixed_grid import fixed_grid
    from l2d.sampling.noise import RequestNoise, default_keys
    from l2d.sampling.sites import make_sites
    from l2d.sampling.solve import solve_sites

    paths, count = session.model.paths, sequences.shape[1] - start
    with torch.no_grad():
        state = paths.main_path(sequences[:, :-1])
        index = torch.arange(start - 1, start - 1 + count, device=sequences.device)
        if settings.is_base:
            base = torch.softmax(paths.base_logits(state, index[None])[0].float(), -1)
            return [0.0], torch.zeros(count, 0, dtype=torch.int64), base[:, None].cpu()
        (key,) = default_keys([sequences[0, :start].tolist()])
        noises = [RequestNoise(settings.seed, key)] * count
        positions = list(range(start, start + count))
        sites = make_sites(paths.config, settings, torch.zeros_like(index), index, positions, noises)
        site_class = settings.class_index(paths.config.guidance_classes)
        settings = settings.replace(speculation=False)  # which then records every evaluation
        solved: Any = solve_sites(paths, state, sites, settings, site_class, record=True)
        probabilities = [
            torch.softmax(paths.logits(part).float(), -1).cpu() for part in solved.evaluated.flatten(0, 1).split(_BATCH)
        ]
    times, shape = fixed_grid(settings).times.tolist(), solved.evaluated.shape[:2]
    return times, solved.chosen[..., 0].cpu(), torch.cat(probabilities).unflatten(0, shape)


def _token_trace(session: Session, token: int, piece: str, chosen: Any, probabilities: Any) -> dict[str, Any]:
    chosen = chosen.tolist()
    peaks = probabilities.amax(0)  # (V,)
    must = list(dict.fromkeys([token, *chosen]))[:SHOWN]
    likely = peaks.topk(min(SHOWN, len(peaks))).indices.tolist()
    wanted = list(dict.fromkeys(must + [other for other in likely if peaks[other] >= 0.01]))[:SHOWN]
    candidates = [
        Candidate(other, session.token_text(other), [round(p, 6) for p in probabilities[:, other].tolist()])
        for other in wanted
    ]
    base = int(probabilities[0].argmax())
    return {
        "chosen": chosen,
        "chosen_texts": [session.token_text(other) for other in chosen],
        "changes": [n for n in range(1, len(chosen)) if chosen[n] != chosen[n - 1]],
        "base_token": base,
        "base_text": session.token_text(base),
        "candidates": candidates,
    }
