"""Dataset-scale mining: hard negatives of every query of a training set among millions of rows, streamed, exact.

rows.py    embeddings as one sequence of rows, whatever holds them: arrays, tensors, .npy files, shards
lists.py   lists of corpus rows for each query: positives and exclusions
scan.py    a batch of queries against the corpus, chunk by chunk, through the kernels
draw.py    which members of a window of ranks are kept
mine.py    mine_hard_negatives: checks, sizes, the loop
result.py  MiningResult: what came out, saved, summed up and turned into training data
"""

from negmine.search.mine import mine_hard_negatives
from negmine.search.result import MiningResult

__all__ = ["MiningResult", "mine_hard_negatives"]
