"The corpus: what a notebook cannot hold: faults, memory, processes, and sets that are not there everywhere."
import errno, gzip, json, os, shutil, subprocess, sys, time
from pathlib import Path

import datasets, numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest
from datasets import Dataset

from effpt import corpus
from effpt.basics import InputError
from effpt.corpus import corpus_fingerprint, load, split

TEXTS = ['The first text.', 'Zwölf Boxkämpfer jagen Viktor.', 'A text with\n\nan empty line, and 漢字.', '<|end|>']


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('EFFPT_CACHE', str(tmp_path/'cache'))
    return tmp_path/'cache'


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ---- formats

def jsonl(texts): return ''.join(json.dumps(dict(text=t)) + '\n' for t in texts).encode()

def parquet(texts, **kw):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(text=texts)), sink, **kw)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize('name, data', [('a.jsonl', jsonl(TEXTS)), ('a.ndjson', jsonl(TEXTS)), ('a.parquet', parquet(TEXTS)), ('a.parquet', parquet(TEXTS, row_group_size=1))])
@pytest.mark.parametrize('packed', [False, True])
def test_rows(tmp_path, name, data, packed):
    path = write(tmp_path/(name + '.gz' * packed), gzip.compress(data) if packed else data)
    ds = load(path, quiet=True)
    assert ds['text'][:] == TEXTS
    assert ds.column_names == ['text', 'domain', 'source']
    assert ds['source'][0] == f'{path.name}:1' and set(ds['domain'][:]) == {'a'}


@pytest.mark.parametrize('name', ['a.txt', 'a.md', 'a.txt.gz', 'a.py', 'a.py.gz', 'no-extension'])
def test_one_document(tmp_path, name):
    text = 'x = 1\n\n\ny = "ü"\n'
    data = b'\xef\xbb\xbf' * ('py' not in name) + text.replace('\n', '\r\n').encode()
    ds = load(write(tmp_path/name, gzip.compress(data) if name.endswith('.gz') else data), quiet=True)
    assert ds['text'][:] == [text]


@pytest.mark.parametrize('column', [pa.array(TEXTS).dictionary_encode(), pa.array(TEXTS, pa.large_string()), pa.array([t.encode() for t in TEXTS])])
def test_parquet_types(tmp_path, column):
    pq.write_table(pa.table(dict(text=column)), tmp_path/'a.parquet')
    assert load(tmp_path/'a.parquet', quiet=True)['text'][:] == TEXTS


def test_a_long_text_is_cut(tmp_path):
    paragraphs = [f'Paragraph {i}. ' + 'word ' * (i % 40) + '\n' for i in range(20_000)]
    ds = load(write(tmp_path/'a.txt', '\n'.join(paragraphs)), quiet=True)
    sizes = corpus.text_bytes(ds)
    assert 400 < len(ds) < 600 and sizes.max() < 64_000
    assert '\n'.join(''.join(ds['text'][:]).split('\n\n')).split() == ' '.join(paragraphs).split()
    line = int(ds['source'][100].split(':')[1])
    assert '\n'.join(paragraphs).split('\n')[line - 1] == ds['text'][100].split('\n')[0]


def test_lines_without_blank_ones_are_cut(tmp_path):
    ds = load(write(tmp_path/'a.txt', 'a line of words\n' * 20_000), quiet=True)
    assert len(ds) == 5 and corpus.text_bytes(ds).max() <= 64_000


def test_dates_and_domains_are_kept(tmp_path):
    write(tmp_path/'a.jsonl', '{"text": "old", "date": "1945", "domain": "speech", "source": "Truman"}\n{"text": "undated"}\n')
    ds = load(tmp_path/'a.jsonl', quiet=True)
    assert ds[0] == dict(text='old', domain='speech', source='Truman', date='1945')
    assert ds[1] == dict(text='undated', domain='a', source='a.jsonl:2', date=None)


def test_limit_takes_from_everywhere(tmp_path):
    for i in range(30): write(tmp_path/'set'/f'{i:02}.txt', f'text {i}')
    some = load(tmp_path/'set', limit=10, quiet=True)
    assert len(some) == 10 and some['source'][:] != sorted(some['source'][:])
    assert load(tmp_path/'set', limit=10, quiet=True)['text'][:] == some['text'][:]


# ---- bad input

BAD = {
    'missing.txt': (None, {}, 'missing.txt does not exist'),
    'a.bin': (b'\0\1', {}, 'a.bin is a binary file'),
    'utf16.txt': ('text'.encode('utf-16'), {}, 'is a binary file'),
    'a.csv': (b'text\n1\n', {}, 'load_dataset'),
    'a.json': (b'[]', {}, 'write it as .jsonl'),
    'a.zip': (b'PK', {}, 'unpack it first'),
    'empty.txt': (b'', {}, "empty.txt' holds no text"),
    'blank.jsonl': (b'{"text": " "}\n\n', {}, "blank.jsonl' holds no text"),
    'list.jsonl': (b'[1]\n', {}, 'list.jsonl:1 is not an object'),
    'broken.jsonl': (b'{"text": "a"}\n{"text": \n', {}, 'broken.jsonl:2 is not valid JSON'),
    'column.jsonl': (b'{"txt": "a"}\n', {}, "column.jsonl:1 has no column 'text', did you mean 'txt'?; there are txt"),
    'number.jsonl': (b'{"text": 7}\n', {}, "number.jsonl:1: column 'text' holds int, not text"),
    'columns.jsonl': (b'{"question": "a"}\n', dict(column='question,answer'), "has no column 'answer'"),
    'latin.txt': (b'one\ntwo\nthr\xe9e\n', dict(strict=True), 'latin.txt: line 3 is not valid UTF-8 (byte 0xe9)'),
    'latin.py': (b'x = 1\ny = "\xe9"\n', dict(strict=True), 'latin.py: line 2 is not valid UTF-8'),
    'latin.jsonl': (b'{"text": "a"}\n{"text": "\xff"}\n', dict(strict=True), 'latin.jsonl: line 2 is not valid UTF-8'),
    'half.jsonl': (b'{"text": "\\ud800"}\n', dict(strict=True), 'half.jsonl:1 holds half of a surrogate pair'),
    'long.txt': (b'short\n' + b'x' * 2001, dict(max_document='2kB'), 'long.txt: line 2 is longer than 2 kB'),
    'long.jsonl': (jsonl(['a', 'x' * 2000]), dict(max_document='2kB'), 'long.jsonl: line 2 is longer'),
    'long.parquet': (parquet(['a', 'x' * 2001]), dict(max_document='2kB'), 'long.parquet: row 2 is longer'),
    'long.py': (b'x' * 2001, dict(max_document='2kB'), 'long.py is longer'),
    'table.parquet': (parquet([1, 2]), {}, "column 'text' holds int64, not text"),
    'other.parquet': (parquet(['a']), dict(column='body'), "has no column 'body'"),
    'cut.parquet': (parquet(TEXTS * 100)[:-20], {}, 'cut.parquet is not a Parquet file'),
    'not.parquet': (b'hello', {}, 'not.parquet is not a Parquet file'),
    'cut.txt.gz': (gzip.compress(os.urandom(9000).hex().encode())[:-100], {}, 'cut.txt.gz is damaged'),
    'not.txt.gz': (b'hello', {}, 'not.txt.gz is damaged'),
}

@pytest.mark.parametrize('name', BAD)
def test_bad_file(tmp_path, name, cache):
    data, arguments, says = BAD[name]
    if data is not None: write(tmp_path/name, data)
    with pytest.raises(InputError) as caught: load(tmp_path/name, quiet=True, **arguments)
    assert says in str(caught.value) and '\n' not in str(caught.value)
    assert not cache.exists() or not any((cache/'corpus').iterdir())  # nothing half made is left


def test_limits_are_inclusive(tmp_path):
    for name, data in {'a.txt': b'x' * 2000 + b'\r\n', 'a.parquet': parquet(['x' * 2000]), 'a.py': b'x' * 2000}.items():
        assert len(load(write(tmp_path/name, data), max_document='2kB', quiet=True)) == 1


def test_damaged_in_the_middle(tmp_path):
    data = bytearray(parquet([os.urandom(500).hex() for _ in range(1000)], compression='none', row_group_size=100))
    start = len(data) // 2
    data[start:start + 40_000] = os.urandom(40_000)
    with pytest.raises(InputError, match='is not a Parquet file|invalid'): load(write(tmp_path/'a.parquet', bytes(data)), strict=True, quiet=True)


def test_folder_without_text(tmp_path):
    write(tmp_path/'set'/'a.png', b'\x89PNG\0')
    with pytest.raises(InputError, match='holds no file to read.*a.png'): load(tmp_path/'set', quiet=True)


def test_replaced_and_passed_over_is_told(tmp_path, capsys):
    write(tmp_path/'set'/'a.txt', b'caf\xe9'), write(tmp_path/'set'/'b.txt', b'\0'), write(tmp_path/'set'/'c.jsonl', b'{"text": "\\ud800"}\n{"text": ""}\n')
    for _ in range(2):  # also when it comes from the cache
        ds = load(tmp_path/'set')
        told = capsys.readouterr().out
        assert ds['text'][:] == ['caf\ufffd', '\ufffd']
        assert 'replaced: 2 (a.txt 1, c.jsonl 1)' in told and '1 (b.txt)' in told and 'empty documents left out: 1' in told
        assert str(tmp_path) not in told


@pytest.mark.parametrize('data, says', [(3, 'not a int'), (datasets.DatasetDict(), 'choose one split'), ('python/pose', "did you mean 'python/prose'"), ('./x/y', 'does not exist')])
def test_bad_name(monkeypatch, data, says):
    def offline(*a, **k): raise ConnectionError('no network')
    monkeypatch.setattr(datasets, 'load_dataset', offline)
    with pytest.raises(InputError, match=says): load(data, quiet=True)


def test_hub_names(monkeypatch):
    asked = []
    def answer(*name, split): asked.append((*name, split)); return Dataset.from_dict(dict(text=TEXTS))
    monkeypatch.setattr(datasets, 'load_dataset', answer)
    for name in 'org/name', 'org/name:test', 'org/name/config:validation', 'name': assert load(name, quiet=True)['text'][:] == TEXTS
    assert asked == [('org/name', 'train'), ('org/name', 'test'), ('org/name', 'config', 'validation'), ('name', 'train')]


def test_datasets(tmp_path):
    ds = Dataset.from_dict(dict(body=['a', None, 'b'], n=[1, 2, 3]))
    assert load(ds, column='body', quiet=True)['text'][:] == ['a', 'b']
    with pytest.raises(InputError, match="no column 'text'; known: body, n"): load(ds)
    with pytest.raises(InputError, match="'dataset': row 0 is longer"): load(ds, column='body', max_document=0)
    again = load(load(ds, column='body', quiet=True), quiet=True)
    assert again['source'][:] == ['dataset:0', 'dataset:2']


# ---- caches

def arrow_file(cache): return next((cache/'corpus').glob('*/data.arrow'))


def test_moved_or_touched_is_the_same(tmp_path, cache):
    write(tmp_path/'one'/'set'/'a.txt', 'text')
    shutil.copytree(tmp_path/'one', tmp_path/'two')
    os.utime(tmp_path/'two'/'set'/'a.txt', (0, 0))
    assert corpus_fingerprint(load(tmp_path/'one'/'set', quiet=True)) == corpus_fingerprint(load(tmp_path/'two'/'set', quiet=True))
    assert len(list((cache/'corpus').iterdir())) == 1
    write(tmp_path/'two'/'set'/'a.txt', 'Text')
    load(tmp_path/'two'/'set', quiet=True)
    assert len(list((cache/'corpus').iterdir())) == 2


@pytest.mark.parametrize('harm', ['flip', 'cut', 'remove', 'meta'])
def test_damaged_cache_is_made_again(tmp_path, cache, harm):
    path = write(tmp_path/'a.jsonl', jsonl(TEXTS))
    load(path, quiet=True)
    file = arrow_file(cache)
    data = bytearray(file.read_bytes())
    if harm == 'flip': data[len(data) // 2] ^= 1; file.write_bytes(data)
    if harm == 'cut': file.write_bytes(data[:-100])
    if harm == 'remove': file.unlink()
    if harm == 'meta': (file.parent/'meta.json').write_text('{"files": 3}')
    assert load(path, quiet=True)['text'][:] == TEXTS


@pytest.mark.parametrize('code', [errno.ENOSPC, errno.EIO])
def test_full_disk(tmp_path, cache, monkeypatch, code):
    path = write(tmp_path/'a.txt', 'text')
    def fails(handle): raise OSError(code, os.strerror(code))
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', fails)
        with pytest.raises(InputError if code == errno.ENOSPC else OSError, match='disk is full' if code == errno.ENOSPC else None): load(path, quiet=True)
    assert not any((cache/'corpus').iterdir())
    assert load(path, quiet=True)['text'][:] == ['text']


def test_two_processes_build_the_same(tmp_path):
    meta = [dict(), dict()]
    with corpus.seal(tmp_path/'x', meta[0]) as one:
        (one/'f').write_text('same')
        with corpus.seal(tmp_path/'x', meta[1]) as two: (two/'f').write_text('same')
    assert corpus.sealed(tmp_path/'x') == meta[0] == meta[1]
    assert [p.name for p in tmp_path.iterdir()] == ['x']


# ---- processes

def test_the_number_of_processes_does_not_matter(tmp_path, monkeypatch):
    found = []
    for n in 1, 2, 3:
        monkeypatch.setenv('EFFPT_CACHE', str(tmp_path/f'cache{n}'))
        monkeypatch.setattr(corpus, '_cores', lambda: n)
        ds = load('python', limit=200, quiet=True)
        parts = split(ds, 0.1, quiet=True)
        found.append((corpus_fingerprint(ds), corpus_fingerprint(parts.train), corpus_fingerprint(parts.held_out), parts.fingerprint, parts.report))
    assert found[0] == found[1] == found[2]


@pytest.mark.skipif(sys.platform != 'linux', reason='sessions of processes')
@pytest.mark.parametrize('how', ['kill', 'die'])
def test_workers_end_with_their_parent(tmp_path, how):
    code = f'''
import os, time
from effpt.corpus import spread
def work(shared, job):
    if job == 1 and "{how}" == "die": os._exit(9)
    print(job, flush=True)
    time.sleep(0 if job < 4 else 600)
list(spread(work, None, list(range(8)), workers=3))
'''
    run = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    if how == 'kill':
        run.stdout.readline()
        run.kill()
    assert 'BrokenProcessPool' in run.communicate(timeout=60)[1] or how == 'kill'  # a dead worker is an error, not a wait for ever
    for _ in range(200):
        try: os.killpg(run.pid, 0)
        except ProcessLookupError: return
        time.sleep(.1)
    os.killpg(run.pid, 9)
    pytest.fail('workers are still there')


def test_built_in_names_nobody(tmp_path):
    ds = load('python', limit=300, quiet=True)
    assert not any(s.startswith('/') or 'site-packages' in s for s in ds['source'][:])
    assert {d.split('/')[1] for d in ds['domain'][:]} <= {'docstring', 'reference', 'code'}
    assert len(set(ds['text'][:])) == len(ds)


# ---- held out

def test_held_out_is_stable_and_disjoint():
    rng = np.random.default_rng(0)
    texts = [' '.join(map(str, rng.integers(0, 10_000, 60))) for i in range(3000)]
    parts = split(Dataset.from_dict(dict(text=texts)), 0.1, quiet=True)
    more = split(Dataset.from_dict(dict(text=['something new'] * 50 + texts[::-1])), 0.1, quiet=True)
    assert set(parts.held_out['text'][:]) == set(more.held_out['text'][:]) - {'something new'}
    assert 230 < len(parts.held_out) < 370 and parts.report['near_copies'] == 0
    assert len(parts.train) + len(parts.held_out) == 3000


def test_a_split_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv('EFFPT_CACHE', str(tmp_path))
    searches, search = [], corpus._decide
    monkeypatch.setattr(corpus, '_decide', lambda *args: searches.append(args[1:3]) or search(*args))
    texts = [f'document {i} of some' for i in range(200)]
    def says(parts): return parts.train['text'][:], parts.held_out['text'][:], parts.report, parts.fingerprint
    def again(texts=texts, **arguments): return says(split(Dataset.from_dict(dict(text=texts)), **dict(held_out=.1, quiet=True) | arguments))
    first = again()
    assert again() == first and searches == [(.1, .8)]
    assert again(held_out=.2)[1] != first[1] and again(near=.9) and again(texts[:150])[0] != first[0] and len(searches) == 4
    for kept in (tmp_path/'splits').glob('*/held_out.npy'): kept.write_bytes(b'damaged')
    assert again() == first and len(searches) == 5
    with pytest.raises(InputError, match='no document is left'): again(held_out=1 - 1e-12)
    assert len([*(tmp_path/'splits').iterdir()]) == 4


def test_planted_copies_are_found():
    rng = np.random.default_rng(0)
    vocabulary = [f'word{i}' for i in range(5000)]
    base = [' '.join(rng.choice(vocabulary, 80)) for _ in range(400)]
    def changed(text): ws = text.split(); ws[rng.integers(len(ws))] = 'changed'; return ' '.join(ws)
    copies = [t.upper().replace(' ', ',\n') for t in base] + [changed(t) for t in base] + [f'before {t} after' for t in base]
    parts = split(Dataset.from_dict(dict(text=base + copies)), 0.1, quiet=True)
    grams = lambda t: {tuple(corpus.words(t)[i:i + 5]) for i in range(len(corpus.words(t)) - 4)}
    held = [grams(t) for t in parts.held_out['text'][:]]
    assert parts.report['near_copies'] > 60 and parts.report['repeats'] > 20
    for t in parts.train['text'][:]:
        g = grams(t)
        assert all(len(g & h) < .8 * len(h) for h in held)


def test_signs_without_spaces():
    held = '天地玄黄宇宙洪荒日月盈昃辰宿列张'
    assert corpus.contained([held + '。', held[:8], '寒来暑往秋收冬藏'], corpus.shingle_index([held]), .8).tolist() == [0]


@pytest.mark.parametrize('texts, arguments, says', [(['a'], {}, 'no document of 1 was held out'), (['a', 'b'], dict(held_out=1.5), 'give a share'), ([], {}, 'no document of 0'),
                                                  (['a', 'b'], dict(held_out=1 - 1e-12), 'no document is left to train on')])
def test_split_refuses(texts, arguments, says):
    with pytest.raises(InputError, match=says): split(Dataset.from_dict(dict(text=pa.array(texts, pa.string()))), quiet=True, **arguments)


# ---- memory: anonymous memory of the whole process, sampled while it works

MEASURE = '''
import sys, threading, time
from effpt.basics import InputError
from effpt.corpus import load, split
from effpt.tokens import encode, train_tokenizer
def anonymous(): return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith('RssAnon'))
peak, before, stop = 0, anonymous(), threading.Event()
def watch():
    global peak
    while not stop.is_set(): peak = max(peak, anonymous()); time.sleep(.002)
thread = threading.Thread(target=watch); thread.start()
try: {work}
except InputError as e: print(e)
stop.set(); thread.join()
print((peak - before) / 1e6)
'''

def growth(work, cache):
    "Megabytes by which the anonymous memory of a fresh process grows."
    run = subprocess.run([sys.executable, '-c', MEASURE.replace('{work}', work)], capture_output=True, text=True, env=os.environ | dict(EFFPT_CACHE=str(cache), RAYON_NUM_THREADS='2'))
    assert run.returncode == 0, run.stderr
    *said, mb = run.stdout.strip().split('\n')
    return float(mb), ' '.join(said)

linux = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='anonymous memory is read from /proc')


@linux
def test_a_large_file_is_not_held_in_memory(tmp_path, cache):
    rng = np.random.default_rng(0)
    words = [''.join(chr(97 + c) for c in rng.integers(0, 26, n)) for n in rng.integers(2, 10, 3000)]
    with open(tmp_path/'big.txt', 'w') as file:
        while file.tell() < 64_000_000: file.write('\n\n'.join(' '.join(words[i] for i in row) for row in rng.integers(0, 3000, (500, 100))))
    mb, said = growth(f'split(load(r"{tmp_path}/big.txt"))', cache)
    assert mb < 50 and '64 MB' in said, (mb, said)


@linux
@pytest.mark.parametrize('name', ['line.txt', 'line.jsonl.gz'])
def test_a_document_of_200_mb_is_refused(tmp_path, cache, name):
    with (gzip.open if name.endswith('.gz') else open)(tmp_path/name, 'wb') as file:
        file.write(b'{"text": "' if 'jsonl' in name else b'')
        for _ in range(200): file.write(b'word ' * 200_000)
    mb, said = growth(f'load(r"{tmp_path}/{name}")', cache)
    assert mb < 80 and f'{name}: line 1 is longer than 16 MB' in said, (mb, said)


# ---- named sets

sets = pytest.mark.skipif(not os.environ.get('EFFPT_DATA'), reason='EFFPT_DATA names no folder of sets')
def need(name):
    if name not in corpus.named_sets(): pytest.skip(f'{name} is not under EFFPT_DATA')


def test_named_set(tmp_path, monkeypatch):
    write(tmp_path/'data'/'mine'/'a.txt', 'text')
    monkeypatch.setenv('EFFPT_DATA', str(tmp_path/'data'))
    monkeypatch.chdir(tmp_path)
    assert load('mine', quiet=True)[0] == dict(text='text', domain='mine', source='a.txt:1')


@sets
@pytest.mark.parametrize('name', ['tinyshakespeare', 'wikitext-2', 'state_union', 'movie_reviews'])
def test_text_sets(name):
    need(name)
    ds = load(name, quiet=True)
    parts = split(ds, .02, quiet=True)
    assert len(parts.held_out) and corpus.text_bytes(ds).sum() > 1_000_000
    if name == 'state_union': assert min(ds['date'][:]) == '1945'


@sets
def test_a_set_with_other_columns():
    need('gsm8k')
    with pytest.raises(InputError, match='known: answer, question: choose with column='): load('gsm8k', quiet=True)
    ds = load('gsm8k', column='question,answer', quiet=True)
    assert len(ds) == 7473 and ds['text'][0].startswith('Natalia') and '\n\nNatalia sold 48/2' in ds['text'][0]
