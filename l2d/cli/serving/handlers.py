"""Transformers' handlers of the three endpoints, for one request to an L2D checkpoint each.

- `ChatHandler`, `TextHandler`, `ResponsesHandler`: `/v1/chat/completions`, `/v1/completions`, `/v1/responses`
- `OneModel`, `OneQueue`: the model manager of a server with one model;
  `Turns`: generation, one request after the other
"""

import json
import time
from typing import Any

import torch
from fastapi.responses import JSONResponse
from transformers import BatchEncoding
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState

from l2d.cli.serving.request import Request, check_fields
from l2d.cli.serving.scoring import score_prompt
from l2d.cli.session import Session


class OneModel(ModelManager):
    """The one model that is served, under the name that it was given by."""

    def __init__(self, session: Session, name: str):
        super().__init__()
        self.session, self.name, self.started = session, name, int(time.time())

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: a revision was chosen when the server started."""
        return model_id

    def load_model_and_processor(self, name: str, progress_callback: Any = None, **_: Any) -> tuple[Any, Any]:
        """The model and its tokenizer. Raises `ValueError` for another name."""
        if name != self.name:
            raise ValueError(f"model={name!r} is not served here: this server has {self.name!r}.")
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": name, "cached": True})
        return self.session.model, self.session.tokenizer

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:
        """The one model, as `/v1/models` lists it."""
        return [{"id": self.name, "object": "model", "created": self.started, "owned_by": ""}]


class Turns(GenerateManager):
    """Generation on one thread, in the order in which requests came; too long ones are refused before it starts."""

    def generate_streaming(self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **more: Any):
        """Start generation: the queue of its pieces, and the streamer that fills it."""
        model.fit(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *rest, **more)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **more: Any
    ):
        """Text, length of the prompt, and generated tokens."""
        model.fit(inputs, gen_config)
        return await super().generate_non_streaming(model, processor, inputs, gen_config, *rest, **more)


class OneQueue(GenerationState):
    """All requests share one `Turns`."""

    def __init__(self) -> None:
        super().__init__()
        self.turns = Turns()

    def get_manager(self, model_id: str, use_cb: bool = False) -> Turns:
        """The one queue."""
        return self.turns


class _Handler(BaseHandler):
    """What the three endpoints share: the request in place of the model, and fields that are checked."""

    required = ""

    def __init__(self, manager: OneModel, state: OneQueue, request: Request, body: dict[str, Any]):
        super().__init__(manager, state)
        self.request = request

    @classmethod
    def check(cls, body: dict[str, Any]) -> None:
        """Raise `ValueError` for a field that is missing, unknown, or that this endpoint cannot follow."""
        check_fields(body, getattr(cls._valid_params_class, "__mutable_keys__", ()))
        if not body.get(cls.required) and body.get(cls.required) != "":
            raise ValueError(f"{cls.required} is not set: give the {cls.required} to answer.")

    def _validate_request(self, body: dict) -> None:
        """It was checked before its settings were taken out."""

    def _resolve_model(self, body: dict) -> tuple[str, Any, Any]:
        name = body.get("model") or self.model_manager.name
        _, tokenizer = self.model_manager.load_model_and_processor(name)
        return name, self.request, tokenizer

    def _build_generation_config(self, body: dict, model_generation_config: Any, use_cb: bool = False) -> Any:
        if body.get("generation_config") is not None:
            try:
                if not isinstance(json.loads(body["generation_config"]), dict):
                    raise TypeError("it holds no mapping")
            except (TypeError, ValueError) as error:
                raise ValueError(f"generation_config must be the JSON text of a mapping ({error}).") from error
        config = super()._build_generation_config(body, model_generation_config, use_cb)
        return self.request.settle(config, body)


class _Conversation(_Handler):
    """An endpoint whose input goes through the chat template."""

    @classmethod
    def check(cls, body: dict[str, Any]) -> None:
        super().check(body)
        if not isinstance(body.get("chat_template_kwargs") or {}, dict):
            raise ValueError("chat_template_kwargs must be a mapping.")

    def _resolve_model(self, body: dict) -> tuple[str, Any, Any]:
        if self.model_manager.session.tokenizer.chat_template is None:
            raise ValueError("the tokenizer of this checkpoint has no chat template: use /v1/completions.")
        return super()._resolve_model(body)

    @staticmethod
    def get_processor_inputs_from_messages(messages: Any, modality: Any) -> list[dict]:
        """Messages as the template takes them. Raises `ValueError`."""
        try:
            return BaseHandler.get_processor_inputs_from_messages(messages, modality)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"messages={messages!r} must be a list of mappings with role and content.") from error


class ChatHandler(_Conversation, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    required = "messages"


class ResponsesHandler(_Conversation, ResponseHandler):
    """`/v1/responses`; unlike transformers' it streams only when asked to, as the protocol says."""

    required = "input"

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Answer; `stream` is off unless it is set."""
        return await super().handle_request({**body, "stream": bool(body.get("stream"))}, request_id)


class TextHandler(_Handler, CompletionHandler):
    """`/v1/completions`, also for prompts that are tokens, and for lists of prompts, which are answered in order."""

    required = "prompt"

    async def handle_request(self, body: dict, request_id: str) -> Any:
        """Answer one prompt, or every prompt of a list as a choice of its own."""
        name, request, tokenizer = self._resolve_model(body)
        prompts = _prompts(body["prompt"])
        if body.get("echo") or body.get("logprobs"):
            return await self._scored(body, prompts, name)
        config = self._build_generation_config(body, request.generation_config)
        turns = self.generation_state.get_manager(name)
        common = (config, turns, body.get("suffix"))
        if body.get("stream"):
            if len(prompts) > 1:
                raise ValueError(f"prompt has {len(prompts)} prompts, and a stream answers one: leave stream out.")
            return self._streaming(request_id, request, tokenizer, name, self._inputs(prompts[0]), *common)
        answers = []
        for prompt in prompts:
            inputs = self._inputs(prompt)
            response = await self._non_streaming(request_id, request, tokenizer, name, inputs, *common)
            answers.append(json.loads(bytes(response.body)))
        return JSONResponse(_joined(answers))

    async def _scored(self, body: dict, prompts: list[str | list[int]], name: str) -> JSONResponse:
        """The prompts themselves with the log-probability of each token, and at most one token more."""
        more = body.get("max_tokens")
        if not body.get("echo") or body.get("logprobs") not in (0, 1) or more not in (0, 1) or body.get("stream"):
            raise ValueError("echo scores prompts: set echo=true, logprobs=1 and max_tokens to 0 or 1, without stream.")
        config = self._build_generation_config({**body, "max_tokens": 1}, self.request.generation_config)
        turns, answers = self.generation_state.get_manager(name), []
        for prompt in prompts:
            inputs = self._inputs(prompt)
            self.request.fit(inputs, config)
            config.max_new_tokens = more
            answers.append(await turns.async_submit(score_prompt, self.request, inputs["input_ids"], config, name))
        return JSONResponse(_joined(answers))

    def _inputs(self, prompt: str | list[int]) -> BatchEncoding:
        session = self.request.session
        tokens = session.encode(prompt) if isinstance(prompt, str) else prompt
        vocabulary = session.model.config.get_text_config().vocab_size
        if not all(0 <= token < vocabulary for token in tokens):
            raise ValueError(f"prompt holds tokens outside the vocabulary of {vocabulary}: give the base's own tokens.")
        ids = torch.tensor([tokens], device=session.model.device)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _joined(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Answers to several prompts as one, with a choice for each."""
    content = answers[0]
    for number, answer in enumerate(answers[1:], start=1):
        content["choices"].append({**answer["choices"][0], "index": number})
        for count, value in answer["usage"].items():
            content["usage"][count] += value
    return content


def _prompts(prompt: Any) -> list[str | list[int]]:
    """The prompts of a request: one, or several; texts, or tokens. Raises `ValueError`."""

    def tokens(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)

    prompts = [prompt] if isinstance(prompt, str) or tokens(prompt) else prompt
    if not isinstance(prompts, list) or not all(isinstance(one, str) or tokens(one) for one in prompts):
        raise ValueError("prompt must be a text, a list of tokens, or a list of these.")
    return prompts
