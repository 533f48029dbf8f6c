"""The command line as a user meets it: the README's commands, and one sentence with exit code 2 for everything that is wrong."""
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from effpt import checkpoint
from effpt.catalog import techniques
from effpt.cli import main, recipe_of

HERE = Path(__file__).parent
SMALL = '--steps 6 --batch 4 --length 32 --vocab 512 --held-out 0.1 --eval-tokens 2k --precision float32 --quiet'.split()


@pytest.fixture(scope='module')
def verses(tmp_path_factory):
    folder = tmp_path_factory.mktemp('verses')
    lines = (HERE/'golden.txt').read_text().splitlines()
    (folder/'verses.jsonl').write_text(''.join(json.dumps(dict(text=v, book='Genesis')) + '\n' for v in lines))
    return str(folder/'verses.jsonl')


@pytest.fixture(scope='module')
def run(tmp_path_factory, verses):
    out = tmp_path_factory.mktemp('run')/'run'
    assert main(['train', '--data', verses, '--out', str(out), *SMALL]) == 0
    return out


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    "Run a command that must be refused: one sentence, exit code 2, and nothing left behind in the current folder."
    monkeypatch.chdir(tmp_path)

    def call(*words, left=()):
        capsys.readouterr()
        before = {p.name for p in tmp_path.iterdir()}
        assert main([str(w) for w in words]) == 2
        error = capsys.readouterr().err
        said = [line for line in error.splitlines() if line.startswith('effpt: ')]
        assert len(said) == 1 and 'Traceback' not in error, error
        assert {p.name for p in tmp_path.iterdir()} - before <= set(left)
        return said[0]
    return call


def test_results_are_said(run, capsys, verses, tmp_path):
    main(['train', '--data', verses, '--out', str(tmp_path/'other'), *SMALL])
    out = capsys.readouterr().out
    for word in 'bits per byte', 'Cost', 'train', 'evaluate', 'Sample', 'report.html', 'curve.png', 'effpt generate', 'effpt export': assert word in out, word
    html = (run/'report.html').read_text()
    assert 'bits per byte' in html.lower() and 'src="http' not in html and 'href="http' not in html


def test_text_in_many_forms(verses, tmp_path, capsys):
    lines = [json.loads(line) for line in Path(verses).read_text().splitlines()]
    folder = tmp_path/'texts'
    folder.mkdir()
    for i, row in enumerate(lines[:40]): (folder/f'{i}.txt').write_text(row['text'])
    with gzip.open(folder/'more.jsonl.gz', 'wt') as file: file.writelines(json.dumps(row) + '\n' for row in lines[40:])
    assert main(['train', '--data', str(folder), '--out', str(tmp_path/'run'), *SMALL[:-1]]) == 0
    assert '160 documents' in capsys.readouterr().out


def test_bad_input(refused, tmp_path, verses):
    (tmp_path/'empty.txt').write_text('')
    (tmp_path/'one.txt').write_text('Only one document, and a short one.')
    (tmp_path/'latin.txt').write_bytes(b'caf\xe9 ' * 400)
    (tmp_path/'program.txt').write_bytes(b'\x7fELF\x00\x00\x01')
    (tmp_path/'broken.jsonl').write_text('{"text": "fine"}\n{"text": \n')
    train = lambda data, *words: refused('train', '--data', data, '--out', 'out', *SMALL, *words)
    assert 'nowhere.txt' in train('nowhere.txt')
    assert 'empty.txt' in train('empty.txt')
    assert 'held' in train('one.txt')
    assert 'latin.txt' in train('latin.txt', '--strict')
    assert 'program.txt' in train('program.txt')
    assert 'broken.jsonl' in train('broken.jsonl') and '2' in train('broken.jsonl')
    said = train(verses, '--column', 'bok')
    assert "'bok'" in said and 'book' in said
    assert 'smaller than one step' in refused('train', '--data', verses, *SMALL[2:], '--tokens', '20', '--out', 'out', left=['out'])
    assert 'nothing' in train(verses, '--steps', '0')
    assert "did you mean 'micro'" in train(verses, '--size', 'mikro')


def test_a_document_of_200_mb(refused, tmp_path):
    with open(tmp_path/'huge.txt', 'wb') as file:
        for _ in range(200): file.write(b'no blank line ever ' * 52632)
    assert 'huge.txt' in refused('train', '--data', 'huge.txt', '--out', 'out', *SMALL)


def test_a_folder_that_holds_another_run(refused, run, verses):
    before = sorted(p.name for p in run.rglob('*'))
    assert 'holds another run' in refused('train', '--data', verses, '--out', run, *SMALL)
    assert sorted(p.name for p in run.rglob('*')) == before


def copy_of(run, tmp_path):
    shutil.copytree(run, tmp_path/'copy')
    return tmp_path/'copy', checkpoint.latest(tmp_path/'copy'/'checkpoints')


@pytest.mark.parametrize('harm', ['flipped', 'cut', 'lost', 'pickle'])
def test_damaged_checkpoints(harm, refused, run, tmp_path):
    copy, saved = copy_of(run, tmp_path)
    file = saved/'model.safetensors'
    if harm == 'flipped':
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 16
        file.write_bytes(content)
    if harm == 'cut': file.write_bytes(file.read_bytes()[:-100])
    if harm == 'lost': file.unlink()
    if harm == 'pickle':
        for p in saved.iterdir(): p.unlink()
        torch.save(dict(a=torch.ones(2)), saved/'model.pt')
    for words in (['resume', copy], ['generate', copy], ['export', copy]):
        said = refused(*words)
        assert ('model.pt' if harm == 'pickle' else 'model.safetensors') in said


@pytest.mark.parametrize('key, value, says', [('limit', 100, 'another corpus'), ('vocab', 400, 'another tokenizer'), ('length', 16, 'another length'), ('size', 'micro', 'another model shape')])
def test_resuming_something_else(key, value, says, refused, run, tmp_path):
    copy, _ = copy_of(run, tmp_path)
    described = json.loads((copy/'run.json').read_text())
    described['about']['recipe'][key] = value
    if key == 'vocab': (copy/'tokenizer.json').unlink()
    (copy/'run.json').write_text(json.dumps(described))
    said = refused('resume', copy, '--quiet')
    assert says in said or (key == 'limit' and 'another tokenizer' in said), said


def test_a_full_disk(refused, verses, tmp_path):
    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    assert main(['train', '--data', verses, '--out', str(tmp_path/'kept'), *SMALL]) == 0
    with mock.patch.object(checkpoint, 'save_file', full):
        assert 'the disk is full' in refused('train', '--data', verses, '--out', 'out', *SMALL, left=['out'])
    assert main(['resume', 'out', '--quiet']) == 0  # there is space again
    a, b = (checkpoint.load(checkpoint.latest(p/'checkpoints'))['model'] for p in (tmp_path/'out', tmp_path/'kept'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_loss_that_is_no_number(refused, verses):
    said = refused('train', '--data', verses, '--out', 'out', *SMALL, '--steps', '200', '--lr', '1e30', '--clip', '1e30', left=['out'])
    assert 'at step' in said and 'batch' in said and 'learning rate' in said


def fresh(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=os.environ)


@pytest.fixture
def recipe(tmp_path, verses):
    "Write a recipe for a tiny run: `recipe(name, lines)`."
    plain = f'data = {json.dumps(verses)}\nbudget = "6 steps"\nbatch = 4\nlength = 32\nvocab = 512\nheld_out = 0.1\neval_tokens = "2k"\nprecision = "float32"\ncompile = false\n'

    def write(name, lines=''):
        (tmp_path/f'{name}.toml').write_text(plain + lines)
        return str(tmp_path/f'{name}.toml')
    return write


def results(folder):
    return checkpoint.load(checkpoint.latest(Path(folder)/'checkpoints'))['run']['results']


def test_recipes_are_run_and_options_come_before_them(recipe, tmp_path, capsys):
    ours = recipe('ours', 'schedule = ["linear", {name = "warmup", share = 0.2}]\n')
    assert main(['train', '--recipe', ours, '--out', str(tmp_path/'a'), '--quiet']) == 0
    assert main(['train', '--recipe', str(tmp_path/'a'/'recipe.toml'), '--out', str(tmp_path/'b'), '--quiet']) == 0
    assert results(tmp_path/'a') == results(tmp_path/'b')
    assert main(['train', '--recipe', ours, '--steps', '4', '--seed', '1', '--out', str(tmp_path/'c'), '--quiet']) == 0
    capsys.readouterr()
    assert main(['diff', str(tmp_path/'a'), str(tmp_path/'c')]) == 0
    said = capsys.readouterr().out
    assert re.search('budget +6 steps +4 steps', said) and re.search('seed +0 +1', said) and 'recipe.schedule' not in said, said


def test_wrong_recipes(refused, recipe, tmp_path):
    assert "did you mean 'lr'" in refused('train', '--recipe', recipe('a', 'lrr = 1\n'))
    assert "did you mean 'warmup'" in refused('train', '--recipe', recipe('b', 'schedule = ["linear", "warmupp"]\n'))
    assert "did you mean 'share'" in refused('train', '--recipe', recipe('c', 'schedule = ["linear", {name = "warmup", shar = 0.1}]\n'))
    assert 'd.toml' in refused('train', '--recipe', recipe('d', 'loss = [\n'))
    assert 'nowhere.toml' in refused('train', '--recipe', 'nowhere.toml')
    assert 'tokens and in steps' in refused('train', '--recipe', recipe('e'), '--steps', '3', '--tokens', '1M')


def test_compare(recipe, tmp_path, capsys):
    base, other = recipe('base'), recipe('other', 'lr = 1e-6\n')
    assert main(['compare', base, other, '--seeds', '2', '--no-tune', '--quiet', '--out', str(tmp_path/'all.json')]) == 0
    said = capsys.readouterr().out
    assert re.search(r'^base ', said, re.M) and re.search(r'^other .*±', said, re.M) and 'no verdict on tokens' in said, said
    assert set(json.loads((tmp_path/'all.json').read_text())['arms']) == {'base', 'other'}


def test_compare_by_name(verses, capsys):
    assert main(['compare', 'adamw', 'galore,rank=8', 'per_layer', '--data', verses, '--budget', '2 steps', '--seeds', '2', '--no-tune', '--quiet', '--cost', 'bytes']) == 0
    said = capsys.readouterr().out
    assert re.search(r'^galore,rank=8 .*±', said, re.M) and re.search(r'^per_layer .*±', said, re.M) and 'weights, gradients and state' in said, said


@pytest.mark.parametrize('name', sorted(techniques()))
def test_every_technique_is_a_recipe_by_its_name(name):
    from effpt.recipe import build
    known = techniques()[name]
    needed = ','.join([*known['needs'], name])
    slots = build(recipe_of(needed))
    assert name == 'adamw' or known['slot'] in slots


def test_wrong_comparisons(refused, recipe):
    assert "no technique 'muom', did you mean 'muon'" in refused('compare', 'adamw', 'muom')
    assert "did you mean 'rank'" in refused('compare', 'adamw', 'galore,rnk=3')
    base = recipe('base')
    assert 'one recipe cannot be compared' in refused('compare', base)
    assert 'given twice' in refused('compare', base, base)
    assert 'one seed shows no spread' in refused('compare', base, recipe('same'), '--seeds', '1')
    assert "did you mean 'tokens'" in refused('compare', base, recipe('same'), '--cost', 'token')
    Path(recipe('longer')).write_text(Path(base).read_text().replace('6 steps', '7 steps'))
    assert 'budget' in refused('compare', base, Path(base).with_name('longer.toml'))
    assert 'does not exist' in refused('diff', 'runs/a', 'runs/b')


def test_plan(capsys, refused):
    assert main('plan --size 7b --optim galore --rank 1024 --memory 24GB'.split()) == 0
    assert 'optimizer' in capsys.readouterr().out
    assert "did you mean 'rank'" in refused(*'plan --size 7b --optim galore --rnk 1024'.split())
    assert "did you mean 'galore'" in refused(*'plan --optim galor'.split())
    assert "did you mean '7b'" in refused(*'plan --size 7bb'.split())
    assert "'memory'" in refused(*'plan --memroy 24GB'.split())


def test_wrong_names_of_pages(refused, monkeypatch):
    assert 'from a clone' in refused('book', '04_schedule')
    monkeypatch.chdir(HERE.parent)
    assert "did you mean '04_schedule'" in refused('book', '04_schedul')
    assert "'gpu'" in refused('book', '04_schedule', '--profile', 'gpo')


def test_list_needs_no_torch():
    done = fresh('import sys, effpt.cli; effpt.cli.main(["list"]); assert not {"torch", "datasets", "matplotlib"} & sys.modules.keys(), sys.modules.keys()')
    assert 'effpt.recipe' in done.stdout


def test_export_loads_in_transformers(run, capsys):
    transformers = pytest.importorskip('transformers')
    assert main(['export', str(run), '--to', 'hf']) == 0
    from effpt.recipe import open_run
    trained, theirs = open_run(run), transformers.AutoModelForCausalLM.from_pretrained(run/'hf')
    tokenizer = transformers.AutoTokenizer.from_pretrained(run/'hf')
    text = 'In the beginning God created'
    assert tokenizer(text)['input_ids'] == trained.tokenizer.encode(text)
    tokens = torch.tensor([trained.tokenizer.encode(text)])
    assert torch.allclose(trained.model(tokens), theirs(tokens).logits, atol=1e-5)


def test_generate_writes(run, capsys):
    assert main(['generate', str(run), '--prompt', 'And God', '--tokens', '12', '--temperature', '0']) == 0
    assert capsys.readouterr().out.startswith('And God')
