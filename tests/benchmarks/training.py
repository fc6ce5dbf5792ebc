"""One training step of ours against the naive one and against TRL's LoRA finetuning, interleaved in one run.

    python -m tests.benchmarks.training --shape 135m [--response-fraction 0.3] [--draws 4] [--json FILE]

Same base, same batch, optimizer step included; medians over `--steps` rounds, each of which runs all three:

- `ours`: `L2DTrainer`'s step: evaluations, logits and loss at response positions only, K draws per main-path pass
- `naive`: the same model and loss with evaluations and logits at all positions and a main-path pass per draw
- `sft`: `SFTTrainer`'s step with LoRA of the same rank on every linear layer

`speedup_over_naive` compares supervised (token, draw) pairs per second, `speedup_over_sft` supervised tokens.
`WAY_of_peak` is the part of the machine's best matrix product that a step reaches: the step's operations, as torch
counts them, by its median time, over the operations per second of the fastest of some large products, which take turns
with the steps. What is neither a product nor attention counts as no operation. `--ways ours` measures that step alone;
`--processor-time` counts this process's time on a CPU, for one thread on a machine that others use, too.
`memory_over_naive` compares peaks of weights, optimizer and step together, each way in a process of its own; on the CPU
it is resident memory above that of the imported libraries. `--no-memory` leaves these processes out.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from trl import SFTConfig, SFTTrainer

from l2d import L2DConfig, L2DForCausalLM
from tests.benchmarks import command
from tests.benchmarks.models import make_base
from tests.conftest import train_tokenizer
from training.config import L2DTrainingConfig
from training.trainer import L2DTrainer

WAYS = ("ours", "naive", "sft")
COMMON = {
    "per_device_train_batch_size": 1, "activation_checkpointing": False, "report_to": "none", "disable_tqdm": True,
    "adam_beta2": 0.95, "weight_decay": 0.01, "learning_rate": 1e-4, "max_steps": 1000, "shuffle_dataset": False,
    "max_length": None, "save_strategy": "no",
}  # fmt: skip
PRODUCT = {True: 2048, False: 8192}  # rows and columns, on the CPU and elsewhere
PRODUCTS = 3  # in every round
Step = Callable[[], None]


def make_rows(arguments: argparse.Namespace, vocabulary: int) -> datasets.Dataset:
    """Random examples of equal length; the last tokens of each are the response."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, vocabulary, (arguments.batch_size, arguments.length), generator=generator)
    labels = ids.clone()
    labels[:, : arguments.length - round(arguments.length * arguments.response_fraction)] = -100
    return datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def naive_loss(trainer: L2DTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of one draw, with path and logits at every position; prompts are masked in the loss only."""
    model: L2DForCausalLM = trainer.model
    ids = batch["input_ids"]
    state = model.paths.main_path(ids, batch["attention_mask"])
    rows = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1] - 1)
    index = torch.arange(ids.shape[1] - 1, device=ids.device).repeat(len(ids))
    time_ = torch.rand(len(index), device=ids.device)
    noise = torch.randn(len(index), model.config.diffusion_dim, device=ids.device) * model.config.noise_std
    x = (1 - time_)[:, None] * noise + time_[:, None] * model.path.embed_tokens(ids[:, 1:].reshape(-1))
    logits = model.paths.logits(model.paths.path_hidden(state, rows, index, x, time_)[0])
    return cross_entropy(logits.float(), batch["labels"][:, 1:].reshape(-1))


def make_step(way: str, arguments: argparse.Namespace, folder: str) -> Step:
    """A function that does one optimizer step the given way."""
    dtype, device = getattr(torch, arguments.dtype), arguments.device
    base = make_base(arguments.shape, dtype, device)
    tokenizer, rows = train_tokenizer(), make_rows(arguments, base.config.vocab_size)
    common = {**COMMON, "output_dir": folder, "use_cpu": device == "cpu", "bf16": False}
    if way == "sft":
        lora = LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules="all-linear")
        trainer = SFTTrainer(
            base, SFTConfig(**common), train_dataset=rows, processing_class=tokenizer, peft_config=lora
        )
    else:
        model = L2DForCausalLM.from_base(base, L2DConfig(variant=arguments.variant, warm_start=arguments.warm_start))
        args = L2DTrainingConfig(**common, draws=arguments.draws)
        trainer = L2DTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    batch = trainer.data_collator([{**row} for row in trainer.train_dataset])
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    targets = (batch["labels"][:, 1:] != -100).sum()
    trainer.create_optimizer()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]

    def step() -> None:
        trainer.model.train()
        for _ in range(arguments.draws if way == "naive" else 1):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                if way == "naive":
                    loss = naive_loss(trainer, batch) / arguments.draws
                else:
                    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=targets)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def attention_operations(query: torch.Size, key: torch.Size, *_: object, **__: object) -> int:
    """Two products of queries (B, H, Q, D) with all keys (B, H, S, D), as torch counts them elsewhere."""
    return 4 * query.numel() * key[2]


def attention_backward_operations(
    gradient: object, query: torch.Size, key: torch.Size, *_: object, **__: object
) -> int:
    """Five products, one of which is a forward product again."""
    return 10 * query.numel() * key[2]


def added_operations(_: object, one: torch.Size, other: torch.Size, *__: object, **___: object) -> int:
    """A product of (N, K) and (K, M) that is added in place."""
    return 2 * one[0] * one[1] * other[1]


NOT_COUNTED = {  # by torch's counter itself
    torch.ops.aten.addmm_: added_operations,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_operations,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_operations,
}


def count_operations(step: Step) -> int:
    """Floating-point operations of products and attention in a step, two for a multiplication and an addition."""
    with FlopCounterMode(display=False, custom_mapping=NOT_COUNTED) as counter:
        step()
    return counter.get_total_flops()


def make_product(arguments: argparse.Namespace) -> tuple[Step, int]:
    """A function that does one large matrix product in the benchmark's dtype, and its operations."""
    size = PRODUCT[arguments.device == "cpu"]
    options = {"dtype": getattr(torch, arguments.dtype), "device": arguments.device}
    one, other = torch.randn(size, size, **options), torch.randn(size, size, **options)
    result = torch.empty_like(one)

    def product() -> None:
        torch.mm(one, other, out=result)
        command.synchronize(arguments.device)

    return product, 2 * size**3


def measure_times(arguments: argparse.Namespace, folder: str) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a step, by way; and the part of the machine's best matrix product that it reaches."""
    steps = {way: make_step(way, arguments, folder) for way in arguments.ways}
    clock = time.process_time if arguments.processor_time else time.perf_counter
    operations = {way: count_operations(step) for way, step in steps.items()}  # makes optimizer states and warms up
    product, product_operations = make_product(arguments)
    times: dict[str, list[float]] = {way: [] for way in (*steps, "product")}
    for _ in range(arguments.steps):
        for way, step in (*steps.items(), *[("product", product)] * PRODUCTS):
            begin = clock()
            step()
            times[way].append(clock() - begin)
    peak = product_operations / min(times.pop("product"))
    medians = {way: statistics.median(values) for way, values in times.items()}
    return medians, {way: operations[way] / medians[way] / peak for way in steps}


def resident_mib(field: str) -> float:
    """A memory figure of this process, such as `VmRSS` or `VmHWM`."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(f"{field}:"))


def measure_memory(way: str, arguments: argparse.Namespace, folder: str) -> float:
    """Peak MiB of building the model and two steps, in this process."""
    before = resident_mib("VmRSS")
    step = make_step(way, arguments, folder)
    for _ in range(2):
        step()
    if arguments.device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_mib("VmHWM") - before


def memory_in_process(way: str, options: list[str]) -> float:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.training", *options, "--memory-of", way]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"measuring the memory of {way} failed: {done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def parse(options: list[str]) -> argparse.Namespace:
    """Command line."""
    parser = command.parser("training", __doc__)
    parser.add_argument("--response-fraction", type=float, default=0.3, help="share of each row that is response")
    parser.add_argument("--draws", type=int, default=1, help="K, draws of (time, noise) per response token")
    parser.add_argument("--variant", choices=("lora", "full"), default="lora")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens per row")
    parser.add_argument("--warm-start", action="store_true")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--processor-time", action="store_true")
    parser.add_argument("--steps", type=int, default=3, help="timed rounds")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--memory-of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(options)
    if "ours" not in arguments.ways:
        parser.error("--ways must name ours, which the others are compared with")
    return arguments


def main(options: list[str] | None = None) -> dict[str, float]:
    """Measure, print and write the figures."""
    options = sys.argv[1:] if options is None else options
    arguments = parse(options)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.memory_of:
            print(measure_memory(arguments.memory_of, arguments, folder))
            return {}
        times, parts = measure_times(arguments, folder)
    figures = {f"{way}_step_s": seconds for way, seconds in times.items()}
    figures |= {f"{way}_of_peak": part for way, part in parts.items()}
    # naive does a whole pass per draw, so a step of either way is worth the same number of (token, draw) pairs
    figures |= {f"speedup_over_{way}": times[way] / times["ours"] for way in arguments.ways if way != "ours"}
    if arguments.memory:
        peaks = {way: memory_in_process(way, options) for way in arguments.ways}
        figures |= {f"{way}_peak_mib": peak for way, peak in peaks.items()}
        if "naive" in peaks:
            figures["memory_over_naive"] = peaks["ours"] / peaks["naive"]
    targets = arguments.batch_size * round(arguments.length * arguments.response_fraction)
    figures["supervised_tokens_per_s"] = targets / times["ours"]
    print(f"{arguments.shape}, {arguments.batch_size} x {arguments.length} tokens, response "
          f"{arguments.response_fraction:.0%}, K = {arguments.draws}, {arguments.variant}, {arguments.dtype} on "
          f"{arguments.device}, {arguments.threads} threads")  # fmt: skip
    for name, value in figures.items():
        print(f"{name:24s} {value:.4g}")
    command.write(arguments, **figures)
    return figures


if __name__ == "__main__":
    main()
