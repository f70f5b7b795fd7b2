"""The command `negmine`: mine, index, analyze, doctor, bench, demo.

options.py        options made from a function's signature and docstring, so the two cannot part
files.py          what options name: lists, labels, texts, similarities, callables
outputs.py        the files that a command will write, checked before any work
mine.py           negmine mine
flagembedding.py  negmine mine --compat flagembedding
index.py          negmine index build, search, recall
analyze.py        negmine analyze
checkout.py       negmine bench, negmine demo
main.py           the parser, and what each exit code means
"""

from negmine.cli.main import main

__all__ = ["main"]
