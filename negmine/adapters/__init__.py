"""Shapes of other packages over negmine's ops: one module a package, imported by name and only where it is wanted.

from negmine.adapters.lightly import NTXentLoss
"""
