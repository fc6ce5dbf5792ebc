"""A real server on the loopback: OpenAI's client and lm-eval against it, wrong requests, and how it ends.

Run: `python -m pytest tests/l2d/test_serve.py` (about 40 seconds, most of it loading libraries in the server)
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from l2d.cli.chat import Chat
from l2d.cli.serving.answers import StopCut
from l2d.cli.session import Session, load_session
from tests.conftest import REPOSITORY
from tests.integration.harness import TASKS

QUESTION = "How many clips did she sell?"
MESSAGES = [{"role": "user", "content": QUESTION}]
LONG = {"max_tokens": 3000, "extra_body": {"diffusion_budget": 127, "generation_config": '{"eos_token_id": 399}'}}


class Server:
    """`python -m l2d serve` in a process of its own."""

    def __init__(self, folder: Path, budget: int = 7):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "l2d", "serve", str(folder), "--port", "0", "--budget", str(budget)]
        self.name = str(folder)
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert f"T = {budget}, midpoint." in line, line
        self.url = line.split(" at ")[1].split(": T")[0]
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=120)

    def chat(self, **options) -> openai.types.chat.ChatCompletion:
        """An answer to `MESSAGES` of at most 12 tokens."""
        return self.client.chat.completions.create(
            **{"model": self.name, "messages": MESSAGES, "max_tokens": 12, **options}
        )

    def text(self, prompt: str | list = QUESTION, **options) -> openai.types.Completion:
        """A continuation of at most 12 tokens."""
        return self.client.completions.create(**{"model": self.name, "prompt": prompt, "max_tokens": 12, **options})


@pytest.fixture(scope="module")
def folder(make_l2d, base_dir) -> Path:
    return make_l2d(base_dir, classes=["math", "coding"])


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    started = Server(folder)
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def base_server(folder) -> Iterator[Server]:
    started = Server(folder, budget=1)
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture(scope="module")
def session(folder) -> Session:
    return load_session(folder, device="cpu")


def said(session: Session, sampler: dict, temperature: float = 0.0) -> tuple[str, list[int]]:
    """What `python -m l2d chat` answers, as text without special tokens, and its evaluations."""
    chat = Chat(session, {"budget": 7, **sampler}, temperature, max_new_tokens=12)
    tokens: list[int] = []
    real = session.model.generate

    def generate(*args, **kwargs):
        result, record = real(*args, **kwargs)
        tokens.extend(result[0, args[0].shape[1] :].tolist())
        return result, record

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.model, "generate", generate)
        reply = chat.answer(QUESTION)
    return session.tokenizer.decode(tokens, skip_special_tokens=True), reply.nfe_computed


# ---- answers -----------------------------------------------------------------------------------------------------


def test_models(server):
    assert [model.id for model in server.client.models.list()] == [server.name]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"diffusion_budget": 1},
        {"diffusion_budget": 15, "seed": 3},
        {"guidance_scale": 2.0, "guidance_class": "coding"},
        {"solver": "rk4", "diffusion_budget": 13},
        {"temperature": 1.0, "seed": 5},
    ],
    ids=str,
)
def test_answers_are_those_of_chat(server, session, fields):
    sampler = {"budget" if name == "diffusion_budget" else name: value for name, value in fields.items()}
    text, computed = said(session, sampler, sampler.pop("temperature", 0.0))
    options = {name: fields[name] for name in ("seed", "temperature") if name in fields}
    answer = server.chat(**options, extra_body={k: v for k, v in fields.items() if k not in options})
    assert answer.choices[0].message.content == text
    usage = answer.usage.model_dump()
    count = usage["completion_tokens"]
    assert count == len(computed)
    assert (usage["nfe_requested"], usage["nfe_computed"]) == (sampler.get("budget", 7) * count, sum(computed))
    assert answer.choices[0].finish_reason == ("length" if count == 12 else "stop")


def test_settings_change_answers(server):
    texts = {
        server.chat(extra_body=fields).choices[0].message.content
        for fields in ({}, {"diffusion_budget": 1}, {"seed": 1}, {"guidance_scale": 3.0, "guidance_class": "math"})
    }
    assert len(texts) > 2


def streamed(text: str) -> str:
    """What a stream shows of `text`: a character whose last bytes never came is left out."""
    return text.rstrip("\ufffd")


def test_a_generation_config_is_followed(server, session):
    """`transformers chat` sends all of its settings so."""
    greedy = '{"max_new_tokens": 5, "do_sample": false}'
    text = server.chat(max_tokens=None, extra_body={"generation_config": greedy})
    assert text.usage.completion_tokens == 5
    assert server.chat().choices[0].message.content.startswith(streamed(text.choices[0].message.content))
    sampled = {
        server.chat(seed=n, extra_body={"generation_config": '{"do_sample": true}'}).choices[0].message.content
        for n in range(3)
    }
    assert len(sampled) == 3
    stop = text.choices[0].message.content[2:4]
    ended = server.chat(extra_body={"generation_config": json.dumps({"stop_strings": [stop]})})
    assert ended.choices[0].message.content == text.choices[0].message.content[:2]


def test_transformers_chat_is_a_client(server):
    command = [str(Path(sys.executable).parent / "transformers"), "chat", server.name, server.url]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}  # to its client our address is the hub
    told, options = f"{QUESTION}\nn\n!exit\n", ["max_new_tokens=5", "do_sample=False"]
    done = subprocess.run(
        [*command, *options], input=told, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0 and "5 tokens in" in done.stdout, done.stdout + done.stderr


def test_streams_say_the_same(server):
    whole = server.chat()
    events = list(server.chat(stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].delta.content or "" for event in events) == streamed(
        whole.choices[0].message.content
    )
    assert events[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].usage.model_dump() == whole.usage.model_dump() and events[-1].usage.nfe_computed > 0
    pieces = list(server.text(stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == streamed(server.text().choices[0].text)
    assert pieces[-1].usage.model_dump() == server.text().usage.model_dump()


def test_responses(server):
    text = server.chat().choices[0].message.content
    ask = {"model": server.name, "input": QUESTION, "max_output_tokens": 12}
    whole = server.client.responses.create(**ask)
    assert whole.output_text == text and whole.usage.nfe_requested == 7 * whole.usage.output_tokens
    events = list(server.client.responses.create(**ask, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == streamed(text)
    assert events[-1].type == "response.completed" and events[-1].response.usage.nfe_requested == 84


def test_prompts_as_text_tokens_and_lists(server, session):
    tokens = session.encode(QUESTION)
    one = server.text().choices[0].text
    several = server.text([QUESTION, "1 + 1 ="])
    assert server.text(tokens).choices[0].text == server.text([tokens]).choices[0].text == one
    assert [choice.text for choice in several.choices] == [one, server.text("1 + 1 =").choices[0].text]
    assert several.usage.nfe_requested == 7 * several.usage.completion_tokens


def test_prompts_are_scored_by_echo(server, session):
    """By the definition: what `score` gives for the same tokens, and one generated token behind them."""
    ask = {"echo": True, "logprobs": 1, "extra_body": {"diffusion_budget": 15}}
    for prompt in (QUESTION, session.encode(QUESTION)):
        (choice,) = server.text(prompt, max_tokens=0, **ask).choices
        ids = torch.tensor([session.encode(QUESTION)])
        expected = session.model.score(ids, sampler={"budget": 15})
        assert choice.logprobs.token_logprobs[0] is None and choice.text == session.tokenizer.decode(ids[0])
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected.logprobs[0, 1:].tolist(), abs=1e-4)
        pairs = zip(choice.logprobs.token_logprobs[1:], choice.logprobs.top_logprobs[1:], strict=True)
        greedy = [value == max(top.values()) for value, top in pairs]
        assert greedy == expected.greedy[0, 1:].tolist()
    both = server.text([QUESTION, "2 + 3"], max_tokens=1, **ask)
    assert [choice.index for choice in both.choices] == [0, 1] and both.usage.completion_tokens == 2
    assert both.choices[0].logprobs.token_logprobs[1:-1] == pytest.approx(choice.logprobs.token_logprobs[1:], abs=1e-4)
    assert both.usage.nfe_requested == 15 * (both.usage.total_tokens - 2 + 2)
    for wrong in ({"max_tokens": 5}, {"logprobs": 3}, {"echo": False}, {"stream": True}):
        with pytest.raises(openai.BadRequestError, match="echo scores prompts: set echo=true, logprobs=1 and max_tok"):
            server.text(**{**ask, "max_tokens": 1, **wrong})


def test_stop_strings_are_cut(server):
    text = server.text().choices[0].text
    stop = text[len(text) // 2 :][:2]
    before = text[: text.index(stop)]
    for options in ({"stop": stop}, {"stop": ["never said", stop]}):
        answer = server.text(**options)
        assert answer.choices[0].text == before and answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < 12
        pieces = list(server.text(**options, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == before
    assert server.text("x" + stop, stop=stop).usage.completion_tokens > 0  # in the prompt it ends nothing


def test_held_back_text_comes_with_the_end():
    cut = StopCut(["END", "\n\n"])
    assert [cut.add(piece) for piece in ("a E", "N", "x\n")] == ["a ", "", "ENx"]
    assert cut.add("", last=True) == "\n"
    cut = StopCut(["END"])
    assert [cut.add(piece) for piece in ("aE", "ND b", "c")] == ["a", "", ""] and cut.add("", last=True) == ""


# ---- wrong requests ----------------------------------------------------------------------------------------------

WRONG = [
    ({"diffusion_budget": 14}, "cannot be met by solver='midpoint', which spends 2(n-1)+1"),
    ({"diffusion_budgett": 15}, "field 'diffusion_budgett' is not known: did you mean 'diffusion_budget'?"),
    ({"solver": "midpiont"}, "solver='midpiont' is not known; choose one of: euler, midpoint"),
    ({"guidance_class": "history"}, "guidance_class='history' is not a class of this model; choose one of: math"),
    ({"guidance_scale": 2}, "guidance_scale=2 needs guidance_class"),
    ({"seed": -1}, "seed=-1 must be a whole number from 0 to"),
    ({"temperature": -1}, "temperature=-1 must be at least 0 (greedy)."),
    ({"temperature": "hot"}, "temperature='hot' must be a number."),
    ({"top_p": 2}, "top_p=2 must be above 0 and at most 1."),
    ({"frequency_penalty": -2}, "frequency_penalty=-2 must be above -1."),
    ({"max_tokens": 0}, "max_new_tokens=0 must be at least 1 and below the base's 4096 tokens."),
    ({"max_tokens": "all"}, "max_tokens='all' must be a whole number of tokens."),
    ({"max_tokens": 4090}, "and its answer may have 4090, and the base takes 4096 in all: shorten one of them."),
    ({"stop": 3}, "stop=3 must be a text or a list of texts."),
    ({"n": 2}, "n=2 cannot be followed by this server: leave it out."),
    ({"generation_config": "{"}, "generation_config must be the JSON text of a mapping"),
    ({"generation_config": '{"num_beams": 3}'}, "num_beams cannot be used"),
    (
        {"generation_config": '{"num_return_sequences": 3, "do_sample": true}'},
        "num_return_sequences=3 cannot be followed: leave it out.",
    ),
    ({"model": "another"}, "model='another' is not served here"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fields, words", WRONG, ids=[str(fields) for fields, _ in WRONG])
def test_wrong_fields_are_refused_in_one_sentence(server, fields, words, stream):
    for ask in (server.chat, server.text):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(stream=stream, extra_body=fields)
        assert words in caught.value.body["message"] and "\n" not in caught.value.body["message"]


def test_wrong_input_is_refused(server):
    for messages in ([{"role": "user"}, {"content": "x"}], [{"role": "user", "content": [{"text": "x"}]}], ["x"], []):
        with pytest.raises(openai.BadRequestError, match="messages"):
            server.chat(messages=messages)
    for prompt in (["x", 3], [9999], {"a": 1}):
        with pytest.raises(openai.BadRequestError, match="prompt"):
            server.text(prompt)
    with pytest.raises(openai.BadRequestError, match="a stream answers one"):
        server.text(["a", "b"], stream=True)
    with pytest.raises(openai.BadRequestError, match="must be a JSON object"):
        server.client.post("/completions", body=[1], cast_to=dict)
    with pytest.raises(openai.NotFoundError):
        server.client.post("/audio/transcriptions", body={}, cast_to=dict)


# ---- several clients --------------------------------------------------------------------------------------------


def test_requests_at_once_are_all_answered(server):
    budgets = [1, 3, 7, 15] * 3
    with ThreadPoolExecutor(len(budgets)) as pool:
        together = list(pool.map(lambda budget: server.chat(extra_body={"diffusion_budget": budget}), budgets))
    alone = {budget: server.chat(extra_body={"diffusion_budget": budget}) for budget in set(budgets)}
    for budget, answer in zip(budgets, together, strict=True):
        assert answer.choices == alone[budget].choices and answer.usage == alone[budget].usage


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_generation(server, stream):
    """3,000 tokens at T = 127 take minutes: the next answer does not wait for them."""
    if stream:
        events = server.chat(stream=True, **LONG)
        next(event for event in events if event.choices[0].delta.content)
        events.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            server.chat(timeout=1.0, **LONG)
    start = time.monotonic()
    assert server.chat(timeout=30).usage.completion_tokens > 0
    assert time.monotonic() - start < 30


def test_a_port_in_use_is_refused_before_loading(folder, capsys):
    from l2d.__main__ import main

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit):
            main(["serve", str(folder), "--host", "127.0.0.1", "--port", str(port)])
    assert f"port={port} cannot be listened on" in capsys.readouterr().err


# ---- lm-eval -----------------------------------------------------------------------------------------------------


def evaluate(model: str, model_args: dict, task: str, **options) -> list[list[str]]:
    """Answers of the harness's model class to the first six rows of `task`."""
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    results = simple_evaluate(
        model=model, model_args=model_args, tasks=[task], task_manager=manager, limit=6, bootstrap_iters=0, **options
    )
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


@pytest.mark.parametrize("form", ["text", "tokens", "batches", "chat"])
def test_lm_eval_gets_the_answers_of_its_own_class(server, folder, form):
    chat = {"apply_chat_template": True} if form == "chat" else {}
    ours = {"pretrained": str(folder), "diffusion_budget": 7, "device": "cpu"}
    expected = evaluate("l2d", ours, "l2d_test_generate", batch_size=3, **chat)
    kind, path = ("local-chat-completions", "chat/completions") if chat else ("local-completions", "completions")
    remote = {"model": str(folder), "base_url": f"{server.url}/{path}", "seed": 0, "num_concurrent": 3}
    if form in ("tokens", "batches"):
        remote |= {"add_bos_token": True, "tokenizer_backend": "huggingface"}
    elif form == "text":
        remote |= {"tokenized_requests": False, "tokenizer_backend": "huggingface"}
    found = evaluate(kind, remote, "l2d_test_generate", batch_size=3 if form == "batches" else 1, **chat)
    assert found == expected and len({tuple(answer) for answer in found}) > 1


def test_lm_eval_scores_through_the_server(base_server, folder):
    """At T = 1 as its own class does; above, only the noise is another one."""
    ours = {"pretrained": str(folder), "diffusion_budget": 1, "device": "cpu"}
    remote = {"model": str(folder), "base_url": f"{base_server.url}/completions", "add_bos_token": True}
    expected, found = (
        [answer for answers in evaluate(*call, "l2d_test_choice") for answer in answers]
        for call in (("l2d", ours), ("local-completions", {**remote, "tokenizer_backend": "huggingface"}))
    )
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] and len(found) == 30


# ---- the end -----------------------------------------------------------------------------------------------------


def test_sigterm_finishes_what_runs(base_server):
    """The last test of that server."""
    server = base_server
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.chat, max_tokens=40, extra_body={"diffusion_budget": 63})
        events = server.text(max_tokens=40, stream=True, extra_body={"diffusion_budget": 63})
        first = next(iter(events))
        server.process.terminate()
        pieces = [first, *events]
        assert pieces[-1].choices[0].finish_reason is not None and pieces[-1].usage.completion_tokens > 1
        assert whole.result().choices[0].finish_reason is not None
    assert server.process.wait(timeout=60) in (0, -signal.SIGTERM)
    with pytest.raises(openai.APIConnectionError):
        server.chat()
