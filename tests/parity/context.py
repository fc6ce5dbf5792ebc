"""What every check of a case needs: the model, the main path and the places to ask at.

- `Context`: case, model and recorder, with the main path run once
"""

import dataclasses
import functools

import torch

from l2d.modeling import L2DForCausalLM
from l2d.network.diffusion_path import PathInputs
from l2d.network.main_path import MainPathState
from tests.parity.fixtures import Case
from tests.parity.report import Recorder


@dataclasses.dataclass
class Context:
    """One case on one model. Legend: B rows, L prompt length, V vocabulary, d diffusion dimension."""

    case: Case
    model: L2DForCausalLM
    record: Recorder

    @functools.cached_property
    def input_ids(self) -> torch.Tensor:
        """Prompts, (B, L)."""
        return self.case.given("in.input_ids")

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """(B, L), 0 at padding; only left-padded cases have one."""
        return self.case.given("in.attention_mask") if self.case.has("in.attention_mask") else None

    @property
    def position_ids(self) -> torch.Tensor | None:
        """(B, L); only left-padded cases have them."""
        return self.case.given("in.position_ids") if self.case.has("in.position_ids") else None

    @functools.cached_property
    def valid(self) -> torch.Tensor:
        """(B, L) bool: real tokens, the only places whose outputs mean something."""
        for key in ("in.valid_mask", "in.attention_mask"):
            if self.case.has(key):
                return self.case.given(key).bool()
        return torch.ones_like(self.input_ids, dtype=torch.bool)

    @functools.cached_property
    def state(self) -> MainPathState:
        """The main path over the prompts."""
        return self.model.paths.main_path(self.input_ids, self.attention_mask, self.position_ids)

    @property
    def index(self) -> torch.Tensor:
        """(B, L): every position, -1 at padding."""
        places = torch.arange(self.input_ids.shape[1]).expand_as(self.input_ids)
        return places.masked_fill(~self.valid, -1)

    @property
    def classes(self) -> torch.Tensor | None:
        """Class of each row, (B,), in guidance cases."""
        return self.case.given("in.class_labels") if self.case.has("in.class_labels") else None

    def required_classes(self) -> torch.Tensor:
        """Class of each row, (B,), for a check that cannot do without; `KeyError` if there is none."""
        return self.case.given("in.class_labels")

    def logits(
        self, x: torch.Tensor, time: torch.Tensor, classes: torch.Tensor | None, last: bool = False
    ) -> torch.Tensor:
        """Logits of the diffusion path at all positions, (B, L, V), or at the last one, (B, 1, V).

        `x` (B, L, d), `time` (B, L) or a scalar, `classes` (B,) or `None` for "no class".
        """
        index, time = self.index, time.float().expand(self.input_ids.shape)
        classes = None if classes is None else classes[:, None].expand_as(index)
        if last:
            index, x, time = index[:, -1:], x[:, -1:], time[:, -1:]
            classes = None if classes is None else classes[:, -1:]
        return self.model.paths.path_logits(self.state, PathInputs(index, x.float(), time, classes))
