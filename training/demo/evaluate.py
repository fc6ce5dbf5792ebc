"""One process for the evaluations of a setting: `python -m training.demo.evaluate OUT NAME`.

* runs the `lm_eval` command lines of a setting, greedy and sampled, and prints each of them: starting the harness takes
  longer than most evaluations here
"""

import shlex
import sys
from pathlib import Path

from training.demo.plan import DECODINGS, SETTINGS, lm_eval_command


def evaluate(out: Path, name: str) -> None:
    """Run the evaluations of the setting called `name`; results go below `out`."""
    from lm_eval.__main__ import cli_evaluate

    setting = next(one for one in SETTINGS if one.name == name)
    for decoding in DECODINGS:
        sys.argv = lm_eval_command(out, setting, decoding)
        print("$", shlex.join(sys.argv), flush=True)
        cli_evaluate()


if __name__ == "__main__":
    evaluate(Path(sys.argv[1]), sys.argv[2])
