"""One notebook is enough: a page that is added to a copy of the repository appears wherever techniques do, with nothing else edited."""
import json, re, sys, time
from pathlib import Path

import pytest

from effpt.catalog import papers
from test_package import copy_of_repository, run

PAPER = next(p['id'] for p in papers() if not p['built'])
CELLS = [
    ('markdown', '# Toy\n\n> Descent with momentum, to see that a page is enough.'),
    ('code', '#| default_exp optim.toy'),
    ('code', f"""#| export
card = {{
    'papers': ['{PAPER}'],
    'saves': 'half of the optimizer state', 'costs': 'patience', 'when': 'a test needs a page', 'avoid': 'where anything is to be learned',
    'techniques': {{
        'toy': {{'slot': 'optimizer', 'kind': 'base', 'touches': ['optimizer state'], 'case': {{'momentum': 0.5}}, 'without': ['linear']}}}},
}}"""),
    ('code', '#| export\nimport torch\n\nfrom effpt.basics import InputError'),
    ('code', '#| hide\nfrom effpt.catalog import show_card'),
    ('code', "#| exec_doc\nshow_card('optim/toy')"),
    ('markdown', 'The velocity $v_t = \\mu v_{t-1} + g_t$ moves the weights.'),
    ('markdown', '## The optimizer'),
    ('code', '''#| exports
def toy(
    model: torch.nn.Module,  # whose parameters
    lr: float = 0.01,  # the schedule's factor 1
    momentum: float = 0.9,  # $\\mu$
) -> torch.optim.Optimizer:
    "Descent with momentum."
    if not lr > 0: raise InputError(f'lr is {lr}: give a rate above 0.')
    if not 0 <= momentum < 1: raise InputError(f'momentum is {momentum}: give a share below 1.')
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters: raise InputError('the model has nothing to train.')
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum)'''),
    ('code', "assert toy(torch.nn.Linear(2, 2)).defaults['momentum'] == .9"),
    ('markdown', '## Measurement'),
    ('code', "#| eval: false\nfrom effpt.compare import Claim, compare\nmeasured = compare({'adamw': {}, 'toy': {'optimizer': 'toy'}})"),
    ('markdown', '## Verdict'),
    ('code', "#| eval: false\nmeasured.verdict(Claim(says='it is a toy', arm='toy', cost='bytes'))"),
    ('markdown', '## Use it'),
    ('code', 'from effpt.optim.toy import toy\nmodel = torch.nn.Linear(2, 2)\noptimizer = toy(model, lr=.1)'),
    ('markdown', 'It needs one number per weight.')]


def notebook(cells):
    code = dict(execution_count=None, outputs=[])
    made = [dict(cell_type=kind, id=f'cell{i}', metadata={}, source=source.splitlines(keepends=True), **(code if kind == 'code' else {})) for i, (kind, source) in enumerate(cells)]
    return json.dumps(dict(cells=made, metadata={}, nbformat=4, nbformat_minor=5), indent=1)


def contents(root): return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob('*') if p.is_file() and '__pycache__' not in p.parts}


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy with the toy's page, exported; the paths of the files that this changed; and when it began."
    start = time.monotonic()
    folder = copy_of_repository(tmp_path_factory.mktemp('copy'), 'settings.ini', 'README.md', 'pyproject.toml', '_quarto.yml', 'effpt', 'kernels', 'nbs', 'tests')
    before = contents(folder)
    (folder/'nbs'/'optim'/'toy.ipynb').write_text(notebook(CELLS))
    run(sys.executable, '-c', 'import nbdev; nbdev.nbdev_export()', cwd=folder)
    after = contents(folder)
    return folder, {p for p in before.keys() | after.keys() if before.get(p) != after.get(p)}, start


def python(folder, code, *words):
    "What `code` prints in a fresh interpreter that takes effpt from the copy."
    return run(sys.executable, '-c', code, *words, cwd=folder, PYTHONPATH=str(folder)).stdout


def test_export_makes_a_module_and_changes_nothing_else(copy):
    _, changed, _ = copy
    assert changed == {'nbs/optim/toy.ipynb', 'effpt/optim/toy.py', 'effpt/_modidx.py'}


def test_catalogue(copy):
    code = f'''import json, sys
import effpt.catalog as c
t, paper = c.techniques()["toy"], next(p for p in c.papers() if p["id"] == "{PAPER}")
said = dict(file=c.__file__, page=t["page"], slot=t["slot"], case=t["case"], without=t["without"], built=paper["built"], table=str(c.part_table("optim")))
print(json.dumps(said))
assert not {{"torch", "numpy"}} & sys.modules.keys()'''
    said = json.loads(python(copy[0], code))
    assert Path(said['file']).is_relative_to(copy[0])
    assert (said['page'], said['slot'], said['case'], said['without'], said['built']) == ('optim/toy', 'optimizer', {'momentum': .5}, ['linear'], True)
    assert '[toy](toy.ipynb)' in said['table']


def test_command_line(copy):
    code = 'import sys; from effpt.cli import main; code = main(sys.argv[1:]); assert not {"torch", "numpy"} & sys.modules.keys(); sys.exit(code)'
    assert re.search('^  toy +optimizer ', python(copy[0], code, 'list'), re.MULTILINE)
    shown = python(copy[0], code, 'show', 'toy')
    assert 'half of the optimizer state' in shown and 'patience' in shown


def test_generic_tests_and_pairs(copy):
    "They are made for it, and it passes them."
    files = [f'tests/{name}.py' for name in ('test_techniques', 'test_pairs', 'test_pages')]
    printed = run(sys.executable, '-m', 'pytest', '-vv', '-k', 'toy', '--durations=3', '-p', 'no:cacheprovider', *files, cwd=copy[0], PYTHONPATH=str(copy[0]), EFFPT_PAIRS='all').stdout
    passed = {line.split()[0] for line in printed.splitlines() if ' PASSED' in line}
    print(printed)
    for test in ('test_techniques.py::test_trains[toy]', 'test_techniques.py::test_resumes_to_the_same_bits[toy]', 'test_techniques.py::test_works_on_other_models[toy-Llama]',
                 'test_techniques.py::test_wrong_arguments_raise[toy-momentum=nan]', 'test_pairs.py::test_forbidden_pairs_are_refused[linear+toy]',
                 'test_pages.py::test_rooms[optim/toy]'): assert f'tests/{test}' in passed
    assert any(name.startswith('tests/test_pairs.py::test_together[') for name in passed)


def test_docs(copy, note):
    "Of the other pages only the titles are rendered, and parts that these two do not link to not at all: test_docs.py does it all."
    folder = copy[0]
    for path in (folder/'nbs').rglob('*.ipynb'):
        page = path.relative_to(folder/'nbs').as_posix()
        if page in ('optim/toy.ipynb', 'optim/index.ipynb'): continue
        if page.startswith('optim/') or '/' not in page:
            path.write_text(json.dumps(dict(cells=json.loads(path.read_text())['cells'][:1], metadata={}, nbformat=4, nbformat_minor=5)))
        else: path.unlink()
    python(folder, 'from effpt.book import site, sidebar; site("site", "."); sidebar(".")')
    page, part = ((folder/'site'/'optim'/name).read_text() for name in ('toy.html', 'index.html'))
    assert '<h1>Toy</h1>' in page and 'half of the optimizer state' in page      # the card is drawn
    assert 'Built and not measured yet' in part and 'href="toy.html">toy</a>' in part     # the part names it
    assert 'optim/toy.ipynb' in (folder/'nbs'/'sidebar.yml').read_text()
    assert 'href="optim/toy.html"' in (folder/'site'/'index.html').read_text()
    note(f'a page written, exported, listed, tested and rendered in {time.monotonic() - copy[2]:.0f} s')
