"""The benchmarks run and measure what they say. `python -m pytest tests/test_benchmarks.py`"""

import itertools
import json

import pytest
import torch

from tests.benchmarks import decode, gpu, launches, released, scoring, serving, sharding, training, warm_start
from tests.benchmarks.models import make_base, make_model
from tests.benchmarks.training import COMMON, WAYS, count_operations, main, make_rows, naive_loss, parse
from tests.conftest import randomise_path, train_tokenizer
from tests.training_runs import write_jsonl
from training.config import L2DTrainingConfig
from training.trainer import L2DTrainer, response_positions

TINY = ["--shape", "tiny", "--threads", "1"]


def test_decoding_figures(tmp_path):
    file = tmp_path / "figures.json"
    options = [*TINY, "--budget", "7", "15", "--gain", "3", "--tokens", "4", "--batch-size", "2", "--batches", "1"]
    figures = decode.main([*options, "--guidance", "--json", str(file)])
    assert [one["budget"] for one in figures] == [7, 15] and all(one["exact"] == 1 for one in figures)
    assert all(one["ratio"] == one["token_s"] / one["plain_step_s"] > 1 for one in figures)
    written = json.loads(file.read_text())
    assert written["batch_size"] == 2 and written["results"][1]["ratio"] == figures[1]["ratio"]


def test_launches(tmp_path):
    """Plain decoding waits once a token, for its own end; T = 1 is plain decoding and little more."""
    figures = launches.main(["--layers", "1", "--threads", "1", "--lines", "1", "--json", str(tmp_path / "out.json")])
    plain, base, drafted, undrafted, sequential = figures
    assert plain["synchronisations"] == 1 and plain["ratio"] == 1 < base["ratio"] < 2
    assert plain["launches"] < drafted["launches"] < undrafted["launches"] < sequential["launches"]
    assert json.loads((tmp_path / "out.json").read_text())["results"] == figures


@pytest.mark.slow
def test_memory_of_sharding(tmp_path):
    file = tmp_path / "figures.json"
    small = ["--processes", "2", "--layers", "2", "--hidden", "64", "--only", "fsdp2"]
    figures = sharding.main([*small, "--json", str(file)])
    assert figures[0]["configuration"] == "fsdp2" and figures[0]["peak_mib"] > 0
    assert json.loads(file.read_text())["results"] == figures


def test_the_gpu_script_in_miniature(tmp_path, monkeypatch):
    """Every part runs on a CPU; one that fails or has no time left keeps no other from running."""
    file = tmp_path / "gpu.json"
    options = ["--device", "cpu", *TINY, "--dtype", "float32", "--quick", "--json", str(file)]
    figures = gpu.main([*options, "--minutes", "20"])
    assert json.loads(file.read_text()) == figures and set(gpu.PARTS) < figures.keys()
    assert all("failed" not in figures[name] and figures[name]["figures"] for name in gpu.PARTS)
    for one in figures["checks"]["figures"]:
        exact = one["dtype"] == "float32"
        assert one.get("equal_bits", True) and one.get("equal", 1.0) >= (1.0 if exact else 0.5)
        assert all(one.get(name, 0.0) == 0 for name in ("largest_difference", "loss_difference", "gradients"))
    assert {one.get("drafts") for one in figures["decode"]["figures"]} == {None, 0, 3}
    assert [one["compiled"] for one in figures["compiled"]["figures"]] == [False, True]
    assert all(one["equal_to_plain"] == 1 for one in figures["compiled"]["figures"])
    assert "no --base" in figures["study"]["figures"][0]["skipped"]

    def fails(arguments):
        raise RuntimeError("of a device")
        yield {}

    monkeypatch.setattr(gpu, "PARTS", {"checks": fails, "decode": lambda arguments: iter([{"a": 1}, {"a": 2}])})
    figures = gpu.main([*options, "--minutes", "0"])
    assert figures["checks"]["failed"] == "RuntimeError: of a device"
    assert figures["decode"]["figures"] == [{"a": 1}] and "not measured" in figures["decode"]["stopped"]


def test_scoring_figures(tmp_path):
    file = tmp_path / "figures.json"
    options = [*TINY, "--context", "16", "--continuation", "1", "4", "--repeats", "1", "--budget", "7"]
    figures = scoring.main([*options, "--json", str(file)])
    assert [one["continuation"] for one in figures] == [1, 4]
    assert all(one["passes_per_token"] >= 1 and one["ratio"] > 0 for one in figures)
    assert json.loads(file.read_text())["results"] == figures


def test_released_figures(tmp_path):
    figures = released.main([*TINY, "--tokens", "2", "--prompts", "1", "--budget", "7"])
    assert figures["times_faster"] == pytest.approx(figures["released_ratio"] / figures["ratio"])


def test_every_evaluation_of_the_released_procedure_makes_the_vocabulary_anew(monkeypatch):
    """That is most of its cost; and the procedure gives the token of our sequential solver with the same noise."""
    model = make_model(make_base("tiny", torch.float32, "cpu"), "lora", gain=3.0)
    made = []
    embed = type(model.path.vocabulary).forward
    monkeypatch.setattr(type(model.path.vocabulary), "forward", lambda self, rows: made.append(1) or embed(self, rows))
    prompt = torch.arange(1, 9)[None]
    with released.as_released(model):
        token = released.released_token(model, prompt, 7)()
    assert len(made) == 6  # the last evaluation reads the output and needs none
    state = model.paths.main_path(prompt)
    noise = torch.randn(1, 1, model.config.diffusion_dim, generator=torch.Generator().manual_seed(4))
    x0 = noise * model.config.noise_std
    solution = model.solve(state, torch.tensor([[7]]), x0, model.sampler({"budget": 7, "speculation": False}))
    assert solution.final_logits.argmax(-1).tolist() == token.tolist()


def test_serving_figures(tmp_path):
    """Two servers, each asked in turn."""
    figures = serving.main([*TINY, "--gain", "3", "--budget", "3", "--tokens", "4", "--repeats", "2"])
    assert [one["model"] for one in figures] == ["base", "T = 3"]
    assert all(one["first_token_s"] > 0 and one["tokens_per_s"] > 0 for one in figures)


def test_training_figures(tmp_path):
    """All keys, on the smallest shape; memory is measured in processes of their own and left out here."""
    small = [*TINY, "--steps", "1", "--batch-size", "2", "--length", "32", "--draws", "2"]
    figures = main([*small, "--no-memory", "--json", str(tmp_path / "figures.json")])
    assert figures["speedup_over_naive"] > 0 and figures["speedup_over_sft"] > 0
    assert all(0 < figures[f"{way}_of_peak"] < 1 for way in WAYS)
    alone = main([*small, "--no-memory", "--ways", "ours", "--warm-start", "--processor-time"])
    assert 0 < alone["ours_of_peak"] < 1 and "speedup_over_sft" not in alone
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["draws"] == 2 and written["speedup_over_naive"] == figures["speedup_over_naive"]


def test_operations_of_products_and_attention_are_counted():
    """Forward and backward pass, by hand: three products of a linear layer, two and five of attention."""
    layer, x = torch.nn.Linear(8, 16), torch.randn(4, 8, requires_grad=True)
    assert count_operations(lambda: layer(x).sum().backward()) == 3 * 2 * 4 * 8 * 16
    one, other = torch.ones(4, 5), torch.ones(5, 6)
    assert count_operations(lambda: torch.ones(4, 6).addmm_(one, other)) == 2 * 4 * 5 * 6
    query, key = (torch.randn(2, 3, length, 16, requires_grad=True) for length in (5, 7))
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count_operations(lambda: attention(query, key, key).sum().backward()) == 7 * 2 * (2 * 3 * 5 * 7 * 16)


def test_part_of_peak_is_what_a_product_reaches_of_itself(monkeypatch, tmp_path):
    """Where every step is one of the products that the peak is measured with, all of it."""
    arguments = parse([*TINY, "--steps", "2", "--dtype", "float32"])
    monkeypatch.setitem(training.PRODUCT, True, 256)
    product, operations = training.make_product(arguments)
    clock = itertools.count()
    monkeypatch.setattr(training, "make_step", lambda *_: product)
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(clock))
    assert count_operations(product) == operations == 2 * 256**3
    times, parts = training.measure_times(arguments, str(tmp_path))
    assert times == dict.fromkeys(WAYS, 1) and parts == dict.fromkeys(WAYS, 1.0)


def test_the_naive_step_has_the_same_loss(tmp_path, monkeypatch):
    """Given the same times and noise, the naive way and ours agree."""
    from l2d import L2DConfig, L2DForCausalLM

    arguments = parse(["--shape", "tiny", "--batch-size", "2", "--length", "24"])
    base = make_base("tiny", torch.float32, "cpu")
    model = L2DForCausalLM.from_base(base, L2DConfig(diffusion_dim=8, noise_std=2.0))
    randomise_path(model)
    rows = make_rows(arguments, base.config.vocab_size)
    args = L2DTrainingConfig(**COMMON, output_dir=str(tmp_path), use_cpu=True)
    trainer = L2DTrainer(model, args, train_dataset=rows, processing_class=train_tokenizer())
    batch = trainer.data_collator([{**row} for row in trainer.train_dataset])
    time, noise = torch.full((2, 23), 0.4), torch.randn(2, 23, 8)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: time.flatten())
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: noise.flatten(0, 1))
    naive = naive_loss(trainer, batch)
    monkeypatch.undo()
    index, targets = response_positions(batch["labels"])
    noised = trainer._draw(batch, index, targets)
    noised.time = time.gather(1, index)[None]
    noised.noise = noise.gather(1, index[..., None].expand(-1, -1, 8))[None]
    trainer._draw = lambda *args: noised
    assert trainer.compute_loss(model, batch).item() == pytest.approx(naive.item(), rel=1e-5)


def test_warm_start(base_dir, tmp_path, capsys):
    """Both starts on the same rows: losses, bins of time, changes of the choice; heads may have their own rate."""
    rows = [{"question": f"{n} and {n}?", "answer": f"It is {2 * n}."} for n in range(12)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    common = ["--base", str(base_dir), "--data", str(data), "--steps", "2", "--batch", "4", "--held-out", "4"]
    common += ["--first-held-out", "8", "--scratch", str(tmp_path), "--json", str(tmp_path / "out.json")]
    warm_start.main([*common, "--published", "1e-3", "--warm", "1e-3", "1e-2", "--heads", "0.5"])
    results = json.loads((tmp_path / "out.json").read_text())
    assert [(one["start"], one["learning_rate"]) for one in results] == [
        ("published", 1e-3), ("warm", 1e-3), ("warm", 1e-2)
    ]  # fmt: skip
    assert all(len(one["losses"]) == 2 and len(one["changes"]) == 13 for one in results)
    assert results[0]["losses"][0] == pytest.approx(results[1]["losses"][0], rel=0.05)  # both begin as the base
    assert capsys.readouterr().out.count("held-out loss") == 3
