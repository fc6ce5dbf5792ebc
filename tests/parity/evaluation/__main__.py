"""Command line: compare the tasks `l2d_released` with every fixture of a folder.

    python -m tests.parity.evaluation DIR [--tokenizer DIR]

DIR holds `gsm8k.json`, ..., `settings.json`, any of them. `--tokenizer` names SmolLM2-Instruct's, with which the
fixtures were counted and rendered: without it their counts are taken as they are, and their first rendering is
compared with a template of the same shape. Prints what was compared, and `N passed, M failed`. Exit status: 0 if
nothing failed, 1 if something did, 2 if the folder cannot be read.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tests.parity.evaluation.prompts import check_prompts
from tests.parity.evaluation.scoring import check_scoring
from tests.parity.evaluation.settings import check_models, check_sampler, check_settings
from tests.parity.report import Recorder, Result, failure_lines, summary_line, table

NAMES = {
    **{name: name for name in ("gsm8k", "math", "mmlu", "mmlu_pro", "mbpp", "humaneval_openai")},
    "humaneval_instruct": "humaneval",
}
"""Name of a fixture -> our name of the benchmark."""


def compare(file: Path, tokenizer: Any = None) -> list[Result]:
    """All comparisons of one fixture."""
    fixture = json.loads(file.read_text(encoding="utf-8"))
    record = Recorder(file.stem)
    if "by_model" in fixture or "sampler" in fixture:
        check_models(record, fixture.get("by_model") or {})
        check_sampler(record, fixture.get("sampler") or {})
    elif fixture.get("task") in NAMES:
        name = NAMES[fixture["task"]]
        check_settings(record, name, fixture.get("settings") or {})
        check_prompts(record, name, fixture.get("prompts") or [], fixture.get("settings") or {}, tokenizer)
        check_scoring(record, name, fixture)
    else:
        record.fail("file", file.name, f"the task {fixture.get('task')!r} is not one of {', '.join(NAMES)}")
    return record.results


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.parity.evaluation", description="Compare with fixtures of the released evaluation."
    )
    parser.add_argument("folder", type=Path, help="folder with NAME.json files")
    parser.add_argument("--tokenizer", help="folder of SmolLM2-Instruct's tokenizer, to count tokens with")
    options = parser.parse_args(arguments)
    files = sorted(options.folder.glob("*.json"))
    if not files:
        print(f"error: {str(options.folder)!r} holds no NAME.json.", file=sys.stderr)
        return 2
    tokenizer = None
    if options.tokenizer is not None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    try:
        results = [result for file in files for result in compare(file, tokenizer)]
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if tokenizer is None:
        print("No --tokenizer: token counts are the fixtures' own, SmolLM2's template is one of the same shape.\n")
    for line in [*table(results), *failure_lines(results), ""]:
        print(line)
    print(summary_line(results))
    return 1 if any(result.status == "FAIL" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
