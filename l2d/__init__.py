"""L2D: diffusion finetuning of pre-trained causal language models.

Public names, imported on first use so that `import l2d` alone does not load torch:

- `L2DConfig`, `L2DForCausalLM`: the model (also known to `AutoConfig` and `AutoModelForCausalLM`)
- `SamplerConfig`: budget, solver, guidance and everything else that a user may set at inference
- `plot_budget_curve`: accuracy against budget, from lm-eval's results
"""

import importlib
import importlib.abc
import importlib.machinery
import sys

__version__ = "0.1.0"

_HOMES = {
    "L2DConfig": "l2d.modeling",
    "L2DForCausalLM": "l2d.modeling",
    "SamplerConfig": "l2d.sampler_config",
    "plot_budget_curve": "l2d.card.curve",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'l2d' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


_AUTO_CLASSES = {  # where transformers keeps its Auto classes, and which of our modules registers with them
    "transformers.models.auto.configuration_auto": "l2d.config",
    "transformers.models.auto.modeling_auto": "l2d.modeling",
}


class _RegisterLater(importlib.abc.MetaPathFinder):
    """Registers our classes with the Auto classes when these are imported.

    `import l2d` is all that `AutoModelForCausalLM` needs, and commands that refuse bad input load nothing heavy:
    transformers has no entry points for models, and registering at once would import torch here.
    """

    def find_spec(self, name: str, path=None, target=None):
        """The ordinary spec of an Auto module that registers us after its execution; `None` for other names."""
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name in _AUTO_CLASSES else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_register(module) -> None:
            load(module)
            ours = [m for n, m in list(sys.modules.items()) if n.startswith("l2d.")]
            if not any(getattr(m.__spec__, "_initializing", False) for m in ours):  # else they register themselves
                importlib.import_module(_AUTO_CLASSES[name])

        vars(spec.loader)["exec_module"] = load_and_register
        return spec


if "transformers.configuration_utils" in sys.modules:  # torch is loaded already: let the Auto classes know us at once
    importlib.import_module("l2d.modeling")
else:
    sys.meta_path.insert(0, _RegisterLater())
