"""Where the tests of kernels run: on a GPU where there is one, else under the interpreter of Triton."""
import importlib.util

import pytest, torch

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is not made for this machine')
