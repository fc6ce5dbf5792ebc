"""Configuration of an L2D model: the shape of its diffusion path and the base that it belongs to.

- `L2DConfig`: what `config.json` of a checkpoint holds, with the fields of `CheckpointSettings`
- `SamplerConfig`, re-exported: what may be set at inference
"""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from l2d.checkpoint.settings import CheckpointSettings
from l2d.sampler_config import SamplerConfig

__all__ = ["L2DConfig", "SamplerConfig"]

_RETIRED = ("settings_digest", "generation_digest")  # of older checkpoints: settings may be edited by hand


class L2DConfig(PreTrainedConfig, CheckpointSettings):
    """Configuration of `L2DForCausalLM`; `CheckpointSettings` declares its fields. Raises `ValueError`."""

    model_type = "l2d"
    has_no_defaults_at_init = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in _RETIRED:
            kwargs.pop(name, None)
        self.check()
        super().__post_init__(**kwargs)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name, None)
            if not all(isinstance(i, (int, type(None))) for i in (ids if isinstance(ids, list) else [ids])):
                raise ValueError(f"{name}={ids!r} must be a token's number, or null.")

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
