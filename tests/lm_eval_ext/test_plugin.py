"""How the harness finds the model: the `.pth` bridge for lm-eval 0.4.13, and what it costs when nobody evaluates.

Run: `python -m pytest tests/lm_eval_ext/test_plugin.py`
"""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def run(code: str) -> list[str]:
    """Lines printed by `code` in a new interpreter that finds the package but has no installed hook."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_importing_the_bridge_imports_nothing():
    code = "import sys; before = set(sys.modules); import lm_eval_ext.harness.plugin; "
    code += "print(sorted(set(sys.modules) - before))"
    new = run(
        "import sys; sys.modules.pop('lm_eval_ext', None); sys.modules.pop('lm_eval_ext.harness.plugin', None); " + code
    )
    assert new == ["['lm_eval_ext', 'lm_eval_ext.harness.plugin']"]


def test_bridge_registers_a_placeholder_and_keeps_the_others():
    lines = run(
        "import sys, lm_eval_ext.harness.plugin, lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "print(dict(model_registry.items())['l2d'], 'hf' in model_registry, 'lm_eval_ext.model' in sys.modules)\n"
        "import lm_eval.tasks\n"
        "print(lm_eval_ext.harness.plugin.HarnessFinder in sys.meta_path)\n"
        "import lm_eval.evaluator\n"
        "print(lm_eval_ext.harness.plugin.HarnessFinder in sys.meta_path)\n"
    )
    assert lines == ["lm_eval_ext.model:L2DLM True False", "True", "False"]


def test_our_tasks_are_found_by_name_without_include_path():
    lines = run(
        "import lm_eval_ext.harness.plugin\n"
        "from lm_eval.tasks import TaskManager\n"
        "from tests.integration.harness import TASKS\n"
        "known = TaskManager(include_path=str(TASKS)).all_tasks\n"
        "print(*(name in known for name in ('l2d_released', 'l2d_demo_products', 'gsm8k', 'l2d_test_choice')))\n"
        "print(len(TaskManager(include_defaults=False).all_tasks))\n"
    )
    assert lines == ["True True True True", "0"]


def test_placeholder_resolves_to_the_class():
    pytest.importorskip("l2d.modeling")
    lines = run(
        "import lm_eval_ext.harness.plugin\n"
        "from lm_eval.api.registry import get_model\n"
        "print(get_model('l2d').__module__, get_model('l2d').__name__, get_model('hf').__name__)\n"
    )
    assert lines[-1] == "lm_eval_ext.model L2DLM HFLM"


def test_bridge_does_nothing_where_the_harness_discovers_entry_points():
    lines = run(
        "import lm_eval_ext.harness.plugin\n"
        "from lm_eval.api import registry\n"
        "registry.load_plugins = lambda *args: []\n"
        "import lm_eval.models\n"
        "print('l2d' in registry.model_registry, 'hf' in registry.model_registry)\n"
    )
    assert lines == ["False True"]


def test_installing_twice_or_late_is_harmless():
    lines = run(
        "import sys, lm_eval_ext.harness.plugin as bridge\n"
        "bridge.install()\n"
        "print(sys.meta_path.count(bridge.HarnessFinder))\n"
        "import lm_eval.models, lm_eval.tasks, lm_eval.evaluator\n"
        "bridge.install()\n"
        "print(sys.meta_path.count(bridge.HarnessFinder))\n"
    )
    assert lines == ["1", "0"]
