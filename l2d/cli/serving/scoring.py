"""Prompts that are scored: `/v1/completions` with `echo` and `logprobs`, as lm-eval's `loglikelihood` asks for it.

- `score_prompt`: one prompt with the log-probability of each of its tokens
"""

import itertools
import time
from typing import Any

import torch

from l2d.cli.serving.request import Request


def score_prompt(request: Request, input_ids: torch.Tensor, config: Any, name: str) -> dict[str, Any]:
    """A `Completion` for tokens (1, L), with at most one generated token (`config.max_new_tokens`) behind them.

    The first token has no log-probability. Noise is keyed by the first token, so that texts that begin alike, such as
    the choices of one question, are compared under the same noise.
    """
    session, length = request.session, input_ids.shape[1]
    if config.max_new_tokens:
        input_ids = request.generate(input_ids=input_ids, generation_config=config)
    output = session.model.score(input_ids, sampler=request.sampler)
    request.add_cost(output)
    tokens = input_ids[0].tolist()
    texts = [session.token_text(token) for token in tokens]
    values, best = output.logprobs[0].tolist(), output.best_logprobs[0].tolist()
    likely = [session.token_text(token) for token in output.best[0].tolist()]
    top = [{text: value, first: most} for text, value, first, most in zip(texts, values, likely, best, strict=True)]
    logprobs = {"tokens": texts, "token_logprobs": [None, *values[1:]], "top_logprobs": [None, *top[1:]]}
    logprobs["text_offset"] = [0, *itertools.accumulate(map(len, texts[:-1]))]
    choice = {"index": 0, "text": session.tokenizer.decode(tokens), "logprobs": logprobs, "finish_reason": "length"}
    usage = {"prompt_tokens": length, "completion_tokens": len(tokens) - length, "total_tokens": len(tokens)}
    return {
        "id": f"cmpl-{time.time_ns()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": name,
        "choices": [choice],
        "usage": usage,
    }
