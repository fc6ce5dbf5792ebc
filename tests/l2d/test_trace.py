"""`python -m l2d trace`: the recorded trajectories are those of generation; terminal, JSON and page show them.

Run: `python -m pytest tests/l2d/test_trace.py` (about 15 seconds)
"""

import dataclasses
import html
import json
import os
import re
from pathlib import Path

import pytest
import torch

from l2d.__main__ import main
from l2d.cli.session import Session, load_session
from l2d.cli.terminal import width
from l2d.cli.trace import trace_prompt
from l2d.cli.trace_command import terminal_text
from l2d.cli.trace_page import html_page
from tests.browser.chromium import Browser, find_chromium

PROMPT = "Question: Natalia sold 48 clips."
SETTINGS = [
    {"budget": 15},
    {"budget": 7, "solver": "euler", "final_time": 0.5},
    {"budget": 9, "choice_temperature": 0.7},
]


@pytest.fixture(scope="module")
def session(l2d_dir) -> Session:
    """A loaded checkpoint."""
    return load_session(l2d_dir, device="cpu")


@pytest.mark.parametrize("sampler", [*SETTINGS, {"budget": 1}])
def test_the_trace_is_that_of_generate(session, sampler):
    trace = trace_prompt(session, PROMPT, sampler, max_new_tokens=12)
    ids = torch.tensor([session.encode(PROMPT)])
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=session.end_tokens(), pad_token_id=0)
    sequences, record = session.model.generate(ids, sampler=sampler, return_record=True, **options)
    assert [token.token for token in trace.tokens] == sequences[0, ids.shape[1] :].tolist()
    assert [len(token.changes) for token in trace.tokens] == record.changes[0]
    assert [token.nfe_computed for token in trace.tokens] == record.nfe_computed[0]
    assert trace.answer == session.tokenizer.decode(sequences[0, ids.shape[1] :])
    if sampler["budget"] > 1:
        assert any(token.changes for token in trace.tokens)  # else this test would prove little


@pytest.mark.parametrize("sampler", SETTINGS[:2])
def test_chosen_tokens_are_the_most_likely_ones(session, sampler):
    trace = trace_prompt(session, PROMPT, sampler, max_new_tokens=8)
    for token in trace.tokens:
        assert len(token.chosen) + 1 == len(trace.times) == len(token.candidates[0].probabilities)
        for number, chosen in enumerate([*token.chosen, token.token]):  # the last evaluation gives the output
            likely = max(token.candidates, key=lambda candidate: candidate.probabilities[number])
            assert likely.token == chosen or chosen not in [candidate.token for candidate in token.candidates]
        assert token.chosen[0] == token.base_token  # the first evaluation is the base's


def test_guided_traces(make_l2d, base_dir):
    session = load_session(make_l2d(base_dir, classes=["math", "coding"]), device="cpu")
    plain = trace_prompt(session, PROMPT, {"budget": 7, "guidance_class": "math"}, max_new_tokens=4)
    guided = {"budget": 7, "guidance_class": "math", "guidance_scale": 2.0}
    trace = trace_prompt(session, PROMPT, guided, max_new_tokens=4)
    assert len(trace.tokens[0].chosen) == 6
    assert trace.tokens[0].nfe_computed > plain.tokens[0].nfe_computed
    final = max(trace.tokens[0].candidates, key=lambda candidate: candidate.probabilities[-1])
    assert final.token == trace.tokens[0].token


def test_command_writes_page_and_data(l2d_dir, tmp_path, capsys):
    out = tmp_path / "deep" / "trace.html"
    arguments = ["trace", str(l2d_dir), "--prompt", "<b>1 + 1</b>", "--budget", "7", "--max-new-tokens", "5"]
    main([*arguments, "--device", "cpu", "--out", str(out)])
    printed = capsys.readouterr().out
    data = json.loads(out.with_suffix(".json").read_text())
    assert data["sampler"]["budget"] == 7 and len(data["tokens"]) == 5
    assert str(out) in printed and "5 tokens" in printed
    page = out.read_text()
    assert "&lt;b&gt;1 + 1" in page and "<b>1 + 1" not in page and "@@" not in page
    assert page.count("<figure") == 5 and "http" not in page


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--budget", "4"], "diffusion_budget=4 cannot be met"),
        (["--solver", "dopri5"], "trace a fixed-grid solver"),
        (["--guidance", "2"], "guidance classes"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--max-new-tokens", "4096"], "below the base's 4096"),
        (["--max-new-tokens", "4095"], "prompt has 2 tokens"),
    ],
)
def test_users_mistakes_are_one_line(l2d_dir, capsys, arguments, words):
    with pytest.raises(SystemExit):
        main(["trace", str(l2d_dir), "--prompt", "x", "--device", "cpu", *arguments])
    told = capsys.readouterr().err.strip().splitlines()
    assert words in told[-1]


def test_a_folder_without_a_checkpoint(base_dir, tmp_path, capsys):
    for folder, words in ((base_dir, "not an L2D checkpoint"), (tmp_path, "holds no config.json")):
        with pytest.raises(SystemExit):
            main(["trace", str(folder), "--prompt", "x"])
        assert words in capsys.readouterr().err


def test_terminal_form(session):
    trace = trace_prompt(session, PROMPT, {"budget": 15}, max_new_tokens=6)
    plain, coloured = terminal_text(trace), terminal_text(trace, colour=True)
    assert "\x1b" not in plain and "\x1b[48;5;" in coloured
    changed = next(token for token in trace.tokens if token.changes)
    assert f"at t = {trace.times[changed.changes[0]]:.2f}" in plain


def test_columns_stay_in_line(session):
    """Whatever the tokens are: long, wide, without width, empty."""
    trace = trace_prompt(session, PROMPT, {"budget": 15}, max_new_tokens=6)
    texts = [" a", " internationalization of everything", "\u65e5\u672c", "\u05d0\u0301", "", "\u200d"]
    tokens = [dataclasses.replace(token, text=text) for token, text in zip(trace.tokens, texts, strict=True)]
    lines = terminal_text(dataclasses.replace(trace, tokens=tokens)).splitlines()[-8:-1]
    assert lines[0].startswith("token ")
    begin = lines[0].index("passes")
    for line, token in zip(lines[1:], tokens, strict=True):
        name = next(line[:end] for end in range(len(line)) if width(line[:end]) == begin)
        assert line[len(name) :].startswith(f"{token.passes:>6}  {token.nfe_computed:>11}  ")
    assert "…" in lines[2]


def test_progress_is_told(session):
    told: list[str] = []
    trace_prompt(session, PROMPT, {"budget": 3}, max_new_tokens=3, wait=told.append)
    count = len(session.encode(PROMPT))
    expected = [f"reading {count} tokens ...", *(f"token {n} of at most 3 ..." for n in (1, 2, 3))]
    assert told == [*expected, "solving the trajectories of 3 tokens again ..."]


def test_nothing_in_a_prompt_reaches_the_terminal_as_a_command(session):
    trace = dataclasses.replace(trace_prompt(session, "1 + 1 =", max_new_tokens=1), prompt="1\x1b[2J\n+ 1")
    for colour in (False, True):
        assert "\x1b[2J" not in terminal_text(trace, colour)


def test_pieces_add_up_to_the_text(session):
    tokens = session.tokenizer("naïve → 日本 clips", add_special_tokens=False)["input_ids"]
    pieces = session.pieces(tokens)
    assert len(pieces) == len(tokens) and "".join(pieces) == session.tokenizer.decode(tokens)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")
def test_page_in_a_browser(session, tmp_path):
    page = tmp_path / "trace.html"
    trace = trace_prompt(session, PROMPT, {"budget": 15}, max_new_tokens=24)
    page.write_text(html_page(trace))
    shots = Path(os.environ.get("L2D_SCREENSHOTS") or tmp_path)
    with Browser(tmp_path / "profile") as browser:
        for width in (390, 1440):
            browser.open(page, width)
            assert browser.messages == [] and browser.requests == [page.resolve().as_uri()]
            assert browser.run("document.documentElement.scrollWidth <= innerWidth")
            assert browser.screenshot(shots / f"trace-{width}.png").stat().st_size > 10_000
        first = next(number for number, token in enumerate(trace.tokens) if token.changes)
        current = "document.querySelector('figure.current').id"
        assert browser.run(current) == f"token-{first}"
        browser.run("document.querySelectorAll('.token')[3].click()")
        assert browser.run(current) == "token-3"
        browser.run("document.getElementById('next').click()")
        assert browser.run(current) == "token-4"
        assert browser.run("document.querySelectorAll('figure.current').length") == 1
        assert browser.messages == []


def test_notebooks_show_the_page_and_the_record(session):
    """The page in a frame of its own, and a table of what a generation cost."""
    trace = trace_prompt(session, "<b>1 + 1</b> =", {"budget": 3}, max_new_tokens=3)
    frame = trace._repr_html_()
    (page,) = re.findall(r'<iframe srcdoc="([^"]*)"', frame)
    assert html.unescape(page) == html_page(trace) and frame.count("<") == 2
    ids = torch.tensor([trace.prompt_tokens])
    _, record = session.model.generate(ids, sampler={"budget": 3}, max_new_tokens=3, return_record=True)
    computed = sum(record.nfe_computed[0])
    assert f"<td>3</td><td>9 (3.00 each)</td><td>{computed} ({computed / 3:.2f} each)</td>" in record._repr_html_()
    assert "max_evaluations" not in record._repr_html_()
    record.capped = 2
    assert "2 solves reached max_evaluations" in record._repr_html_()
