"""Hard negatives from a corpus in shards, mined by Ray's actors, with the bits of one process.

    python examples/ray_mining.py --quick              a Ray of its own on this machine
    python examples/ray_mining.py --address auto       the cluster that this machine belongs to

The corpus is written as .npy files, as a job that embeds it would leave them. Each actor opens its shards where they lie, so on a
cluster --folder must be one that every node sees. An actor that dies is started again by Ray.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import ray

import negmine


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def write_data(folder: Path, rows: int, queries: int, shards: int) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Paths of the shards, queries (Q, D), and the row that answers each. Rows lie around topics, as texts do."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((rows // 50, 64))
    corpus = unit(topics[rng.integers(0, len(topics), rows)] + rng.standard_normal((rows, 64)))
    positives = rng.integers(0, rows, queries)
    paths = [folder / f"corpus-{shard:03}.npy" for shard in range(shards)]
    for path, part in zip(paths, np.array_split(corpus, shards), strict=True):
        np.save(path, part)
    return paths, unit(corpus[positives] + 0.1 * rng.standard_normal((queries, 64))), positives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small corpus: seconds on two cores")
    parser.add_argument("--address", help="of a Ray cluster; default: one is started here")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--folder", help="for the shards, seen by every node; default: a temporary one")
    args = parser.parse_args()
    rows, queries = (20_000, 1_000) if args.quick else (500_000, 20_000)

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths, query, positives = write_data(Path(folder), rows, queries, args.shards)
        options = {"select": negmine.Select(relative_margin=0.05), "num_negatives": 5}
        ray.init(address=args.address or "local", log_to_driver=False)

        began = time.monotonic()
        mined = negmine.mine_hard_negatives(
            query,
            paths,
            positives,
            engine="ray",
            engine_options={"num_actors": args.actors},
            show_progress_bar=True,
            **options,
        )
        print(f"{queries:,} queries, {rows:,} rows on {args.actors} actors: {time.monotonic() - began:.1f} s")
        print(mined.summary())

        alone = negmine.mine_hard_negatives(query, paths, positives, **options)
        differing = int((mined.indices != alone.indices).sum() + (mined.scores != alone.scores).sum())
        print(f"entries that differ from one process: {differing}")
        ray.shutdown()


if __name__ == "__main__":
    main()
