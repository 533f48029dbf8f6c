"""Every page of a technique from a paper has the same rooms in the same order, found by what the cells are, not by their words:

1. the title with a summary, `#| default_exp`, and then, before any other definition, the exported literal `card = {...}`; a cell that calls `show_card`;
2. the idea: text with a formula between the card and the first exported function;
3. the code: every section (## or ###) that exports a function or class ends its code with a cell that is not exported: a test, or a look;
4. the measurement: a cell that calls `compare`;
5. the verdict: after it, a cell that calls `.verdict`;
6. use it: after that, a cell that imports a technique of the page from the installed module, as a reader would, and calls it;
7. costs, limits, further reading: the last cell is text."""
import ast, json, re
from pathlib import Path

import pytest

from effpt.book import page_name, pages
from effpt.catalog import techniques

ROOT = Path(__file__).resolve().parents[1]
TECHNIQUES = techniques()
PAGES = sorted({t['page'] for t in TECHNIQUES.values() if t['papers'] or t['sources']})     # what a paper claims must be measured


class Cell:
    "A cell of a notebook, and what it does."
    def __init__(self, cell):
        self.code, self.text = cell['cell_type'] == 'code', ''.join(cell['source'])
        lines = self.text.splitlines()
        self.directives = {m[1] for line in lines if (m := re.match(r'#\|\s*([\w-]+)', line))} if self.code else set()
        self.exported = bool(self.directives & {'export', 'exports', 'exporti'})
        source = '\n'.join(line for line in lines if not line.lstrip().startswith(('%', '!')))
        self.tree = ast.parse(source) if self.code else ast.Module([], [])
        self.defines = {n.name for n in self.tree.body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
        self.assigns = {t.id for n in self.tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}

    def calls(self, *names): return any(isinstance(n, ast.Call) and called(n.func) in names for n in ast.walk(self.tree))
    def imports(self, module, names): return any(isinstance(n, ast.ImportFrom) and n.module == module and names & {a.name for a in n.names} for n in ast.walk(self.tree))
    def is_heading(self): return not self.code and bool(re.match('#{2,3} ', self.text))


def called(function): return function.attr if isinstance(function, ast.Attribute) else getattr(function, 'id', None)


def read(page): return [Cell(c) for c in json.loads((ROOT/'nbs'/f'{page}.ipynb').read_text(encoding='utf-8'))['cells']]


def untested(cells):
    "Headings of the sections that end with a definition."
    sections = [('the beginning', [])]
    for c in cells:
        if c.is_heading(): sections.append((c.text.splitlines()[0].lstrip('# '), []))
        sections[-1][1].append(c)
    for title, held in sections:
        defined = [i for i, c in enumerate(held) if c.exported and c.defines]
        if defined and not any(c.code and not c.exported for c in held[defined[-1] + 1:]): yield title


def missing_rooms(
    cells,   # of the page
    names,   # its techniques
    module,  # where they are installed
):
    "What the page lacks, in words, in the order of the rooms."
    def first(found, after=-1): return next((i for i, c in enumerate(cells) if i > after and found(c)), len(cells))
    end, card, defined = len(cells), first(lambda c: c.exported and 'card' in c.assigns), first(lambda c: c.exported and c.defines)
    shown, compared = first(lambda c: c.calls('show_card')), first(lambda c: c.calls('compare'), defined)
    judged = first(lambda c: c.calls('verdict'), compared)
    imported = first(lambda c: not c.exported and c.imports(module, names), judged)
    used = first(lambda c: not c.exported and c.calls(*names), imported - 1)
    lacks = {
        'a card: `card = {...}`, exported, before the first definition': card < defined < end,
        'its card shown: a call of show_card before the first definition': card < shown < defined,
        'the idea: text with a formula before the first definition': any('$' in c.text for c in cells[card:defined] if not c.code),
        **{f'a test after the last definition under "{title}"': False for title in untested(cells)},
        'the measurement: a call of compare': compared < end,
        'the verdict: a call of verdict after the measurement': judged < end,
        f'use it: a cell after the verdict that imports from {module}, and a call': used < end,
        'text at its end: costs, limits, further reading': not cells[-1].code and (len(cells[-1].text.splitlines()) > 1 or not cells[-1].is_heading())}
    return [room for room, there in lacks.items() if not there]


@pytest.mark.parametrize('page', PAGES)
def test_rooms(page):
    names, module = {n for n, t in TECHNIQUES.items() if t['page'] == page}, f"effpt.{page.replace('/', '.')}"
    lacks = missing_rooms(read(page), names, module)
    if lacks: pytest.fail(f'{page} lacks\n' + '\n'.join(lacks), pytrace=False)


@pytest.mark.parametrize('page', PAGES)
def test_the_page_names_each_technique_in_a_test(page):
    "Each technique is called by a cell that is not exported."
    called_somewhere = {n for n, t in TECHNIQUES.items() if t['page'] == page for c in read(page) if not c.exported and c.calls(n)}
    assert called_somewhere == {n for n, t in TECHNIQUES.items() if t['page'] == page}


BOOK = [page_name(path, ROOT) for path in pages(ROOT)]


@pytest.mark.parametrize('page', BOOK)
def test_a_page_begins_with_what_it_is_about(page):
    "On the site, a page does not begin with what it imports: exported imports and the card are left out, as the card is drawn; the other imports are folded."
    top = True
    for c in read(page):
        top = top and not c.is_heading()
        imports = [isinstance(n, (ast.Import, ast.ImportFrom)) for n in c.tree.body]
        only = bool(imports) and all(imports)
        assert 'exports' not in c.directives or not (only or c.assigns == {'card'}), c.text
        assert c.exported or c.directives & {'hide', 'code-fold'} or not (top and only or any(imports) and c.calls('figures')), c.text
        assert any(imports) or 'code-fold' not in c.directives, c.text


def page(*cells): return [Cell(dict(cell_type='code' if kind else 'markdown', source=[text])) for kind, text in cells]


WHOLE = [(0, '# A'), (1, "#| exports\ncard = {}"), (1, "show_card('a')"), (0, '$x$'), (0, '## Code'), (1, '#| exports\ndef f(): pass'), (1, 'f()'),
         (0, '## Measured'), (1, 'c = compare({})'), (1, 'c.verdict(x)'), (1, 'from effpt.a import f\nf()'), (0, '## Limits\n\nNone.')]


def test_the_rule_itself():
    lacks = lambda cells: missing_rooms(page(*cells), {'f'}, 'effpt.a')
    assert not lacks(WHOLE)
    for i, word in {1: 'card', 2: 'shown', 3: 'formula', 6: 'a test after', 8: 'compare', 9: 'verdict', 10: 'use it', 11: 'text at its end'}.items():
        assert any(word in room for room in lacks(WHOLE[:i] + WHOLE[i + 1:])), word
    assert lacks([WHOLE[i] for i in (0, 1, 2, 3, 4, 5, 6, 7, 9, 8, 10, 11)])     # a verdict before the measurement
