"""Small trained modules around the diffusion path.

- `VocabularyEmbedding`: tokens as points on a sphere, and their cached table
- `InputProjection`: a noised embedding into the base's hidden stream
- `TimeEmbedding`: sinusoidal features of t and their MLP
- `modulation_head`: linear, SiLU, zero-initialised linear
- `CarriedState`: what one evaluation hands to the next
- `full_precision`: a context without autocast, for values that outlive it
- `version`: tells whether values that were computed from a weight are outdated

All of them compute in float32, whatever the base's dtype (in float64 where they were cast to it). Source: Cetin et
al., 2025, sections 3 and A.
"""

import math

import torch
from torch import nn
from torch.nn import functional


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself in float32 or float64, a float32 copy of any other."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def version(tensor: torch.Tensor) -> int:
    """How often the tensor was changed in place; -1 for inference tensors, which do not count it."""
    return -1 if tensor.is_inference() else tensor._version


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 (unless under autocast), also in a model cast to a smaller dtype."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs (..., I) of any dtype to (..., O) in the weight's dtype, but at least float32."""
        weight = at_least_float32(self.weight)
        bias = None if self.bias is None else self.bias.to(weight.dtype)
        return functional.linear(inputs.to(weight.dtype), weight, bias)


def _linear(inputs: int, outputs: int, init: str) -> nn.Linear:
    linear = Float32Linear(inputs, outputs, dtype=torch.float32)
    if init == "xavier":
        nn.init.xavier_uniform_(linear.weight)
    elif init == "normal":
        nn.init.normal_(linear.weight, std=0.02)
    else:
        nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def full_precision(tensor: torch.Tensor) -> torch.autocast:
    """A context without autocast on the tensor's device."""
    return torch.autocast(tensor.device.type, enabled=False)


def modulation_head(width: int, outputs: int) -> nn.Sequential:
    """Linear, SiLU, Linear with a zero-initialised last layer: `(..., width) -> (..., outputs)`."""
    return nn.Sequential(_linear(width, width, "xavier"), nn.SiLU(), _linear(width, outputs, "zero"))


class VocabularyEmbedding(nn.Module):
    """Token embeddings of norm `norm` in the diffusion space: `norm * normalize(W E_v + b)`."""

    def __init__(self, hidden_size: int, dim: int, norm: float):
        super().__init__()
        self.projection = _linear(hidden_size, dim, "xavier")
        self.norm = norm
        self._cached: tuple[tuple, torch.Tensor] | None = None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the base's embedding table (..., H) to embeddings (..., d) float32."""
        with full_precision(rows):
            return self.norm * functional.normalize(self.projection(rows), dim=-1)

    @torch.no_grad()
    def table(self, weight: torch.Tensor, chunk: int = 16384) -> torch.Tensor:
        """Embeddings of the whole vocabulary, (V, d) float32, computed once for given weights."""
        sources = (weight, self.projection.weight, self.projection.bias)
        key = tuple((t.data_ptr(), t.device, version(t)) for t in sources)
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, torch.cat([self(rows) for rows in weight.split(chunk)]))
        return self._cached[1]

    def forget(self) -> None:
        """Drop the table that is kept."""
        self._cached = None


class InputProjection(nn.Module):
    """Noised embedding to hidden stream: variance rescaling, Linear, SiLU, Linear."""

    def __init__(self, dim: int, width: int, hidden_size: int, noise_std: float, token_variance: float, scale: float):
        super().__init__()
        self.layers = nn.Sequential(_linear(dim, width, "xavier"), nn.SiLU(), _linear(width, hidden_size, "xavier"))
        self.noise_std, self.token_variance, self.scale = noise_std, token_variance, scale

    def start_at_zero(self) -> None:
        """Let the projection give zero at first."""
        nn.init.zeros_(self.layers.get_parameter("2.weight"))

    def std(self, time: torch.Tensor) -> torch.Tensor:
        """Standard deviation (..., 1) float32 of states at times (...), by which they are divided."""
        time = time.float()
        return torch.sqrt(((1 - time) * self.noise_std) ** 2 + time**2 * self.token_variance).unsqueeze(-1)

    def forward(self, x: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        """States (..., d) of standard deviations (..., 1) to (..., H) float32; rescaled in float32 first."""
        x = x.to(at_least_float32(next(self.layers.parameters())).dtype) / std
        return self.layers(x if self.scale == 1 else x * self.scale)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of t itself (not of 1000 t) and a two-layer MLP, always in float32."""

    def __init__(self, frequency_width: int, width: int):
        super().__init__()
        self.frequency_width = frequency_width
        self.layers = nn.Sequential(
            _linear(frequency_width, width, "normal"), nn.SiLU(), _linear(width, width, "normal")
        )

    def features(self, time: torch.Tensor) -> torch.Tensor:
        """`[cos(t w_k), sin(t w_k)]` with `w_k = 10000 ** (-k / (F / 2))`: (...) to (..., F) float32."""
        half = self.frequency_width // 2
        steps = torch.arange(half, dtype=torch.float32, device=time.device)
        angles = time.float().unsqueeze(-1) * torch.exp(-math.log(10000) * steps / half)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        """Times (...) to embeddings (..., C) float32."""
        with full_precision(time):
            return self.layers(self.features(time))


class CarriedState(nn.Module):
    """The path's last hidden state of one evaluation, added to the input of the next: `W RMSNorm(s)`, W zero at first.

    Not part of the published method. Where nothing was evaluated before, `s = 0`, and so is what is added.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.projection = Float32Linear(hidden_size, hidden_size, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.projection.weight)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """States (..., H) to what is added to the projected input, (..., H) float32."""
        return self.projection(functional.rms_norm(at_least_float32(state), state.shape[-1:], eps=1e-6))
