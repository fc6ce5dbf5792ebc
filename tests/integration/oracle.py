"""An oracle: the harness's model class whose network is replaced by given answers; all else is the real text path."""

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance

from l2d.decoding import DecodeRecord
from lm_eval_ext.model import L2DLM


class Oracle(L2DLM):
    """Replays `answer(doc, repeat)` token by token, until a stopping criterion holds."""

    def __init__(self, answer: Callable[[dict[str, Any], int], str], **arguments: Any):
        super().__init__(**arguments)
        self.answer = answer
        self.contexts: list[str] = []
        self.model.generate = self._replay

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self.contexts += [request.args[0] for request in requests]
        return super().generate_until(requests, disable_tqdm)

    def _decode(self, batch, settings, candidate=None):
        self.batch = batch
        return super()._decode(batch, settings, candidate)

    def _replay(self, input_ids, attention_mask, max_new_tokens, stopping_criteria, pad_token_id, **_):
        rows, counts = [], []
        for job, prompt in zip(self.batch, input_ids.tolist(), strict=True):
            answer = self.answer(job.source.instance.doc, job.source.repeat)
            wanted = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], self.eot_token_id]
            given: list[int] = []
            for token in wanted[:max_new_tokens]:
                given.append(token)
                if bool(stopping_criteria(torch.tensor([prompt + given]), None)[0]):
                    break
            rows.append(prompt + given)
            counts.append([1] * len(given))
        width = max(map(len, rows))
        sequences = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows])
        return sequences, DecodeRecord(counts, counts, counts, counts)
