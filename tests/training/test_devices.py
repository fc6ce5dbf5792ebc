"""`L2DTrainer` with a base that is spread over two devices, which pretend.

Run: `python -m pytest tests/training/test_devices.py`
"""

import accelerate
import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import LlamaForCausalLM

from l2d import L2DConfig, L2DForCausalLM
from tests.conftest import randomise_path
from tests.pretend_device import PretendDevices
from tests.training_runs import sums
from training.config import L2DTrainingConfig
from training.trainer import L2DTrainer

PLACES = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
PLACES |= {f"model.layers.{number}": number for number in range(2)}
FIRST = torch.device("cuda", 0)


@pytest.fixture
def first_device(monkeypatch):
    """Accelerate puts data on the first device, as it would if there was one; other tests find it as it was."""
    start = PartialState.__init__

    def started(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.device = FIRST

    def switch():
        AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.setattr(PartialState, "__init__", started)

    yield switch
    AcceleratorState._reset_state(reset_partial_state=True)


def test_training_with_a_base_that_is_spread(base_dir, tokenizer, tmp_path, first_device, monkeypatch):
    """Three steps, clipped: the losses and the weights of one device; each layer's weights are beside the base's."""

    def trained(base, spread=False):
        shape = dict(diffusion_dim=8, input_width=8, conditioning_width=8, frequency_width=8, noise_std=2.0)
        model = L2DForCausalLM.from_base(base, L2DConfig(variant="full", **shape))
        randomise_path(model)
        args = L2DTrainingConfig(
            output_dir=str(tmp_path), max_steps=3, save_strategy="no", disable_tqdm=True, logging_steps=1,
            per_device_train_batch_size=2, activation_checkpointing=False, max_grad_norm=0.05,
        )  # fmt: skip
        assert args.world_size == 1  # it has found the CPU
        if spread:
            monkeypatch.setattr(L2DTrainingConfig, "device", FIRST)
        rows = datasets.Dataset.from_list(sums(8))
        trainer = L2DTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
        trainer._draw = lambda inputs, index, targets: trainer.evaluation_targets(inputs)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, dict(model.trained_parameters())

    losses, weights = trained(LlamaForCausalLM.from_pretrained(base_dir))
    first_device()
    with PretendDevices():
        spread = accelerate.dispatch_model(LlamaForCausalLM.from_pretrained(base_dir), PLACES, force_hooks=True)
        others, parameters = trained(spread, spread=True)
        places = {str(p.device) for name, p in parameters.items() if ".layers.1." in name}
        moved = {name: parameter.detach().cpu() for name, parameter in parameters.items()}
    assert places == {"cuda:1"} and len(losses) == 3 and others == pytest.approx(losses, abs=1e-6)
    for name, value in moved.items():  # the norm of all gradients is summed device by device
        torch.testing.assert_close(value, weights[name].detach(), rtol=1e-5, atol=1e-7)
