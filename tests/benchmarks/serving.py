"""`python -m l2d serve` against `transformers serve` of the same base: first-token time and throughput, interleaved.

    python -m tests.benchmarks.serving --shape 135m --budget 1 15 --changes 0.2

Both servers run at once and are asked in turn, with streaming, by the same client; nothing else should run. Prints
for the base and each budget the median `first_token_s` and `tokens_per_s` (of the whole request, first token
included), and ratios to the base. `--json FILE` writes the same figures.
"""

import argparse
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.benchmarks import command
from tests.benchmarks.models import calibrate, make_model
from tests.conftest import REPOSITORY


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` made-up words, so that every token of a random model is a piece of text."""
    backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", model_max_length=8192)


@contextlib.contextmanager
def server(words: list[str], threads: int) -> Iterator[openai.OpenAI]:
    """A client of the server that `words` start on a port of its own, once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*words, "--host", "127.0.0.1", "--port", str(port)], env=environment, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=300).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None and time.monotonic() < end, f"{words} did not start"
                time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600)
    finally:
        process.terminate()
        process.wait()


def ask(client: openai.OpenAI, model: str, prompt: str, tokens: int, extra: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first piece of text, and tokens per second, of one streamed completion."""
    begin, first = time.perf_counter(), None
    events = client.completions.create(
        model=model, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body=extra
    )
    count = 0
    for event in events:
        if first is None and event.choices[0].text:
            first = time.perf_counter() - begin
        count = event.usage.completion_tokens if event.usage else count
    assert first is not None and count == tokens
    return first, count / (time.perf_counter() - begin)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, print and return one row for the base and one for each budget."""
    parser = command.parser("serving", __doc__)
    parser.add_argument("--budget", type=int, nargs="+", default=[1, 15])
    parser.add_argument("--changes", type=float, help="changes per token to scale the path to (default: at least 1)")
    parser.add_argument("--gain", type=float, help="strength of the path, in place of --changes")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=8)
    given = parser.parse_args(arguments)
    base = command.start(given)
    size = base.config.vocab_size
    ids = torch.randint(1, size, (given.repeats, given.prompt_tokens), generator=torch.Generator().manual_seed(3))
    with tempfile.TemporaryDirectory() as folder:
        names = {"base": str(Path(folder) / "base"), "l2d": str(Path(folder) / "l2d")}
        base.save_pretrained(names["base"])
        base.config._name_or_path = names["base"]
        model = make_model(base, "lora", gain=given.gain)
        rate = None if given.gain else calibrate(model, given.changes, max(given.budget), ids[:2])[1]
        model.save_pretrained(names["l2d"])
        for name in names.values():
            word_tokenizer(size).save_pretrained(name)
        del model, base
        rows = _measure(names, [" ".join(f"w{token}" for token in row) for row in ids.tolist()], given)
    if rate is not None:
        print(f"changes per token: {rate:.2f}")
    command.write(given, changes_met=rate, results=rows)
    return rows


def _measure(names: dict[str, str], prompts: list[str], given: argparse.Namespace) -> list[dict[str, Any]]:
    transformers = [str(Path(sys.executable).parent / "transformers"), "serve", names["base"], "--device", given.device]
    ours = [sys.executable, "-m", "l2d", "serve", names["l2d"], "--device", given.device]
    settings = {"base": {}, **{f"T = {budget}": {"diffusion_budget": budget} for budget in given.budget}}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in settings}
    with server(transformers, given.threads) as plain, server(ours, given.threads) as l2d:
        for number, prompt in enumerate([prompts[0], *prompts]):  # the first is a warm-up
            for name, extra in settings.items():
                client, model = (plain, names["base"]) if name == "base" else (l2d, names["l2d"])
                measured = ask(client, model, prompt, given.tokens, extra)
                times[name] += [measured] if number else []
    rows = []
    for name, values in times.items():
        first, speed = (statistics.median(column) for column in zip(*values, strict=True))
        row = {"model": name, "first_token_s": first, "tokens_per_s": speed}
        start = rows[0] if rows else row
        row |= {"first_ratio": first / start["first_token_s"], "time_ratio": start["tokens_per_s"] / speed}
        rows.append(row)
        print(
            f"{name:<8} first token {first:.3f} s ({row['first_ratio']:.2f} x the base), {speed:.1f} tokens/s "
            f"({row['time_ratio']:.2f} x the base's time)"
        )
    return rows


if __name__ == "__main__":
    main()
