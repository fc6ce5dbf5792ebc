"""`python -m l2d chat`: the answers are those of `generate` and of the evaluation; settings change on the way.

Run: `python -m pytest tests/l2d/test_chat.py` (about 15 seconds)
"""

import io

import pytest
import torch
from lm_eval.api.instance import Instance

from l2d.__main__ import main
from l2d.cli.chat import HELP, Chat, Streamer, command, tinted
from l2d.cli.session import Session, load_session
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
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in reply.text)
    assert "".join(written) == shown


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


def test_tint_shows_compute(session):
    reply = Chat(session, {"budget": 15}, max_new_tokens=16).answer(FIRST)
    assert len(set(reply.nfe_computed)) > 1
    text = tinted(reply)
    assert text.count("\x1b[48;5;") >= sum(bool(piece.strip()) for piece in reply.pieces) - 1
    assert "\x1b" not in tinted(reply, colour=False)


def test_a_conversation_on_the_terminal(folder, monkeypatch, capsys):
    lines = f"{FIRST}\n/budget 4\n/budget 1\n\n/tint\n{SECOND}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    main(["chat", str(folder), "--budget", "7", "--device", "cpu", "--max-new-tokens", "6"])
    printed = capsys.readouterr().out
    assert "T = 7, midpoint" in printed and "use 3 or 5" in printed and "T = 1, midpoint" in printed
    assert "evaluations and" in printed
