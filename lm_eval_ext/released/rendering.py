"""From conversations to prompts.

- `template_text`: one of the release's two chat templates of its own
- `render`: a conversation with a template, the last turn left open on request
- `fits`: the length filter

Source: Transformers 4.46.3, which the release pins: an open last turn is cut right after its stripped text.
"""

from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from lm_eval_ext.released.benchmarks import MAX_TOKENS


def template_text(name: str) -> str:
    """Jinja text of one of `options.TEMPLATES`."""
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def render(template: str, messages: list[dict[str, str]], open_turn: bool = False, **variables: Any) -> str:
    """The prompt of `messages` by the Jinja text `template`, with a generation prompt unless the last turn stays open.

    Args:
        variables: what the template refers to, such as `bos_token`.
    """
    rendered, _ = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        continue_final_message=open_turn,
        add_generation_prompt=not open_turn,
        **variables,
    )
    return rendered[0].rstrip() if open_turn else rendered[0]


def fits(prompt_tokens: int, reference_tokens: int) -> bool:
    """Whether a problem stays in the evaluation, and in its denominator."""
    return prompt_tokens + reference_tokens <= MAX_TOKENS
