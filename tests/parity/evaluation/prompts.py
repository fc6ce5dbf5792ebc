"""Compares conversations, rendered prompts, the length filter and guidance classes with the `prompts` of a fixture."""

from typing import Any

from lm_eval_ext.released.benchmarks import BENCHMARKS, MAX_TOKENS, Benchmark, is_shot, messages
from lm_eval_ext.released.options import TEMPLATES
from lm_eval_ext.released.rendering import fits, render, template_text
from tests.parity.report import Recorder

SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, "
    "trained by Hugging Face<|im_end|>\\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' "
    "+ message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Renders as the chat template of SmolLM2-Instruct does, the example of a tokenizer's own template."""


def check_prompts(
    record: Recorder, name: str, prompts: list[dict[str, Any]], settings: dict[str, Any], tokenizer: Any
) -> None:
    """Compare every prompt. `settings` has the classes' order under `guidance_ids`, where the benchmark has any."""
    classes = settings.get("guidance_ids") or {"math": 0, "coding": 1, "general_qa": 2, "other": 3}
    for prompt in prompts:
        with record.attempt("prompt", prompt["id"]):
            _check_prompt(record, name, prompt, classes, tokenizer)


def _check_prompt(record: Recorder, name: str, prompt: dict[str, Any], classes: dict[str, int], tokenizer: Any) -> None:
    benchmark, row, shots = BENCHMARKS[name], prompt["doc"], prompt["shots"]
    if is_shot(benchmark, row, shots):
        record.equal("kept", prompt["id"], False, prompt["kept"])
        record.equal("messages", prompt["id"], None, prompt["messages"])
        return
    conversation = messages(benchmark, row, shots)
    record.equal("messages", prompt["id"], conversation, prompt["messages"])
    open_turn = benchmark.opening is not None
    record.equal("open turn", prompt["id"], open_turn, prompt["continue_final_message"])
    record.equal("generation prompt", prompt["id"], not open_turn, prompt["add_generation_prompt"])
    for template, text in (prompt["rendered"] or {}).items():
        ours = _rendered(template, conversation, open_turn, tokenizer)
        if ours is None:
            record.skip(f"rendered, {template}", prompt["id"], "this template is not known here")
        else:
            record.equal(f"rendered, {template}", prompt["id"], ours, text)
    record.equal("reference", prompt["id"], benchmark.reference(row), prompt["reference"])
    _check_length(record, benchmark, prompt, tokenizer)
    if prompt.get("guidance") is not None:
        guidance = benchmark.guidance(row)
        ours = {"category": guidance, "id": None if guidance is None else classes[guidance]}
        record.equal("guidance", prompt["id"], ours, prompt["guidance"])
        subject = row[benchmark.subject] if benchmark.subject else None
        record.equal("subject", prompt["id"], subject, prompt["category_without_guidance"])
    if prompt.get("output_space") is not None:
        record.equal("letters", prompt["id"], benchmark.letters and benchmark.letters(row), prompt["output_space"])
    if prompt.get("test_list") is not None and name == "mbpp":
        record.equal("tests", prompt["id"], row["test_list"], prompt["test_list"])


def _rendered(template: str, conversation: list[dict[str, str]], open_turn: bool, tokenizer: Any) -> str | None:
    if template == "smollm2":
        return render(SMOLLM2 if tokenizer is None else tokenizer.chat_template, conversation, open_turn)
    if template in TEMPLATES:
        return render(template_text(template), conversation, open_turn, bos_token="<|begin_of_text|>")
    return None


def _check_length(record: Recorder, benchmark: Benchmark, prompt: dict[str, Any], tokenizer: Any) -> None:
    counts = prompt["tokens_smollm2"]
    record.equal("longest", prompt["id"], MAX_TOKENS, counts["sum_must_not_exceed"])
    ours = {name: counts[name] for name in ("prompt", "reference")}
    if tokenizer is not None:
        conversation = messages(benchmark, prompt["doc"], prompt["shots"])
        text = render(tokenizer.chat_template, conversation, benchmark.opening is not None)
        texts = {"prompt": text, "reference": benchmark.reference(prompt["doc"])}
        ours = {name: len(tokenizer(text, add_special_tokens=False)["input_ids"]) for name, text in texts.items()}
        record.equal("tokens", prompt["id"], ours, {name: counts[name] for name in ours})
    record.equal("kept", prompt["id"], fits(ours["prompt"], ours["reference"]), prompt["kept"])
