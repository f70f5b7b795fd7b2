"""The signatures of other packages, implemented with negmine. There is one module for each package, imported by name:

from negmine.adapters.lightly import NTXentLoss
"""
