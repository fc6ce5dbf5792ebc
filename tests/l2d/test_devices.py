"""What runs on accelerators, tried on devices that pretend. `python -m pytest tests/l2d/test_devices.py`

- the pretended devices refuse and count as CUDA does
"""

import pytest
import torch

from tests.pretend_device import PretendDevices


def _lines(counter) -> int:
    return counter.total()


def test_pretended_devices_refuse_what_cuda_refuses():
    with PretendDevices():
        here, there, other = (torch.ones(3, device=d) for d in ("cpu", "cuda:0", "cuda:1"))
        assert [str(t.device) for t in (here, there[1:], (other + 1).view(3, 1))] == ["cpu", "cuda:0", "cuda:1"]
        for mixed in (
            lambda: here + there,
            lambda: torch.cat([there, other]),
            lambda: there @ other,
            lambda: here[torch.tensor([0], device="cuda:0")],
            lambda: torch.nn.functional.embedding(torch.tensor([0]), there[:, None]),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert (there + torch.tensor(1.0)).device == there.device  # a scalar
        assert there[torch.tensor([0, 1])].device == there.device  # indices may be on the CPU
        assert other.to(there).device == there.device and here.to(1).device == other.device


def test_pretended_devices_keep_gradients_where_weights_are():
    with PretendDevices():
        layer = torch.nn.Linear(2, 2).to("cuda:1")
        layer(torch.ones(1, 2, device="cuda:1").to("cuda:0").to("cuda:1")).sum().backward()
        assert layer.weight.grad is not None and str(layer.weight.grad.device) == "cuda:1"
        with pytest.raises(RuntimeError, match="same device"):
            layer(torch.ones(1, 2))


@pytest.mark.parametrize(
    ("work", "launches", "waits"),
    [
        (lambda x: x.view(4).unsqueeze(0)[:, 1:].t(), 0, 0),
        (lambda x: torch.empty_like(x), 0, 0),
        (lambda x: x * 2 + 1, 2, 0),
        (lambda x: torch.nn.functional.rms_norm(x, (2,)), 1, 0),
        (lambda x: bool(x.sum() > 0), 2, 1),
        (lambda x: x.tolist(), 0, 1),
        (lambda x: torch.nonzero(x), 1, 1),
        (lambda x: x[x > 0], 2, 1),
        (lambda x: x.masked_fill(x > 0, 1.0), 2, 0),
        (lambda x: x.cpu(), 1, 1),
        (lambda x: torch.ones(2, 2).to(x.device), 1, 1),
        (lambda x: torch.ones(2, 2).to(x.device, non_blocking=True), 1, 0),
        (lambda x: torch.tensor([1.0], device=x.device), 1, 1),
        (lambda x: torch.arange(3, device=x.device), 1, 0),
    ],
)
def test_pretended_devices_count(work, launches, waits):
    with PretendDevices() as devices:
        x = torch.ones(2, 2, device="cuda:0")
        devices.reset()
        work(x)
        assert (_lines(devices.launches), _lines(devices.synchronisations)) == (launches, waits)
