"""What must be set before the first import of numpy and triton.

Without a CUDA device the Triton kernels run in Triton's CPU interpreter, which tests/kernels/conftest.py mends for bfloat16.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the interpreter multiplies small blocks: threads only get in the way

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
