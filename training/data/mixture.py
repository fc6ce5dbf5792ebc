"""Several data sets as one, each with a share of the examples.

- `mix`: examples drawn by weight, and a line that counts them; shares are exact, as far as whole examples allow
- `mix_streams`: the same of streams, whose shares hold on average

As many examples are drawn as the data sets allow without using one twice.
"""

import datasets
import numpy


def mix(
    parts: list[datasets.Dataset], names: list[str], weights: list[float | None], seed: int
) -> tuple[datasets.Dataset, str]:
    """One table: all examples, or where there are weights, as many of each data set as its share; which, by `seed`.

    Examples that are left out for a reason stay in the table and do not count.
    """
    usable = [numpy.array([row for row, reason in enumerate(part["left_out"][:]) if reason is None]) for part in parts]
    counts = [len(rows) for rows in usable]
    if weights[0] is not None:
        shares = _shares(weights)
        most = min(len(rows) / share for rows, share in zip(usable, shares, strict=True))
        counts = [min(round(most * share), len(rows)) for rows, share in zip(usable, shares, strict=True)]
        parts = [_drawn(*three, seed) for three in zip(parts, usable, counts, strict=True)]
    whole = max(sum(counts), 1)
    told = (
        f"{count:,} of {len(rows):,} from {name} ({count / whole:.1%})"
        for count, rows, name in zip(counts, usable, names, strict=True)
    )
    return datasets.concatenate_datasets(parts), f"mixture: {', '.join(told)}"


def _shares(weights: list[float | None]) -> list[float]:
    total = sum(weight or 0 for weight in weights)
    return [(weight or 0) / total for weight in weights]


def _drawn(part: datasets.Dataset, usable: numpy.ndarray, count: int, seed: int) -> datasets.Dataset:
    """`count` of the usable rows and all that are left out, in the order of the data."""
    chosen = numpy.random.default_rng(seed).permutation(usable)[:count]
    return part.select(sorted([*chosen.tolist(), *(set(range(len(part))) - set(usable.tolist()))]))


def mix_streams(
    parts: list[datasets.IterableDataset], names: list[str], weights: list[float | None], seed: int
) -> tuple[datasets.IterableDataset, str]:
    """One stream: one data set after the other, or drawn by weight and `seed` until one of them ends."""
    if weights[0] is None:
        return datasets.concatenate_datasets(parts), f"mixture: streams of {', '.join(names)}, one after the other"
    shares = _shares(weights)
    mixed = datasets.interleave_datasets(parts, shares, seed=seed, stopping_strategy="first_exhausted")
    told = (f"{share:.1%} from {name}" for share, name in zip(shares, names, strict=True))
    return mixed, f"mixture: streams, on average {', '.join(told)}"
