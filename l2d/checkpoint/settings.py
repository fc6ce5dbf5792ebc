"""What `config.json` of a checkpoint says, declared and checked in one place and without torch.

- `CheckpointSettings`: the shape of the diffusion path, the base that it belongs to, and the sampler's defaults

`L2DConfig` has these fields, recipes set some of them, and a run resumes only with the same ones `of_the_weights`.
"""

import dataclasses
from typing import Any

from l2d.sampler_config import NOISE_FREE_SAMPLER, SamplerConfig
from l2d.settings import (
    Kind,
    check_settings,
    matching,
    number,
    one_of,
    optional,
    positive,
    refused,
    setting,
    truth,
    whole,
)

_width = whole(1, 1 << 17)  # beyond any use; a damaged number is refused before memory is asked for
_text = optional(matching("a text", lambda value: isinstance(value, str)))
_mapping = matching("a mapping", lambda value: isinstance(value, dict))


def _check_classes(name: str, value: Any) -> list[str] | None:
    names = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(isinstance(one, str) for one in names) or len(set(names)) != len(names):
        raise refused(name, value, "a list of distinct names")
    return names or None


def _check_frequencies(name: str, value: Any) -> int:
    if _width.check(name, value) % 2:
        raise refused(name, value, "even: half cosines, half sines")
    return _width.check(name, value)


@dataclasses.dataclass(kw_only=True)
class CheckpointSettings:
    """The settings of a checkpoint. `check` raises a one-sentence `ValueError` for what is impossible."""

    base_name_or_path: str | None = setting(None, _text, "hub name or folder of the frozen base, which is loaded there")
    base_revision: str | None = setting(None, _text, "revision of the base on the hub")
    base_gguf_file: str | None = setting(
        None, _text, "GGUF file with the base's weights, configuration and tokenizer, by its name in the base's folder"
    )
    base_fingerprint: str | None = setting(None, _text, "hash of the base's weights; another base is refused")
    base_config: dict[str, Any] | None = setting(None, optional(_mapping), "the base's own configuration")
    variant: str = setting(
        "lora",
        one_of("lora", "full"),
        "trained part of the path's projections: low-rank deltas, or whole copies",
        of_the_weights=True,
    )
    lora_rank: int = setting(32, _width, "rank of the deltas", of_the_weights=True)
    lora_alpha: float = setting(32.0, positive, "deltas are scaled by lora_alpha / lora_rank", of_the_weights=True)
    diffusion_dim: int = setting(256, _width, "dimension d in which tokens are noised", of_the_weights=True)
    noise_std: float = setting(64.0, positive, "sigma, standard deviation of the noise at t = 0", of_the_weights=True)
    input_width: int = setting(256, _width, "hidden width of the projection of the noised token", of_the_weights=True)
    conditioning_width: int = setting(256, _width, "width of the time embedding", of_the_weights=True)
    frequency_width: int = setting(
        256,
        Kind("an even whole number", _check_frequencies),
        "number of sinusoidal features of the time",
        of_the_weights=True,
    )
    embedding_norm: float | None = setting(
        None,
        optional(positive),
        "norm of every token's embedding; by default sqrt(diffusion_dim), unit variance",
        of_the_weights=True,
    )
    input_scale: float = setting(1.0, positive, "factor on the variance-rescaled input", of_the_weights=True)
    min_noise: float = setting(
        0.0,
        number("a number of at least 0 and below 1", lambda value: 0 <= value < 1),
        "training times are drawn from [0, 1 - min_noise]",
        of_the_weights=True,
    )
    guidance_classes: list[str] | None = setting(
        None,
        Kind("a list of distinct names", _check_classes),
        "names of the classes for classifier-free guidance",
        of_the_weights=True,
    )
    carried_state: bool = setting(
        False,
        truth,
        "the path's last hidden state enters its next evaluation; these then go in sequence",
        of_the_weights=True,
    )
    noise_free: bool = setting(
        False,
        truth,
        "control: the path sees a constant in place of the noised token, and is evaluated once",
        of_the_weights=True,
    )
    warm_start: bool = setting(
        False,
        truth,
        "the path starts as the base itself: the base's input stream, open gates; not as published, learns sooner",
        of_the_weights=True,
    )
    own_values_rank: int = setting(
        0,
        whole(0, 1 << 17),
        "rank of the path's own change of the values that its attention reads; 0: none, as published",
        of_the_weights=True,
    )
    own_keys_rank: int = setting(
        0,
        whole(0, 1 << 17),
        "rank of the path's own change of the keys that its attention reads; 0: none, as published",
        of_the_weights=True,
    )
    sampler: dict[str, Any] = setting(
        None,
        Kind("a mapping", lambda name, value: dict(_mapping.check(name, value or {}))),
        "inference defaults that belong to the checkpoint, e.g. {budget: 15}",
    )
    tensors_digest: str | None = setting(None, _text, "digest of the trained tensors that were saved with it")

    def check(self) -> None:
        """Check and convert all settings. Raises `ValueError`."""
        check_settings(self)
        if self.noise_free and self.carried_state:
            raise ValueError("noise_free=True is evaluated once, so carried_state=True has no effect: set one of them.")
        if self.noise_free:
            self.sampler = {**NOISE_FREE_SAMPLER, **self.sampler}
        self.check_sampler(self.default_sampler())

    @property
    def token_norm(self) -> float:
        """Norm of every token's embedding in the diffusion space."""
        return self.diffusion_dim**0.5 if self.embedding_norm is None else self.embedding_norm

    @property
    def longest(self) -> int | None:
        """Most tokens that the base takes, where its configuration says so."""
        base = self.base_config or {}
        return (base.get("text_config") or base).get("max_position_embeddings")

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
