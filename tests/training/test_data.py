"""Data: reading, columns, tokens and labels. `python -m pytest tests/training/test_data.py`"""

import json

import datasets
import pytest
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from tests.training_runs import BASELINE, SMALL, sums, write_jsonl, write_recipe
from training.config import L2DTrainingConfig
from training.data.loading import load_examples
from training.data.options import DataArguments
from training.data.ready import encode
from training.planning.dry_run import coloured
from training.recipe import read_recipe
from training.train import build_trainer, prepare

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 4?"},
    {"role": "assistant", "content": "9 cats"},
]


@pytest.fixture
def chat(tokenizer):
    """The tokenizer with a template that marks all of the assistant's words."""
    kept, tokenizer.chat_template = tokenizer.chat_template, TEMPLATE
    yield tokenizer
    tokenizer.chat_template = kept


@pytest.fixture
def training(tmp_path):
    """`training(**settings)`: trainer settings."""
    return lambda **settings: L2DTrainingConfig(output_dir=str(tmp_path), activation_checkpointing=False, **settings)


def parts(examples) -> list[dict]:
    """What the examples are made of."""
    return [json.loads(row["example"]) for row in examples]


def targets(tokenizer, row) -> str:
    """The text of what is trained on."""
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_prompt_and_completion(tokenizer, training):
    rows = datasets.Dataset.from_list(sums(3))
    encoded, summary = encode(rows, tokenizer, training(), 64, "train")
    assert encoded.column_names == ["input_ids", "labels"]
    for row, source in zip(encoded, sums(3), strict=True):
        assert tokenizer.decode(row["input_ids"]) == f"<s>{source['prompt']}{source['completion']}</s>"
        assert targets(tokenizer, row) == f"{source['completion']}</s>"
        assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))
    assert summary.startswith("train: 3 examples")


def test_prompt_too_if_asked(tokenizer, training):
    encoded, _ = encode(
        datasets.Dataset.from_list(sums(1)), tokenizer, training(completion_only_loss=False), 64, "train"
    )
    assert encoded[0]["labels"] == encoded[0]["input_ids"]


def test_only_assistant_turns(chat, training):
    rows = datasets.Dataset.from_list([{"messages": TALK}])
    encoded, _ = encode(rows, chat, training(), 64, "train")
    assert targets(chat, encoded[0]) == "5</s>9 cats</s>"
    everything, _ = encode(rows, chat, training(assistant_only_loss=False), 64, "train")
    assert everything[0]["labels"] == everything[0]["input_ids"]


def test_conversational_prompt_and_completion(chat, training):
    rows = datasets.Dataset.from_list([{"prompt": TALK[:3], "completion": TALK[3:]}])
    encoded, _ = encode(rows, chat, training(), 64, "train")
    assert targets(chat, encoded[0]) == "9 cats</s>"


@pytest.mark.parametrize("names", [{}, {"user": "human", "assistant": "gpt"}], ids=["chatml", "sharegpt"])
@pytest.mark.parametrize("unroll", [False, True])
def test_sharegpt_conversations(chat, training, tmp_path, names, unroll):
    """They are rendered as the same turns in ChatML, whatever they call the speakers."""
    turns = [{"from": names.get(turn["role"], turn["role"]), "value": turn["content"]} for turn in TALK]
    encoded = []
    for row in ({"conversations": turns}, {"messages": TALK}):
        path = write_jsonl(tmp_path / f"{next(iter(row))}.jsonl", [row])
        rows, _ = load_examples(DataArguments(dataset=str(path), unroll=unroll), None, 0)
        encoded.append(encode(rows, chat, training(), 64, "train")[0])
    assert encoded[0].to_list() == encoded[1].to_list()
    assert targets(chat, encoded[0][0]) == ("5</s>" if unroll else "5</s>9 cats</s>")


def test_templates_that_cannot_be_followed_are_refused(chat, training):
    rows = datasets.Dataset.from_list([{"messages": TALK}])
    chat.chat_template = "{% for m in messages|reverse %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="turn 2 cannot be found.*chat_template_path"):
        encode(rows, chat, training(), 64, "train")
    chat.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        encode(rows, chat, training(), 64, "train")


def test_examples_without_response_are_left_out(chat, training):
    rows = datasets.Dataset.from_list([*sums(2), {"prompt": "Say nothing:", "completion": ""}])
    encoded, summary = encode(rows, chat, training(), 64, "train")
    assert len(encoded) == 2 and "left out 1 (no response 1)" in summary
    with pytest.raises(ValueError, match="no train example has a response"):
        encode(rows.select([2]), chat, training(), 64, "train")
    with pytest.raises(ValueError, match="no eval example has a response"):
        encode(datasets.Dataset.from_list([{"messages": TALK[:1]}]), chat, training(), 64, "eval")


def test_long_examples(tokenizer, training):
    rows = datasets.Dataset.from_list([*sums(2), {"prompt": "Q", "completion": " 7" * 100}])
    with pytest.raises(ValueError, match=r"train data, example 3 has \d+ tokens, more than max_length=64"):
        encode(rows, tokenizer, training(), 64, "train")
    encoded, summary = encode(rows, tokenizer, training(too_long="drop"), 64, "train")
    assert len(encoded) == 2 and "left out 1 (longer than max_length=64 1)" in summary
    encoded, summary = encode(rows, tokenizer, training(too_long="truncate"), 64, "train")
    assert len(encoded[2]["input_ids"]) == len(encoded[2]["labels"]) == 64 and "cut 1" in summary


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "saved splits", "folder"])
def test_sources(tmp_path, kind):
    data = datasets.Dataset.from_list([{"question": f"{i}?", "answer": str(i)} for i in range(6)])
    path, split = tmp_path / f"data.{kind}", "train"
    if kind in ("jsonl", "json"):
        data.to_json(path)
    elif kind in ("csv", "parquet"):
        getattr(data, f"to_{kind}")(path)
    elif kind == "folder":
        path.mkdir()
        data.to_parquet(path / "train-0.parquet")
    else:
        path, split = tmp_path / "data", "train" if kind == "saved" else "more"
        (data if kind == "saved" else datasets.DatasetDict(more=data)).save_to_disk(path)
    arguments = DataArguments(
        dataset=str(path),
        train_split=split,
        eval_holdout=2,
        columns={"prompt": "Q: {question}\nA:", "completion": "answer"},
    )
    train, evaluation = load_examples(arguments, None, seed=0)
    assert (len(train), len(evaluation)) == (4, 2)
    made = parts(train) + parts(evaluation)
    assert sorted(example["prompt"] for example in made) == [f"Q: {i}?\nA:" for i in range(6)]
    assert {example["completion"] for example in made} == set("012345")
    assert sorted([*train["number"], *evaluation["number"]]) == [1, 2, 3, 4, 5, 6]


def test_typed_columns_are_refused(tokenizer, training):
    """How a number of a table is written is nobody's to guess."""
    rows = datasets.Dataset.from_list([{"prompt": "6 * 7 =", "completion": 42}])
    with pytest.raises(ValueError, match="train data, example 1, column 'completion': holds 42 .int., which is not"):
        encode(rows, tokenizer, training(), 64, "train")


def test_prompts_that_end_inside_a_token(tokenizer, training):
    rows = datasets.Dataset.from_list([{"prompt": "The cat sat ", "completion": "on the mat"}])
    encoded, summary = encode(rows, tokenizer, training(), 64, "train")
    assert targets(tokenizer, encoded[0]) == "on the mat</s>" and "1 prompts end inside" in summary
    alone = tokenizer("The cat sat ")["input_ids"]
    assert encoded[0]["input_ids"][: len(alone)] == alone


def test_eval_file_and_slices(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", sums(9))
    other = write_jsonl(tmp_path / "other.jsonl", sums(3))
    train, evaluation = load_examples(
        DataArguments(dataset=str(path), train_split="train[:5]", eval_dataset=str(other)), None, 0
    )
    assert (len(train), len(evaluation)) == (5, 3)
    arguments = DataArguments(dataset=str(path), train_split="train[:5]", eval_split="train[5:]")
    assert [len(part) for part in load_examples(arguments, None, 0)] == [5, 4]


def test_guidance_classes(tmp_path):
    rows = [{**row, "kind": kind} for row, kind in zip(sums(3), ["gsm", "mbpp", None], strict=True)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    mapped = DataArguments(dataset=str(path), guidance_column="kind", guidance_map={"gsm": "math", "mbpp": "code"})
    assert load_examples(mapped, ["code", "math"], 0)[0]["guidance_class"][:] == [1, 0, 2]
    constant = DataArguments(dataset=str(path), guidance_class="code")
    assert load_examples(constant, ["code", "math"], 0)[0]["guidance_class"][:] == [0, 0, 0]
    with pytest.raises(ValueError, match="'gsm'.*guidance_map"):
        load_examples(DataArguments(dataset=str(path), guidance_column="kind"), ["code", "math"], 0)


TEXTS = [{"text": "The cat sat on the mat."}, {"text": "It ended</s>"}, {"text": "7"}]


@pytest.mark.parametrize("method", ["l2d", "lora_sft", "full_sft"])
def test_plain_text_is_trained_on_as_trl_does(tmp_path, base_dir, tokenizer, method):
    """The same tokens and labels as TRL makes of the same rows, whatever else they hold."""
    path = write_jsonl(tmp_path / "data.jsonl", [row | {"source": "web"} for row in TEXTS])
    settings = {**(SMALL if method == "l2d" else BASELINE), "method": method, "output_dir": tmp_path / "out"}
    recipe = write_recipe(tmp_path / "recipe.yaml", **settings, base=base_dir, dataset=path, seed=3)
    job = prepare(read_recipe(["--config", str(recipe)]))
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=None)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    theirs = SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(TEXTS), processing_class=tokenizer)
    wanted = [(row["input_ids"], row["labels"]) for row in theirs.train_dataset]
    assert [(row["input_ids"], row["labels"]) for row in job.train] == wanted
    assert tokenizer.decode(wanted[0][0]) == "<s>The cat sat on the mat.</s>" and wanted[1][0].count(2) == 1
    trainer = build_trainer(job)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"][:, 1:] != -100).sum() == sum(len(tokens) - 1 for tokens, _ in wanted)
    trainer.train()


def test_text_is_the_last_choice_unless_it_is_asked_for(chat, training, tmp_path):
    path = str(write_jsonl(tmp_path / "data.jsonl", [PAIR | {"text": "some words", "body": "others", "talk": TALK}]))
    for options, found in {
        (): " 4</s>",
        (("messages", "talk"),): "5</s>9 cats</s>",
        (("text", "text"),): "<s>some words</s>",
        (("text", "{body}, {text}"),): "<s>others, some words</s>",
    }.items():
        examples, _ = load_examples(DataArguments(dataset=path, columns=dict(options) or None), None, seed=0)
        encoded, summary = encode(examples, chat, training(), 64, "train")
        assert targets(chat, encoded[0]) == found
        assert ("plain text, of which every token but an example's first" in summary) == (found[:3] == "<s>")
    rows = datasets.Dataset.from_list([*TEXTS, {"text": ""}, {"text": None}])
    encoded, summary = encode(rows, chat, training(), 64, "train")
    assert len(encoded) == 3 and "left out 2 (no response 2)" in summary
    # what a dry run shows of it: all but the first token is green
    assert coloured(encoded[2], chat) == "\033[90m<s>\033[0m\033[1;32m7</s>\033[0m"


REFUSED = {
    "no file": ({"dataset": "nowhere.jsonl"}, "does not exist"),
    "no hub name": ({"dataset": "no/such-data"}, "dataset='no/such-data' cannot be read"),
    "no split": ({"eval_split": "validation"}, "validation"),
    "columns": ({"columns": {"prompt": "question", "completion": "completion"}}, "'question'"),
    "columns of what": ({"columns": {"response": "completion"}}, "'response'"),
    "class column": ({"guidance_column": "kind"}, "guidance_column='kind'"),
    "holdout": ({"eval_holdout": 6}, "eval_holdout=6"),
}


@pytest.mark.parametrize("settings, words", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, settings, words):
    path = write_jsonl(tmp_path / "data.jsonl", sums(6))
    with pytest.raises(ValueError, match=words):
        load_examples(DataArguments(**{"dataset": str(path), **settings}), ["math"], 0)


def test_empty_or_unusable(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_examples(DataArguments(dataset=str(tmp_path / "empty.jsonl")), None, 0)
    path = write_jsonl(tmp_path / "text.jsonl", [{"words": "just words"}])
    with pytest.raises(ValueError, match="set columns"):
        load_examples(DataArguments(dataset=str(path)), None, 0)
    (tmp_path / "broken.jsonl").write_text("{not json")
    with pytest.raises(ValueError, match="cannot be read"):
        load_examples(DataArguments(dataset=str(tmp_path / "broken.jsonl")), None, 0)


PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
REFUSED = {
    "text for messages": ([{"messages": "hello"}], {}, {}, "example 1, column 'messages': must hold lists of.*'hello'"),
    "turns without roles": ([{"messages": [{"content": "a"}]}], {}, {}, "must hold lists of turns.*turn 1 is"),
    "text to unroll": ([{"messages": "hello"}], {"unroll": True}, {}, "must hold lists of turns"),
    "text and turns": ([{"prompt": TALK[:1], "completion": "5"}], {}, {}, "must both be texts or both be lists"),
    "turns and text": ([{"prompt": "a", "completion": TALK[1:2]}], {}, {}, "must both be texts or both be lists"),
    "tools": ([{"messages": TALK, "tools": "none"}], {}, {}, "column 'tools': 'none' is not JSON"),
    "open brace": ([PAIR], {"columns": {"prompt": "{prompt"}}, {}, "'{prompt' is no text with columns in braces"),
    "two kinds": (
        [PAIR | {"messages": TALK}], {"columns": {"messages": "messages", "prompt": "prompt"}}, {}, "keep one"
    ),
    "completions of a conversation": ([{"messages": TALK}], {}, {"completion_only_loss": False}, "assistant_only_loss"),
    "text of nothing": ([{"text": "a"}], {"columns": {"prompt": "", "completion": "text"}}, {}, "{text: COLUMN}"),
    "text and prompt": ([PAIR], {"columns": {"text": "prompt", "prompt": "prompt"}}, {}, "completion and text, of"),
    "half a pair": ([{"text": "a", "body": "b"}], {"columns": {"prompt": "body"}}, {}, "so that prompt and completion"),
    "turns of a text": ([{"text": "a"}], {}, {"assistant_only_loss": True}, "a plain text: leave it out"),
    "completions of a text": ([{"text": "a"}], {}, {"completion_only_loss": True}, "a plain text: leave it out"),
    "text that is none": ([{"text": ["a"]}], {}, {}, "column 'text': holds .'a'. .a list., which is not text"),
    "unrolled text": ([{"text": "a"}], {"unroll": True}, {}, "an example of every assistant turn"),
    "all too long": ([PAIR], {}, {"too_long": "drop", "max_length": 3}, "every train example is longer than"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "settings", "words"), REFUSED.values(), ids=REFUSED)
def test_data_that_cannot_be_read_end_in_a_sentence(chat, training, tmp_path, rows, options, settings, words):
    path = write_jsonl(tmp_path / "data.jsonl", rows * 3)
    args = training(**settings)
    with pytest.raises(ValueError, match=words):
        examples, _ = load_examples(DataArguments(dataset=str(path), **options), None, seed=0)
        encode(examples, chat, args, args.max_length or 64, "train")


def test_what_a_template_refuses_ends_in_a_sentence(chat, training):
    """Templates raise errors of their own, for example about the order of roles."""
    chat.chat_template = "{{ raise_exception('roles must alternate') }}" + TEMPLATE
    rows = datasets.Dataset.from_list([{"messages": TALK}])
    with pytest.raises(ValueError, match="the chat template cannot render .*roles must alternate"):
        encode(rows, chat, training(), 64, "train")


def test_a_column_that_only_sounds_like_ours(tokenizer, training, tmp_path):
    """`guidance_class` of the data means nothing where the recipe names no classes."""
    path = write_jsonl(tmp_path / "data.jsonl", [PAIR | {"guidance_class": "math"}] * 3)
    examples, _ = load_examples(DataArguments(dataset=str(path)), None, seed=0)
    encoded, _ = encode(examples, tokenizer, training(), 64, "train")
    assert encoded.column_names == ["input_ids", "labels"]


@pytest.mark.parametrize(
    "options", [{"columns": {"messages": "talk"}}, {"columns": {"messages": "talk"}, "unroll": True}]
)
def test_messages_are_used_where_they_are_asked_for(chat, training, tmp_path, options):
    """Also in data that have a prompt and a completion besides; empty conversations have no response."""
    path = write_jsonl(tmp_path / "data.jsonl", [PAIR | {"talk": TALK}, PAIR | {"talk": None}])
    examples, _ = load_examples(DataArguments(dataset=str(path), **options), None, seed=0)
    encoded, _ = encode(examples, chat, training(), 64, "train")
    found = [targets(chat, row) for row in encoded]
    assert found == (["5</s>", "9 cats</s>"] if "unroll" in options else ["5</s>9 cats</s>"])


def test_completions_alone_if_both_are_said(chat, training):
    rows = datasets.Dataset.from_list([{"prompt": TALK[:3], "completion": TALK[3:]}])
    settings = training(assistant_only_loss=False, completion_only_loss=True)
    assert targets(chat, encode(rows, chat, settings, 64, "train")[0][0]) == "9 cats</s>"
    every = encode(rows, chat, training(assistant_only_loss=False), 64, "train")[0][0]
    assert every["labels"] == every["input_ids"]


@pytest.mark.parametrize("too_long", ["drop", "error"])
def test_the_end_token_counts_or_not(tokenizer, training, too_long):
    """As in the release, prompt and response alone are measured; what is trained on stays the same."""
    rows = datasets.Dataset.from_list(sums(1))
    whole, _ = encode(rows, tokenizer, training(), 64, "train")
    length = len(whole[0]["input_ids"])
    assert whole[0]["input_ids"][-1] == tokenizer.eos_token_id
    fits, _ = encode(rows, tokenizer, training(too_long=too_long, count_end_token=False), length - 1, "train")
    assert fits[:] == whole[:]
    for settings, limit in (({}, length - 1), ({"count_end_token": False}, length - 2)):
        with pytest.raises(ValueError, match="longer than|more than"):
            encode(rows, tokenizer, training(too_long=too_long, **settings), limit, "train")


def test_what_follows_the_end_token_does_not_count_either(chat, training):
    """A template may write more behind the last end token of a conversation."""
    chat.chat_template = TEMPLATE + " over and out"
    rows = datasets.Dataset.from_list([{"messages": TALK}])
    whole, _ = encode(rows, chat, training(), 256, "train")
    end = max(place for place, token in enumerate(whole[0]["input_ids"]) if token == chat.eos_token_id)
    assert end < len(whole[0]["input_ids"]) - 1
    encode(rows, chat, training(count_end_token=False), end, "train")
    with pytest.raises(ValueError, match="more than max_length"):
        encode(rows, chat, training(count_end_token=False), end - 1, "train")


@pytest.mark.parametrize("settings", [{"too_long": "truncate"}, {"packing": True, "max_length": 64}])
def test_rows_that_must_not_be_longer(training, settings):
    with pytest.raises(ValueError, match="count_end_token=False"):
        training(count_end_token=False, **settings)
