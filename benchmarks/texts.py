"""Time each stage of mining WordNet from texts, from a BEIR folder to a training file.

    pip install wordllama && python -m benchmarks.texts           117,659 entries, 48,339 example sentences
    python -m benchmarks.texts --queries 2000                     fewer sentences
    python -m benchmarks.texts --table                            only writes the table of docs/mining.md again

    read     read_beir of corpus.jsonl, queries.jsonl and qrels      floor: json.loads of the same lines
    embed    from_texts without its search                           floor: the model alone on the same texts
    mine     the search: 5 negatives, relative_margin 0.05           floor: the matrix product alone, in fp32
    write    to_jsonl for sentence-transformers                      floor: the same bytes written and flushed

The model is the static model of wordllama with 256 dimensions, whose weights are part of that package. Every stage runs once, in
one process, followed by its floor. `load` is the load of the machine. Rows are appended to results/texts/<machine>.csv.
"""

import argparse
import datetime
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import negmine
from benchmarks import wordnet
from benchmarks.rows import RESULTS, append, commit, machine_name, read, write_between
from negmine.mining import from_texts, text_mining
from negmine.mining.text_sets import read_beir

STAGES = {
    "read": "JSON of the same lines parsed",
    "embed": "the model alone",
    "mine": "the matrix product alone, fp32",
    "write": "the same bytes written",
}
DOCS = RESULTS.parents[1] / "docs/mining.md"
BEGIN = "<!-- made by `python -m benchmarks.texts --table` from benchmarks/results/texts -->"
COLUMNS = ["date", "commit", "threads", "torch", "model", "Q", "K", "D", "stage", "wall_s", "floor_s", "load"]


def write_beir(folder: Path, limit: int | None) -> None:
    """Write the task as a BEIR folder. Documents have lemmas as title and the gloss as text; queries are example sentences."""
    texts, task = wordnet.load_texts(), wordnet.load()
    (folder / "qrels").mkdir()
    with (folder / "corpus.jsonl").open("w") as file:
        for row, (lemmas, gloss) in enumerate(zip(texts.lemmas, texts.glosses, strict=True)):
            file.write(json.dumps({"_id": f"d{row}", "title": ", ".join(lemmas), "text": gloss}) + "\n")
    with (folder / "queries.jsonl").open("w") as file, (folder / "qrels/train.tsv").open("w") as qrels:
        qrels.write("query-id\tcorpus-id\tscore\n")
        for row, (sentence, answer) in enumerate(zip(texts.examples[:limit], task.positives.tolist(), strict=False)):
            file.write(json.dumps({"_id": f"q{row}", "text": sentence}) + "\n")
            qrels.write(f"q{row}\td{answer}\t1\n")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    made = work()
    return time.perf_counter() - start, made


def parsed(folder: Path) -> None:
    for name in ("corpus.jsonl", "queries.jsonl"):
        with (folder / name).open() as file:
            for line in file:
                json.loads(line)


def multiplied(queries: np.ndarray, corpus: np.ndarray) -> None:
    rows = torch.from_numpy(corpus)  # (K, D)
    for block in torch.from_numpy(queries).split(256):
        block @ rows.T  # (256, K)


def rewritten(content: bytes, path: Path) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def measured(embed: Callable[[list[str]], np.ndarray], folder: Path) -> tuple[dict[str, tuple[float, float]], dict]:
    """Run all stages; return the seconds of each stage and of its floor, and the sizes."""
    times: dict[str, tuple[float, float]] = {}
    seconds, data = timed(lambda: read_beir(folder))
    times["read"] = seconds, timed(lambda: parsed(folder))[0]
    held: dict[str, Any] = {}

    @functools.wraps(negmine.mine_hard_negatives)
    def searched(*arguments: Any, **options: Any) -> Any:
        held["rows"] = arguments[:2]
        held["mine"], result = timed(lambda: negmine.mine_hard_negatives(*arguments, **options))
        return result

    text_mining.mine_hard_negatives = searched
    options: dict[str, Any] = {"query_ids": data.query_ids, "corpus_ids": data.corpus_ids, "num_negatives": 5}
    options["select"] = negmine.Select(relative_margin=0.05)
    whole, result = timed(lambda: from_texts(embed, data.query_texts, data.corpus_texts, data.positives, **options))
    alone = sum(timed(lambda texts=texts: embed(texts))[0] for texts in (data.query_texts, data.corpus_texts))
    times["embed"] = whole - held["mine"], alone
    times["mine"] = held["mine"], timed(lambda: multiplied(*held["rows"]))[0]
    path = folder / "train.jsonl"
    seconds, _ = timed(lambda: result.to_jsonl(path, form="sentence-transformers"))
    times["write"] = seconds, timed(lambda: rewritten(path.read_bytes(), folder / "again"))[0]
    sizes = {"Q": len(data.query_texts), "K": len(data.corpus_texts), "D": held["rows"][0].shape[1]}
    return times, sizes


def table() -> str:
    lines = []
    for path in sorted((RESULTS / "texts").glob("*.csv")):
        rows = read(path)
        rows = [row for row in rows if row["date"] == max(other["date"] for other in rows)]
        one = rows[0]
        lines += ["| stage | s | floor, s | what the floor is |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {row['stage']} | {float(row['wall_s']):.1f} | {float(row['floor_s']):.1f} | {STAGES[row['stage']]} |"
            for row in rows
        ]
        lines += ["", f"{int(one['Q']):,} queries, {int(one['K']):,} documents, {one['model']}, D = {one['D']}; {path.stem}, "
                  f"{one['threads']} threads, torch {one['torch']}, commit {one['commit']}, {one['date'][:10]}, "
                  f"load {one['load']}.", ""]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, help="use only the first QUERIES sentences")
    parser.add_argument(
        "--table", action="store_true", help="time nothing; only write the table of docs/mining.md from the rows"
    )
    args = parser.parse_args()
    if not args.table:
        import wordllama

        model = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
        model.embed(["a first text"])
        with tempfile.TemporaryDirectory() as folder:
            write_beir(Path(folder), args.queries)
            times, sizes = measured(model.embed, Path(folder))
        stamp = {"date": datetime.datetime.now().isoformat(timespec="seconds"), "commit": commit()}
        stamp |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "model": "wordllama l2_supercat"}
        rows = [
            stamp | sizes | {"stage": name, "wall_s": round(s, 2), "floor_s": round(floor, 2)}
            for name, (s, floor) in times.items()
        ]
        rows = [row | {"load": round(os.getloadavg()[0], 1)} for row in rows]
        for row in rows:
            print(f"{row['stage']:<8}{row['wall_s']:>8} s{row['floor_s']:>8} s floor")
        if args.queries is None:
            append(RESULTS / "texts" / f"{machine_name('cpu')}.csv", COLUMNS, rows)
    write_between(DOCS, BEGIN, table())


if __name__ == "__main__":
    main()
