"""How much memory a device has, and how much of it logits may take.

- `free_memory`: bytes that are free now
- `logit_rows`: rows of logits that may be alive at once

On a CPU few are alive: the C library maps blocks above 32 MiB anew each time. On an accelerator every piece reads the
whole head again, a gigabyte for a vocabulary of 128,000, so pieces are as large as its memory makes harmless.
"""

import psutil
import torch

_LEAST = 1 << 26  # elements on an accelerator of any size


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else 0


def logit_rows(vocabulary: int, device: torch.device, on_cpu: int, share: float) -> int:
    """Rows of logits (rows, V) that may be alive at once, at least 1.

    Args:
        on_cpu: elements on a CPU.
        share: of the whole memory of an accelerator, in float32.
    """
    elements = on_cpu
    if device.type == "cuda":
        elements = _LEAST
    if device.type == "cuda" and torch.cuda.device_count():  # none where a run is planned for another machine
        elements = max(_LEAST, int(torch.cuda.get_device_properties(device).total_memory * share) // 4)
    return max(1, elements // vocabulary)
