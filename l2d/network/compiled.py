"""The half of the path's layers that `torch.compile` takes: everything after attention.

- `compile_layers`: switch it on or off for a path
- `compiled`: a function of tensors, compiled once for all layers and models

Attention stays as it is: its keys grow with every token, and what is compiled for one length serves no other. After
attention only the number of evaluations varies, so a handful of graphs serve all layers and all calls.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch


def compile_layers(layers: Iterable[Any], backend: str | None) -> None:
    """Let the twins of a path's `layers` compute their MLP half by a `backend` of torch.compile; `None`: plainly."""
    for layer in layers:
        layer.twin.backend = backend


def with_graphs(backend: str, hidden: torch.Tensor) -> bool:
    """Whether a call on `hidden` is recorded as a CUDA graph, which has one shape.

    In half precision all calls have few shapes (`fixed_shapes`); what has gradients varies with the batch.
    """
    return backend == "inductor" and hidden.is_cuda and hidden.dtype.itemsize < 4 and not torch.is_grad_enabled()


@functools.cache
def compiled(function: Callable, backend: str, graphs: bool) -> Callable:
    """`function`, compiled for any number of rows; with `graphs` as CUDA graphs."""
    return torch.compile(function, dynamic=True, backend=backend, mode="reduce-overhead" if graphs else None)
