"""Damaged checkpoints, made from a seed: `variants(...)` yields a name and a function that damages a copied folder.

- `file_damage`: any file, as bytes: cut off, bits flipped, zeroed, replaced by something else
- `tensor_damage`: a valid file with other tensors
- `settings_damage`: every field of a JSON file removed, of another type, out of range
- `mixed`: files of another run with the same shapes, another base, shards
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], None]
WEIGHTS, CONFIG, GENERATION = "model.safetensors", "config.json", "generation_config.json"
INDEX = "model.safetensors.index.json"


def variants(whole: Path, other: Path, foreign: Path, sharded: Path, seed: int = 0) -> Iterator[tuple[str, Damage]]:
    """Variants of checkpoint `whole`; `other` is another run, `foreign` another base, `sharded` the same in shards."""
    chance = random.Random(seed)
    for file, cuts, flips in ((WEIGHTS, 22, 60), (CONFIG, 8, 25), (GENERATION, 4, 8)):
        yield from file_damage(whole / file, chance, cuts, flips)
    yield from tensor_damage(load_file(whole / WEIGHTS), chance)
    yield from settings_damage(whole / CONFIG)
    yield from mixed(whole, other, foreign, sharded)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _edit(folder: Path, file: str, change: Callable[[bytearray], bytes | bytearray]) -> None:
    (folder / file).write_bytes(change(bytearray((folder / file).read_bytes())))


def _flip(content: bytearray, place: int, bit: int) -> bytearray:
    content[place] ^= 1 << bit
    return content


def _zero(content: bytearray, place: int, count: int) -> bytearray:
    content[place : place + count] = bytes(len(content[place : place + count]))
    return content


def file_damage(path: Path, chance: random.Random, cuts: int, flips: int) -> Iterator[tuple[str, Damage]]:
    """The file cut off, flipped, zeroed, empty, gone, a folder, a dangling link, longer, or something else."""
    size, name = path.stat().st_size, path.name
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little") if name == WEIGHTS else size
    lengths = {0, 1, min(7, size), min(8, size), size - 1} | {chance.randrange(size) for _ in range(cuts)}
    for length in sorted(lengths):
        yield f"{name} cut to {length}", partial(_edit, file=name, change=lambda c, n=length: c[:n])
    for number in range(flips):
        place = chance.randrange(header) if number % 2 else chance.randrange(size)
        bit = chance.randrange(8)
        yield f"{name} bit {place}.{bit}", partial(_edit, file=name, change=partial(_flip, place=place, bit=bit))
    for _ in range(3):
        place, count = chance.randrange(size), chance.randrange(1, 64)
        yield (
            f"{name} {count} zeros at {place}",
            partial(_edit, file=name, change=partial(_zero, place=place, count=count)),
        )
    others = {
        "longer": lambda c: c + b"\0" * 9,
        "text": lambda c: b"# not it\n",
        "noise": lambda c: chance.randbytes(99),
    }
    others["huge header"] = lambda c: (1 << 60).to_bytes(8, "little") + c[8:]
    for what, change in others.items():
        yield f"{name} {what}", partial(_edit, file=name, change=change)
    for what in ("gone", "folder", "link"):
        yield f"{name} {what}", partial(_replace, file=name, what=what)


def _replace(folder: Path, file: str, what: str) -> None:
    (folder / file).unlink()
    if what == "folder":
        (folder / file).mkdir()
    elif what == "link":
        (folder / file).symlink_to("nowhere")


# ---- tensors ---------------------------------------------------------------------------------------------------------


def tensor_damage(tensors: dict[str, torch.Tensor], chance: random.Random) -> Iterator[tuple[str, Damage]]:
    """A valid file: a tensor missing, renamed, added, of another shape, dtype or value, or two of them swapped."""
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "nan": lambda t: t.flatten().index_fill(0, torch.tensor([t.numel() // 2]), float("nan")).view(t.shape),
        "inf": lambda t: t.flatten().index_fill(0, torch.tensor([0]), float("-inf")).view(t.shape),
        "flat": lambda t: t.flatten()[None],
        "longer": lambda t: torch.cat([t, t[:1]]),
        "empty": lambda t: t[:0],
        "scalar": lambda t: t.flatten()[0],
        "bfloat16": torch.Tensor.bfloat16,
        "float64": torch.Tensor.double,
        "int32": torch.Tensor.int,
        "bool": torch.Tensor.bool,
        "negative": torch.Tensor.neg,
        "zero": torch.zeros_like,
        "one rounding": lambda t: torch.nextafter(t, t + 1),
    }
    names = sorted(tensors)
    for what, change in changes.items():
        for name in chance.sample(names, 2):
            yield f"{name} {what}", partial(_save, tensors={**tensors, name: change(tensors[name]).contiguous()})
    for name in chance.sample(names, 3):
        less = {key: value for key, value in tensors.items() if key != name}
        yield f"{name} missing", partial(_save, tensors=less)
        yield f"{name} renamed", partial(_save, tensors={**less, name + "x": tensors[name]})
        yield f"{name} doubled", partial(_save, tensors={**tensors, name + ".copy": tensors[name].clone()})
    pairs = [(a, b) for a in names for b in names if a < b and tensors[a].shape == tensors[b].shape]
    for a, b in chance.sample(pairs, 4):
        yield f"{a} and {b} swapped", partial(_save, tensors={**tensors, a: tensors[b], b: tensors[a]})
    yield "no tensors", partial(_save, tensors={})
    yield "base tensors", partial(_save, tensors={**tensors, "base.lm_head.weight": torch.zeros(3)})


def _save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# ---- settings --------------------------------------------------------------------------------------------------------


def settings_damage(path: Path) -> Iterator[tuple[str, Damage]]:
    """Every field removed and of another type; numbers out of range; the file of another kind."""
    content = json.loads(path.read_text())
    for key, value in content.items():
        yield f"{key} removed", partial(_set, file=path.name, key=key, remove=True)
        other = 7 if isinstance(value, str) else "x"
        yield f"{key} = {other!r}", partial(_set, file=path.name, key=key, value=other)
        numbers = (10**12, -1, 0.5, float("nan")) if isinstance(value, (int, float)) else ([[]], {"x": None}, "")
        for number, wrong in enumerate(numbers):
            if number == len(key) % len(numbers):
                yield f"{key} = {wrong!r}", partial(_set, file=path.name, key=key, value=wrong)
    texts = {"list": "[]", "number": "3", "null": "null", "nested": "[" * 50000, "other": '{"model_type": "llama"}'}
    for what, text in texts.items():
        yield f"{path.name} {what}", partial(_edit, file=path.name, change=lambda c, t=text: t.encode())
    yield f"{path.name} latin-1", partial(_edit, file=path.name, change=lambda c: '{"ä": 1}'.encode("latin-1"))


def _set(folder: Path, file: str, key: str, value: object = None, remove: bool = False) -> None:
    content = json.loads((folder / file).read_text())
    content[key] = value
    if remove:
        del content[key]
    (folder / file).write_text(json.dumps(content))


def unsigned(folder: Path) -> None:
    """Take the digest out, as if the checkpoint were older than it is."""
    content = json.loads((folder / CONFIG).read_text())
    content.pop("tensors_digest", None)
    (folder / CONFIG).write_text(json.dumps(content))


# ---- several runs ----------------------------------------------------------------------------------------------------


def mixed(whole: Path, other: Path, foreign: Path, sharded: Path) -> Iterator[tuple[str, Damage]]:
    """One file of another run, another base, and the checkpoint in shards of which one is wrong."""
    for file in (WEIGHTS, CONFIG, GENERATION):
        yield f"{file} of another run", partial(_take, file=file, source=other)
    yield "another base", partial(_set, file=CONFIG, key="base_name_or_path", value=str(foreign))
    for name in ("", "nowhere/at-all", "/nowhere/at-all", str(whole)):
        yield f"base {name!r}", partial(_set, file=CONFIG, key="base_name_or_path", value=name)
    yield "weights of the base", partial(_take, file=WEIGHTS, source=foreign)
    yield "configuration of the base", partial(_take, file=CONFIG, source=foreign)
    shards = sorted(file.name for file in sharded.glob("model-*.safetensors"))
    yield "in shards", partial(_shards, source=sharded)
    for shard in (shards[0], shards[-1]):
        yield f"{shard} gone", partial(_shards, source=sharded, shard=shard, change=Path.unlink)
        yield f"{shard} empty", partial(_shards, source=sharded, shard=shard, change=lambda f: f.write_bytes(b""))
        yield f"{shard} cut", partial(_shards, source=sharded, shard=shard, change=lambda f: os.truncate(f, 99))
        yield f"{shard} flipped", partial(_shards, source=sharded, shard=shard, change=_flip_last)
        copied = partial(shutil.copy, sharded / shards[1])
        yield f"{shard} another", partial(_shards, source=sharded, shard=shard, change=copied)
    names = ("[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": "x"}}', "{", "")
    for text in names:
        yield f"index {text}", partial(_write, file=INDEX, text=text)


def _take(folder: Path, file: str, source: Path) -> None:
    shutil.copy(source / file, folder / file)


def _write(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text)


def _flip_last(file: Path) -> None:
    file.write_bytes(_flip(bytearray(file.read_bytes()), -2, 3))


def _shards(
    folder: Path, source: Path, shard: str | None = None, change: Callable[[Path], object] | None = None
) -> None:
    shutil.rmtree(folder)
    shutil.copytree(source, folder)
    if change is not None:
        change(folder / shard)
