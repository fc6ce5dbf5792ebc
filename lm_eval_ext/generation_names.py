"""Which names generation kwargs may have: the harness's, the sampler's, and those of transformers' `generate`.

- `check_names`: raises `UsageError` for all others, without importing torch
"""

import difflib
from collections.abc import Iterable

from lm_eval_ext.arguments import SAMPLER_ARGUMENTS, SEARCH, UsageError

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting
_USUAL = (*SAMPLER_ARGUMENTS, SEARCH, "until", "do_sample", "temperature", *_LENGTHS)
_OURS = (
    *("input_ids", "inputs", "attention_mask", "sampler", "request_keys", "noise", "return_record", "pad_token_id"),
    *("stopping_criteria", "logits_processor", "streamer", "return_dict_in_generate", "generation_config"),
)
_OBJECTS = ("tokenizer", "prefix_allowed_tokens_fn", "synced_gpus")  # of `generate`, for code that hands them over


def check_names(names: Iterable[str]) -> None:
    """Raise `UsageError` for a name that no one would follow, or that is not the user's to set."""
    for name in names:
        if name in _USUAL:
            continue
        if name == "max_length":
            raise UsageError(
                "generation setting 'max_length' depends on the prompt's length: set max_gen_toks instead."
            )
        if name in _OURS:
            raise UsageError(f"generation setting {name!r} is set by the model class: leave it out.")
        from transformers import GenerationConfig  # late: half a second

        known = (*_USUAL, *_OBJECTS, *(other for other in vars(GenerationConfig()) if not other.startswith("_")))
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.5)
            where = "python -m lm_eval_ext args lists the sampler's, transformers' GenerationConfig has the others"
            hint = f"did you mean {near[0]!r}? ({where})" if near else f"{where}."
            raise UsageError(f"generation setting {name!r} is not known: {hint}")
