"""Calls of one shape, so that rounding is the same whatever is evaluated together.

- `evaluations_per_row`: how many evaluations of each row a call has, where it must always be as many
- `FixedCalls`: a flat batch of evaluations as calls of that shape

On an accelerator a product's rounding depends on its number of rows, since its kernel is chosen by it. In bfloat16 and
float16 that is enough to choose another token. So there every call of the path has the same rows in every solver:
as many evaluations of every row of the main path as the longest draft needs, repeated ones where there are fewer.
"""

import dataclasses

import torch

from l2d.network.main_path import MainPathState

_POSITIONS = 4  # that a draft of usual length decides at once
_MOST = 512  # evaluations of a call with room for drafts; with many rows drafts are rarely accepted
_STEP = 16  # products are fastest with multiples of it


def evaluations_per_row(state: MainPathState, per_site: int) -> int | None:
    """Evaluations of each row in a call of fixed shape, for solves of `per_site`; `None`: no shape is needed.

    It depends on the main path and on the grid alone, never on the solver or on drafts.
    """
    if state.hidden.dtype.itemsize >= 4 or state.hidden.device.type == "cpu":
        return None
    for positions in (_POSITIONS, 1):
        count = -(-positions * per_site // _STEP) * _STEP
        if count * state.hidden.shape[0] <= _MOST:
            return count
    return -(-per_site // _STEP) * _STEP


@dataclasses.dataclass
class FixedCalls:
    """Evaluations (M,) of rows (M,), not decreasing, as calls of `count` evaluations of each of `batch` rows.

    Attributes, all of the host:
        filled: per call, (batch count,) which evaluation is in each place; a repeated one where there is none.
        rows: (batch count,) the row of each place.
        own: per call, which places are not repetitions, in the order of the evaluations.
        order: (M,) where each evaluation is among the places of `own` of all calls.
    """

    filled: list[torch.Tensor]
    rows: torch.Tensor
    own: list[torch.Tensor]
    order: torch.Tensor

    @classmethod
    def make(cls, rows: torch.Tensor, batch: int, count: int) -> "FixedCalls":
        """Calls for evaluations of `rows` (M,)."""
        sizes = torch.bincount(rows, minlength=batch)
        rank = torch.arange(len(rows)) - (sizes.cumsum(0) - sizes)[rows]
        filled, own, members = [], [], []
        for call in range(-(-int(sizes.max()) // count)):
            here = torch.nonzero(rank // count == call, as_tuple=True)[0]
            places = rows[here] * count + rank[here] % count
            filled.append(here[:1].repeat(batch * count).index_copy(0, places, here))
            own.append(places)
            members.append(here)
        return cls(filled, torch.arange(batch).repeat_interleave(count), own, torch.argsort(torch.cat(members)))
