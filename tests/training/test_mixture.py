"""The SmolTalk mixture, on made-up conversations of its schema. `python -m pytest tests/training/test_mixture.py`"""

import json

import datasets
import pytest
import yaml

from tests.training_runs import (
    REPOSITORY,
    SMALL,
    logged,
    same_bits,
    train_here,
    weights,
    write_jsonl,
    write_recipe,
)
from training.config import L2DTrainingConfig
from training.data import tokenizing
from training.data.loading import load_examples
from training.data.options import DataArguments
from training.data.ready import encode
from training.data.ready import stream as encode_stream

SHARED = REPOSITORY / "training" / "recipes"
CLASSES = ["math", "coding", "general_qa"]
CATEGORIES = ["math", "coding", "data-analysis", "editing", "role-playing", "reasoning", None]


def talk(name: str, turns: int, system: bool = False) -> list[dict[str, str]]:
    """A conversation with `turns` assistant turns."""
    start = [{"role": "system", "content": "Be brief."}] if system else []
    pairs = [
        [{"role": "user", "content": f"{name} {i}?"}, {"role": "assistant", "content": f"answer {i}"}]
        for i in range(turns)
    ]
    return start + [turn for pair in pairs for turn in pair]


@pytest.fixture(scope="module")
def smoltalk(tmp_path_factory):
    """A folder that `datasets` reads like SmolTalk: a subset per configuration, categories in one of them only."""
    folder = tmp_path_factory.mktemp("smoltalk")
    plain = ("self-oss-instruct", "metamathqa-50k", "numina-cot-100k")
    subsets = {name: [{"messages": talk(name, 1)} for _ in range(4)] for name in plain}
    subsets["openhermes-100k"] = [
        {"messages": talk("hermes", 2, system=True), "source": "x", "category": None if i else "coding"}
        for i in range(4)
    ]
    subsets["smol-magpie-ultra"] = [
        {"messages": talk(str(category), 3), "category": category, "difficulty": "easy", "quality": "good",
         "reward_model_score": 0.5, "conversation_tokens": 9}
        for category in CATEGORIES
    ]  # fmt: skip
    configs = []
    for name, rows in subsets.items():
        for split in ("train", "test"):
            datasets.Dataset.from_list(rows if split == "train" else rows[:1]).to_parquet(
                folder / name / f"{split}-00000-of-00001.parquet"
            )
        files = [{"split": split, "path": f"{name}/{split}-*"} for split in ("train", "test")]
        configs.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return folder


def paper(smoltalk, **changes) -> DataArguments:
    """The paper's recipe's settings, on the made-up data."""
    guidance = yaml.safe_load((SHARED / "llama-3.2-1b-l2d-guidance.yaml").read_text())
    settings = yaml.safe_load((SHARED / "shared" / "paper.yaml").read_text())
    names = ("dataset_config", "train_split", "eval_split", "exclude", "unroll")
    chosen = {name: settings[name] for name in names} | {"dataset": str(smoltalk)}
    chosen |= {name: guidance[name] for name in ("guidance_column", "guidance_map")}
    return DataArguments(**chosen | changes)


@pytest.fixture
def training(tmp_path):
    """`training(**settings)`: trainer settings."""
    return lambda **settings: L2DTrainingConfig(output_dir=str(tmp_path), activation_checkpointing=False, **settings)


def test_every_turn_is_an_example(smoltalk, tokenizer, training):
    """Excluded categories are gone, rows without one stay; the prompt is all that came before."""
    examples, evaluation = load_examples(paper(smoltalk), CLASSES, 0)
    assert [row["left_out"] for row in examples if row["left_out"]] == [
        "excluded by category: editing", "excluded by category: role-playing"
    ]  # fmt: skip
    train = [json.loads(row["example"]) for row in examples if row["left_out"] is None]
    assert len(train) == 3 * 4 + 4 * 2 + 5 * 3 and len(evaluation) == 3 + 2 + 3
    prompts = [[turn["content"] for turn in row["prompt"]] for row in train]
    assert not any("editing" in text or "role-playing" in text for texts in prompts for text in texts)
    hermes = [texts for texts in prompts if "hermes 1?" in texts]
    assert hermes[0] == ["Be brief.", "hermes 0?", "answer 0", "hermes 1?"] and len(hermes) == 4
    encoded, _ = encode(examples, tokenizer, training(), 512, "train")
    for row, source in zip(encoded, train, strict=True):
        text = tokenizer.decode([label for label in row["labels"] if label != -100])
        assert text == source["completion"][0]["content"] + "</s>"
        shown = tokenizer.decode(row["input_ids"])
        assert all(turn["content"] in shown for turn in source["prompt"]) and shown.endswith("</s>")


def test_classes_of_the_paper(smoltalk):
    """By subset; by category where the subset has many; no class where the category has none."""
    train, _ = load_examples(paper(smoltalk), CLASSES, 0)
    found = {}
    for row in train.filter(lambda row: row["left_out"] is None):
        name = json.loads(row["example"])["prompt"][-1]["content"].split()[0]
        found.setdefault(name, set()).add(row["guidance_class"])
    assert found == {
        "metamathqa-50k": {0}, "numina-cot-100k": {0}, "math": {0}, "self-oss-instruct": {1}, "coding": {1},
        "hermes": {2}, "data-analysis": {2}, "reasoning": {2}, "None": {3},
    }  # fmt: skip


def test_preprocessing_is_cached_and_the_same_in_parallel(smoltalk, tokenizer, training, monkeypatch):
    def prepared(processes):
        train, _ = load_examples(paper(smoltalk), CLASSES, 0, processes)
        return encode(train, tokenizer, training(dataset_num_proc=processes), 512, "train")[0]

    first, calls = prepared(None), []
    assert prepared(2)[:] == first[:]
    monkeypatch.setattr(tokenizing, "render_pair", lambda *args: calls.append(args) or 1 / 0)
    assert prepared(None)[:] == first[:] and not calls


def test_whole_recipe(smoltalk, base_dir, tmp_path, capsys):
    """Shared settings of the paper, guidance and all, on a tiny base: printed counts, lengths, and a run."""
    data = paper(smoltalk)
    settings = {
        **SMALL, "base": base_dir, "output_dir": tmp_path / "out", "dataset": data.dataset,
        "dataset_config": data.dataset_config, "exclude": data.exclude, "unroll": True, "eval_split": "test",
        "guidance_classes": CLASSES, "guidance_column": data.guidance_column, "guidance_map": data.guidance_map,
        "expected_examples": [35, 9], "max_length": 40, "too_long": "drop", "max_steps": 2,
    }  # fmt: skip
    train_here(write_recipe(tmp_path / "recipe.yaml", **settings))
    printed = capsys.readouterr().out
    assert "longer than max_length=40" in printed and "35 were expected" in printed and "9 were expected" in printed


def test_date_is_fixed_in_the_template(base_dir, tmp_path, training):
    """A template that would take the date from the clock says the recipe's, also as saved."""
    from transformers import AutoTokenizer

    from training.config import ModelArguments
    from training.data.tokenizer import load_tokenizer

    template = tmp_path / "dated.jinja"
    template.write_text(
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "Today: {{ date_string }}{% for m in messages %} {{ m['content'] }}{% endfor %}"
    )
    model = ModelArguments(base=str(base_dir))
    options = training(chat_template_path=str(template), chat_template_date="26 Jul 2024")
    load_tokenizer(model, options).save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    message = [{"role": "user", "content": "Hi"}]
    assert saved.apply_chat_template(message, tokenize=False) == "Today: 26 Jul 2024 Hi"
    with pytest.raises(ValueError, match="date_string"):
        load_tokenizer(model, training(chat_template_date="26 Jul 2024"))


def test_refused(smoltalk):
    with pytest.raises(ValueError, match="exclude='kind' is not a column"):
        load_examples(paper(smoltalk, exclude={"kind": ["x"]}), CLASSES, 0)
    with pytest.raises(ValueError, match="guidance_column='kind'"):
        load_examples(paper(smoltalk, guidance_column=["kind"]), CLASSES, 0)


# ---- several data sets -------------------------------------------------------------------------------------------


def pairs(path, name: str, count: int, **names):
    """A file of `count` pairs whose answers say where they are from."""
    q, a = names.get("q", "prompt"), names.get("a", "completion")
    return write_jsonl(path / f"{name}.jsonl", [{q: f"{name} {i}?", a: f" {name}{i}"} for i in range(count)])


def drawn(data: DataArguments, seed: int = 0) -> list[str]:
    """The answers of the training examples."""
    return [json.loads(row["example"])["completion"].strip() for row in load_examples(data, None, seed)[0]]


def test_shares_of_several_data_sets(tmp_path, capsys):
    """Columns of their own, exact shares, no example twice; which ones, by the seed."""
    one, two = pairs(tmp_path, "a", 30), pairs(tmp_path, "b", 100, q="question", a="answer")
    entries = [
        {"dataset": str(one), "weight": 3},
        {"dataset": str(two), "weight": 1, "columns": {"prompt": "question", "completion": "answer"}},
    ]
    found = drawn(DataArguments(dataset=entries))
    assert sum(answer[0] == "a" for answer in found) == 30 and sum(answer[0] == "b" for answer in found) == 10
    assert len(set(found)) == 40 and found == drawn(DataArguments(dataset=json.dumps(entries)))
    assert set(found) != set(drawn(DataArguments(dataset=entries), seed=1))
    assert f"mixture: 30 of 30 from {one} (75.0%), 10 of 100 from {two} (25.0%)" in capsys.readouterr().out
    whole = [{name: value for name, value in entry.items() if name != "weight"} for entry in entries]
    assert len(drawn(DataArguments(dataset=whole))) == 130
    train, held = load_examples(DataArguments(dataset=entries, eval_holdout=8), None, 0)
    assert (len(train), len(held)) == (32, 8)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([{"dataset": "a.jsonl", "weight": 0}], "entry 1: weight=0 must be a number above 0"),
        ([{"dataset": "a.jsonl", "weight": 1}, {"dataset": "a.jsonl"}], "all or none have a weight"),
        ([{"data": "a.jsonl"}], "entry 1: {'data': 'a.jsonl'} must be a mapping with the key dataset"),
        ([{"dataset": "a.jsonl", "wieght": 1}], "entry 1 has the key 'wieght', which is not known"),
        ([{"dataset": "a.jsonl", "columns": 3}], "entry 1: columns=3 must be a mapping"),
        ([], "must be a list of data sets"),
        ("[{", "is not a JSON list"),
    ],
)
def test_mixtures_that_cannot_be_made(entries, words):
    with pytest.raises(ValueError, match=words):
        DataArguments(dataset=entries)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_is_resumed_exactly(tmp_path, base_dir, streaming):
    """Shares by seed, streamed or not: a run from its checkpoint ends with the bits of an unbroken one."""
    entries = [
        {"dataset": str(pairs(tmp_path, "a", 20)), "weight": 1},
        {"dataset": str(pairs(tmp_path, "b", 20)), "weight": 1},
    ]
    settings = {**SMALL, "base": base_dir, "output_dir": tmp_path / "out", "dataset": entries, "streaming": streaming}
    settings |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    path = write_recipe(tmp_path / "recipe.yaml", **settings)
    train_here(path)
    whole = weights(tmp_path / "out")
    train_here(path, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2"))
    assert same_bits(whole, weights(tmp_path / "out"))
    assert not same_bits(whole, weights(tmp_path / "out" / "checkpoint-2"))
    losses = logged(tmp_path / "out")
    assert len(set(losses.values())) == 4


def test_streams_read_what_files_hold(tmp_path, tokenizer, training, capsys):
    """The same examples as without streaming; mistakes are found while they are read."""
    path = pairs(tmp_path, "a", 12)
    for data in (str(path), [{"dataset": str(path), "weight": 2}, {"dataset": str(path), "weight": 2}]):
        stream, _ = load_examples(DataArguments(dataset=data, streaming=True), None, 0)
        rows = list(encode_stream(stream, tokenizer, training(), 64, "train"))
        answers = {tokenizer.decode([label for label in row["labels"] if label != -100]) for row in rows}
        assert answers <= {f" a{i}</s>" for i in range(12)} and len(answers) > 6
    assert len(rows) > 12 and "mixture: streams, on average 50.0% from" in capsys.readouterr().out
    write_jsonl(path, [{"prompt": "a", "completion": ["b"]}])
    stream, _ = load_examples(DataArguments(dataset=str(path), streaming=True), None, 0)
    with pytest.raises(ValueError, match="a.jsonl, example 1, column 'completion'"):
        list(stream)
    with pytest.raises(ValueError, match="needs all rows, and streaming reads them later"):
        load_examples(DataArguments(dataset=str(path), streaming=True, train_split="train[:1]"), None, 0)
    with pytest.raises(ValueError, match="eval_holdout needs all examples"):
        DataArguments(dataset=str(path), streaming=True, eval_holdout=1)
