"""Lets lm-eval 0.4.13, which looks model names up in a fixed table, find the model `l2d`.

- `install`: puts a finder on `sys.meta_path`; called when this module is imported
- `register`: adds the name `l2d` to the harness's registry; called after `lm_eval.models` has filled it

A `.pth` file imports this module whenever Python starts, so only `sys` is imported here, and nothing happens before the
harness itself imports `lm_eval.models`. Later releases discover the entry point `lm_eval.models` themselves; then
nothing is registered here. To be dropped when such a release is the oldest one that we support.
"""

import sys


class ModelsFinder:
    """Meta path finder that steps in once, when `lm_eval.models` is imported."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Return the ordinary spec of `lm_eval.models`, executed with `register` after it; `None` for other names."""
        if name != "lm_eval.models":
            return None
        sys.meta_path.remove(cls)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register
        return spec


def install() -> None:
    """Put the finder first on `sys.meta_path`, unless it is there or the harness is loaded already."""
    if ModelsFinder not in sys.meta_path and "lm_eval.models" not in sys.modules:
        sys.meta_path.insert(0, ModelsFinder)


def register() -> None:
    """Register a lazy placeholder for the model, unless the harness knows it or discovers entry points itself."""
    from lm_eval.api import registry

    if "l2d" not in registry.model_registry and not hasattr(registry, "load_plugins"):
        registry.model_registry.register("l2d", target="lm_eval_ext.model:L2DLM")


install()
