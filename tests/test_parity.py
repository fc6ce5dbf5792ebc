"""Parity with the released implementation, and proof that the parity checks can fail.

Run: `pytest tests/test_parity.py`. The fixtures lie in `../shared/golden` beside the repository; without them the tests
that need one are skipped.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from l2d.released import released_config
from tests.parity import runner
from tests.parity.__main__ import main
from tests.parity.fixtures import load_cases
from tests.parity.report import Recorder, summary_line, table

GOLDEN = Path(__file__).resolve().parents[1] / "../shared/golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
needs_golden = pytest.mark.skipif(not NAMES, reason="no fixtures in ../shared/golden")


@needs_golden
@pytest.mark.parametrize("name", NAMES)
def test_golden_case(name, capsys):
    status = main([str(GOLDEN), "--case", name])
    output = capsys.readouterr().out
    assert status == 0, output
    passed, failed = re.fullmatch(r"(\d+) passed, (\d+) failed", output.splitlines()[-1]).groups()
    assert int(passed) > 150 and int(failed) == 0


# ---- a small copy of a case, to be damaged ---------------------------------------------------------------------------


class Copy:
    """A case in a folder of its own, with one short solve left."""

    def __init__(self, folder: Path, source: str):
        self.folder, self.name = folder, source
        self.meta = json.loads((GOLDEN / f"{source}.json").read_text())
        self.tensors = load_file(GOLDEN / f"{source}.safetensors")
        self.solve = next(name for name, solve in self.meta["solves"].items() if solve["method"] == "midpoint")
        self.meta["solves"] = {self.solve: self.meta["solves"][self.solve]}
        self.tensors = {
            key: value
            for key, value in self.tensors.items()
            if not key.startswith("ode.") or key.startswith(f"ode.{self.solve}.")
        }
        self.meta["tensors"] = {key: value for key, value in self.meta["tensors"].items() if key in self.tensors}

    def write(self) -> Path:
        (self.folder / f"{self.name}.json").write_text(json.dumps(self.meta))
        save_file(self.tensors, self.folder / f"{self.name}.safetensors")
        return self.folder

    def results(self):
        return runner.run_case(load_cases(self.write())[0])


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path, "llama-lora-guidance" if "llama-lora-guidance" in NAMES else NAMES[0])


def failed_quantities(results) -> set[str]:
    return {result.quantity for result in results if result.status == "FAIL"}


@needs_golden
def test_undamaged_copy_passes(copy, capsys):
    assert main([str(copy.write())]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" passed, 0 failed")


@needs_golden
def test_every_damaged_answer_is_noticed(copy):
    """With every answer of the fixture damaged at once, only comparisons of the model with itself still pass."""
    copy.write()
    undamaged = copy.results()
    answers = [key for key in load_cases(copy.folder)[0].not_looked_at() if not key.startswith("state.")]
    for key in answers:
        if key == "train.class_labels_after_drop":  # an input of the later steps; damaged on its own below
            continue
        value = copy.tensors[key]
        copy.tensors[key] = value + (1 if value.dtype == torch.int64 else 1e-2 + 1e-2 * value.abs())
    passing = [result for result in copy.results() if result.status == "ok"]
    assert not failed_quantities(undamaged) and len(answers) > 80
    itself = {
        "load",
        "weights",
        "training classes",
        "base logits, bit for bit",
        "t = 0 equals base, bit for bit",
        "frozen base",
    }
    # These are told by the JSON, which is as it was: the norm of all gradients, which one vanishes, their names.
    told = {"zero gradient", "gradient norm", "gradient"}
    assert {result.quantity for result in passing} <= itself | told
    assert [r.name for r in passing if r.quantity == "gradient"] == ["trained parameters without a counterpart"]


@needs_golden
@pytest.mark.parametrize(
    ("key", "quantity"),
    [
        ("fwd.logits_token_uncond", "forward logits"),
        ("enc.out_token", "input projection"),
        ("mod.layer0_by_class", "modulation"),
        ("vel.v_guided_1.5", "velocity"),
        ("vel.x1_token_cond", "velocity token"),
        ("decode.tokens", "decode tokens"),
        ("train.x_t", "training input"),
        ("train.class_labels_after_drop", "training classes"),
        ("train.grad.model.data_label_embedder.weight", "gradient"),
        ("state.model.norm.weight", "base logits"),
    ],
)
def test_one_damaged_tensor_is_noticed(copy, key, quantity, capsys):
    if key not in copy.tensors:
        pytest.skip(f"this case has no {key}")
    value = copy.tensors[key].clone()
    value.view(-1)[-1] += 1
    copy.tensors[key] = value
    assert main([str(copy.write())]) == 1
    output = capsys.readouterr().out
    assert re.search(rf"{re.escape(quantity)} .*FAIL", output), output
    assert not output.splitlines()[-1].endswith(" 0 failed")


def _drop_shift(model):
    for layer in model.path.layers:
        head, hidden = layer.modulation[2], layer.modulation[2].out_features // 6
        with torch.no_grad():
            head.weight[hidden : 2 * hidden] = 0
            head.bias[hidden : 2 * hidden] = 0


def _drop_subtraction(model):
    model.path.modulate = _without_start(model.path.modulate)


def _without_start(modulate):
    def changed(time, classes=None):
        result = modulate(time, classes)
        result.output = result.output + modulate(torch.ones_like(time), classes).output
        return result

    return changed


def _wrong_noise(model):
    model.config.noise_std *= 1.001


def _wrong_class(model):
    with torch.no_grad():
        model.path.class_embedding.weight.copy_(model.path.class_embedding.weight.flip(0))


def _frozen_delta(model):
    next(p for name, p in model.trained_parameters() if "lora_A" in name).requires_grad_(False)


@needs_golden
@pytest.mark.parametrize(
    ("damage", "quantities"),
    [
        (_drop_shift, {"weights", "modulation", "forward logits", "velocity", "decode logits", "training logits"}),
        (_drop_subtraction, {"forward logits", "t = 0 equals base, bit for bit", "training loss"}),
        (_wrong_noise, {"training input", "training loss", "gradient"}),
        (_wrong_class, {"modulation", "forward logits", "velocity", "training logits"}),
        (_frozen_delta, {"gradient"}),
    ],
)
def test_broken_ingredient_is_noticed(copy, monkeypatch, damage, quantities):
    load = runner.load_released

    def broken(*arguments):
        model = load(*arguments)
        damage(model)
        return model

    monkeypatch.setattr(runner, "load_released", broken)
    assert quantities <= failed_quantities(copy.results())


@needs_golden
def test_nothing_is_silently_left_out(copy):
    copy.tensors["fwd.something_new"] = torch.zeros(2)
    copy.tensors["ode.unknown_solve.traj"] = torch.zeros(2)
    copy.meta["tensors"]["base.vanished"] = {"dtype": "float32", "shape": [1]}
    copy.meta["solves"] |= {
        "failed": {"error": "AssertionError "},
        "strange": {**copy.meta["solves"][copy.solve], "call_overrides": {"clamp": True}},
        "gone": {**copy.meta["solves"][copy.solve]},
    }
    results = copy.results()
    unchecked = {result.name for result in results if result.quantity == "not checked"}
    assert unchecked == {"fwd.something_new", "ode.unknown_solve.traj", "base.vanished"}
    solves = {result.name: result for result in results if result.quantity == "solve"}
    assert solves["failed"].status == "skip" and "AssertionError" in solves["failed"].message
    assert solves["strange"].status == solves["gone"].status == "FAIL"
    assert "clamp" in solves["strange"].message


@needs_golden
def test_unreadable_settings_fail_and_do_not_abort(copy, capsys):
    copy.meta["flow_kwargs"]["flow_representation_rescaling"] = "unheard-of"
    assert main([str(copy.write())]) == 1
    output = capsys.readouterr().out
    assert re.search(r"load +.*FAIL", output) and "unheard-of" in output


@needs_golden
def test_options(copy, tmp_path, capsys):
    report = tmp_path / "out" / "report.json"
    report.parent.mkdir()
    assert main([str(copy.write()), "--json", str(report), "--quantity", "velocity"]) == 0
    results = json.loads(report.read_text())
    assert {result["quantity"] for result in results} == {"velocity", "velocity token"}
    assert main([str(copy.folder), "--quantity", "nonsense"]) == 2
    assert main([str(copy.folder), "--case", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


# ---- without fixtures ------------------------------------------------------------------------------------------------


def one_line_error(folder: Path, capsys) -> str:
    assert main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    return captured.err


def test_missing_and_empty_folders(tmp_path, capsys):
    assert "is not a folder" in one_line_error(tmp_path / "missing", capsys)
    assert "no fixtures" in one_line_error(tmp_path, capsys)
    (tmp_path / "notes.json").write_text("[]")
    assert "no fixtures" in one_line_error(tmp_path, capsys)


def test_malformed_cases(tmp_path, capsys):
    path, tensors = tmp_path / "a.json", tmp_path / "a.safetensors"
    path.write_text("{")
    assert "a.safetensors" in one_line_error(tmp_path, capsys)
    save_file({"in.input_ids": torch.zeros(1, 2, dtype=torch.int64)}, tensors)
    assert "not JSON" in one_line_error(tmp_path, capsys)
    path.write_text('{"family": "llama", "base_config": {}}')
    assert "'flow_kwargs'" in one_line_error(tmp_path, capsys)
    path.write_text('{"family": "llama", "base_config": {}, "flow_kwargs": {}, "solves": []}')
    assert "'solves'" in one_line_error(tmp_path, capsys)
    path.write_text('{"family": "llama", "base_config": {}, "flow_kwargs": {}}')
    assert "'state.*'" in one_line_error(tmp_path, capsys)
    tensors.write_bytes(b"12345678nonsense")
    assert "not a safetensors file" in one_line_error(tmp_path, capsys)
    path.unlink()
    assert "a.json" in one_line_error(tmp_path, capsys)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("flow_kwargs", "named"),
    [
        ({"noise_scaling": 64.0}, "'noise_scaling' in flow_kwargs is not known"),
        ({"ode_kwargs": {"method": "midpoint", "steps": 8}}, "'steps' in ode_kwargs"),
        ({"ode_kwargs": {"method": "bosh3", "options": {"max_step": 0.1}}}, "'max_step' in options"),
        ({"velocity_schedule": "edm"}, "velocity_schedule='edm'.* only 'constant'"),
    ],
)
def test_settings_that_might_change_results_are_refused_by_name(flow_kwargs, named):
    with pytest.raises(ValueError, match=named):
        released_config(flow_kwargs)


def test_settings_of_loading_and_training_change_nothing():
    harmless = {
        "reinit_flow_params": True,
        "guidance_modulation_training_dropout": 0.2,
        "nstep_guidance_parameter": 1.5,
    }
    unset = {"minimum_training_noise": None, "nstep_temperature_schedule": None}
    assert released_config({**harmless, **unset}).to_dict() == released_config({}).to_dict()
    adaptive = released_config({"ode_kwargs": {"method": "bosh3", "options": {"first_step": 0.01}}}).default_sampler()
    assert (adaptive.solver, adaptive.first_step) == ("bosh3", 0.01)


def test_recorder_judges():
    record = Recorder("case")
    one = torch.ones(2, 3)
    record.close("base logits", "equal", one, one)
    record.close("base logits", "far", one + 1e-3, one)
    record.close("base logits", "not a number", one * float("nan"), one)
    record.close("base logits", "shape", one, one[:1])
    record.close("base logits", "nothing", one, one, where=torch.zeros(2, dtype=torch.bool))
    record.close("base logits", "masked", torch.stack([one[0], one[1] + 1]), one, where=torch.tensor([True, False]))
    record.same("tokens", "differ", torch.tensor([1, 2]), torch.tensor([1, 3]))
    record.relative("gradient", "far", one * 1.01, one)
    with record.attempt("anything", "raises"):
        raise KeyError("missing key")
    record.skip("anything", "left out", "a reason")
    statuses = {result.name: result.status for result in record.results}
    assert statuses == {
        "equal": "ok",
        "far": "FAIL",
        "not a number": "FAIL",
        "shape": "FAIL",
        "nothing": "FAIL",
        "masked": "ok",
        "differ": "FAIL",
        "raises": "FAIL",
        "left out": "skip",
    }
    assert summary_line(record.results) == "2 passed, 7 failed"
    lines = table(record.results)
    assert len(lines) == 1 + len({result.quantity for result in record.results})
    assert "nan" in next(line for line in lines if "base logits" in line)
