"""hardness_report: the negatives of a dataset by difficulty, which of them may be false negatives, and what to do about it.

inputs.py    checks of bins, classes, similarity measures and texts
ranking.py   queries against the corpus through the kernels: rows at ranks, the hardest rows, counts
figures.py   the arithmetic: bins, sampled ranks, consistency, overlap, rank correlation
suspects.py  negatives that outscore the positives, near duplicates of positives
measure.py   hardness_report: the loop over batches of queries
result.py    HardnessReport: figures and facts, saved and loaded
words.py     findings and advice in sentences
page.py      the HTML page
"""

from negmine.report.measure import hardness_report
from negmine.report.result import HardnessReport

__all__ = ["HardnessReport", "hardness_report"]
