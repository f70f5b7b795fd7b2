"""Dataset-scale mining: hard negatives of every query of a training set among millions of rows, streamed, exact.

mine.py         mine_hard_negatives: sizes, the loop; arguments.py checks its options
rows.py         embeddings as one sequence of rows; shards.py opens the files that hold them
lists.py        lists of corpus rows for each query: positives and exclusions
scan.py         a batch of queries against the corpus, chunk by chunk, through the kernels
screen.py       the same answer from products in bf16, where the processor has them
ranks.py        a corpus held by several processes
miner.py        one batch: windows of ranks, counted, filtered, looked at deeper; thin.py drops near duplicates
draw.py         which members of a window are kept
index.py        NegativeIndex; engines.py: FAISS and cuVS; approximate.py: candidates of an index in the place of a scan
resume.py       a run that survives its end; files.py: files that are whole or absent
result.py       MiningResult: what came out, saved, summed up and turned into training data
rounds.py       mine, train, mine again
"""

from negmine.search.index import Found, NegativeIndex
from negmine.search.mine import mine_hard_negatives
from negmine.search.result import MiningResult
from negmine.search.rounds import Round, mining_rounds

__all__ = ["Found", "MiningResult", "NegativeIndex", "Round", "mine_hard_negatives", "mining_rounds"]
