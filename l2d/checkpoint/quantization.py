"""How a base is quantized when it is loaded: settings with the names of transformers, and what of them is recorded.

- `QUANTIZATION`: the settings, for recipes, `from_base` and `lm_eval`
- `check_quantization`: what contradicts itself, or needs a package that is not there
- `quantizing`: whether any of them is set
- `recorded_quantization`: what a base's configuration says of it

No torch is imported.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping
from typing import Any

from l2d.settings import Setting, matching, one_of, optional, truth

KNOWN_METHODS = ("bitsandbytes", "torchao")
"""Quantizations that the path can be trained on, by their `quant_method`."""
_DTYPES = ("float32", "bfloat16", "float16")
_ALL = {
    "load_in_4bit": Setting(False, truth, "load the base in 4 bits per weight, by bitsandbytes"),
    "load_in_8bit": Setting(False, truth, "load the base in 8 bits per weight, by bitsandbytes"),
    "bnb_4bit_quant_type": Setting("nf4", one_of("nf4", "fp4"), "the 16 values of load_in_4bit"),
    "bnb_4bit_compute_dtype": Setting(
        None, optional(one_of(*_DTYPES)), "type that load_in_4bit multiplies in", default_words="the base's"
    ),
    "bnb_4bit_use_double_quant": Setting(False, truth, "quantize the scales of load_in_4bit, too"),
    "quantization_config": Setting(
        None,
        optional(
            matching("a mapping with quant_method", lambda value: isinstance(value, dict) and "quant_method" in value)
        ),
        "another quantization of the base, as transformers writes it into config.json",
    ),
}
QUANTIZATION = {name: dataclasses.replace(one, name=name, argument=name) for name, one in _ALL.items()}
"""Settings of transformers' `BitsAndBytesConfig` by name, and `quantization_config`."""


def quantizing(values: Mapping[str, Any]) -> str | None:
    """Name of the setting among `values` that quantizes the base, `None` where it stays as it is stored."""
    return next((n for n in ("load_in_4bit", "load_in_8bit", "quantization_config") if values.get(n)), None)


def check_quantization(values: Mapping[str, Any]) -> None:
    """Raise `ValueError` for settings that exclude each other or need what is not installed."""
    named = [name for name in ("load_in_4bit", "load_in_8bit", "quantization_config") if values.get(name)]
    if len(named) > 1:
        raise ValueError(f"{named[0]} and {named[1]} exclude each other: keep one of them.")
    if not named:
        return
    if values.get("base_gguf_file"):
        raise ValueError(
            f"{named[0]} cannot be applied to a GGUF file: write it as a plain model with python -m l2d dequantize, "
            "and give that as base."
        )
    given = values["quantization_config"] if named[0] == "quantization_config" else {"quant_method": "bitsandbytes"}
    check_method(str(given["quant_method"]), named[0])


def check_method(method: str, name: str) -> None:
    """Raise `ValueError` for a `quant_method`, set by `name`, that is not known or not installed."""
    if method not in KNOWN_METHODS:
        raise ValueError(
            f"{name}: quantization by {method!r} is not supported, since nothing can be trained on its layers: use "
            f"{' or '.join(KNOWN_METHODS)}, or an unquantized base."
        )
    if importlib.util.find_spec(method) is None:
        raise ValueError(f"{name} needs the package {method}, which is not installed: pip install 'l2d[quantized]'.")


def recorded_quantization(base_config: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The quantization in a base's configuration, `None` without one."""
    found = (base_config or {}).get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") in KNOWN_METHODS else None
