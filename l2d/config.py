"""Configuration of an L2D model: the shape of its diffusion path and the base that it belongs to.

- `L2DConfig`: what `config.json` of a checkpoint holds
- `SamplerConfig`, re-exported: what may be set at inference
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from l2d.sampler_config import NOISE_FREE_SAMPLER, SamplerConfig

__all__ = ["L2DConfig", "SamplerConfig"]

_WIDEST = 1 << 17  # beyond any use; a damaged number is refused before memory is asked for


class L2DConfig(PreTrainedConfig):
    """Configuration of `L2DForCausalLM`.

    Args:
        base_name_or_path: hub name or folder of the frozen base; it is loaded from there.
        base_revision: revision of the base on the hub.
        base_fingerprint: hash of the base's weights; loading with another base is refused.
        base_config: the base's own configuration, as a dictionary.
        variant: `"lora"` (low-rank deltas on the path's projections) or `"full"` (trained copies of them). In mixtures
            of experts these are the projections of attention and of dense MLPs; fused experts stay the base's.
        lora_rank, lora_alpha: LoRA deltas are scaled by `lora_alpha / lora_rank`.
        diffusion_dim: dimension d of the space in which tokens are noised.
        noise_std: sigma, the standard deviation of the noise at t = 0.
        input_width: hidden width of the projection from the noised token to the base's hidden size.
        conditioning_width, frequency_width: widths of the time embedding and of its sinusoidal features.
        embedding_norm: norm of every token's embedding; `None` is `sqrt(diffusion_dim)` (unit variance).
        input_scale: factor on the variance-rescaled input.
        min_noise: training times are drawn from `[0, 1 - min_noise]`.
        guidance_classes: names of the classes for classifier-free guidance; `None` for a model without.
        carried_state: the path's last hidden state enters the next evaluation; evaluations then go in sequence.
        noise_free: a control: the path sees a constant in place of the noised token and is evaluated once, at t = 1.
        sampler: defaults for `SamplerConfig` that belong to this checkpoint.
        tensors_digest: of the trained tensors that were saved with it.
    """

    model_type = "l2d"
    has_no_defaults_at_init = False

    def __init__(
        self,
        base_name_or_path: str | None = None,
        base_revision: str | None = None,
        base_fingerprint: str | None = None,
        base_config: dict[str, Any] | None = None,
        variant: str = "lora",
        lora_rank: int = 32,
        lora_alpha: float = 32.0,
        diffusion_dim: int = 256,
        noise_std: float = 64.0,
        input_width: int = 256,
        conditioning_width: int = 256,
        frequency_width: int = 256,
        embedding_norm: float | None = None,
        input_scale: float = 1.0,
        min_noise: float = 0.0,
        guidance_classes: list[str] | None = None,
        carried_state: bool = False,
        noise_free: bool = False,
        sampler: dict[str, Any] | None = None,
        tensors_digest: str | None = None,
        **kwargs: Any,
    ):
        self.base_name_or_path = base_name_or_path
        self.base_revision = base_revision
        self.base_fingerprint = base_fingerprint
        self.base_config = base_config
        self.variant = variant
        self.lora_rank = lora_rank
        self.lora_alpha = lora_alpha
        self.diffusion_dim = diffusion_dim
        self.noise_std = noise_std
        self.input_width = input_width
        self.conditioning_width = conditioning_width
        self.frequency_width = frequency_width
        self.embedding_norm = embedding_norm
        self.input_scale = input_scale
        self.min_noise = min_noise
        self.guidance_classes = list(guidance_classes) if guidance_classes else None
        self.carried_state = carried_state
        self.noise_free = noise_free
        self.sampler = dict(sampler or {})
        self.tensors_digest = tensors_digest
        for retired in (
            "settings_digest",
            "generation_digest",
        ):  # of checkpoints from before 0.2: settings may be edited
            kwargs.pop(retired, None)
        self._validate_base()  # which the next line looks into
        super().__init__(**kwargs)
        self._validate()

    def _validate(self) -> None:
        if self.variant not in ("lora", "full"):
            raise ValueError(f"variant={self.variant!r} is not known; choose 'lora' or 'full'.")
        for name in ("lora_rank", "diffusion_dim", "input_width", "conditioning_width", "frequency_width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _WIDEST:
                raise ValueError(f"{name}={value!r} must be a whole number from 1 to {_WIDEST}.")
        if self.frequency_width % 2:
            raise ValueError(f"frequency_width={self.frequency_width} must be even: half cosines, half sines.")
        for name in ("lora_alpha", "noise_std", "input_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} must be a number above 0.")
        norm = self.embedding_norm
        if norm is not None and (isinstance(norm, bool) or not isinstance(norm, (int, float)) or not norm > 0):
            raise ValueError(f"embedding_norm={norm!r} must be a number above 0, or null.")
        if not isinstance(self.min_noise, (int, float)) or not 0 <= self.min_noise < 1:
            raise ValueError(f"min_noise={self.min_noise!r} must be at least 0 and below 1.")
        classes = self.guidance_classes or []
        if len(set(classes)) != len(classes) or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"guidance_classes={classes!r} must be distinct names.")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name, None)
            if not all(isinstance(i, (int, type(None))) for i in (ids if isinstance(ids, list) else [ids])):
                raise ValueError(f"{name}={ids!r} must be a token's number, or null.")
        for name in ("carried_state", "noise_free"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be true or false.")
        if self.noise_free and self.carried_state:
            raise ValueError("noise_free=True is evaluated once, so carried_state=True has no effect: set one of them.")
        if self.noise_free:
            self.sampler = {**NOISE_FREE_SAMPLER, **self.sampler}
        self.check_sampler(SamplerConfig().replace(**self.sampler))

    def _validate_base(self) -> None:
        for name in ("base_name_or_path", "base_revision", "base_fingerprint"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a text, or null.")
        if not isinstance(self.base_config, (dict, type(None))):
            raise ValueError(f"base_config={self.base_config!r} must be a mapping, or null.")

    @property
    def token_norm(self) -> float:
        """Norm of every token's embedding in the diffusion space."""
        return self.diffusion_dim**0.5 if self.embedding_norm is None else self.embedding_norm

    def check_sampler(self, sampler: SamplerConfig) -> SamplerConfig:
        """`sampler` as this model can follow it; `ValueError` where its classes or its path do not allow it."""
        sampler.class_index(self.guidance_classes)
        return sampler.for_path(self.carried_state, self.noise_free)

    def default_sampler(self, sampler: SamplerConfig | dict[str, Any] | None = None, **changes: Any) -> SamplerConfig:
        """The checkpoint's sampler settings, overridden by `sampler` (a dictionary, or whole) and `changes`."""
        if not isinstance(sampler, (SamplerConfig, dict, type(None))):
            raise ValueError(f"sampler={sampler!r} must be a SamplerConfig or a dictionary of its fields.")
        if not isinstance(sampler, SamplerConfig):
            sampler = SamplerConfig().replace(**{**self.sampler, **(sampler or {})})
        return sampler.replace(**changes)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The base's configuration, which tells caches, trainers and harnesses about layers, heads and lengths."""
        if not self.base_config:
            return self
        if getattr(self, "_text_config", None) is None:
            self._text_config = base_config_from_dict(self.base_config).get_text_config()
        return self._text_config

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `config.json`, without the cached base configuration."""
        output = super().to_dict()
        output.pop("_text_config", None)
        return output


def base_config_from_dict(base_config: dict[str, Any]) -> PreTrainedConfig:
    """Rebuild a base's configuration object from its dictionary (`model_type` included)."""
    return AutoConfig.for_model(**base_config)


AutoConfig.register("l2d", L2DConfig, exist_ok=True)
