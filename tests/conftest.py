"""Shared fixtures: tiny random models made on the spot, offline. Run the tests with `python -m pytest`.

- `tokenizer`: byte-level BPE trained on a few sentences, with a chat template
- `make_base(family)`, `base_dir`: folder of a tiny random base of any family, with that tokenizer
- `make_l2d(base, variant, classes)`, `l2d_dir`: folder of an L2D checkpoint whose random path matters
- `randomise_path(model)`: makes the fresh path of an `L2DForCausalLM` matter
- `shared_data`: folder with real data sets; tests skip where it is absent
"""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the process that started this one has set its own number
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile(  # always the same examples, without a clock
    "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

REPOSITORY = Path(__file__).parents[1]
JUDGE_SECONDS = bool(os.environ.get("JUDGE_SECONDS"))
"""Whether tests judge how long something took: only on request, on a machine that does nothing else."""
SHARED = REPOSITORY.parent / "shared"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
TRAINING_TEXT = [
    "Question: Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?",
    "Answer: She sold 48 / 2 = <<48/2=24>>24 clips in May and 48 + 24 = <<48+24=72>>72 clips altogether.\n#### 72",
    "Question: A train runs 30 miles in an hour. How far in 3 hours?\nAnswer: It runs 30 * 3 = 90 miles.\n#### 90",
    "The cat sat on the mat, and the dog lay on the rug; both were warm. 0 1 2 3 4 5 6 7 8 9",
    "def add(a, b):\n    return a + b\n\n\ndef main():\n    print(add(1, 2))\n",
]
SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
    initializer_range=0.25,  # logits must differ by more than rounding
    attention_dropout=0.0,
)


def train_tokenizer(vocab_size: int = 400, texts: list[str] = TRAINING_TEXT) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of `texts` with `<pad>`, `<s>` (put first) and `</s>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=4096
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all bases made here."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def make_base(tmp_path_factory, tokenizer) -> Callable[..., Path]:
    """`make_base(family="llama", **config)`: folder of a tiny random base; equal calls return the same folder."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", seed: int = 0, **overrides) -> Path:
        key = repr((family, seed, sorted(overrides.items())))
        if key not in made:
            ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, vocab_size=len(tokenizer))
            config = AutoConfig.for_model(family, **{**SIZES, **ids, **overrides})
            torch.manual_seed(seed)
            base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            made[key] = tmp_path_factory.mktemp(f"base-{family}")
            base.save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return make


def nine_digits(number: str) -> float:
    """A number of a JSON file: the last digits of a sum differ from one processor to another."""
    return float(f"{float(number):.9g}")


@torch.no_grad()
def randomise_path(model, seed: int = 1, gain: float = 1.0) -> None:
    """Give all trained weights random values of a size at which the path changes tokens (at `gain` 0.5 hardly any)."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in model.trained_parameters():
        size = gain / (parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 4.0)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.fixture(scope="session")
def make_l2d(tmp_path_factory, tokenizer) -> Callable[..., Path]:
    """`make_l2d(base, variant="lora", classes=None, **config)`: folder of a checkpoint with a random path."""
    from l2d import L2DConfig, L2DForCausalLM

    made: dict[str, Path] = {}

    def make(base: Path, variant: str = "lora", classes: list[str] | None = None, **overrides) -> Path:
        key = repr((base, variant, classes, sorted(overrides.items())))
        if key not in made:
            small = dict(diffusion_dim=16, input_width=16, conditioning_width=16, frequency_width=16, lora_rank=4)
            small |= dict(lora_alpha=8.0, noise_std=2.0)
            config = L2DConfig(variant=variant, guidance_classes=classes, **{**small, **overrides})
            torch.manual_seed(0)
            model = L2DForCausalLM.from_base(str(base), config)
            randomise_path(model)
            made[key] = tmp_path_factory.mktemp(f"l2d-{variant}")
            model.save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def base_dir(make_base) -> Path:
    """A tiny random Llama with its tokenizer."""
    return make_base("llama")


@pytest.fixture(scope="session")
def l2d_dir(make_l2d, base_dir) -> Path:
    """An L2D checkpoint (LoRA, no classes) on top of `base_dir`."""
    return make_l2d(base_dir)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder that `datasets` resolves real data sets in; skips where it is absent."""
    hub = SHARED / "data" / "hub"
    if not hub.is_dir():
        pytest.skip(f"{hub} is absent: no real data on this machine")
    return hub
