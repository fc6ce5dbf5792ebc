"""`python -m lm_eval_ext ...`: the harness's own command line, with `--model l2d` and our tasks.

It needs no installed hook, so it also works where the package is only on `PYTHONPATH`. The tasks in `lm_eval_ext/tasks`
are found by name; `--include_path` adds to them.
"""

import sys
from pathlib import Path

from lm_eval_ext import bridge

TASKS = Path(__file__).parent / "tasks"


def main() -> None:
    """Run lm-eval's command line."""
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    if "lm_eval.models" in sys.modules:  # imported before the finder was installed
        bridge.register()
    setup_logging()
    cli = HarnessCLI()
    args = cli.parse_args()
    if hasattr(args, "include_path"):
        args.include_path = [str(TASKS), *filter(None, [args.include_path])]
    cli.execute(args)


if __name__ == "__main__":
    main()
