"""The compiled path computes what the plain one does. `python -m pytest tests/l2d/test_compiled.py`

Backends that compile nothing must give equal bits; PyTorch's own compiler rounds otherwise.
"""

import copy
import pickle
import shutil

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import LlamaConfig, LlamaForCausalLM

from l2d import L2DForCausalLM
from l2d.network.compiled import compiled
from lm_eval_ext.arguments import UsageError
from lm_eval_ext.model import L2DLM
from tests.l2d.test_devices import GUIDED, IDS, SAMPLED, SAMPLERS, answers, small_base, small_model

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch's compiler needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No test sees what another compiled; a function that is compiled too often is an error."""
    torch._dynamo.reset()
    compiled.cache_clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()
    compiled.cache_clear()


def compiled_twice(model: L2DForCausalLM, backend: str, samplers: list[dict]) -> tuple:
    """Plain tokens and scores, and compiled ones."""
    plain = answers(model, "cpu", samplers)
    model.compile_path(backend)
    return *plain, *answers(model, "cpu", samplers)


@pytest.mark.parametrize(
    ("backend", "settings"),
    [
        ("eager", {"warm_start": True, "guidance_classes": ["a"]}),
        ("aot_eager", {"guidance_classes": ["a"]}),
        ("aot_eager", {"carried_state": True}),
    ],
)
def test_the_compiled_path_is_the_plain_one(backend, settings):
    samplers = [*SAMPLERS, SAMPLED, *([GUIDED] if "guidance_classes" in settings else [])]
    tokens, scores, again, others = compiled_twice(small_model(small_base(), **settings), backend, samplers)
    assert all(torch.equal(*pair) for pair in zip(tokens, again, strict=True)) and torch.equal(scores, others)


@pytest.mark.slow
@NEEDS_COMPILER
@pytest.mark.parametrize("width", [64, 512])
def test_pytorchs_own_compiler_gives_the_same_tokens(width):
    """Also where products are oneDNN's, whose packed weights it does not know: those of width 512."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width + 32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=300, eos_token_id=None, pad_token_id=0, initializer_range=0.25,
    )  # fmt: skip
    model = small_model(LlamaForCausalLM(config).eval())
    tokens, scores, again, others = compiled_twice(model, "inductor", [{"budget": 7}])
    assert torch.equal(tokens[0], again[0])
    torch.testing.assert_close(scores, others, rtol=1e-5, atol=1e-5)


def test_compiled_once_for_all_layers_and_calls():
    """A graph per way in which numbers of rows may be one; weights are in none of them, nor copied by CUDA graphs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = small_model(small_base(torch.bfloat16))
    model.paths.prepare_inference()
    assert "forward" in vars(model.path.layers[0].twin.mlp.gate_proj)  # merged
    for layer in model.path.layers:
        layer.twin.backend = backend
    answers(model, "cpu", SAMPLERS)
    assert 0 < len(graphs) <= 5
    for graph in graphs:
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder" and "tensor_dict" in node.meta]
        fixed = [node for node in inputs if "_dynamo_static_input_type" in node.meta["tensor_dict"]]
        assert len(inputs) - len(fixed) == 3  # the stream, weight and shift of its norm
        assert len(fixed) == 9  # three projections: the base's weight and the two factors


def test_copies_of_a_compiled_model_compute_with_their_own_weights():
    model = small_model(small_base())
    model.compile_path("eager")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    plain = answers(model, "cpu", SAMPLERS)[1]
    with torch.no_grad():
        for one in copies:
            one.path.layers[0].twin.mlp.gate_proj.lora_A["diffusion"].weight.mul_(-3)
    changed = [answers(one, "cpu", SAMPLERS)[1] for one in copies]
    assert torch.equal(answers(model, "cpu", SAMPLERS)[1], plain)
    assert torch.equal(*changed) and not torch.equal(changed[0], plain)


def broken(graph, inputs):
    raise RuntimeError("no compiler was found\nand more\n\nhow to set it up")


def test_where_nothing_can_be_compiled_one_sentence_says_so():
    model = small_model(small_base())
    plain = model.generate(IDS, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"^compile_path is not possible .*no compiler was found and more\): leave"):
        model.compile_path(broken)
    assert torch.equal(model.generate(IDS, max_new_tokens=2), plain)


def test_lm_eval_compiles_on_request(l2d_dir, monkeypatch):
    """With the same answers, by the checkpoint's folder and by a loaded model; or refused in one sentence."""
    monkeypatch.setattr(L2DForCausalLM.compile_path, "__defaults__", ("eager",))
    request = Instance("loglikelihood", {}, ("The cat", " sat"), 0)
    settings = {"device": "cpu", "diffusion_budget": 3}
    plain = L2DLM(pretrained=str(l2d_dir), **settings)
    expected = plain.loglikelihood([request])
    given = {"pretrained": plain.model, "tokenizer": plain.tokenizer}
    for arguments in ({"pretrained": str(l2d_dir)}, given):
        lm = L2DLM(**arguments, **settings, compile_path=True)
        assert lm.model.path.layers[0].twin.backend == "eager" and lm.loglikelihood([request]) == expected
    monkeypatch.setattr(L2DForCausalLM.compile_path, "__defaults__", (broken,))
    with pytest.raises(UsageError, match="^compile_path is not possible"):
        L2DLM(pretrained=str(l2d_dir), **settings, compile_path=True)
