"""Compares extraction, verdicts, programs, runs of programs and metrics with a fixture's `scoring` and `aggregate`."""

from typing import Any

from lm_eval_ext.released.answers import judge
from lm_eval_ext.released.benchmarks import BENCHMARKS
from lm_eval_ext.released.math_answers import RAISED
from lm_eval_ext.released.programs import assemble, pass_rates, passes
from tests.parity.report import Recorder

TOLERANCE = 1e-12
"""Of metrics, which are sums of a few fractions."""


def check_scoring(record: Recorder, name: str, fixture: dict[str, Any]) -> None:
    """Compare all cases of one benchmark."""
    cases, documents = fixture.get("scoring") or [], fixture.get("scoring_docs") or {}
    if BENCHMARKS[name].code:
        _check_programs(record, name, cases, documents)
        for aggregate in fixture.get("aggregate") or []:
            with record.attempt("metrics", aggregate["label"]):
                ours = pass_rates([(problem["samples"], problem["passing"]) for problem in aggregate["problems"]])
                _check_metrics(record, aggregate["label"], ours, aggregate["metrics"])
        return
    verdicts = [_check_case(record, name, case, documents[case["doc_id"]]) for case in cases]
    for crash in fixture.get("crashes") or []:
        _check_crash(record, name, crash, documents[crash["doc_id"]])
    aggregate = dict(fixture.get("aggregate") or {})
    if aggregate:
        record.equal("metrics", "n", len(verdicts), aggregate.pop("n"))
        aggregate.pop("over")
        counted = {
            "accuracy": sum(right for right, _ in verdicts),
            "format_accuracy": sum(read for _, read in verdicts),
        }
        ours = {metric: count / len(verdicts) for metric, count in counted.items()}
        _check_metrics(record, "all cases", ours, aggregate)


def _check_case(record: Recorder, name: str, case: dict[str, Any], row: dict[str, Any]) -> tuple[bool, bool]:
    """Compare one text case; returns whether it is right, and whether an answer was extracted."""
    what = f"{case['id']}, {case['branch']}"
    with record.attempt("verdict", what):
        benchmark = BENCHMARKS[name]
        record.equal("reference", what, benchmark.reference(row), case["reference"])
        if case.get("output_space") is not None:
            record.equal("letters", what, benchmark.letters and benchmark.letters(row), case["output_space"])
        verdict = judge(name, row, case["completion"])
        record.equal("extracted", what, _typed(verdict.answer), _typed(case["extracted"]))
        record.equal("extracted reference", what, _typed(verdict.reference), _typed(case["extracted_reference"]))
        record.equal("format_ok", what, verdict.answer is not None, case["format_ok"])
        record.equal("verdict", what, verdict.correct, case["correct"])
        return verdict.correct, verdict.answer is not None
    return False, False


def _typed(value: Any) -> tuple[bool, Any]:
    """A number and a text that look alike are not the same."""
    return isinstance(value, str), value


def _check_crash(record: Recorder, name: str, crash: dict[str, Any], row: dict[str, Any]) -> None:
    what = f"{crash['id']}, {crash['branch']}"
    try:
        verdict = judge(name, row, crash["completion"])
    except RAISED as error:
        record.equal("raises", what, type(error).__name__, crash["raises"])
    else:
        record.fail("raises", what, f"{verdict} where {crash['raises']} is raised")


def _check_programs(
    record: Recorder, name: str, cases: list[dict[str, Any]], documents: dict[str, dict[str, Any]]
) -> None:
    programs = []
    for case in cases:
        what = f"{case['id']}, {case['branch']}"
        programs.append(assemble(name, documents[case["doc_id"]], case["completion"]))
        record.equal("program", what, programs[-1], case["program"])
    for case, passed in zip(cases, passes(programs), strict=True):
        record.equal("passed", f"{case['id']}, {case['branch']}", passed, case["correct"])


def _check_metrics(record: Recorder, what: str, ours: dict[str, float], fixture: dict[str, float]) -> None:
    """Names in the fixture carry the data set's: `mbpp/pass@1`."""
    released = {name.rpartition("/")[2]: value for name, value in fixture.items()}
    record.equal("metrics", f"{what}, names", sorted(ours), sorted(released))
    for name in ours.keys() & released.keys():
        record.measured("metrics", f"{what}, {name}", abs(ours[name] - released[name]), TOLERANCE)
