"""Arrays as text in a JSON file.

* `pack`, `unpack`: numbers of a small type, compressed
* `write_json`: a file that is whole or not there
"""

import base64
import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np


def pack(values: np.ndarray) -> str:
    """The bytes of an array (N,) of any type, compressed, as text."""
    return base64.b64encode(zlib.compress(values.tobytes(), 9)).decode()


def unpack(text: str, dtype: Any) -> np.ndarray:
    """What `pack` made of an array (N,) of `dtype`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=dtype)


def write_json(content: Any, file: Path, indent: int | None = None) -> None:
    """Write plain values to `file`, never half of them."""
    draft = file.with_name(f".{file.name}")
    draft.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    os.replace(draft, file)
