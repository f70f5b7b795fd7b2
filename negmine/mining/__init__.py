"""Mining a dataset: hard negatives of every query among millions of rows, exact, streamed, in bounded memory.

hard_negatives.py     mine_hard_negatives: options, plan, loop over batches
batch_miner.py        one batch: windows of ranks, filters, near duplicates
scan.py               an exact scan of the corpus through the kernels, chunk by chunk
prefilter.py          the same result by way of products of rounded vectors, on processors where these are faster
index_scan.py         candidates of an approximate index instead of a scan
sampling.py           which candidates of a window become negatives
dedup.py              equal rows and near duplicates
identity.py           documents and queries by id, text and row; what each query must not get
columns.py            texts, ids and lists by position, whatever container holds them
rescoring.py          a cross-encoder's scores for the candidates
retrievers.py         several retrievers in one result
batches.py            batches of queries that are hard for each other
text_mining.py        from_texts: a model and texts in, negatives out
sources.py            embeddings in arrays, tensors and files as one sequence of rows
tables.py             embeddings in the columns of tables
row_lists.py          lists of corpus rows per query: positives and exclusions
memory_budget.py      how many queries and rows to process at a time
parts.py              mine_part: a job as phases, and the part of any queries and rows
merging.py            parts of a phase joined by any tree
shares.py             merge_parts, and shares of a job that no engine runs
executors.py          what answers a phase for the whole corpus: this process, ranks, an engine
ray_executor.py       actors of Ray
process_ranks.py      communication where several processes hold the corpus
index.py              NegativeIndex
index_shards.py       several saved indexes searched as one
engines.py            what an index searches with: a scan, FAISS, cuVS
result.py             MiningResult: saved, summarised, turned into training data
training_rows.py      a result as rows of training data, in the forms of other programs
text_sets.py          queries and documents from the files of other programs
result_page.py        its HTML page
resume.py             resuming interrupted runs
rounds.py             mining_rounds: mine, train, mine again
atomic_file.py        files that are written completely or not at all
array_file.py         the file format of indexes and resumed runs
numpy_file.py         arrays of .npy and .npz files
regular_file.py       files opened for reading, and JSON
text_files.py         lines of text files, plain or compressed
progress.py           a progress bar on stderr
"""

from negmine.mining.batches import build_batches
from negmine.mining.hard_negatives import mine_hard_negatives
from negmine.mining.index import Found, NegativeIndex
from negmine.mining.parts import MiningPlan, Part, Phase, mine_part
from negmine.mining.result import MiningResult
from negmine.mining.retrievers import merge_retrievers
from negmine.mining.rounds import Round, mining_rounds, newest_round
from negmine.mining.shares import merge_parts
from negmine.mining.text_mining import from_texts

__all__ = [
    "Found",
    "MiningPlan",
    "MiningResult",
    "NegativeIndex",
    "Part",
    "Phase",
    "Round",
    "build_batches",
    "from_texts",
    "merge_parts",
    "merge_retrievers",
    "mine_hard_negatives",
    "mine_part",
    "mining_rounds",
    "newest_round",
]
