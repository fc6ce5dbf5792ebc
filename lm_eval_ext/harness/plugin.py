"""Lets lm-eval 0.4.13, which has no plugins, find the model `l2d` and our tasks by name.

- `install`: puts a finder on `sys.meta_path`; called when this module is imported
- `register`: adds the name `l2d` to the harness's registry; called after `lm_eval.models` has filled it
- `check_early`: lets the harness check the arguments of `--model l2d` before it reads its tasks
- `check_calls`: lets `simple_evaluate` refuse L2D checkpoints for the harness's own model class
- `add_tasks`: lets every `TaskManager` know our tasks; called after the harness has defined it

A `.pth` file imports this module whenever Python starts, so only `sys` is imported here, and nothing happens before the
harness itself is imported. Later releases discover the entry point `lm_eval.models` themselves; then no model is
registered here. To be dropped when such a release is the oldest one that we support.
"""

import sys


class HarnessFinder:
    """Meta path finder that steps in when a module in `AFTER` is imported, and goes when all of them are."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """The ordinary spec of a module in `AFTER`, executed with its function after it; `None` for other names."""
        if name not in AFTER or name in sys.modules:
            return None
        sys.meta_path.remove(cls)
        try:
            from importlib.util import find_spec

            spec = find_spec(name)
        finally:
            sys.meta_path.insert(0, cls)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_more(module):
                execute(module)
                AFTER[name]()
                if cls in sys.meta_path and all(known in sys.modules for known in AFTER):
                    sys.meta_path.remove(cls)

            vars(spec.loader)["exec_module"] = execute_and_more
        return spec


def install() -> None:
    """Put the finder first on `sys.meta_path`, unless it is there; what is imported already is wrapped at once."""
    for name, function in AFTER.items():
        if name in sys.modules:
            function()
    if HarnessFinder not in sys.meta_path and not all(name in sys.modules for name in AFTER):
        sys.meta_path.insert(0, HarnessFinder)


def register() -> None:
    """Register a lazy placeholder for the model, unless the harness knows it or discovers entry points itself."""
    from lm_eval.api import registry

    if "l2d" not in registry.model_registry and not hasattr(registry, "load_plugins"):
        registry.model_registry.register("l2d", target="lm_eval_ext.model:L2DLM")


def add_tasks() -> None:
    """Make `TaskManager` look for tasks in `lm_eval_ext/tasks`, too, before the user's `--include_path`."""
    import functools
    import os

    manager = getattr(sys.modules["lm_eval.tasks.manager"], "TaskManager", None)
    if manager is None or getattr(manager.__init__, "knows_l2d", False):
        return
    init = manager.__init__
    ours = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tasks")

    @functools.wraps(init)
    def init_with_ours(self, *args, **kwargs):
        paths = kwargs.get("include_path")
        paths = list(paths) if isinstance(paths, (list, tuple)) else [paths] if paths else []
        if len(args) < 2 and kwargs.get("include_defaults", True):  # the second positional one is the path
            kwargs["include_path"] = [ours, *(path for path in paths if os.path.abspath(path) != ours)]
        init(self, *args, **kwargs)

    vars(init_with_ours)["knows_l2d"] = True
    manager.__init__ = init_with_ours


def check_early() -> None:
    """Wrap the harness's configuration, see `lm_eval_ext.harness.preflight`."""
    from lm_eval_ext.harness.preflight import install as wrap

    wrap(sys.modules["lm_eval.config.evaluate_config"].EvaluatorConfig)


def check_calls() -> None:
    """Wrap `simple_evaluate`, see `lm_eval_ext.harness.preflight.refuse_checkpoint`; nothing is imported
    before it is called.
    """
    import functools

    names = vars(sys.modules["lm_eval.evaluator"])
    evaluate = names["simple_evaluate"]
    if getattr(evaluate, "checks_l2d", False):
        return

    @functools.wraps(evaluate)
    def simple_evaluate(*args, **kwargs):
        named = dict(zip(("model", "model_args", "tasks"), args, strict=False)) | kwargs
        if isinstance(named.get("model"), str):
            from lm_eval_ext.harness.preflight import refuse_checkpoint

            refuse_checkpoint(named["model"], named.get("model_args") or {})
        if any("l2d_released" in str(task) for task in named.get("tasks") or ()):
            from lm_eval_ext.released.preflight import allows_code, check_run, released_benchmarks

            if allows_code():
                kwargs["confirm_run_unsafe_code"] = named["confirm_run_unsafe_code"] = True
            benchmarks = released_benchmarks(named["tasks"])
            if benchmarks:
                check_run(named.get("model"), named.get("model_args"), benchmarks, named)
        return evaluate(*args, **kwargs)

    vars(simple_evaluate)["checks_l2d"] = True
    names["simple_evaluate"] = simple_evaluate


AFTER = {
    "lm_eval.models": register,
    "lm_eval.tasks.manager": add_tasks,
    "lm_eval.config.evaluate_config": check_early,
    "lm_eval.evaluator": check_calls,
}
install()
