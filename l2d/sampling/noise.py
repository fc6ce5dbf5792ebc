"""Noise as a function of (seed, request, position, draw), so that no result depends on batch-mates or order.

- `request_key`: a request's identity from its tokens and how often they occurred before
- `RequestNoise`: start noise and uniform numbers for one request

A counter-based generator (Philox) is keyed by seed and request, and its counter is (stream, position, draw): any number
can be drawn without those before it, on any machine, and every budget sees the same start noise.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

_NORMAL, _CHOICE, _OUTPUT = range(3)


def request_key(tokens: Iterable[int], occurrence: int = 0) -> bytes:
    """Key of a request: its prompt tokens, and the number of equal prompts before it."""
    content = np.asarray([*tokens, occurrence], dtype=np.int64)
    return hashlib.blake2b(content.tobytes(), digest_size=16).digest()


def default_keys(prompts: Sequence[Sequence[int]]) -> list[bytes]:
    """Keys of a batch of prompts; equal prompts are told apart by their order among themselves."""
    seen: Counter = Counter()
    keys = []
    for prompt in map(tuple, prompts):
        keys.append(request_key(prompt, seen[prompt]))
        seen[prompt] += 1
    return keys


class RequestNoise:
    """All randomness of one request.

    Args:
        seed: the sampler's seed.
        key: the request's key, bytes or anything with a stable text form (a name, a number).
    """

    def __init__(self, seed: int, key: bytes | str | int):
        content = key if isinstance(key, bytes) else str(key).encode()
        digest = hashlib.blake2b(seed.to_bytes(8, "little", signed=False) + content, digest_size=16).digest()
        self._key = np.frombuffer(digest, dtype=np.uint64)

    def _generator(self, stream: int, position: int, draw: int) -> np.random.Generator:
        counter = np.array([0, stream, position, draw], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(counter=counter, key=self._key))

    def normal(self, position: int, draw: int, size: int) -> np.ndarray:
        """Unit normal start noise (size,) for the token at a position of the sequence."""
        return self._generator(_NORMAL, position, draw).standard_normal(size, dtype=np.float32)

    def choices(self, position: int, draw: int, evaluations: int) -> np.ndarray:
        """Uniform numbers (evaluations,) that fix the token drawn at each evaluation of a trajectory."""
        return self._generator(_CHOICE, position, draw).random(evaluations)

    def output(self, position: int) -> float:
        """The uniform number that fixes the output token drawn at a position."""
        return float(self._generator(_OUTPUT, position, 0).random())


def draw_token(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse-transform sampling: token (...) for probabilities (..., V) and uniform numbers (...) in [0, 1)."""
    cumulative = probabilities.double().cumsum(-1)
    threshold = uniform.to(cumulative).unsqueeze(-1) * cumulative[..., -1:]
    token = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    return token.clamp_(max=probabilities.shape[-1] - 1)
