"""The house of the kernels: how they run on this machine, and that a Triton kernel gives what PyTorch gives, over odd shapes."""
import importlib.util, os, subprocess, sys
from pathlib import Path

import pytest, torch

import effpt_kernels
from effpt_kernels import backend, dispatch, interpreted
from device import needs_triton


if importlib.util.find_spec('triton') is not None:
    import triton, triton.language as tl

    @triton.jit
    def _softmax_kernel(x_ptr, out_ptr, stride, columns, BLOCK: tl.constexpr):
        row, column = tl.program_id(0), tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row*stride + column, mask=column < columns, other=-float('inf')).to(tl.float32)
        e = tl.exp(x - tl.max(x, 0))
        tl.store(out_ptr + row*columns + column, e / tl.sum(e, 0), mask=column < columns)


def reference(x): return torch.softmax(x.double(), -1).to(x.dtype)

def launch(x):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _softmax_kernel[(x.shape[0],)](x, out, x.stride(0), x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return out

softmax = dispatch(launch, reference)


@needs_triton
def test_kernels_are_interpreted_without_a_gpu(monkeypatch):
    monkeypatch.setenv('EFFPT_KERNELS', 'gpu' if torch.cuda.is_available() else 'interpret')
    assert backend() == ('gpu' if torch.cuda.is_available() else 'interpret')
    assert interpreted() != torch.cuda.is_available()


@needs_triton
@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize('shape', [(1, 1), (1, 3), (3, 17), (2, 128), (5, 129)])
def test_a_kernel_gives_what_torch_gives(monkeypatch, shape, dtype, tolerance):
    monkeypatch.setenv('EFFPT_KERNELS', 'gpu' if torch.cuda.is_available() else 'interpret')
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(8).to(dtype)
    x = torch.cat([x, x], 1)[:, :shape[1]].to('cuda' if torch.cuda.is_available() else 'cpu')      # rows that are not contiguous
    assert softmax.__wrapped__ is reference
    torch.testing.assert_close(softmax(x), reference(x), rtol=tolerance, atol=tolerance)


def test_the_variable_overrides(monkeypatch):
    monkeypatch.setenv('EFFPT_KERNELS', 'torch')
    x = torch.randn(2, 5)
    assert backend() == backend(x) == 'torch'
    assert torch.equal(softmax(x), reference(x))


def test_a_bad_variable_is_refused(monkeypatch):
    monkeypatch.setenv('EFFPT_KERNELS', 'cuda')
    with pytest.raises(ValueError, match="EFFPT_KERNELS is 'cuda': set it to one of gpu, interpret, torch"): backend()


def test_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv('EFFPT_KERNELS', 'gpu')
    with pytest.raises(ValueError, match='EFFPT_KERNELS is gpu, but'): backend(torch.ones(1))
    monkeypatch.setenv('EFFPT_KERNELS', 'interpret')
    monkeypatch.setattr(effpt_kernels, 'interpreted', lambda: False)
    with pytest.raises(ValueError, match='set TRITON_INTERPRET=1'): backend()


def fresh(code, **environment):
    "What `code` prints in a fresh interpreter in which nothing about kernels was said yet, apart from `environment`."
    kept = {k: v for k, v in os.environ.items() if k not in ('TRITON_INTERPRET', 'EFFPT_KERNELS')}
    done = subprocess.run([sys.executable, '-c', code], env=kept | environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_default_is_the_fast_one():
    said = fresh('from effpt_kernels import backend; import os; print(backend(), os.environ.get("TRITON_INTERPRET"))')
    assert said == (['gpu', 'None'] if torch.cuda.is_available() else ['torch', '1'])


def test_the_default_stays_where_the_environment_is_exchanged():
    "As in a process that is forked from one with everything loaded, and given another's environment."
    said = fresh('import os; from effpt_kernels import backend; os.environ.pop("EFFPT_KERNELS", 0); os.environ.pop("TRITON_INTERPRET", 0); print(backend())')
    assert said == ['gpu' if torch.cuda.is_available() else 'torch']


@needs_triton
def test_asking_triton_for_its_interpreter_is_enough():
    assert fresh('from effpt_kernels import backend; print(backend())', TRITON_INTERPRET='1') == ['interpret']


def test_import_without_triton():
    hide = 'import importlib.util, sys; find = importlib.util.find_spec; sys.modules["triton"] = None\n' \
           'importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)\n'
    code = hide + 'from effpt_kernels import backend, interpreted; print(interpreted(), backend())'
    assert fresh(code) == ['False', 'torch']
