"""What the page on monitoring cannot show in a notebook: real terminals, real kernels, real event files, killed processes, full disks."""
import errno, fcntl, json, os, pty, signal, struct, subprocess, sys, termios, textwrap, time
from types import SimpleNamespace

import pytest

from effpt.basics import InputError
from effpt.monitor import Callback, JsonLines, LiveCurve, ProgressBar, TensorBoard, columns, curve, read_metrics, report

# A stand-in for the training loop; as text, since other processes need it too.
LOOP = textwrap.dedent('''
    from types import SimpleNamespace
    from effpt.monitor import *

    def pretend(callbacks, steps=20, out=None, start=0, pause=0., known=True, rank=0):
        import time
        run = SimpleNamespace(step=start, tokens=start * 64, flops=0., seconds=start * .5, total_steps=steps if known else None,
                              progress=start / steps, out=out, rank=rank, stopped=None)
        for c in callbacks: c.before_fit(run)
        for run.step in range(start + 1, steps + 1):
            run.tokens, run.seconds, run.progress = run.step * 64, run.step * .5, run.step / steps
            if run.step > 5: run.total_steps = steps
            row = dict(step=run.step, tokens=run.tokens, flops=0., seconds=run.seconds, loss=5 / run.step ** .5)
            for c in callbacks: c.after_step(run, row)
            if run.step % 10 == 0:
                for c in callbacks: c.after_evaluate(run, dict(accuracy=run.step / 100, loss=5 / run.step ** .5))
            time.sleep(pause)
        for c in callbacks: c.after_fit(run)
        return run
    ''')
exec(LOOP, space := {})
pretend = space['pretend']


def python(code, **kw):
    "Run code after the loop's definition in a fresh interpreter."
    return subprocess.Popen([sys.executable, '-c', LOOP + textwrap.dedent(code)], **kw)


def test_a_callback_needs_no_method():
    callback = Callback()
    pretend([callback], steps=3)
    callback.before_save(None)
    callback.after_save(None, None)
    callback.load_state_dict(callback.state_dict())


# --- the bar

def in_terminal(code):
    "What a program shows in a terminal."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 40, 160, 0, 0))
    process = python(code, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = b''
    while True:
        try: part = os.read(ours, 4096)
        except OSError: break  # Linux's way to say that the other side is closed
        if not part: break
        shown += part
    os.close(ours)
    assert process.wait(60) == 0, shown
    return shown.decode()


def test_a_terminal_gets_a_bar_that_learns_the_number_of_steps_late():
    shown = in_terminal('pretend([ProgressBar()], known=False, pause=.05)')
    frames = shown.split('\r')
    assert frames[1].startswith('0 steps, 00:00')
    assert '| 20/20, 00:00 left' in shown and '100%' in shown
    assert 'loss' in frames[-2] + frames[-1] and 'tokens/s' in shown and 'held-out loss 1.118' in shown
    assert shown.count('\n') == 1


def test_a_resumed_bar_starts_where_the_run_stands():
    assert '| 15/20, ' in in_terminal('pretend([ProgressBar()], start=15)').split('\r')[1]


def test_quiet_and_other_ranks_show_nothing():
    assert in_terminal('pretend([ProgressBar(quiet=True)]); pretend([ProgressBar()], rank=1)') == ''


def test_a_pipe_gets_plain_lines_on_stderr():
    process = python('pretend([ProgressBar()], steps=40)', stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=60)
    lines = err.splitlines()
    assert out == '' and '\r' not in err and len(lines) == 11
    assert lines[0].startswith('step 1/40, loss 5.000') and lines[-1].startswith('step 40/40, ') and 'left' in lines[5]


def test_a_stopped_run_gets_a_last_line(capsys):
    bar, run = ProgressBar(), SimpleNamespace(step=0, tokens=0, seconds=0., total_steps=100, progress=0., rank=0)
    bar.before_fit(run)
    for run.step in range(1, 16):
        run.progress = run.step / 100
        bar.after_step(run, dict(step=run.step, tokens=run.step, seconds=run.step, loss=2.))
    bar.after_fit(run)
    assert capsys.readouterr().err.splitlines()[-1].startswith('step 15/100')


def test_loss_that_is_not_a_number_is_survived(capsys):
    bar, run = ProgressBar(), SimpleNamespace(step=1, tokens=0, seconds=0., total_steps=1, progress=1., rank=0)
    bar.before_fit(run)
    bar.after_step(run, dict(step=1, tokens=8, seconds=1., loss=float('nan')))
    bar.after_fit(run)
    assert 'nan' not in capsys.readouterr().err


# --- rows

@pytest.mark.parametrize('cut', [1, 5, 30, 60])
def test_rows_cut_anywhere_are_repaired(tmp_path, cut):
    pretend([JsonLines()], out=tmp_path)
    path = tmp_path/'metrics.jsonl'
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert read_metrics(tmp_path) == [json.loads(line) for line in whole.splitlines()][:21 if cut > 1 else 22]
    pretend([JsonLines()], out=tmp_path, start=14)
    assert path.read_bytes() == whole


def test_a_new_run_starts_a_new_file(tmp_path):
    for _ in range(2): pretend([JsonLines()], out=tmp_path)
    assert columns(read_metrics(tmp_path))['step'] == list(range(1, 21))


def test_killed_between_writes_the_file_is_readable_and_goes_on(tmp_path):
    process = python(f'pretend([JsonLines(every=.01)], steps=10**6, out={str(tmp_path)!r}, pause=.001)')
    path = tmp_path/'metrics.jsonl'
    while not path.exists() or path.stat().st_size < 5000: time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    steps = columns(read_metrics(tmp_path))['step']
    assert steps == list(range(1, len(steps) + 1))
    pretend([JsonLines()], out=tmp_path, steps=40, start=30)
    assert columns(read_metrics(tmp_path))['step'] == list(range(1, 41))


def test_rows_are_on_the_disk_before_a_checkpoint(tmp_path):
    log = JsonLines(every=1e9)
    run = SimpleNamespace(step=0, tokens=0, flops=0., seconds=0., out=tmp_path, rank=0)
    log.before_fit(run)
    for moment in log.flush, lambda: log.before_save(run), lambda: log.after_fit(run):
        run.step += 1
        log.after_step(run, dict(step=run.step))
        moment()
        assert read_metrics(tmp_path)[-1]['step'] == run.step


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch):
    log = JsonLines(every=1e9)
    log.before_fit(SimpleNamespace(step=0, out=tmp_path, rank=0))
    log.after_step(None, dict(step=1))
    def full(handle): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr(os, 'fsync', full)
        with pytest.raises(InputError, match='metrics.jsonl could not be written: the disk is full'): log.flush()
    assert log.waiting


def test_going_back_in_mid_run_drops_the_rows_after_it(tmp_path):
    log, live, bar, board = watching = JsonLines(every=1e9), LiveCurve(), ProgressBar(quiet=True), TensorBoard()
    run = SimpleNamespace(step=0, tokens=0, flops=0., seconds=0., total_steps=9, progress=0., out=tmp_path, rank=0)
    for c in watching: c.before_fit(run)
    def go_to(end):
        for run.step in range(run.step + 1, end + 1):
            for c in watching: c.after_step(run, dict(step=run.step, tokens=run.step, seconds=1., loss=1.))
    go_to(7)
    run.step = 4
    for c in watching: c.before_fit(run)
    go_to(9)
    for c in watching: c.after_fit(run)
    assert columns(read_metrics(tmp_path))['step'] == list(range(1, 10))


def test_tensors_and_numpy_numbers_become_numbers(tmp_path):
    import numpy as np, torch
    log = JsonLines()
    log.before_fit(SimpleNamespace(step=0, out=tmp_path, rank=0))
    log.after_step(None, dict(step=1, a=torch.tensor(2.5), b=np.float64('inf'), c=np.int64(3), d=torch.tensor(float('nan'))))
    log.flush()
    assert read_metrics(tmp_path) == [dict(step=1, a=2.5, b=None, c=3, d=None)]


# --- loggers

def test_tensorboard_files_read_back_and_forget_repeated_steps(tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    pretend([TensorBoard()], out=tmp_path)
    pretend([TensorBoard()], out=tmp_path, start=15)
    events = EventAccumulator(str(tmp_path/'tensorboard')).Reload()
    assert {'train/loss', 'train/tokens', 'train/seconds', 'evaluate/accuracy', 'evaluate/loss'} <= set(events.Tags()['scalars'])
    assert [e.step for e in events.Scalars('train/loss')] == list(range(1, 21))
    assert [round(e.value, 4) for e in events.Scalars('evaluate/accuracy')] == [.1, .2]
    assert events.Scalars('train/loss')[3].value == pytest.approx(2.5)


def test_other_ranks_log_nothing(tmp_path):
    pretend([TensorBoard(), JsonLines()], out=tmp_path, rank=1)
    assert not list(tmp_path.iterdir())


# --- pictures

def test_a_curve_needs_no_display_and_no_pyplot(tmp_path):
    pretend([JsonLines()], out=tmp_path)
    code = f'''
        import sys, matplotlib
        before = dict(dict.items(matplotlib.rcParams))  # looking up the backend would import pyplot
        curve({str(tmp_path)!r}, {str(tmp_path/'curve.png')!r})
        assert 'matplotlib.pyplot' not in sys.modules and dict(dict.items(matplotlib.rcParams)) == before'''
    env = {k: v for k, v in os.environ.items() if k not in ('DISPLAY', 'MPLBACKEND')}
    assert python(code, env=env).wait(60) == 0
    assert (tmp_path/'curve.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('rows', [
    [dict(step=1, tokens=64, loss=3.)],
    [dict(step=i, tokens=i, loss=2.) for i in range(1, 9)],
    [dict(step=i, tokens=i, loss=None if i > 3 else 2. / i) for i in range(1, 9)],
    [dict(step=1, tokens=64, loss=3.), dict(step=1, tokens=64, evaluate=dict(accuracy=.5))],
    [dict(step=1, tokens=0, evaluate=dict(loss=9.)), dict(step=1, tokens=64, loss=3.)],
], ids=['one step', 'constant', 'ends in nan', 'other metrics', 'evaluated first'])
def test_odd_runs_are_drawn_and_reported(tmp_path, rows):
    (tmp_path/'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    curve(tmp_path, tmp_path/'curve.png')
    text = report(tmp_path, dict(bytes=dict(parameters=0), ledger=[dict(name='train')])).read_text()
    assert '<svg' in text and 'nan' not in text


def test_a_report_escapes_every_entry(tmp_path):
    bad = '<img src=x onerror=alert(1)>"\'&'
    summary = dict(title=bad, results={bad: 1.}, parameters=5, ledger=[dict(name=bad, tokens=1, flops=1, seconds=1)], bytes={bad: 5},
                   sample=dict(prompt=bad, text=bad + '\x00\ud800'), commands=[bad], files={bad: bad}, arguments={bad: [bad]}, machine={bad: bad})
    text = report(tmp_path, summary).read_text(encoding='utf-8')
    assert '<img' not in text and text.count('&lt;img') >= 12 and '\x00' not in text


def test_a_kernel_shows_one_live_curve(tmp_path):
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    pytest.importorskip('ipykernel')
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LOOP + 'pretend([LiveCurve(), ProgressBar()], pause=.08)')])
    nbclient.NotebookClient(book, timeout=120, kernel_name='python3', resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    outputs = book.cells[0].outputs
    assert sum('image/png' in o.get('data', {}) for o in outputs) == 1
    assert not any(o.get('text', '').startswith('step 1/') for o in outputs)  # a bar, not lines


def test_live_curve_is_silent_elsewhere(capsys):
    pretend([LiveCurve()])
    assert capsys.readouterr() == ('', '')
