"""Ends a row's generation where its text reaches a stop string.

- `TextStop`: a stopping criterion of `generate`, decided row by row
- `after_last`: the answer's tokens, after the end of the thinking
"""

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

LOOKBACK = 4
"""Tokens looked back beyond a stop string's length, for strings that are tokenized differently in context."""


class TextStop(StoppingCriteria):
    """Finishes each row as soon as its generated text holds one of the stop strings.

    Args:
        tokenizer: decodes the generated tokens.
        stops: stop strings, none of them empty.
        prompt_length: tokens before the generated ones, padding included.
        think_end: stop strings count only after this string or token, where there is to be one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stops: list[str],
        prompt_length: int,
        think_end: str | int | None = None,
    ):
        self.tokenizer = tokenizer
        self.stops = stops
        self.prompt_length = prompt_length
        self.think_end = think_end
        # A token decodes to at least one byte, so no match can begin earlier than this.
        self.window = max((len(stop.encode()) for stop in stops), default=0) + LOOKBACK

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """`(B,)`: which rows are finished, given all tokens so far `(B, S)`."""
        generated = input_ids[:, self.prompt_length :].tolist()
        return torch.tensor([self.reached(row) for row in generated], dtype=torch.bool, device=input_ids.device)

    def reached(self, tokens: list[int]) -> bool:
        """Whether the text of the generated `tokens` holds a stop string."""
        if not self._holds_stop(tokens[-self.window :]):
            return False
        if isinstance(self.think_end, int):
            tokens = after_last(tokens, self.think_end) or []
        return self._holds_stop(tokens, self.think_end)  # the tail alone may decode differently

    def _holds_stop(self, tokens: list[int], think_end: str | int | None = None) -> bool:
        text = self.tokenizer.decode(tokens, skip_special_tokens=False)
        if isinstance(think_end, str):
            _, found, text = text.rpartition(think_end)
            text = text if found else ""
        return any(stop in text for stop in self.stops)


def after_last(tokens: list[int], token: int) -> list[int] | None:
    """What follows the last `token`, or `None` where it does not occur."""
    return tokens[len(tokens) - tokens[::-1].index(token) :] if token in tokens else None
