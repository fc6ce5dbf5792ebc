"""All model args in one table: what `--model_args help=true` and `python -m lm_eval_ext args` print, and README quotes.

- `rows`: name, allowed values, default, meaning, and whether a task may set it with `gen_kwargs`
- `help_text`, `markdown`: the table for a terminal and for a document
"""

import dataclasses
import textwrap

from l2d.budget import ADAPTIVE_SOLVERS, FIXED_SOLVERS
from l2d.sampler_config import SamplerConfig
from lm_eval_ext.arguments import ARGUMENTS, AUTO, BUDGET, HARNESS_ARGUMENTS, SAMPLER_ARGUMENTS, SEARCH

_NUMBER, _TRUTH = "a number above 0", "true or false"
_OWN: dict[str, tuple[str, str]] = {
    "pretrained": ("a folder or hub name", "the L2D checkpoint (required)"),
    "revision": ("a branch, tag or commit", "version of a checkpoint on the hub; a folder has none"),
    "base": ("a folder or hub name", "base to load in place of the recorded one; its weights' fingerprint must match"),
    SEARCH: ("best_of_N, beam_N or none", "search over generated texts, ranked by the model's own likelihood"),
    BUDGET: ("a whole number from 1", "evaluations per token, the last one included; 1 is the base model"),
    "solver": (", ".join((*FIXED_SOLVERS, *ADAPTIVE_SOLVERS)), "ODE solver; the last four choose their own budget"),
    "start_time": ("0 to 1", "where the trajectory starts; 0 is pure noise"),
    "final_time": ("0 to 1", "where the trajectory ends and the output is read"),
    "rtol": (_NUMBER, "relative tolerance (adaptive solvers)"),
    "atol": (_NUMBER, "absolute tolerance (adaptive solvers)"),
    "first_step": (_NUMBER, "first step (adaptive solvers)"),
    "max_evaluations": ("a whole number from 1", "cap per token (adaptive solvers); reaching it is counted"),
    "guidance_scale": ("a number", "strength of classifier-free guidance; 1 is none"),
    "guidance_class": (f"a class, its number or {AUTO}", f"class to guide towards; {AUTO} chooses it by task"),
    "choice": ("sample or average", "move towards one token's embedding, or towards the mean of all"),
    "choice_temperature": ("0 or more, or polynomial_p_end", "temperature of that choice; 0 is the most likely token"),
    "normalize_average": (_TRUTH, "bring averaged embeddings back to a token's norm"),
    "end_velocity": ("straight or zero", "velocity where a solver asks at t = 1; zero is the released behaviour"),
    "votes": ("a whole number from 1", "noise draws per token, each at the whole budget, whose answers are averaged"),
    "mc_samples": ("a whole number from 1", "noise draws averaged when a given continuation is scored"),
    "seed": ("a whole number from 0", "seed of all noise"),
    "speculation": (_TRUTH, "evaluate whole trajectories at once; the result is the same"),
    "draft_tokens": ("a whole number from 0", "tokens that the base drafts ahead; the result is the same"),
}
_HARNESS: dict[str, tuple[str, str]] = {
    "tokenizer": ("checkpoint's, else base's", "tokenizer, by name or folder"),
    "dtype": ("auto", "type of the base's weights"),
    "device": ("cuda, else cpu", "where to run"),
    "batch_size": ("1", "requests at once; no result depends on it"),
    "max_batch_size": ("64", "largest batch size that auto tries"),
    "max_length": ("base's", "longest input in tokens, the answer included"),
    "truncation": ("false", "let the tokenizer cut long prompts"),
    "add_bos_token": ("tokenizer's", "put the first token before every prompt"),
    "prefix_token_id": ("tokenizer's", "token before texts that are scored whole"),
    "use_fast_tokenizer": ("true", "use the fast tokenizer"),
    "trust_remote_code": ("false", "run code that comes with the base"),
    "attn_implementation": ("base's", "attention kernel, for example sdpa or eager"),
    "parallelize": ("false", "spread the layers over all GPUs"),
    "max_memory_per_gpu": ("all", "limit per GPU with parallelize"),
    "max_cpu_memory": ("all", "limit of main memory with parallelize"),
    "offload_folder": ("./offload", "where parallelize puts weights that fit nowhere"),
    "think_end_token": ("none", "text or number of the token that ends the thinking; the answer follows it"),
    "enable_thinking": ("template's", "passed to the chat template"),
    "chat_template_args": ("none", "more arguments of the chat template"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One model arg; `per_task`: whether it may also come with `gen_kwargs`."""

    name: str
    allowed: str
    default: str
    meaning: str
    per_task: bool


def rows() -> list[Row]:
    """All model args in the order of `ARGUMENTS`."""
    defaults = {field.name: field.default for field in dataclasses.fields(SamplerConfig)}
    table = []
    for name in ARGUMENTS:
        if name in HARNESS_ARGUMENTS:
            default, meaning = _HARNESS[name]
            table.append(Row(name, HARNESS_ARGUMENTS[name].__doc__ or "", default, meaning, False))
            continue
        allowed, meaning = _OWN[name]
        default = _shown(defaults[SAMPLER_ARGUMENTS[name]]) if name in SAMPLER_ARGUMENTS else "none"
        table.append(Row(name, allowed, default, meaning, name not in ("pretrained", "revision", "base")))
    return table


def help_text() -> str:
    """The table for a terminal of 100 columns."""
    lines = ["Model args of --model l2d (those with * also per task, through gen_kwargs):", ""]
    for row in rows():
        lines.append(f"{row.name}{'*' if row.per_task else ''}  [{row.allowed}; default {row.default}]")
        lines += textwrap.wrap(row.meaning, 96, initial_indent="    ", subsequent_indent="    ")
    lines += ["", "A checkpoint's own sampler settings take the place of these defaults."]
    return "\n".join(lines)


def markdown() -> str:
    """The table for a document."""
    lines = ["| argument | allowed | default | meaning | per task |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| `{row.name}` | {row.allowed} | {row.default} | {row.meaning} | {'yes' if row.per_task else ''} |"
        for row in rows()
    ]
    return "\n".join(lines)


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, (bool, type(None))) else str(value)
