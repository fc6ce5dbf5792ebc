"""What the host decides, on the device that computes with it, without making the host wait.

- `upload`: a tensor of the host on a device
- `take`: rows of a tensor, by numbers that the host knows

Which sites are evaluated when is decided on the host, in small CPU tensors. A launch costs an accelerator as much as
the work of a small batch, and each wait for a value empties its queue; so numbers go up, and only answers come down.
"""

import torch


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`; the host does not wait for a copy to another one."""
    if values.device == device:
        return values
    if values.device.type == "cpu" and device.type == "cuda":
        values = values.pin_memory()  # from other memory the copy could wait
    return values.to(device, non_blocking=device.type != "cpu")  # a copy to the host is read at once


def spacing(index: torch.Tensor) -> slice | None:
    """The slice that is `index` (N,) of the host, which rises evenly; `None` where there is none."""
    if not len(index):
        return slice(0, 0)
    first, step = int(index[0]), 1
    if len(index) > 1:
        step = int(index[1]) - first
        if step < 1 or not bool((index.diff() == step).all()):
            return None
    return slice(first, first + step * (len(index) - 1) + 1, step)


def take(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `index` (N,) of a tensor (M, ...), as a view where they are evenly spaced."""
    even = spacing(index)
    return tensor[upload(index, tensor.device)] if even is None else tensor[even]
