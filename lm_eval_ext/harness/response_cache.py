"""Keeps `--use_cache` from returning another setting's answers, and from running what a file holds.

- `claim_cache`: writes the run's settings into a new cache file, refuses one that was written with others

The harness keys its cache by the request alone, and keeps answers (texts, numbers) as pickles. Those of a cache that an
L2D run uses may hold plain values only: a pickle that names any function or class is refused.
"""

import io
import json
import pickle
from collections.abc import MutableMapping
from typing import Any

from lm_eval_ext.arguments import UsageError

SETTINGS_KEY = "l2d settings"


def claim_cache(cache: MutableMapping[str, Any], settings: dict[str, Any]) -> None:
    """Mark an empty `cache` as holding answers of `settings`; raise `UsageError` if it holds others'.

    From here on the cache reads plain values only.
    """
    if hasattr(cache, "decode"):
        cache.decode = _decode
    recorded = cache.get(SETTINGS_KEY)
    if recorded is None and next(iter(cache.keys()), None) is None:
        cache[SETTINGS_KEY] = json.dumps(settings, sort_keys=True)
    elif recorded is None:
        raise UsageError("--use_cache names a file with another model's answers: give a new file name.")
    elif json.loads(recorded) != settings:
        raise UsageError(
            "--use_cache names a file with answers of other settings "
            f"({_differences(recorded, settings)}): give a new file name."
        )


class _PlainValues(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Nothing is looked up."""
        raise UsageError(f"--use_cache names a file that holds {module}.{name}, not answers: give another file name.")


def _decode(stored: bytes) -> Any:
    return _PlainValues(io.BytesIO(bytes(stored))).load()


def _differences(recorded: str, settings: dict[str, Any]) -> str:
    before = json.loads(recorded)
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    return ", ".join(f"{name}={before.get(name)!r} there, {settings.get(name)!r} here" for name in names)
