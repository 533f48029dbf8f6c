"""Set up before anything imports torch or triton: one cache for the session, one thread a process, no network, kernels as on this machine."""
import os, shutil, tempfile

import pytest

CACHE = tempfile.mkdtemp(prefix='effpt-tests-')
os.environ.update(EFFPT_CACHE=CACHE, EFFPT_PROFILE='smoke', OMP_NUM_THREADS='1', MPLBACKEND='agg', TOKENIZERS_PARALLELISM='false',
                  HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TRANSFORMERS_OFFLINE='1')
for name in 'EFFPT_KERNELS', 'TRITON_INTERPRET': os.environ.pop(name, None)

import effpt_kernels  # noqa: E402,F401  sets TRITON_INTERPRET where there is no GPU

PAGE_SECONDS = pytest.StashKey()


def pytest_configure(config):
    config.stash[PAGE_SECONDS] = {}


@pytest.fixture(scope='session')
def page_seconds(pytestconfig):
    "Seconds by page, for the table at the end."
    return pytestconfig.stash[PAGE_SECONDS]


def pytest_terminal_summary(terminalreporter, config):
    seconds = sorted(config.stash[PAGE_SECONDS].items(), key=lambda item: -item[1])[:10]
    if not seconds: return
    terminalreporter.section('slowest 10 notebooks')
    for page, s in seconds: terminalreporter.line(f'{s:6.2f} s  {page}')


def pytest_sessionfinish():
    shutil.rmtree(CACHE, ignore_errors=True)
