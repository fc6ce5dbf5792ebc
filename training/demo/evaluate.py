"""One process for the evaluations of a model: `python -m training.demo.evaluate OUT FOLDER`.

* runs the `lm_eval` command lines of every setting of the model in `OUT/FOLDER`, greedy and sampled, and prints each of
  them: starting the harness takes longer than most evaluations here
"""

import shlex
import sys
from pathlib import Path

from training.demo.plan import DECODINGS, SETTINGS, lm_eval_command


def evaluate(out: Path, folder: str) -> None:
    """Run the evaluations of the model in `folder`; results go below `out`."""
    from lm_eval.__main__ import cli_evaluate

    for setting in SETTINGS:
        for decoding in DECODINGS if setting.folder == folder else ():
            sys.argv = lm_eval_command(out, setting, decoding)
            print("$", shlex.join(sys.argv), flush=True)
            cli_evaluate()


if __name__ == "__main__":
    evaluate(Path(sys.argv[1]), sys.argv[2])
