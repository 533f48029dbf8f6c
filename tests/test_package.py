"""What is installed is what the repository holds: wheel, modules, names, exports, and nothing beside the agreed files."""
import json, os, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest

from effpt.book import pages

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted('.'.join(p.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__') for p in (ROOT/'effpt').rglob('*.py'))
KERNELS = sorted(f'effpt_kernels.{p.stem}'.removesuffix('.__init__') for p in (ROOT/'kernels').glob('*.py'))


def run(*command, cwd, check=True, **environment):
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if check and done.returncode: pytest.fail(f'{" ".join(map(str, command))}\n{done.stdout}', pytrace=False)
    return done


def copy_of_repository(folder, *names):
    "The parts `names` of the repository, without caches and build folders."
    skip = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '*.egg-info', 'build')
    for name in names:
        source = ROOT/name
        shutil.copytree(source, folder/name, symlinks=True, ignore=skip) if source.is_dir() else shutil.copy2(source, folder/name)
    return folder


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel, built from a copy so that nothing is left in the repository."
    folder = copy_of_repository(tmp_path_factory.mktemp('wheel'), 'pyproject.toml', 'settings.ini', 'README.md', 'LICENSE', 'effpt', 'kernels')
    run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', 'dist', '.', cwd=folder)
    return zipfile.ZipFile(next((folder/'dist').glob('*.whl')))


def test_wheel_holds_every_module_and_data_file(wheel):
    held = {n for n in wheel.namelist() if '.dist-info/' not in n}
    data = {p.relative_to(ROOT).as_posix() for p in (ROOT/'effpt').rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    assert held == data | {f'effpt_kernels/{p.relative_to(ROOT/"kernels").as_posix()}' for p in (ROOT/'kernels').rglob('*.py')}


def test_wheel_names_command_line_and_license(wheel):
    text = {Path(n).name: wheel.read(n).decode() for n in wheel.namelist() if '.dist-info/' in n}
    assert 'effpt = effpt.cli:main' in text['entry_points.txt'] and 'effpt = effpt._modidx:d' in text['entry_points.txt']
    assert 'Apache License' in text['LICENSE'] and 'Requires-Dist: torch' in text['METADATA']


@pytest.mark.parametrize('module', MODULES + KERNELS)
def test_module_imports_in_a_fresh_interpreter(module):
    done = run(sys.executable, '-c', f'import {module}', cwd=ROOT/'tests', check=False)
    if done.returncode: pytest.fail(done.stdout, pytrace=False)


def test_no_undefined_names():
    done = run(sys.executable, '-m', 'pyflakes', 'effpt', 'kernels', 'tests', cwd=ROOT, check=False)
    bad = [line for line in done.stdout.splitlines() if 'undefined name' in line or 'unable to detect undefined names' in line]
    assert not bad, '\n'.join(bad)


def test_import_needs_no_torch():
    code = 'import sys, time; start = time.perf_counter(); import effpt; print(f"import effpt: {time.perf_counter() - start:.3f} s")\n' \
           'assert not {"torch", "numpy", "datasets", "matplotlib"} & set(sys.modules)'
    print(run(sys.executable, '-c', code, cwd=ROOT/'tests').stdout)


def sources(root):
    "The modules and notebooks under `root`, by path."
    found = [p for p in (*(root/'effpt').rglob('*.py'), *(root/'nbs').rglob('*.ipynb')) if not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in found}


def test_export_is_fresh_and_notebooks_are_clean(tmp_path):
    folder = copy_of_repository(tmp_path, 'settings.ini', 'effpt', 'nbs', '_quarto.yml', 'pyproject.toml')
    for module in (folder/'effpt').rglob('*.py'):
        if module.name not in ('__init__.py', '_modidx.py'): module.unlink()      # what no notebook gives must not stay
    run(sys.executable, '-c', 'import nbdev; nbdev.nbdev_export(); from nbdev.clean import nbdev_clean; nbdev_clean()', cwd=folder)
    ours, theirs = sources(ROOT), sources(folder)
    changed = sorted(p for p in ours.keys() | theirs.keys() if ours.get(p) != theirs.get(p))
    assert not changed, f'run nbdev_export and nbdev_clean: {", ".join(changed)}'


def test_top_level_holds_the_agreed_files_only():
    agreed = set('settings.ini README.md nbs effpt kernels tests _quarto.yml pyproject.toml constraints.txt LICENSE CHANGELOG.md'.split())
    if not (ROOT/'.git').exists(): pytest.skip('not a clone')
    listed = run('git', '-c', 'safe.directory=*', 'ls-files', '--cached', '--others', '--exclude-standard', cwd=ROOT).stdout.splitlines()
    top = {line.split('/')[0] for line in listed}
    assert {t for t in top if not t.startswith('.')} == agreed
    assert {t for t in top if t.startswith('.')} <= {'.ci', '.github', '.gitignore', '.gitattributes'}


def test_notebooks_keep_to_the_house_rules():
    bad = []
    for path in pages(ROOT):
        cells = json.loads(path.read_text())['cells']
        first = ''.join(cells[0]['source']).strip().splitlines()
        if not (first[0].startswith('# ') and first[-1].startswith('> ') and len(first) <= 4): bad.append(f'{path.name}: the first cell is a title and a summary')
        long = [''.join(c['source']) for c in cells if c['cell_type'] == 'code' and len(''.join(c['source']).splitlines()) > 40]
        bad += [f'{path.name}: a cell of over 40 lines, which starts with {" ".join(source.split()[:8])}' for source in long]
    if bad: pytest.fail('\n'.join(bad), pytrace=False)


def test_the_tested_set_names_all_that_is_installed():
    "What the constraints leave out comes in any version, and a tested set that is not whole is none."
    from importlib.metadata import PackageNotFoundError, requires
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    pinned = {canonicalize_name(line.partition('==')[0]) for line in (ROOT/'constraints.txt').read_text().splitlines() if '==' in line}
    seen, todo = set(), [('effpt', frozenset({'dev'}))]
    while todo:
        name, extras = item = todo.pop()
        if item in seen: continue
        seen.add(item)
        try: needed = [Requirement(r) for r in requires(name) or ()]
        except PackageNotFoundError: continue   # of another platform, or of an extra nobody asked for
        for r in needed:
            if r.marker is None or any(r.marker.evaluate({'extra': e}) for e in extras | {''}): todo.append((canonicalize_name(r.name), frozenset(r.extras)))
    missing = {name for name, _ in seen} - pinned - {'effpt'}
    assert not missing, f'constraints.txt has no version of {", ".join(sorted(missing))}'
