"""Figures from the tables of the analyses."""

import os

# numpy's logarithms with AVX-512 differ in their last bit, which can change a pixel of a figure with a logarithmic axis
os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", "X86_V4 AVX512_ICL AVX512_SPR")
