"""Keeps `--use_cache` from returning another setting's answers.

- `claim_cache`: writes the run's settings into a new cache file, refuses one that was written with others

The harness keys its cache by the request alone.
"""

import json
from collections.abc import MutableMapping
from typing import Any

from lm_eval_ext.arguments import UsageError

SETTINGS_KEY = "l2d settings"


def claim_cache(cache: MutableMapping[str, Any], settings: dict[str, Any]) -> None:
    """Mark an empty `cache` as holding answers of `settings`; raise `UsageError` if it holds others'."""
    held = cache.get(SETTINGS_KEY)
    if held is None and next(iter(cache.keys()), None) is None:
        cache[SETTINGS_KEY] = json.dumps(settings, sort_keys=True)
    elif held is None:
        raise UsageError("--use_cache names a file with another model's answers: give a new file name.")
    elif json.loads(held) != settings:
        raise UsageError(
            f"--use_cache names a file whose answers were made with other settings ({_differences(held, settings)}): "
            "give a new file name."
        )


def _differences(held: str, settings: dict[str, Any]) -> str:
    before = json.loads(held)
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    return ", ".join(f"{name}={before.get(name)!r} there, {settings.get(name)!r} here" for name in names)
