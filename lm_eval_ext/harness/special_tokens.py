"""Answers with their special tokens in the text: the generation setting `skip_special_tokens: false`.

- `install`: makes the harness's Hugging Face class follow it, which decodes without them whatever a task asks for
- `whole_text`: all tokens as text, no space cleaned up

vLLM knows a setting of the same name.
"""

import functools
from collections.abc import Iterable
from typing import Any

SETTING = "skip_special_tokens"


def whole_text(tokenizer: Any, tokens: Iterable[int]) -> str:
    """Text of `tokens`, special ones included."""
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def install(model_class: Any) -> None:
    """Wrap `_model_generate`, which gets a batch's settings, and `tok_decode`, which is called for its answers next."""
    generate, decode = model_class._model_generate, model_class.tok_decode
    if getattr(generate, "keeps_special_tokens", False):
        return

    @functools.wraps(generate)
    def generate_batch(self: Any, *args: Any, skip_special_tokens: bool = True, **kwargs: Any) -> Any:
        self._skips_special_tokens = skip_special_tokens
        return generate(self, *args, **kwargs)

    @functools.wraps(decode)
    def decode_answer(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> str:
        if args or kwargs or getattr(self, "_skips_special_tokens", True):
            return decode(self, tokens, *args, **kwargs)
        return whole_text(self.tokenizer, tokens)

    vars(generate_batch)["keeps_special_tokens"] = True
    model_class._model_generate, model_class.tok_decode = generate_batch, decode_answer
