"""Runs every check that a case allows.

- `run_case`: loads the model of a case and makes all checks; nothing that goes wrong in one stops the others
"""

import torch

from l2d.released import load_released
from tests.parity.context import Context
from tests.parity.decoding import check_decode
from tests.parity.fixtures import Case
from tests.parity.forwards import check_base, check_forwards, check_velocity
from tests.parity.losses import check_training
from tests.parity.report import Recorder, Result
from tests.parity.representations import (
    check_clean_estimates,
    check_inputs,
    check_time_and_modulation,
    check_vocabulary,
    check_weights,
)
from tests.parity.solves import check_solves

CHECKS = {
    "weights": check_weights,
    "base logits": check_base,
    "vocabulary table": check_vocabulary,
    "clean estimate": check_clean_estimates,
    "time embedding": check_time_and_modulation,
    "noised input": check_inputs,
    "forward logits": check_forwards,
    "velocity": check_velocity,
    "solve": check_solves,
    "decode tokens": check_decode,
    "training loss": check_training,
}
"""Checks by the quantity under which their own breakdown is reported."""


def run_case(case: Case, only: list[str] | None = None) -> list[Result]:
    """All results of one case; `only` keeps quantities that contain one of the given words.

    Without `only`, every tensor that no check has looked at, and every one that the JSON announces and the file does
    not hold, is a failure.
    """
    record = Recorder(case.name, only)
    model = None
    with record.attempt("load", "load_released"):
        if case.meta.get("dtype", "float32") != "float32":
            raise ValueError(f"dtype {case.meta['dtype']!r}: only float32 fixtures can be checked")
        model = load_released(case.state_dict(), case.flow, case.meta["base_config"])
        record.equal("load", "load_released", "loaded", "loaded")
    if model is not None:
        context = Context(case, model, record)
        for quantity, check in CHECKS.items():
            with record.attempt(quantity, check.__name__):
                if check is check_training:
                    check(context)
                else:
                    with torch.no_grad():
                        check(context)
    if not only:
        _report_unchecked(case, record)
    return record.results


def _report_unchecked(case: Case, record: Recorder) -> None:
    for key in case.not_looked_at():
        record.fail("not checked", key, "no check compares this tensor")
    for key in case.meta.get("tensors") or {}:
        if not case.has(key):
            record.fail("not checked", key, "the JSON announces this tensor and the file does not hold it")
