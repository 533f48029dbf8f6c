"""Set up before anything imports torch or triton: one cache for the session, one thread a process, no network, kernels as on this machine; and the whole suite over the cores there are."""
import functools, os, shutil, tempfile

import pytest

WORKER = 'PYTEST_XDIST_WORKER' in os.environ
CACHE = os.environ['EFFPT_CACHE'] if WORKER else tempfile.mkdtemp(prefix='effpt-tests-')
os.environ.update(EFFPT_CACHE=CACHE, EFFPT_PROFILE='smoke', OMP_NUM_THREADS='1', MPLBACKEND='agg', TOKENIZERS_PARALLELISM='false',
                  HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', TRANSFORMERS_OFFLINE='1')
for name in 'EFFPT_KERNELS', 'TRITON_INTERPRET': os.environ.pop(name, None)

import effpt_kernels  # noqa: E402,F401  sets TRITON_INTERPRET where there is no GPU
from device import DEVICE, needs_triton  # noqa: E402

ALONE = 'test_page', 'test_together', 'test_module_imports_in_a_fresh_interpreter'   # tests that share nothing with the others of their file


def pytest_xdist_auto_num_workers(config):
    "A worker a core for the whole suite; none where files are named, as a worker takes longer to start than most of these."
    return len(os.sched_getaffinity(0)) if config.args_source is not config.ArgsSource.ARGS else 0


def pytest_collection_modifyitems(items):
    "Tests of one file go to one worker, since they share fixtures; those of techniques by technique, since they share runs."
    for item in items:
        if item.originalname in ALONE: continue
        given = item.callspec.params if item.path.stem == 'test_techniques' and hasattr(item, 'callspec') else {}
        technique = given.get('case') or given.get('name')
        item.add_marker(pytest.mark.xdist_group(technique.partition(',')[0] if isinstance(technique, str) else item.path.stem))


@pytest.fixture
def kernels(monkeypatch):
    "Kernels as kernels, compiled or interpreted."
    monkeypatch.setenv('EFFPT_KERNELS', 'gpu' if DEVICE == 'cuda' else 'interpret')


@pytest.fixture(params=['reference', pytest.param('kernel', marks=needs_triton)])
def how(request, monkeypatch):
    "Both ways of running a kernel."
    monkeypatch.setenv('EFFPT_KERNELS', 'torch' if request.param == 'reference' else 'gpu' if DEVICE == 'cuda' else 'interpret')


@pytest.fixture
def note(record_property):
    "Say something that stands at the end of the session, once."
    return functools.partial(record_property, 'note')


@pytest.fixture
def page_seconds(record_property):
    "Tell how long a page took, for the table at the end."
    return lambda page, seconds: record_property('page', (page, seconds))


def pytest_terminal_summary(terminalreporter):
    said = [said for reports in terminalreporter.stats.values() for r in reports if getattr(r, 'when', '') == 'call' for said in r.user_properties]
    for line in dict.fromkeys(value for name, value in said if name == 'note'): terminalreporter.line(line)
    seconds = sorted((value for name, value in said if name == 'page'), key=lambda item: -item[1])[:10]
    if not seconds: return
    terminalreporter.section('slowest 10 notebooks')
    for page, s in seconds: terminalreporter.line(f'{s:6.2f} s  {page}')


def pytest_sessionfinish():
    if not WORKER: shutil.rmtree(CACHE, ignore_errors=True)
