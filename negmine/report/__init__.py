"""hardness_report: measure the negatives of a dataset by difficulty, list likely false negatives, and give advice.

inputs.py    checks of bins, classes, similarity measures and texts
ranking.py   ranks the corpus for queries with the kernels: rows at given ranks, the hardest rows, counts
figures.py   computes bins, sampled ranks, consistency, overlap and rank correlation
suspects.py  finds negatives that outscore the positives, and near duplicates of positives
measure.py   hardness_report: the loop over batches of queries
result.py    HardnessReport: the figures and facts, which can be saved and loaded
words.py     writes findings and advice as sentences
page.py      writes the HTML page
"""

from negmine.report.measure import hardness_report
from negmine.report.result import HardnessReport

__all__ = ["HardnessReport", "hardness_report"]
