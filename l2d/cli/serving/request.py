"""One request to the server: what it asks for, and the model as this request sees it.

- `Request`: the body's sampler settings, checked; the model's face for transformers' handlers; stop strings and cost
- `check_fields`: refuses fields that are unknown or that nothing here can follow
- `fields_of_request`: names under which a request sets a field of `SamplerConfig`
"""

import difflib
import threading
from collections.abc import Collection
from typing import Any

import torch
from transformers import StoppingCriteriaList
from transformers.generation import StoppingCriteria

from l2d.cli.session import Session, decoding_options
from l2d.decoding import UNUSED_SETTINGS, refuse
from l2d.sampler_config import SamplerConfig
from l2d.sampling.stop_strings import TextStop
from l2d.settings import declared

HONOURED = (
    *("model", "messages", "prompt", "input", "instructions", "suffix", "tools", "stream", "seed", "stop"),
    *("temperature", "top_p", "frequency_penalty", "logit_bias", "generation_config", "chat_template_kwargs"),
    *("max_tokens", "max_completion_tokens", "max_output_tokens", "echo", "logprobs"),
)
"""Fields of the OpenAI protocol that change the answer. `stream_options` and the like say nothing of the answer."""
_LENGTHS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_HARMLESS = ("stream_options", "user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier")
_NEUTRAL: tuple[Any, ...] = (None, False, 0, [], {}, "auto", "disabled", {"type": "text"}, {"format": {"type": "text"}})
_NUMBERS = ("temperature", "top_p", "frequency_penalty")


def fields_of_request() -> dict[str, str]:
    """Field of a request -> field of `SamplerConfig`; the budget is called `diffusion_budget`, as in `lm_eval`."""
    return {one.argument: name for name, one in declared(SamplerConfig).items()}


def check_fields(body: dict[str, Any], known: Collection[str]) -> None:
    """Raise `ValueError` for a field of `body` that is not among `known`, not followed, or of the wrong type."""
    ours = fields_of_request()
    for name, value in body.items():
        if name not in known and name not in ours and name != "generation_config":
            near = difflib.get_close_matches(name, [*known, *ours], 1)
            hint = f"did you mean {near[0]!r}?" if near else "leave it out."
            raise ValueError(f"field {name!r} is not known: {hint}")
        neutral = value in _NEUTRAL or (name in ("n", "best_of") and value == 1)
        if name not in (*HONOURED, *_HARMLESS, *ours) and not neutral:
            raise ValueError(f"{name}={value!r} cannot be followed by this server: leave it out.")
    for name in _NUMBERS:
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"{name}={value!r} must be a number.")
    if not 0 < (1 if body.get("top_p") is None else body["top_p"]) <= 1:
        raise ValueError(f"top_p={body['top_p']} must be above 0 and at most 1.")
    if (body.get("frequency_penalty") or 0) <= -1:
        raise ValueError(f"frequency_penalty={body['frequency_penalty']} must be above -1.")
    for name in _LENGTHS:
        value = body.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name}={value!r} must be a whole number of tokens.")
    stops = body.get("stop")
    if not all(isinstance(stop, str) for stop in (stops if isinstance(stops, list) else [stops or ""])):
        raise ValueError(f"stop={stops!r} must be a text or a list of texts.")


class _Cancelled(StoppingCriteria):
    """Finishes all rows once the client is gone."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _Later:
    """A streamer whose end waits until the cost is known, which the last event tells."""

    def __init__(self, streamer: Any):
        self.put = streamer.put

    def end(self) -> None:
        """Not yet."""


class Request:
    """What one request asks for. Transformers' handlers take it for the model and call its `generate`.

    Args:
        session: model and tokenizer.
        body: of the request; its sampler settings are taken out of it.
        sampler: settings of the server, which those of the request override.
        temperature, max_new_tokens: of the server, where the request says nothing.

    Attributes:
        cancelled: set when the client is gone; generation ends at the next token.
        nfe_requested, nfe_computed: evaluations of the answer; error: why there is none.

    Raises `ValueError` for settings that the model cannot follow.
    """

    def __init__(
        self, session: Session, body: dict[str, Any], sampler: dict[str, Any], temperature: float, max_new_tokens: int
    ):
        ours = fields_of_request()
        chosen = {ours[name]: body.pop(name) for name in list(body) if name in ours}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        self.session, self.sampler = session, session.model.sampler({**sampler, **chosen})
        stops = body.pop("stop", None) or []
        self.stops = [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop]
        self.longest = next((body[name] for name in _LENGTHS if body.get(name) is not None), None)
        if self.longest is not None and not body.get("echo"):
            self.longest = session.answer_length(self.longest, 0)
        self.usual_temperature, self.usual_length = temperature, max_new_tokens
        self.cancelled = threading.Event()
        self.nfe_requested = self.nfe_computed = 0
        self.error: str | None = None
        # What the handlers ask of a model; chats are read as the base's are.
        self.device, self.config = session.model.device, session.model.config.get_text_config()
        self.generation_config = session.model.generation_config

    def settle(self, config: Any, body: dict[str, Any]) -> Any:
        """The request's `GenerationConfig` as `generate` takes it. Raises `ValueError`."""
        temperature = body.get("temperature")
        if temperature is None and body.get("generation_config") is None:
            temperature = self.usual_temperature
        if temperature is not None:
            config.update(**decoding_options(temperature, self.usual_length))
        if (config.num_return_sequences or 1) > 1 and body.get("generation_config") is not None:
            raise ValueError(f"num_return_sequences={config.num_return_sequences} cannot be followed: leave it out.")
        for name, value in self.session.ending().items():
            free = name in ("eos_token_id", "pad_token_id") and body.get("generation_config") is not None
            if name != "tokenizer" and not (free and getattr(config, name) is not None):
                setattr(config, name, value)
        ends = config.stop_strings or []
        self.stops += [ends] if isinstance(ends, str) else ends
        config.stop_strings = None  # `TextStop` ends the answer there, and the text is cut
        if body.get("generation_config") is not None and self.longest is None and config.max_new_tokens is not None:
            self.longest = self.session.answer_length(config.max_new_tokens, 0)
        refuse(vars(config), UNUSED_SETTINGS)
        return config

    def fit(self, inputs: Any, config: Any) -> None:
        """Set the most tokens of the answer; `ValueError` if prompt and answer are longer than the base takes."""
        length, longest = inputs["input_ids"].shape[-1], self.session.longest
        room = longest - length
        if room < (self.longest or 1):
            asked = "" if self.longest is None else f" and its answer may have {self.longest}"
            raise ValueError(
                f"the prompt has {length} tokens{asked}, and the base takes {longest} in all: shorten one of them."
            )
        config.max_new_tokens = self.longest or min(self.usual_length, room)

    def generate(self, *, input_ids: torch.Tensor, generation_config: Any, streamer: Any = None, **_: Any) -> Any:
        """Token ids (1, L + new) of prompt and answer; nothing is generated for a client that is gone."""
        if self.cancelled.is_set():
            if streamer is not None:
                streamer.end()
            return input_ids
        stop = TextStop(self.session.tokenizer, self.stops, input_ids.shape[1])
        try:
            tokens, record = self.session.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                sampler=self.sampler,
                generation_config=generation_config,
                stopping_criteria=StoppingCriteriaList([stop, _Cancelled(self.cancelled)]),
                streamer=None if streamer is None else _Later(streamer),
                return_record=True,
            )
        except ValueError as error:
            self.error = str(error)
            raise
        self.add_cost(record)
        if streamer is not None:
            streamer.end()
        return tokens

    def add_cost(self, record: Any) -> None:
        """Count what `record`, of `generate` or `score`, spent."""
        for name in ("nfe_requested", "nfe_computed"):
            spent = getattr(record, name)
            total = int(spent.sum()) if isinstance(spent, torch.Tensor) else sum(map(sum, spent))
            setattr(self, name, getattr(self, name) + total)
