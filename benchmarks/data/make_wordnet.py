"""Make the compact WordNet retrieval task in this folder from the full one.

    python benchmarks/data/make_wordnet.py SOURCE        # writes wordnet.npz, corpus.tsv.xz, queries.txt.xz here

SOURCE has corpus.npy (117659, 384) and queries.npy (48339, 384), float16 unit vectors; positives.npy (48339,), the corpus row
of each query's answer; and synsets.jsonl.gz, one WordNet synset per line. Vectors are projected onto the 128 leading principal
directions of the corpus, without centring, so that their products stay close to the original cosines, and are normalized
again. They are rounded to int8 with one scale for all directions: the later directions then have small values, which compress
well. The files have 19 MB together.
"""

import argparse
import gzip
import json
import lzma
from pathlib import Path

import numpy as np

DIM = 128
FOLDER = Path(__file__).resolve().parent


def principal_directions(corpus: np.ndarray) -> np.ndarray:
    """corpus (K, 384) -> (384, DIM), leading direction first, each with its largest entry positive."""
    vectors = corpus.astype(np.float64)  # (K, 384)
    _, directions = np.linalg.eigh(vectors.T @ vectors)  # (384, 384), ascending
    directions = directions[:, ::-1][:, :DIM]  # (384, DIM)
    largest = np.abs(directions).argmax(axis=0)  # (DIM,)
    return directions * np.sign(directions[largest, np.arange(DIM)])


def rotate(vectors: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """vectors (M, 384) -> unit vectors (M, DIM)."""
    rotated = vectors.astype(np.float64) @ directions  # (M, DIM)
    return rotated / np.linalg.norm(rotated, axis=1, keepdims=True)


def write_lines(name: str, lines: list[str]) -> None:
    if any("\n" in line for line in lines):
        raise ValueError(f"{name}: a text holds a line break, so lines would no longer be rows")
    (FOLDER / name).write_bytes(lzma.compress("\n".join(lines).encode(), preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the full task")
    source = parser.parse_args().source

    with gzip.open(source / "synsets.jsonl.gz", "rt") as lines:
        synsets = [json.loads(line) for line in lines]
    positives = np.load(source / "positives.npy")  # (Q,)
    examples = [(row, example) for row, synset in enumerate(synsets) for example in synset["examples"]]
    if [row for row, _ in examples] != positives.tolist():
        raise ValueError(
            f"positives.npy and the examples of synsets.jsonl.gz disagree: {len(examples)} examples in synset order"
        )

    corpus = np.load(source / "corpus.npy")  # (K, 384)
    directions = principal_directions(corpus)
    corpus = rotate(corpus, directions)  # (K, DIM)
    queries = rotate(np.load(source / "queries.npy"), directions)  # (Q, DIM)
    scale = max(np.abs(corpus).max(), np.abs(queries).max()) / 127

    row_of = {synset["id"]: row for row, synset in enumerate(synsets)}
    lexnames = sorted({synset["lexname"] for synset in synsets})
    np.savez_compressed(
        FOLDER / "wordnet.npz",
        corpus=np.rint(corpus / scale).astype(np.int8),  # (K, DIM)
        queries=np.rint(queries / scale).astype(np.int8),  # (Q, DIM)
        positives=positives.astype(np.int32),  # (Q,)
        lexnames=np.array(lexnames),  # (45,) text
        lexname_of=np.array([lexnames.index(synset["lexname"]) for synset in synsets], np.uint8),  # (K,)
        hypernyms=np.array(
            [(row, row_of[parent]) for row, synset in enumerate(synsets) for parent in synset["hypernyms"]], np.int32
        ),  # (edges, 2): child, parent
    )
    write_lines("corpus.tsv.xz", [f"{s['pos']}\t{', '.join(s['lemmas'])}\t{s['gloss']}" for s in synsets])
    write_lines("queries.txt.xz", [example for _, example in examples])


if __name__ == "__main__":
    main()
