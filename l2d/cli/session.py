"""A loaded checkpoint with its tokenizer, for use by hand: `trace` and `chat`.

- `Session`: prompts and conversations to tokens, exactly as the evaluation does it; end tokens; text of single tokens
- `load_session`: from an open checkpoint, or its folder or hub name
- `add_sampler_arguments`, `sampler_from`, `open_from`, `session_from`: a command line, checked before loading
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from l2d.checkpoint.opening import Checkpoint, open_checkpoint
from l2d.sampler_config import SamplerConfig
from l2d.settings import Setting, declared

if TYPE_CHECKING:
    from l2d.modeling import L2DForCausalLM


@dataclasses.dataclass
class Session:
    """A model and its tokenizer."""

    model: "L2DForCausalLM"
    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt; a start token is added unless the text begins with it. At least one token.

        Raises `ValueError` where there is none, and for text that is not Unicode.
        """
        check_text("prompt", text)
        begins = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        tokens = self.tokenizer(text, **({"add_special_tokens": False} if begins else {}))["input_ids"]
        fallback = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        tokens = tokens or [token for token in fallback if token is not None][:1]
        if not tokens:
            raise ValueError("prompt is empty, and the tokenizer has no token to start from: give some text.")
        return tokens

    def conversation_text(self, messages: list[dict[str, str]]) -> str:
        """The chat template's text of a conversation, ready for the model's turn.

        Raises `ValueError` if the tokenizer has no template.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("the tokenizer of this checkpoint has no chat template: give a plain prompt instead.")
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def end_tokens(self) -> list[int]:
        """All tokens that end an answer: the tokenizer's and those of the base's generation settings."""
        others = self.model.generation_config.eos_token_id if self.model.generation_config is not None else None
        ends = [self.tokenizer.eos_token_id, *(others if isinstance(others, list) else [others])]
        return list(dict.fromkeys(token for token in ends if token is not None))

    def ending(self) -> dict[str, Any]:
        """End and padding tokens as arguments of `generate`, and that one answer is wanted, as token ids."""
        end, pad = self.end_tokens(), self.tokenizer.pad_token_id
        tokens = {"eos_token_id": end or None, "pad_token_id": end[0] if pad is None and end else pad}
        return {**tokens, "num_return_sequences": 1, "return_dict_in_generate": False, "tokenizer": self.tokenizer}

    @property
    def longest(self) -> int:
        """Most tokens that the base takes, prompt and answer together."""
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return longest or min(self.tokenizer.model_max_length, 1 << 20)

    def answer_length(self, requested: int | None, usual: int) -> int:
        """Most tokens of an answer: `requested`, else `usual`, but then at most half of what the base takes.

        Raises `ValueError` where no room is left for a prompt.
        """
        _check_answer_length(requested, self.longest)
        return requested or min(usual, self.longest // 2)

    def pieces(self, tokens: list[int]) -> list[str]:
        """Text that each of `tokens` adds to those before it; a character of several tokens belongs to its last one."""
        texts, start, known = [], 0, ""
        for index in range(len(tokens)):
            text = self.tokenizer.decode(tokens[start : index + 1], skip_special_tokens=False)
            if text.endswith("\ufffd") and index + 1 < len(tokens):
                texts.append("")
                continue
            texts.append(text[len(known) :])
            start, known = index, self.tokenizer.decode(tokens[index : index + 1], skip_special_tokens=False)
        return texts

    def token_text(self, token: int) -> str:
        """Text of one token by itself."""
        return self.tokenizer.decode([token], skip_special_tokens=False)


def check_text(name: str, text: str | None) -> None:
    """Raise `ValueError` for text with bytes that are not UTF-8, as a terminal or a command line may hand over."""
    if any("\ud800" <= letter <= "\udfff" for letter in text or ""):
        raise ValueError(f"{name} holds bytes that are not UTF-8: write it in UTF-8.")


def load_session(
    checkpoint: Checkpoint | str | os.PathLike,
    dtype: str | None = None,
    device: str | None = None,
    template: bool = False,
) -> Session:
    """Load `checkpoint`, open or by its folder or hub name, with its tokenizer.

    `template`: one is needed. Raises `ValueError`, before any weights are read, for a folder without a whole L2D
    checkpoint, a tokenizer without the template, or a device that is not there; and for a base that is not the
    checkpoint's own.
    """
    checkpoint = open_checkpoint(checkpoint)
    checkpoint.check_files()
    import torch

    from l2d.checkpoint.loading import load_tokenizer
    from l2d.modeling import L2DForCausalLM

    target = _device(device)
    tokenizer = load_tokenizer(checkpoint)
    if template and tokenizer.chat_template is None:
        raise ValueError("the tokenizer of this checkpoint has no chat template: use --plain, or trace without --chat.")
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model = L2DForCausalLM.from_pretrained(checkpoint, **options).eval()
    return Session(model.to(target), tokenizer)


def _device(name: str | None) -> Any:
    """The device of that name, by default a GPU where there is one. Raises `ValueError`."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device={name!r} is not available: use cpu, or cuda on a machine with a GPU.") from error
    return device


# ---- command line ------------------------------------------------------------------------------------------------


def add_sampler_arguments(parser: argparse.ArgumentParser) -> None:
    """What `trace` and `chat` share; settings that are left out stay as the checkpoint has them."""
    parser.add_argument("folder", metavar="DIR", help="folder or hub name of an L2D checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of a checkpoint on the hub")
    parser.add_argument("--base", help="name or folder of the base, where it is not where it was")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the base's weights")
    parser.add_argument("--device", help="for example cpu or cuda:0")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the output tokens; 0 (default) is greedy")
    parser.add_argument("--max-new-tokens", type=int, help="longest answer")
    group = parser.add_argument_group("sampler", "by default as the checkpoint stores it")
    for name, one in declared(SamplerConfig).items():
        flags = [f"--{name.replace('_', '-')}", *(["--guidance"] if name == "guidance_scale" else [])]
        group.add_argument(*flags, type=_typed(one), metavar="VALUE", help=f"{one.help} [{one.kind.allowed}]")


def _typed(one: Setting) -> Callable[[str], Any]:
    def read(word: str) -> Any:
        try:
            return one.check(int(word) if re.fullmatch(r"-?\d+", word) else word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def open_from(options: argparse.Namespace) -> Checkpoint:
    """Open the checkpoint that a command line names, and look at all of its settings. Raises `ValueError`."""
    checkpoint = open_checkpoint(options.folder, options.revision, options.base)
    checkpoint.sampler(**sampler_from(options))
    decoding_options(options.temperature, 1)
    _check_answer_length(options.max_new_tokens, checkpoint.settings.longest or sys.maxsize)
    return checkpoint


def session_from(options: argparse.Namespace, template: bool = False, checkpoint: Checkpoint | None = None) -> Session:
    """Load the checkpoint that a command line names, after `open_from` unless it is open. Raises `ValueError`.

    Tells a terminal that loading takes a while, and everyone if the base's dtype is slow on this processor.
    """
    checkpoint = checkpoint or open_from(options)
    if sys.stderr.isatty():
        print(f"Loading {checkpoint.name} ...", file=sys.stderr, flush=True)
    session = load_session(checkpoint, options.dtype, options.device, template)
    from l2d.network.onednn import slow_dtype

    if slow_dtype(session.model.base.dtype, session.model.device):
        print(
            f"The base is in {str(session.model.base.dtype).removeprefix('torch.')}, for which this processor has no "
            "instructions: --dtype float32 is several times as fast, and takes twice the memory.",
            file=sys.stderr,
        )
    return session


def sampler_from(options: argparse.Namespace) -> dict[str, Any]:
    """The sampler settings that a command line names."""
    return {name: value for name in declared(SamplerConfig) if (value := getattr(options, name)) is not None}


def _check_answer_length(requested: int | None, longest: int) -> None:
    if requested is not None and not 1 <= requested < longest:
        raise ValueError(f"max_new_tokens={requested} must be at least 1 and below the base's {longest} tokens.")


def decoding_options(temperature: float, max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate`. Raises `ValueError` for a negative temperature."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature:g} must be at least 0 (greedy).")
    if temperature == 0:
        return {"do_sample": False, "max_new_tokens": max_new_tokens}
    return {"do_sample": True, "temperature": temperature, "max_new_tokens": max_new_tokens}
