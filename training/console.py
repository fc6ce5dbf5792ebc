"""What the training commands tell: one line, once for all processes.

- `say`: on standard output
- `end`: why the command ends, on standard error
- `log_line`: what a step logs, in one line; `show_log_lines` has a trainer print that
- `one_bar`: without the progress bars of single files, which would be drawn over that of the training
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

RANK = int(os.environ.get("RANK", "0"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def say(line: str | None) -> None:
    """Print a line, once for all processes."""
    if line and RANK == 0:
        print(line, flush=True)


def end(error: Exception, status: int, by: int = RANK) -> NoReturn:
    """Say in one line why the command ends here: once for all processes, or with `LOCAL_RANK` once on each machine."""
    if by == 0:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(status)


def log_line(step: int, logs: Mapping[str, Any]) -> str:
    """What a trainer logs at `step`; losses and accuracies of bins of time follow in order, without their bounds."""
    shown: dict[str, list[str]] = {}
    bins: dict[str, list[str]] = {}
    for name, value in logs.items():
        of_bin = re.fullmatch(r"(.*)_t_\d\.\d+_\d\.\d+", name)
        kept = bins.setdefault(of_bin[1], []) if of_bin else shown.setdefault(name, [])
        kept.append(f"{value:.4g}" if isinstance(value, float) else str(value))
    shown.pop("total_flos", None)
    whole, by_time = (", ".join(" ".join([name, *values]) for name, values in part.items()) for part in (shown, bins))
    return f"step {step}: {whole}" + (f"; by time: {by_time}" if by_time else "")


def show_log_lines(trainer: Any) -> None:
    """Have `trainer` print `log_line` where it would print a dictionary: above its progress bar, if it has one."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    class Bar(ProgressCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_world_process_zero and self.training_bar is not None and logs:
                self.training_bar.write(log_line(state.global_step, logs))

    class Printer(PrinterCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if state.is_local_process_zero and logs:
                print(log_line(state.global_step, logs), flush=True)

    for usual, ours in ((ProgressCallback, Bar), (PrinterCallback, Printer)):
        if trainer.pop_callback(usual) is not None:
            trainer.add_callback(ours)


@contextlib.contextmanager
def one_bar() -> Iterator[None]:
    """While this lasts, transformers draws no progress bars."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
