"""The base's tokenizer, ready for training, and what the base's configuration says of tokens.

- `load_tokenizer`, `prepare_tokenizer`: with end-of-sequence and padding token and the chat template asked for
- `Base`, `base_of`, `generation_config`: rows of the embedding, and the tokens that generation stops at
"""

import copy
import dataclasses
import json
import os

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from l2d.checkpoint.bases import model_place, tokenizer_place
from training.config import L2DTrainingConfig, ModelArguments
from training.data.options import named
from training.data.values import Unavailable


@dataclasses.dataclass(frozen=True)
class Base:
    """What matters of a base: how many tokens it has embeddings of, and the ids that generation stops at."""

    rows: int | None = None
    ends: tuple[int, ...] = ()


def base_of(config: PreTrainedConfig, generation: GenerationConfig | None) -> Base:
    """`Base` of a base's configurations."""
    ends = getattr(generation, "eos_token_id", None)
    ends = ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
    return Base(getattr(config.get_text_config(), "vocab_size", None), tuple(ends))


def generation_config(model: ModelArguments, config: PreTrainedConfig) -> GenerationConfig | None:
    """The base's generation settings, where it has a file of them; a GGUF file's are in its `config`."""
    if model.base_gguf_file is not None:
        return GenerationConfig.from_model_config(config)
    try:
        base, options = model_place(named("base", model.base), **model.base_options())
        if os.path.isdir(base) and not os.path.isfile(os.path.join(base, "generation_config.json")):
            return None
        return GenerationConfig.from_pretrained(base, **options)
    except (OSError, ValueError):
        return None


def load_tokenizer(model: ModelArguments, training: L2DTrainingConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer, or the recipe's, as `prepare_tokenizer` makes it.

    Raises `ValueError` if it cannot be found or has no end-of-sequence token.
    """
    source = model.tokenizer or named("base", model.base)
    name = f"{'tokenizer' if model.tokenizer else 'base'}={source!r}"
    try:
        options = {} if model.tokenizer else model.base_options()
        place, options = tokenizer_place(source, **options, trust_remote_code=training.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as error:
        kind = ValueError if os.path.isdir(source) else Unavailable
        raise kind(f"{name} has no tokenizer that can be loaded: {error}") from error
    return prepare_tokenizer(tokenizer, training, name)


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, training: L2DTrainingConfig, name: str
) -> PreTrainedTokenizerBase:
    """A copy with an end-of-sequence and a padding token and the chat template that the settings name.

    Args:
        name: where it is from, for messages.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if training.eos_token is not None:
        if training.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token={training.eos_token!r} is not in the vocabulary of {name}.")
        tokenizer.eos_token = training.eos_token
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no end-of-sequence token: set eos_token.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if training.chat_template_path is not None:
        with open(training.chat_template_path, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
    if training.chat_template_date is not None:
        # In the template itself, so that the date is the same wherever the saved tokenizer is used.
        fixed = f"{{%- set date_string = {json.dumps(training.chat_template_date)} -%}}"
        template = tokenizer.chat_template
        if not isinstance(template, str) or "date_string" not in template:
            raise ValueError("chat_template_date is set, and the chat template uses no date_string: leave it out.")
        tokenizer.chat_template = template if template.startswith(fixed) else fixed + template
    return tokenizer
