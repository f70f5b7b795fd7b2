"""The command `negmine`: mine, merge, index, analyze, doctor, bench, demo.

options.py        makes options from the signature and the docstring of a function
files.py          reads the files that options name: lists, labels, texts, similarities, callables
outputs.py        checks the output files before any work
mine.py           negmine mine
flagembedding.py  negmine mine --compat flagembedding
merge.py          negmine merge
index.py          negmine index build, search, recall
analyze.py        negmine analyze
checkout.py       negmine bench, negmine demo
main.py           the parser and the exit codes
"""

from negmine.cli.main import main

__all__ = ["main"]
