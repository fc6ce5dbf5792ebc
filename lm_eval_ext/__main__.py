"""`python -m lm_eval_ext ...`: the harness's own command line, with `--model l2d` and our tasks.

It needs no installed hook, so it also works where the package is only on `PYTHONPATH`. `python -m lm_eval_ext args` or
`--model_args help` lists all model args, `args --markdown` as a table for a document.
"""

import itertools
import sys

from lm_eval_ext.harness import plugin


def main(arguments: list[str] | None = None) -> None:
    """Run lm-eval's command line with `arguments`, by default those of this process."""
    if arguments is not None:
        sys.argv = ["lm_eval_ext", *arguments]
    help_wanted = any(pair == ("--model_args", "help") for pair in itertools.pairwise(sys.argv))
    if help_wanted or sys.argv[1:2] == ["args"]:
        from lm_eval_ext.argument_table import help_text, markdown

        print(markdown() if "--markdown" in sys.argv else help_text())
        return
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    plugin.install()
    setup_logging()
    cli = HarnessCLI()
    try:
        options = cli.parse_args()
    except ValueError as error:  # the harness's own parser lets broken JSON through
        sys.exit(f"l2d: {' '.join(str(error).split())}")
    cli.execute(options)


if __name__ == "__main__":
    main()
