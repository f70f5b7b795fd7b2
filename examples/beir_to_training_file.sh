#!/usr/bin/env bash
usage='A BEIR folder becomes a training file with five hard negatives for each query.

    bash examples/beir_to_training_file.sh FOLDER MODEL OUTPUT.jsonl     such as: scifact sentence-transformers/all-MiniLM-L6-v2 train.jsonl
    bash examples/beir_to_training_file.sh --quick                       a small folder made of WordNet, with vectors that it has already

FOLDER holds corpus.jsonl, queries.jsonl and qrels/train.tsv (or test.tsv). MODEL is a sentence-transformers model, which embeds both.
A negative never is a judged document, nor a copy of one, and scores at least 5 % below the weakest positive of its query.'

set -euo pipefail
python=${PYTHON:-python3}
case "${1:-}" in
  --quick) quick=1 ;;
  -h | --help | "") echo "$usage"; exit ;;
  *) quick=0; folder=$1 model=$2 output=$3 ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ "$quick" = 1 ]; then
  folder=$work/wordnet output=$work/train.jsonl
  "$python" - "$folder" "$work" "$(dirname "$0")/../benchmarks/data" <<'END'
import json, lzma, sys
from pathlib import Path
import numpy as np

folder, work, data = map(Path, sys.argv[1:])
(folder / "qrels").mkdir(parents=True)
entries = [line.split("\t") for line in lzma.decompress((data / "corpus.tsv.xz").read_bytes()).decode().split("\n")]
sentences = lzma.decompress((data / "queries.txt.xz").read_bytes()).decode().split("\n")
with np.load(data / "wordnet.npz") as arrays:
    corpus, queries, answers = (arrays[name] for name in ("corpus", "queries", "positives"))
asked = np.flatnonzero(answers < 5000)[:300]  # the first 5,000 entries, and 300 sentences about them
with open(folder / "corpus.jsonl", "w") as file:
    for row, (_, lemmas, gloss) in enumerate(entries[:5000]):
        file.write(json.dumps({"_id": f"d{row}", "title": lemmas, "text": gloss}) + "\n")
with open(folder / "queries.jsonl", "w") as file:
    for row in asked:
        file.write(json.dumps({"_id": f"q{row}", "text": sentences[row]}) + "\n")
with open(folder / "qrels" / "train.tsv", "w") as file:
    file.write("query-id\tcorpus-id\tscore\n")
    file.writelines(f"q{row}\td{answers[row]}\t1\n" for row in asked)
for name, rows in (("queries", queries[asked]), ("corpus", corpus[:5000])):
    rows = rows.astype(np.float32)
    np.save(work / f"{name}.npy", rows / np.linalg.norm(rows, axis=1, keepdims=True))
END
else
  "$python" - "$folder" "$model" "$work" <<'END'
import json, sys
from pathlib import Path
import numpy as np
from sentence_transformers import SentenceTransformer

folder, model, work = Path(sys.argv[1]), SentenceTransformer(sys.argv[2]), Path(sys.argv[3])
for name, encode in (("queries", model.encode_query), ("corpus", model.encode_document)):
    with open(folder / f"{name}.jsonl") as file:
        rows = [json.loads(line) for line in file]
    texts = [f"{row.get('title', '')} {row['text']}".strip() for row in rows]
    np.save(work / f"{name}.npy", encode(texts, normalize_embeddings=True, show_progress_bar=True))
END
fi

"$python" -m negmine mine --beir "$folder" \
  --query-embeddings "$work/queries.npy" --corpus-embeddings "$work/corpus.npy" \
  --relative-margin 0.05 --num-negatives 5 --output "$output" --form sentence-transformers

echo "$(wc -l < "$output") lines in $output; the first:"
head -n 1 "$output"
