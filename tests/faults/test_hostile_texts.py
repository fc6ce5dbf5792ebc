"""Texts that want to be markup: names, labels, tokens, prompts and answers stay text on our pages.

Run: `python -m pytest tests/faults/test_hostile_texts.py`. Pages are parsed, and opened in a browser where there is
one.
"""

import dataclasses
import itertools
import json
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest

from l2d.cli.trace import Candidate, TokenTrace, Trace
from l2d.cli.trace_command import terminal_text
from l2d.cli.trace_page import html_page
from lm_eval_ext.leaderboard.__main__ import write_leaderboard
from tests.browser.chromium import Browser, find_chromium
from tests.lm_eval_ext.test_leaderboard import write_run

ACT = "window.hacked=1"
PIECES = [
    f"<script>{ACT}</script>",
    f"</script><script>{ACT}</script>",
    f"</title></style></textarea><svg onload={ACT}>",
    f"<img src=x onerror='{ACT}'>",
    f'" onmouseover="{ACT}" autofocus onfocus="{ACT}" x="',
    f"' onfocus='{ACT}' autofocus tabindex=1 x='",
    f"javascript:{ACT}",
    f"<a href=javascript:{ACT} id=board>x</a>",
    f"`${{{ACT}}}`",
    f"<!--<script>{ACT}//",
    f"]]><iframe srcdoc='&lt;script&gt;parent.{ACT}&lt;/script&gt;'>",
    "\u2028\u2029\u202e\x00\x1b[31m\ufeff",
    f"{{{{ {ACT} }}}}{{% raw %}}@@FACTS@@",
    "&lt;script&gt;&#60;script&#62;",
    f"\\u003cscript\\u003e\\x3cscript>';{ACT};//",
]
KNOWN_TAGS = set(
    "html head meta link title style body a header h1 h2 h3 p nav main section form label input select option output "
    "div table thead tr th button small tbody td span figure figcaption svg line text polyline circle rect path g "
    "polygon defs use clippath ul li details summary pre code dl dt dd dialog noscript script b i u br em".split()
)


class Page(HTMLParser):
    """Tags, attributes and scripts of a page."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.scripts, self.texts, self._inside = set(), [], 0, [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        """Count."""
        self.tags.add(tag)
        self.attributes += attributes
        self.scripts += tag == "script" and ("class", "samples") not in attributes  # one per task

    def handle_data(self, data: str) -> None:
        """Keep."""
        self.texts.append(data)


def check(page: str, plain: str) -> None:
    """The page has no tag, script, or acting attribute that the same page with harmless texts lacks."""
    found, usual = Page(page), Page(plain)
    assert found.tags <= KNOWN_TAGS and found.scripts == usual.scripts
    names = {name for name, _ in found.attributes}
    assert names == {name for name, _ in usual.attributes}
    assert not [name for name in names if name.startswith("on")]
    links = [value for name, value in found.attributes if name in ("href", "src", "action", "xlink:href")]
    assert not [link for link in links if (link or "").strip().lower().startswith(("javascript:", "vbscript:"))]
    assert any(ACT in text for text in found.texts)  # what was written is there to read, as text


def mixture(chance: random.Random, count: int) -> list[str]:
    """Hostile texts: each piece, and pieces put together."""
    return PIECES + ["".join(chance.sample(PIECES, 3)) for _ in range(count - len(PIECES))]


def trace_of(texts: list[str]) -> Trace:
    """A trace in which every text comes from outside."""
    word = itertools.cycle(texts)
    tokens = []
    for place in range(len(texts)):
        candidates = [Candidate(number, next(word), [0.1, 0.4, 0.9]) for number in range(3)]
        more = dict(
            nfe_requested=3, nfe_computed=place % 5 + 2, passes=2, changes=[1], base_token=5, base_text=next(word)
        )
        chosen = [next(word), next(word)]
        tokens.append(TokenTrace(place, 1, next(word), [0, 1], chosen, candidates=candidates, **more))
    sampler, decoding = {"budget": 3, next(word): next(word)}, {next(word): next(word)}
    return Trace(next(word), sampler, decoding, "".join(texts), [1, 2], "".join(texts), [0.0, 0.5, 1.0], tokens)


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """By kind, a hostile page and the text of the same page without hostile texts."""
    work = tmp_path_factory.mktemp("pages")
    texts = mixture(random.Random(0), 40)
    (work / "trace.html").write_text(html_page(trace_of(texts)), encoding="utf-8", errors="replace")
    found = {"trace": (work / "trace.html", html_page(trace_of(["word"] * len(texts))))}
    for kind, words in (("report", texts), ("plain", ["word"] * len(texts))):
        word = iter(f"{text}{number}" for number, text in enumerate(itertools.cycle(words)))
        results = work / kind
        write_run(results / "base", {"gsm8k": [0, 1, 1], _file_name(next(word)): [1, 0, 1]})
        for number in range(6):
            tasks = {"gsm8k": [1, 1, number % 2], _file_name(next(word)): [0, 1, 0]}
            changes = {"git_hash": next(word), "lm_eval_version": next(word), "model_name": next(word)}
            l2d = {"base": next(word), "variant": next(word), "command": next(word)}
            l2d["sampler"] = {"budget": 3, "solver": next(word), "guidance_class": next(word), "guidance_scale": 2.0}
            folder = write_run(results / str(number), tasks, model=f"m{number}", l2d=l2d, **changes)
            for file in folder.glob("results*") if folder.is_dir() else [folder]:
                _poison(file, word)
        (results / "0" / f"results_{_file_name(words[0])}.json").write_text("{")
        write_leaderboard([results], work / f"{kind}-out", title=next(word))
    plain = (work / "plain-out" / "leaderboard.html").read_text()
    return {**found, "report": (work / "report-out" / "leaderboard.html", plain)}


def _file_name(text: str) -> str:
    return text.replace("/", "|").replace("\0", "")[:60]


def _poison(file: Path, word) -> None:
    raw = json.loads(file.read_text())
    raw["config"]["model_args"] = {"pretrained": next(word), "diffusion_budget": 3}
    file.write_text(json.dumps(raw))
    for samples in file.parent.glob("samples_*"):
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        for line in lines:
            line["target"], line["filtered_resps"] = next(word), [next(word)]
            line["arguments"] = {"gen_args_0": {"arg_0": next(word), "arg_1": {}}}
        samples.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("kind", ["trace", "report"])
def test_hostile_texts_stay_text(pages, kind):
    file, plain = pages[kind]
    check(file.read_text(encoding="utf-8", errors="replace"), plain)


def test_the_check_sees_markup(pages):
    """The control: a page that escapes nothing."""
    file, plain = pages["trace"]
    for piece in PIECES[:6]:
        quote = piece[0] if piece[0] in "'\"" else ""
        with pytest.raises(AssertionError):
            check(plain.replace("wordword", f"<b title={quote}{piece}{quote}>" if quote else piece, 1), plain)


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize("kind", ["trace", "report"])
def test_no_script_of_a_text_runs_in_a_browser(pages, kind, tmp_path):
    file, _ = pages[kind]
    with Browser(tmp_path) as browser:
        browser.open(file)
        assert browser.run("window.hacked === undefined")
        if kind == "report":  # what is unpacked when samples are opened
            for number in range(browser.run("document.querySelectorAll('button.open').length")):
                browser.run(f"document.querySelectorAll('button.open')[{number}].click()")
                browser.wait("document.getElementById('drill').open")
                browser.run("document.getElementById('drill').close()")
        for selector in (".token", "a", "button", "[tabindex]"):
            browser.run(
                f"document.querySelectorAll({selector!r}).forEach(e => e.dispatchEvent(new Event('mouseover')))"
            )
            browser.run(f"document.querySelectorAll({selector!r}).forEach(e => e.focus())")
        browser.run("new Promise(done => setTimeout(done, 200))")
        assert browser.run("window.hacked === undefined")
        assert not [url for url in browser.requests if not url.startswith(("file:", "data:"))]
        bad = "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes]).filter(a => a.name.startsWith('on'))"
        assert browser.run(f"{bad}.length") == 0


def test_a_terminal_is_not_told_to_obey():
    trace = trace_of(PIECES)
    shown = terminal_text(dataclasses.replace(trace, prompt="What?\x1b[2J"), colour=False)
    assert not [letter for letter in shown if not letter.isprintable() and letter != "\n"]
