"""hardness_report: what the negatives of a dataset are like by difficulty, which of them may be none, and what to do about it.

inputs.py    bins, classes, measures of similarity and texts, checked
ranking.py   queries against the corpus through the kernels: rows at ranks, the hardest, counts
figures.py   bins, sampled ranks, consistency, overlap, rank correlation
suspects.py  negatives that outscore the positives, rows that repeat them
measure.py   hardness_report: the loop
result.py    HardnessReport: figures and facts, saved, loaded
words.py     what the figures show, and what to do next, in sentences
charts.py    plots as inline SVG
page.py      the HTML page
mined.py     the page of a MiningResult
"""

from negmine.report.measure import hardness_report
from negmine.report.result import HardnessReport

__all__ = ["HardnessReport", "hardness_report"]
