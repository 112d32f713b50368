"""How well rows are shuffled that are read in blocks, where it is hardest: in a file that is sorted by its labels.

    .venv/bin/python benchmarks/shuffle.py [rows] [labels] [batch size]

Prints a Markdown table, means over ten epochs: in the file's own order, in blocks of 256 and of 64 rows with windows of
several sizes, and with any row after any. What the columns mean is written in `hasten.training.shuffle`. The last
column says how many labels a batch holds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from hasten.training.sampler import Blocks, order
from hasten.training.shuffle import shuffle_quality

EPOCHS = 10
BLOCK_ROWS = (256, 64)
WINDOWS = (1, 4, 16, 64, 256)


def main(num_rows: int = 50_000, num_labels: int = 10, batch_size: int = 128) -> None:
    labels = np.arange(num_rows) * num_labels // num_rows
    print(
        "| order | distance | rank correlation | variance between batches | labels in a batch |\n|---|---|---|---|---|"
    )
    for name, epochs in orders(num_rows):
        found = [figures(rows, labels, batch_size) for rows in epochs]
        means = {figure: float(np.mean([each[figure] for each in found])) for figure in found[0]}
        print(f"| {name} | {' | '.join(f'{value:.3g}' for value in means.values())} |", flush=True)


def orders(num_rows: int) -> Iterator[tuple[str, list[NDArray[np.int64]]]]:
    yield "of the file", [np.arange(num_rows)]
    for rows in BLOCK_ROWS:
        for window in WINDOWS:
            if window * rows <= num_rows:
                blocks = Blocks(rows=rows, window=window)
                yield f"blocks of {rows}, window of {window}", epochs_of(num_rows, blocks)
    yield "rows", epochs_of(num_rows, None)


def epochs_of(num_rows: int, blocks: Blocks | None) -> list[NDArray[np.int64]]:
    return [np.concatenate(list(order(num_rows, 0, epoch, blocks))) for epoch in range(EPOCHS)]


def figures(rows: NDArray[np.int64], labels: NDArray[np.int64], batch_size: int) -> Mapping[str, float]:
    whole = rows[: len(rows) // batch_size * batch_size].reshape(-1, batch_size)
    held = float(np.mean([len(np.unique(labels[batch])) for batch in whole]))
    return {**vars(shuffle_quality(rows, labels, batch_size)), "labels": held}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
