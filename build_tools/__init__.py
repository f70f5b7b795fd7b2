"""Code that setup.py, the Makefile and the packaging tests share: compile, find CUDA, check a wheel."""
