"""Mutations of how bases are loaded, recorded and read (`l2d/checkpoint/bases.py`, `l2d/network/quantized.py`)."""

from tests.mutations import Mutation

_GGUF, _ADAPTERS, _QUANTIZED = (f"tests/bases/test_{name}.py" for name in ("gguf", "adapters", "quantized"))
_bases, _layers, _path = "l2d/checkpoint/bases.py", "l2d/network/quantized.py", "l2d/network/path_layers.py"

MUTATIONS = [
    Mutation(
        "bases: the gradient through a quantized layer is not that of its values",
        _layers,
        "return gradient @ dequantized(ctx.linear).to(gradient.dtype), None",
        "return gradient @ dequantized(ctx.linear).sign().to(gradient.dtype), None",
        f"{_QUANTIZED}::test_a_frozen_layer_is_the_bases_and_its_gradient_is_that_of_its_values",
    ),
    Mutation(
        "bases: the two codes of a byte are swapped",
        _layers,
        "torch.stack([flat >> 4, flat & 15], dim=-1)",
        "torch.stack([flat & 15, flat >> 4], dim=-1)",
        f"{_QUANTIZED}::test_dequantize_writes_the_values",
    ),
    Mutation(
        "bases: a quantized base is loaded again as it is stored",
        _bases,
        'options["quantization_config"] = quantization',
        "pass",
        f"{_QUANTIZED}::test_a_model_quantized_by_the_user_loads_again_by_itself",
    ),
    Mutation(
        "bases: the GGUF file is not recorded",
        "l2d/modeling.py",
        "setattr(config, recorded, load_kwargs[name])",
        "pass",
        f"{_GGUF}::test_the_folder_of_both_may_move_and_the_tokenizer_is_the_files",
    ),
    Mutation(
        "bases: a projection inside another module is taken for none",
        _path,
        "multiplies |= module is attention and name in _UNUSED_PROJECTIONS",
        "pass",
        f"{_ADAPTERS}::test_a_model_with_layers_that_would_not_be_trained_is_refused",
    ),
    Mutation(
        "bases: a base that was changed is not compared with its files",
        _bases,
        "if changed := _differs_from_files(folder, base):",
        "if changed := None:",
        f"{_ADAPTERS}::test_a_base_that_its_name_does_not_give_back_is_said",
    ),
]
