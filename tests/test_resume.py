"""Runs that are killed, stopped, or hit by a fault of the disk end with the bits of an undisturbed one."""
import contextlib
import itertools
import json
import multiprocessing as mp
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from effpt import checkpoint
from effpt.basics import rng

STEPS = 30
ARGUMENTS = dict(data=None, limit=200, held_out=.1, eval_tokens='3k', budget=f'{STEPS} steps', batch=4, length=32, vocab=512, precision='float32', save_every=8, quiet=True)


@pytest.fixture(scope='module')
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp('text')
    verses = (Path(__file__).parent/'golden.txt').read_text().splitlines()
    (folder/'verses.jsonl').write_text(''.join(json.dumps(dict(text=v)) + "\n" for v in verses))
    return str(folder/'verses.jsonl')


def train(out, text, workers=0, resume=False):
    torch.set_num_threads(1)
    from effpt.recipe import pretrain
    return pretrain(**{**ARGUMENTS, 'data': text, 'workers': workers}, out=out, resume=resume)


def final(out):
    "The bits of the last checkpoint: weights, moments and position; the ledger's seconds are no two times the same."
    parts = checkpoint.load(checkpoint.latest(Path(out)/'checkpoints'))
    assert parts['run']['step'] == STEPS
    tensors, tree = checkpoint.flatten({k: parts[k] for k in ('model', 'optimizer', 'data')})
    return tensors, tree


def same(a, b): return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(t, b[0][k]) for k, t in a[0].items())


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory, text):
    out = tmp_path_factory.mktemp('undisturbed')/'run'
    began = time.monotonic()
    train(out, text)
    return final(out), time.monotonic() - began


@pytest.mark.parametrize('budget', ['12 steps', '1536', '1e9 FLOPs'])
def test_a_run_of_stages_resumes_in_the_second(tmp_path, text, budget):
    from effpt.recipe import pretrain
    from effpt.schedule import linear
    arguments = ARGUMENTS | dict(data=text, budget=budget, save_every=5, shape=dict(width=32, layers=1, heads=2, hidden=64), stages=[dict(share=.5), dict(share=.5, schedule=linear)])
    run = pretrain(**arguments, out=tmp_path/'run').run
    again = pretrain(**arguments, out=tmp_path/'run', resume=True).run
    assert (again.step, again.stage, again.marks, again.edits) == (run.step, 1, run.marks, run.edits) and 0 < run.marks['stage'] < 1
    assert all(torch.equal(p, q) for p, q in zip(run.model.parameters(), again.model.parameters()))


def in_process(*arguments):
    "Start `train` in a process that was forked from one with torch loaded."
    context = mp.get_context('forkserver')
    context.set_forkserver_preload(['torch', 'effpt.recipe'])
    process = context.Process(target=train, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize('i', range(10))
def test_kill_9_at_any_moment(i, tmp_path, text, undisturbed):
    expected, duration = undisturbed
    out, workers = tmp_path/'run', (0, 2)[i % 2]
    process = in_process(out, text, workers)
    while not (out/'run.json').exists() and process.is_alive(): time.sleep(.01)
    time.sleep(rng(0, 'kill', i).uniform(0, duration / 2))
    process.kill()  # SIGKILL
    process.join()
    for folder in checkpoint.checkpoints(out/'checkpoints'): checkpoint.verify(folder)
    before = checkpoint.latest(out/'checkpoints')
    print('killed with', before.name if before else 'no checkpoint yet')
    train(out, text, workers, resume=True)
    assert same(final(out), expected)
    steps = [row['step'] for row in metrics(out) if 'loss' in row]
    assert steps == list(range(1, STEPS + 1))


def metrics(out):
    return [json.loads(line) for line in (out/'metrics.jsonl').read_text().splitlines()]


def test_one_fault_at_each_write_flush_and_rename(tmp_path, text, undisturbed):
    expected, _ = undisturbed
    total = count_operations(tmp_path/'counting', text)
    assert total > 50
    picks = [*range(6), *sorted(rng(0, 'fault').choice(range(8, total), 8, replace=False).tolist())]
    for nth in picks:
        out = tmp_path/f'run{nth}'
        with pytest.raises(OSError), faults(nth): train(out, text)
        if (out/'run.json').exists(): train(out, text, resume=True)
        else: train(out, text)  # nothing was begun: the same command starts it
        assert same(final(out), expected), nth
        shutil.rmtree(out)


@contextlib.contextmanager
def faults(nth, count=None):
    "The nth write of tensors, flush or rename on the disk fails; `count` is told how many there were."
    counter = itertools.count()

    def faulty(real):
        def call(*args, **kwargs):
            n = next(counter)
            if count is not None: count.append(n)
            if n == nth: raise OSError(5, 'Input/output error')
            return real(*args, **kwargs)
        return call
    with (mock.patch.multiple(os, fsync=faulty(os.fsync), rename=faulty(os.rename), replace=faulty(os.replace)),
          mock.patch.object(checkpoint, 'save_file', faulty(checkpoint.save_file))): yield


def count_operations(out, text):
    count = []
    with faults(-1, count): train(out, text)
    return len(count)


COMMAND = [str(Path(sys.executable).with_name('effpt'))]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_exit(number, tmp_path, text):
    out = tmp_path/'run'
    words = ['train', '--data', text, '--out', str(out), '--steps', '100000', '--batch', '4', '--length', '32', '--vocab', '512', '--held-out', '0.1',
             '--precision', 'float32', '--workers', '1', '--save-every', '1h']
    process = subprocess.Popen(COMMAND + words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (out/'metrics.jsonl').exists() and process.poll() is None and time.monotonic() < deadline: time.sleep(.1)
        time.sleep(1)
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
    finally: process.kill()
    assert process.returncode == 128 + number, printed
    assert 'Traceback' not in printed and f'Stopped by {number.name}' in printed and 'effpt resume' in printed
    saved = checkpoint.load(checkpoint.latest(out/'checkpoints'))
    assert saved['run']['step'] == len(metrics(out)) > 0
