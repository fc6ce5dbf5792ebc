"""L2D: diffusion finetuning of pre-trained causal language models.

Public names, imported on first use so that `import l2d` alone does not load torch:

- `L2DConfig`, `L2DForCausalLM`: the model (also known to `AutoConfig` and `AutoModelForCausalLM`)
- `SamplerConfig`: budget, solver, guidance and everything else that a user may set at inference
"""

import importlib
import sys

__version__ = "0.1.0"

_HOMES = {
    "L2DConfig": "l2d.modeling",
    "L2DForCausalLM": "l2d.modeling",
    "SamplerConfig": "l2d.sampler_config",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'l2d' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


if "transformers.configuration_utils" in sys.modules:  # torch is loaded already: let the Auto classes know us at once
    importlib.import_module("l2d.modeling")
