"""`python -m lm_eval_ext.leaderboard RESULTS_DIR... [--out DIR]`: lm-eval's results as page, table and files.

- `main`: the command line; `write_leaderboard`: the same from Python
"""

import sys
from pathlib import Path

from l2d.cli.files import write_files
from l2d.cli.parser import Parser, check_folder
from lm_eval_ext.leaderboard.board import Board, build_board
from lm_eval_ext.leaderboard.files import read_runs
from lm_eval_ext.leaderboard.tables import csv_text, json_text, markdown, missing_controls

FORMATS = ("html", "md", "csv", "json")


def write_leaderboard(
    folders: list[Path],
    out: Path,
    metrics: dict[str, str] | None = None,
    cluster_fields: tuple[str, ...] = (),
    title: str = "Leaderboard",
    only: tuple[str, ...] = FORMATS,
    margin: float | None = None,
) -> Board:
    """Read all results below `folders`, write `leaderboard.{html,md,csv,json}` into `out`, return what they show.

    Args: see `board.build_board`; `only` names the formats to write. Raises `ValueError` if a folder is missing or
    holds nothing usable, if `out` cannot be written, or if `margin` is not positive.
    """
    if margin is not None and not margin > 0:
        raise ValueError(f"margin={margin:g} must be positive: it is the largest difference that does not matter.")
    check_folder("out", out)
    runs, skipped = read_runs(folders)
    board = build_board(runs, skipped, metrics, cluster_fields, margin)
    if not board.rows:
        reasons = "; ".join(f"{item.file} {item.reason}" for item in skipped[:3])
        raise ValueError(
            f"{', '.join(map(str, folders))}: no usable results_*.json of lm-eval{f' ({reasons})' * bool(reasons)}; "
            "give folders that lm_eval wrote with --output_path."
        )
    texts = {
        "html": lambda: _html(board, out, title),
        "md": lambda: markdown(board, out),
        "csv": lambda: csv_text(board, out),
        "json": lambda: json_text(board, out),
    }
    write_files(out, {f"leaderboard.{ending}": texts[ending]() for ending in only}, "--out")
    return board


def _html(board: Board, out: Path, title: str) -> str:
    from lm_eval_ext.leaderboard.page import html_page  # matplotlib takes its time, and a wrong folder is told at once

    return html_page(board, out, title)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="l2d-leaderboard", description="lm-eval results as one page, table and files")
    parser.add_argument("folders", nargs="+", type=Path, metavar="RESULTS_DIR", help="folders with results_*.json")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder to write to (default: here)")
    parser.add_argument("--title", default="Leaderboard", help="heading of the page")
    parser.add_argument(
        "--metric", action="append", default=[], metavar="TASK=METRIC,FILTER", help="number of a task to show first"
    )
    parser.add_argument(
        "--cluster",
        action="append",
        default=[],
        metavar="FIELD",
        help="document field whose equal values form clusters",
    )
    parser.add_argument("--margin", type=float, help="difference that does not matter, for tests of equality")
    parser.add_argument("--only", nargs="+", choices=FORMATS, default=FORMATS, help="formats to write (default: all)")
    options = parser.parse_args(arguments)
    try:
        metrics = dict(entry.split("=", 1) for entry in options.metric)
    except ValueError:
        parser.error(f"--metric {options.metric!r} must look like gsm8k=exact_match,strict-match")
    try:
        board = write_leaderboard(
            options.folders,
            options.out,
            metrics,
            tuple(options.cluster),
            options.title,
            tuple(options.only),
            options.margin,
        )
    except (OSError, ValueError) as error:
        parser.exit(1, f"l2d-leaderboard: {' '.join(str(error).split())}\n")
    for item in board.skipped:
        print(f"left out: {item.file} {f'({item.part}) ' if item.part else ''}{item.reason}", file=sys.stderr)
    for sentence in missing_controls(board):
        print(sentence)
    written = ", ".join(str(options.out / f"leaderboard.{ending}") for ending in options.only)
    print(f"{len(board.rows)} settings, {len(board.tasks)} tasks: {written}")


if __name__ == "__main__":
    main()
