"""`python -m l2d chat`: the answers are those of `generate` and of the evaluation; settings change on the way.

Run: `python -m pytest tests/l2d/test_chat.py` (about 15 seconds)
"""

import io
import re

import pytest
import torch
from lm_eval.api.instance import Instance

from l2d.__main__ import main
from l2d.cli.chat import HELP, TINT, Chat, Streamer, command, effort
from l2d.cli.session import Session, load_session
from l2d.cli.terminal import Waiting, fitted, harmless, shade, visible, width
from l2d.cli.trace import trace_prompt
from lm_eval_ext.model import L2DLM

FIRST, SECOND = "How many clips did she sell?", "And in June?"


@pytest.fixture(scope="module")
def folder(make_l2d, base_dir):
    """A checkpoint with guidance classes and a chat template."""
    return make_l2d(base_dir, classes=["math", "coding"])


@pytest.fixture(scope="module")
def session(folder) -> Session:
    """The same, loaded."""
    return load_session(folder, device="cpu")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_are_those_of_generate_and_of_the_evaluation(session, folder, temperature):
    settings = {"guidance_class": "math", "seed": 3}
    chat = Chat(session, {"budget": 7, **settings}, temperature=temperature, max_new_tokens=16)
    first = chat.answer(FIRST)
    reply = chat.answer(SECOND)

    lm = L2DLM(str(folder), device="cpu", batch_size=1, diffusion_budget=7, **settings)
    said = [("user", FIRST), ("assistant", first.text), ("user", SECOND)]
    context = lm.apply_chat_template([{"role": role, "content": content} for role, content in said])
    kwargs = {"until": [], "max_gen_toks": 16, "do_sample": temperature > 0, "temperature": temperature}
    request = Instance("generate_until", {}, (context, kwargs), 0, metadata=("task", 0, 1))
    assert lm.generate_until([request], disable_tqdm=True) == [reply.text]

    ids = torch.tensor([session.encode(context)])
    options = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    options |= {"max_new_tokens": 16, "eos_token_id": session.end_tokens(), "pad_token_id": 0}
    sequences = session.model.generate(ids, sampler={"budget": 7, **settings}, **options)
    new = [token for token in sequences[0, ids.shape[1] :].tolist() if token not in session.end_tokens()]
    assert session.tokenizer.decode(new) == reply.text
    assert reply.nfe_requested == [7] * len(reply.nfe_requested) and "".join(reply.pieces) == reply.text


def test_long_conversations_are_cut_as_in_the_evaluation(session, folder):
    text = "clips " * 6000
    chat = Chat(session, {"budget": 3}, max_new_tokens=8)
    assert len(chat.prompt(text)) == 4096 - 8
    lm = L2DLM(str(folder), device="cpu", batch_size=1, diffusion_budget=3)
    context = lm.apply_chat_template([{"role": "user", "content": text}])
    request = Instance("generate_until", {}, (context, {"until": [], "max_gen_toks": 8}), 0, metadata=("task", 0, 1))
    assert lm.generate_until([request], disable_tqdm=True) == [chat.answer(text).text]


def test_streams_exactly_the_answer(session):
    chat, written = Chat(session, {"budget": 7}, max_new_tokens=16), []
    reply = chat.answer(FIRST, write=written.append)
    assert len(written) > 2
    assert "".join(written) == harmless(reply.text)


def test_an_answer_that_reaches_its_length_is_said_to_be_cut(session, monkeypatch):
    whole = Chat(session, {"budget": 1}, max_new_tokens=8).answer(FIRST)
    assert whole.cut and len(whole.pieces) == 8
    text = session.encode(session.conversation_text([{"role": "user", "content": FIRST}]))
    fourth = session.model.generate(torch.tensor([text]), sampler={"budget": 1}, max_new_tokens=4)[0, -1].item()
    monkeypatch.setattr(session.model.generation_config, "eos_token_id", fourth)
    ended = Chat(session, {"budget": 1}, max_new_tokens=8).answer(FIRST)
    assert not ended.cut and len(ended.pieces) < 4


SCRIPTS = {
    "Persian": "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "Hindi": "\u0915\u094d\u200d\u0937",
    "composed": "\U0001f469\u200d\U0001f680", "flag": "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "variant": "\u2764\ufe0f", "no-break space": "3\u00a0000", "wide space": "\u3000\u65e5", "mark": "\u05d0\u200f!",
    "lines": "a\n\tb", "new emoji": "\U0001fae9",
}  # fmt: skip


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_text_of_all_scripts_is_shown(text):
    assert harmless(text) == text
    assert not any(name in visible(text) for name in ("\\x200c", "\\x200d"))


@pytest.mark.parametrize("letter", "\x1b\x07\r\x7f\x9b\u2028\u2029\u202a\u202d\u202e\u2066\u2069\u206b\ud800")
def test_what_a_terminal_obeys_is_not_shown(letter):
    assert harmless(f"a{letter}[2Jb") == "a\ufffd[2Jb" and letter not in visible(f"a{letter}b")


def test_the_system_message_outlives_the_oldest_turns(session):
    chat = Chat(session, {"budget": 1}, max_new_tokens=8, system="Be brief.")
    turns = [
        [{"role": "user", "content": f"{n} " + "clips " * 1400}, {"role": "assistant", "content": "No."}]
        for n in "abcd"
    ]
    chat.messages += [message for turn in turns for message in turn]
    ids, left_out = chat.fit(FIRST)
    rest = [*chat.start, *(message for turn in turns[2:] for message in turn), {"role": "user", "content": FIRST}]
    assert ids == session.encode(session.conversation_text(rest)) and left_out.startswith("The first 2 turns")
    assert chat.answer(FIRST).left_out == left_out and len(chat.messages) == 11
    assert not Chat(session, {"budget": 1}, max_new_tokens=8, system="Be brief.").answer(FIRST).left_out
    ids, left_out = chat.fit("clips " * 6000)
    assert len(ids) == 4096 - 8 and "The first 5 turns" in left_out and "the system message included" in left_out


def test_bytes_that_are_not_utf8_cost_a_turn(folder, monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n/seed 4\n" + FIRST.encode() + b"\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    main(["chat", str(folder), "--budget", "1", "--device", "cpu", "--max-new-tokens", "2", "--tint"])
    printed = capsys.readouterr().out
    assert "prompt holds bytes that are not UTF-8" in printed and "seed 4" in printed and "2 tokens, " in printed


def test_the_bases_settings_for_many_answers_do_not_reach_a_chat(session, monkeypatch):
    expected = Chat(session, {"budget": 3}, max_new_tokens=8).answer(FIRST)
    for name, value in (("do_sample", True), ("num_return_sequences", 2), ("return_dict_in_generate", True)):
        monkeypatch.setattr(session.model.generation_config, name, value)
    assert Chat(session, {"budget": 3}, max_new_tokens=8).answer(FIRST) == expected
    assert len(trace_prompt(session, FIRST, {"budget": 3}, max_new_tokens=3).tokens) == 3
    monkeypatch.setattr(session.model.generation_config, "stop_strings", [expected.text[2:3]])
    stopped = Chat(session, {"budget": 3}, max_new_tokens=8).answer(FIRST).text
    assert expected.text.startswith(stopped) and len(stopped) < len(expected.text)


def test_streamer_waits_for_whole_characters(session):
    tokens, written = session.tokenizer("né日", add_special_tokens=False)["input_ids"], []
    streamer = Streamer(session, written.append, hidden=[2])
    streamer.put(torch.tensor([[1, 5, 6]]))  # the prompt
    for token in [*tokens, 2]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(written) == "né日" and not any("\ufffd" in piece for piece in written)


def test_budget_and_guidance_change_while_chatting(session):
    chat = Chat(session, {"budget": 3}, max_new_tokens=8)
    assert set(chat.answer(FIRST).nfe_requested) == {3}
    assert "T = 31" in command(chat, "/budget 31")
    assert "guidance 2 towards math" in command(chat, "/guidance 2 math")
    assert set(chat.answer(SECOND).nfe_requested) == {31} and len(chat.messages) == 4
    assert "seed 7" in command(chat, "/seed 7")
    assert "temperature 0.5" in command(chat, "/temperature 0.5")
    assert "/budget T" in command(chat, "/help")
    command(chat, "/new")
    assert chat.messages == [] and chat.sampler["budget"] == 31
    assert command(chat, "/quit") is None


@pytest.mark.parametrize(
    "line", ["/budget 4", "/budget many", "/guidance 2", "/guidance 2 history", "/temperature -1", "/votes 2"]
)
def test_impossible_changes_change_nothing(session, line):
    chat = Chat(session, {"budget": 3})
    with pytest.raises(ValueError):
        command(chat, line)
    assert chat.sampler == {"budget": 3} and chat.temperature == 0.0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/bugdet 3", "/bugdet is not known."),
        ("/", "/ is not known."),
        ("/budget", "/budget takes one value."),
        ("/guidance", "/guidance takes one or two values."),
        ("/Help", "/Help is not known."),
    ],
)
def test_unknown_words_are_called_so(session, line, words):
    """Before what there is; /help alone is no mistake."""
    with pytest.raises(ValueError) as caught:
        command(Chat(session, {"budget": 3}), line)
    assert str(caught.value) == f"{words}\n{HELP}" and command(Chat(session), "/help") == HELP


def test_tint_shows_the_compute_of_every_token_as_it_comes(session):
    chat, written = Chat(session, {"budget": 15}, max_new_tokens=16), []
    chat.tint = True
    reply = chat.answer(FIRST, written.append, colour=True)
    assert len(set(reply.nfe_computed)) > 1
    shares = [effort(*cost) for cost in zip(reply.nfe_requested, reply.nfe_computed, strict=True)]
    assert len(set(shares)) > 1
    whole = [(piece, share) for piece, share in zip(reply.pieces, shares, strict=False) if piece]
    assert written == [shade(piece, share, colour=True) for piece, share in whole]
    written.clear()
    chat.reset()
    assert chat.answer(FIRST, written.append) == reply and "\x1b" not in "".join(written)


@pytest.mark.parametrize("cost, share", [((1, 0), 0), ((15, 14), 0), ((15, 30), 0.5), ((15, 45), 1), ((15, 400), 1)])
def test_the_tint_is_relative_to_what_was_requested(cost, share):
    assert effort(*cost) == share


class Terminal(io.StringIO):
    """Takes text as a terminal does: carriage returns and the erasing of a line are obeyed, colours left out."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that are seen in the end."""
        text = re.sub("\x1b\\[[0-9;]*m", "", self.getvalue())
        return [line.rpartition("\r\x1b[K")[2] for line in text.split("\n")]


def test_what_is_waited_for_is_said_and_gone_with_the_first_token(folder, session, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{FIRST}\n"))
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    main(["chat", str(folder), "--budget", "3", "--device", "cpu", "--max-new-tokens", "4", "--tint"])
    count = len(Chat(session).prompt(FIRST))
    answer = Chat(session, {"budget": 3}, max_new_tokens=4).answer(FIRST).text
    assert f"reading {count} tokens" in screen.getvalue()
    shown = "\n".join(screen.screen())
    assert "reading" not in shown and f"\n{harmless(answer)}\n(stopped after 4 tokens: " in shown
    assert f"Tint is on: {TINT}." in screen.screen()


def test_files_get_no_notes_about_waiting():
    file, screen = io.StringIO(), Terminal()
    for stream in (file, screen):
        waiting = Waiting(stream)
        waiting.say("reading " + "long " * 100)
        waiting.end()
        waiting.end()
    assert file.getvalue() == "" and screen.screen() == [""]
    assert "…" in screen.getvalue() and screen.getvalue().count("\n") == 0


@pytest.mark.parametrize(
    "text", ["clips", "internationalization", "\u65e5\u672c\u8a9e\u306e\u6587", "\u0915\u094d\u200d\u0937", ""]
)
@pytest.mark.parametrize("columns", [5, 12])
def test_texts_are_fitted_into_columns(text, columns):
    shown = fitted(text, columns)
    assert width(shown) == columns
    assert shown.rstrip() == text if width(text) <= columns else shown.rstrip().endswith("…")


def test_a_slow_dtype_is_said_and_what_helps(folder, monkeypatch, capsys):
    for capability, dtype, told in (("AVX2", "bfloat16", 1), ("AVX2", "float32", 0), ("AVX512", "bfloat16", 0)):
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda said=capability: said)
        monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
        main(["chat", str(folder), "--dtype", dtype, "--device", "cpu"])
        assert capsys.readouterr().err.count("--dtype float32 is several times as fast") == told


def test_a_conversation_on_the_terminal(folder, monkeypatch, capsys):
    lines = f"{FIRST}\n/budget 4\n/budget 1\n\n/tint\n{SECOND}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    main(["chat", str(folder), "--budget", "7", "--device", "cpu", "--max-new-tokens", "6"])
    printed = capsys.readouterr().out
    assert "T = 7, midpoint" in printed and "use 3 or 5" in printed and "T = 1, midpoint" in printed
    assert "evaluations and" in printed
