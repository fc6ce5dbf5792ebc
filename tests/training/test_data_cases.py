"""What is trained is what the file says: a table of small files. `python -m pytest tests/training/test_data_cases.py`

`data_cases/cases.yaml` holds for each file the recipe's options and what is trained, `data_cases/templates` six chat
templates with the constructions of well-known ones. Every conversation is rendered with `{% generation %}` marks and
without.
"""

import datetime
import json
import re
from decimal import Decimal
from pathlib import Path

import datasets
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as some
from transformers import AutoConfig

from tests.conftest import train_tokenizer
from tests.training_runs import SMALL, train_here, write_recipe
from training.config import L2DTrainingConfig
from training.data.conversations import as_turns
from training.data.files import read_text_files
from training.data.loading import load_examples
from training.data.options import DataArguments
from training.data.ready import keep
from training.data.tokenizer import Base
from training.data.tokenizing import target_texts, tokenize
from training.data.values import parse_json

FOLDER = Path(__file__).parent / "data_cases"
TEMPLATES = FOLDER / "templates"
CASES = yaml.safe_load((FOLDER / "cases.yaml").read_text(encoding="utf-8"))
MARK = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|turn_end|>", "<start_of_turn>", "<end_of_turn>"]


@pytest.fixture(scope="module")
def tokenizer_for():
    """`tokenizer_for(template, tags)`: a tokenizer with the special tokens of all templates."""
    made = {}

    def make(template=None, tags=True):
        if (template, tags) not in made:
            tokenizer = train_tokenizer()
            tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
            text = (TEMPLATES / f"{template}.jinja").read_text() if template else None
            tokenizer.chat_template = text if tags or text is None else MARK.sub("", text)
            made[template, tags] = tokenizer
        return made[template, tags]

    return make


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """`settings(**changes)`: trainer settings."""
    return lambda **changes: L2DTrainingConfig(output_dir=str(tmp_path_factory.mktemp("out")), **changes)


def trained(dataset, tokenizer, settings, **options):
    """Per example: number, what stands before the first target, the targets, and why it is left out."""
    examples, _ = load_examples(DataArguments(dataset=str(dataset), **options), None, 0)
    rows = []
    for row in tokenize(examples, tokenizer, settings, 4096, "train"):
        text, targets = target_texts(row, tokenizer)
        before = text[: text.index(targets[0])] if targets else row["left_out"]
        rows.append((row["number"], before.removeprefix("<s>"), targets))
    return rows


def names(case) -> str:
    return "-".join([case["file"], case.get("template", ""), *sorted(case.get("options", {}))])


@pytest.mark.parametrize("tags", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("case", CASES, ids=names)
def test_what_is_trained(case, tags, tokenizer_for, settings):
    if not tags and "template" not in case:
        pytest.skip("not a conversation")
    if tags and case.get("tags") is False:
        pytest.skip("the marks of this template begin elsewhere")
    tokenizer = tokenizer_for(case.get("template"), tags)
    if "refused" in case:
        with pytest.raises(ValueError) as refusal:
            trained(FOLDER / case["file"], tokenizer, settings(), **case.get("options", {}))
        assert case["refused"] in str(refusal.value) and "\n" not in str(refusal.value)
        return
    rows = trained(FOLDER / case["file"], tokenizer, settings(), **case.get("options", {}))
    assert [(number, targets) for number, _, targets in rows] == [(one[0], one[2]) for one in case["expect"]]
    for (_, before, _), (_, expected, _) in zip(rows, case["expect"], strict=True):
        assert expected is None or before == expected.removeprefix("<s>")


@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_marks_change_nothing_but_what_they_mark(template, tokenizer_for):
    """The templates of the table write the same with and without them."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    texts = [tokenizer_for(template, tags).apply_chat_template(turns, tokenize=False) for tags in (True, False)]
    assert texts[0] == texts[1] and "b" in texts[0]


# ---- tables with types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_typed_columns(tmp_path, tokenizer_for, settings, kind):
    """Texts as they are; other types only where the recipe says how they are written."""
    columns = {
        "q": ["a:", None], "n": [5, 6], "x": [2.5, float("nan")], "d": [datetime.date(2024, 1, 2)] * 2,
        "m": [Decimal("1.50")] * 2, "none": [None, None], "word": ["007", "null"],
    }  # fmt: skip
    path = tmp_path / f"data.{kind}"
    getattr(datasets.Dataset.from_dict(columns), "to_parquet" if kind == "parquet" else "save_to_disk")(path)

    def completions(source):
        rows = trained(path, tokenizer_for(), settings(), columns={"prompt": "q", "completion": source})
        return [targets for _, _, targets in rows]

    assert completions("word") == [["007</s>"], ["null</s>"]]
    assert completions("none") == [[], []]
    assert completions("{n:d}") == [["5</s>"], ["6</s>"]]
    assert completions("{d:%d.%m.%Y} {m!s}") == [["02.01.2024 1.50</s>"]] * 2
    for name in ("n", "x", "d", "m"):
        for source in (name, f"{{{name}}}"):
            with pytest.raises(ValueError, match=f"data.{kind}, example 1, column '{name}': holds .*which is not text"):
                completions(source)


def test_typed_conversations(tmp_path, tokenizer_for, settings):
    """Nulls that only fill the columns of a table are nothing: no tool call, no name."""
    turns = [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "b"}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "1", "y": None}}}
    calls = [{"role": "user", "content": "c"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    datasets.Dataset.from_list([{"messages": turns}, {"messages": calls}]).to_parquet(tmp_path / "data.parquet")
    rows = trained(tmp_path / "data.parquet", tokenizer_for("llama3"), settings())
    assert rows[0][2] == ["b<|turn_end|>"]
    assert rows[1][2] == ['{"name": "f", "parameters": {"x": "1"}}<|turn_end|>']


def test_folders_of_text_files(tmp_path, tokenizer_for, settings):
    """A folder, and what its README says of it, is no reason to guess."""
    (tmp_path / "train.csv").write_text("prompt,completion\na:,007\n")
    (tmp_path / "test.csv").write_text("prompt,completion\nb:,NA\n")
    assert trained(tmp_path, tokenizer_for(), settings()) == [(1, "a:", ["007</s>"])]
    assert trained(tmp_path, tokenizer_for(), settings(), train_split="train+test")[1] == (1, "b:", ["NA</s>"])
    with pytest.raises(ValueError, match="has no split 'dev': choose one of train, test"):
        trained(tmp_path, tokenizer_for(), settings(), train_split="dev")


def test_files_that_change_are_read_again(tmp_path, tokenizer_for, settings):
    path = tmp_path / "data.csv"
    for word in ("one", "two"):
        path.write_text(f"prompt,completion\na:,{word}\n")
        assert trained(path, tokenizer_for(), settings())[0][2] == [f"{word}</s>"]


# ---- any text ----------------------------------------------------------------------------------------------------

TEXTS = some.text(some.characters(exclude_categories=["Cs"]), max_size=12)


@given(rows=some.lists(some.tuples(TEXTS, TEXTS), min_size=1, max_size=4), kind=some.sampled_from(["json", "csv"]))
def test_any_text_comes_back(rows, kind, tokenizer_for, settings, tmp_path_factory):
    """Whatever JSON or CSV can hold is the target, character for character."""
    import csv

    path = tmp_path_factory.mktemp("any") / ("data.jsonl" if kind == "json" else "data.csv")
    with open(path, "w", encoding="utf-8", newline="") as file:
        if kind == "json":
            file.writelines(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows)
        else:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL)
            writer.writerows([("prompt", "completion"), *rows])
    found = trained(path, tokenizer_for(), settings())
    assert [targets for _, _, targets in found] == [[f"{answer}</s>"] if answer else [] for _, answer in rows]


WORDS = some.text(some.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=8)


@given(
    words=some.lists(WORDS, min_size=2, max_size=6),
    template=some.sampled_from(["llama3", "qwen25", "smollm2", "gemma"]),
    tags=some.booleans(),
    shape=some.sampled_from(["messages", "sharegpt", "parts"]),
)
def test_any_conversation_gives_its_assistant_turns(
    words, template, tags, shape, tokenizer_for, settings, tmp_path_factory
):
    """And nothing else, however it is written and whether or not the template marks them."""
    turns = [{"role": ("user", "assistant")[n % 2], "content": word} for n, word in enumerate(words)]
    row = {"messages": turns}
    if shape == "sharegpt":
        row = {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in turns]}
    if shape == "parts":
        row = {"messages": [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]}
    path = tmp_path_factory.mktemp("any") / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    ((_, _, targets),) = trained(path, tokenizer_for(template, tags), settings())
    end = {"llama3": "<|turn_end|>", "gemma": "<end_of_turn>"}.get(template, "<|im_end|>")
    assert targets == [word + end for word in words[1::2]]


def test_numbers_stay_as_they_are_written():
    for literal in ("0", "-0", "1.0", "1E5", "0.1e-7", "12345678901234567890", "1e999"):
        assert parse_json(f"[{literal}]") == [literal]
    with pytest.raises(ValueError, match="NaN is not a JSON number"):
        parse_json("NaN")
    call = '[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.10}}}]}]'
    with pytest.raises(ValueError, match="the number 1.10 would be written as 1.1"):
        as_turns(parse_json(call))


# ---- what is said ------------------------------------------------------------------------------------------------


def test_a_missing_end_is_said(tokenizer_for, settings, tmp_path):
    """With its remedy, and not where generation stops at the token that ends a turn."""
    tokenizer, args = tokenizer_for("gemma"), settings()
    examples, _ = load_examples(DataArguments(dataset=str(FOLDER / "talk.jsonl")), None, 0)
    end = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for ends, warned in (((), True), ((end,), False)):
        tokenized = tokenize(examples, tokenizer, args, 4096, "train", Base(None, ends))
        line = keep(tokenized, args, 4096, "train")[1]
        assert ("warning: no target holds an end-of-sequence token" in line) == warned
        assert ("set eos_token to what ends a turn (these end with '<end_of_turn>')" in line) == warned


def test_what_is_skipped_is_said(tokenizer_for, settings, capsys):
    tokenizer, args = tokenizer_for("smollm2"), settings()
    data = DataArguments(dataset=str(FOLDER / "contents.jsonl"), unroll=True, exclude={"kind": "x"})
    with pytest.raises(ValueError, match="exclude='kind' is not a column"):
        load_examples(data, None, 0)
    data.exclude = None
    line = keep(tokenize(load_examples(data, None, 0)[0], tokenizer, args, 4096, "train"), args, 4096, "train")[1]
    assert "1 turns of the assistant are skipped by unroll" in line and "left out 1 (no response 1)" in line
    data = DataArguments(dataset=str(FOLDER / "short_turns.jsonl"))
    line = keep(tokenize(load_examples(data, None, 0)[0], tokenizer, args, 4096, "train"), args, 4096, "train")[1]
    assert "the chat template does not use what turns have as name" in line
    categories = DataArguments(dataset=str(FOLDER / "categories.jsonl"), exclude={"level": "easy"})
    load_examples(categories, None, 0)
    said = capsys.readouterr().out
    assert "exclude leaves out no example by level" in said
    assert "not used" not in said
    trained(FOLDER / "texts.jsonl", tokenizer, args)
    assert "not used are the columns source" in capsys.readouterr().out


def test_completions_of_several_turns_are_said(tokenizer_for, settings):
    """All of a completion is a target, as TRL has it; a user's turn among them is worth a word."""
    turns = [{"role": role, "content": word} for role, word in zip(("user", "assistant") * 2, "abcd", strict=True)]
    tokenizer, args = tokenizer_for("smollm2"), settings()
    rows = datasets.Dataset.from_list([{"prompt": turns[:1], "completion": turns[1:]}])
    tokenized = tokenize(rows, tokenizer, args, 4096, "train")
    assert "1 completions hold turns that are not the assistant's" in keep(tokenized, args, 4096, "train")[1]


def test_classes_are_compared_as_they_are_written(tmp_path):
    (tmp_path / "data.csv").write_text("prompt,completion,level\na:,b,01\na:,b,1\na:,b,None\n")
    data = DataArguments(
        dataset=str(tmp_path / "data.csv"), guidance_column="level", guidance_map={1: "easy", "None": "hard"}
    )
    assert load_examples(data, ["easy", "hard"], 0)[0]["guidance_class"][:] == [2, 0, 1]


def test_large_cells_and_many_rows_are_read(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion\n" + f'a,"{"x" * 200_000}"\n' * 3)
    rows = read_text_files([str(path)], ["data.csv"], "csv", ",")
    assert len(rows) == 3 and len(json.loads(rows[2]["row"])["completion"]) == 200_000


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def hollow(tmp_path, tokenizer_for):
    """`hollow(rows)`: the folder of a base without weights whose embedding has that many rows."""

    def make(rows=None, template="smollm2"):
        tokenizer = tokenizer_for(template, False)
        folder = tmp_path / "base"
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        config = AutoConfig.for_model("llama", vocab_size=rows or len(tokenizer), max_position_embeddings=128, **sizes)
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.parametrize("method", ["l2d", "full_sft"])
def test_a_dry_run_writes_what_is_trained(tmp_path, hollow, capsys, method):
    """All examples, in order, from tokenizer and configuration alone; it prints as many as it is asked for."""
    start = {name: value for name, value in SMALL.items() if method == "l2d" or name in ("max_steps", "report_to")}
    long = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 100}]}
    data = tmp_path / "data.jsonl"
    data.write_text((FOLDER / "talk.jsonl").read_text() + json.dumps(long) + "\n")
    settings = {**start, "method": method, "base": hollow(), "dataset": data, "output_dir": tmp_path / "out"}
    recipe = write_recipe(tmp_path / "recipe.yaml", **settings, too_long="drop", max_length=96, eos_token="<|im_end|>")
    out = tmp_path / "examples.json"
    train_here(recipe, "--dry_run", "true", "--dry_run_json", str(out), "--dry_run_examples", "1")
    printed = capsys.readouterr().out
    assert printed.count("targets are green") == 1 and "warning" not in printed
    examples = json.loads(out.read_text())["examples"]
    assert [list(example) for example in examples] == [["number", "text", "targets", "left_out"]] * 4
    assert [example["number"] for example in examples] == [1, 2, 3, 4]
    assert [example["targets"] for example in examples] == [["5<|im_end|>", "9 cats<|im_end|>"], [], [], []]
    start = "<|im_start|>system\nYou are small.<|im_end|>\n<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n5"
    assert examples[0]["text"].startswith(start) and "user\n2 + 3?" in examples[1]["text"]
    reasons = [example["left_out"] for example in examples]
    assert reasons[:3] == [None, "no response", "no response"] and reasons[3].startswith("longer than max_length=96: 1")
    assert not (tmp_path / "out").exists()


def test_tokens_without_a_row_are_refused(tmp_path, hollow, capsys):
    """Also by a dry run: the base's embedding would be asked for a row that it has not."""
    settings = {**SMALL, "base": hollow(rows=401), "dataset": FOLDER / "talk.jsonl", "output_dir": tmp_path / "out"}
    for dry in ("true", "false"):
        with pytest.raises(SystemExit):
            train_here(write_recipe(tmp_path / "recipe.yaml", **settings, max_length=96), "--dry_run", dry)
        error = capsys.readouterr().err
        assert "talk.jsonl, example 1: holds the token '<|im_end|>' with the id 401" in error
        assert "the base's embedding has 401 rows" in error and error.count("\n") == 1
