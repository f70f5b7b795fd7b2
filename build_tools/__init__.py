"""What setup.py, the Makefile and the packaging tests share: compiling, finding CUDA, checking a wheel."""
