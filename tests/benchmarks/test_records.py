"""Records know their machine: a run elsewhere replaces none, the page is made of them, and no ratio
stands in a text without the machine it was measured on."""

import json
import re

import pytest

from benchmarks.harness import docs, measure, records
from benchmarks.harness.case import find_cases
from hrvlm_jax.core import machine

ROOT = records.ROOT
# Files of benchmarks/results that are not records: constants of hrvlm plan, by chip.
CONSTANTS = 'tpu_costs_*.json'
# What says that two speeds or sizes were compared.
RATIO = re.compile(
  r'\d(?:\.\d+)?\s?(?:x|times|×) (?:as )?(?:fast|slow|quick|the (?:peer|speed)|its speed)'
  r"|\d\.\d+ of (?:the|its) peer|of the peer's (?:speed|memory)"
  r'|(?:half|twice|(?:several|ten|\d) times) as (?:fast|slow)|\d\s?% (?:faster|slower)'
  r'|\| ratio \||ratio (?:was|is|of) \d', re.IGNORECASE)
MACHINE = re.compile(r'(?:AMD|Intel|Arm|Apple) family \d+|NVIDIA|H100|H200|A100|TPU|\bv[2-6][ep]?:')


def without_machine(text: str) -> list[str]:
  """Ratios of a page that stand in a section whose text names no machine."""
  found = []
  for section in re.split(r'(?m)^(?=#+ )', text):
    flat = ' '.join(section.split())
    if not MACHINE.search(flat):
      found += [f'{section.splitlines()[0][:60]}: {hit[0]}' for hit in RATIO.finditer(flat)]
  return found


def pages():
  for place in ('README.md', 'CONTRIBUTING.md', 'docs/*.md', 'benchmarks/*.md', 'tpu/*.md',
                'configs/**/*.md', 'hrvlm_jax/**/*.md'):
    yield from sorted(ROOT.glob(place))


def test_every_record_says_its_machine_and_lies_in_its_folder():
  kept = list(records.kept())
  assert len({path.parent for path, _ in kept}) >= 2
  for path, record in kept:
    assert records.problems(record) == [], path
    assert path == records.path_of(record)
    isa = records.machine_of(record).isa
    assert isa in (*machine.INSTRUCTIONS, *machine.ARM, 'unknown'), path
    # A ratio of unknown instructions would say nothing.
    assert isa != 'unknown' or 'ratio' not in record, path
  loose = set((ROOT / 'benchmarks/results').glob('*.*'))
  assert loose == set((ROOT / 'benchmarks/results').glob(CONSTANTS)), loose


def test_a_run_elsewhere_adds_a_record_and_replaces_none(tmp_path):
  here = {'case': 'made_up', 'device': 'cpu', 'date': '2026-01-01', 'versions': {'jax': '1'},
          'machine': measure.machine(), 'number': 1}
  first = records.save(here, tmp_path)
  changes = ({'isa': 'sse'}, {'family': 99}, {'model': 99}, {'vendor': 'Abacus'}, {'cores': 77},
             {'capped': 'sse'})
  others = {records.save({**here, 'machine': {**here['machine'], **change}, 'number': 2}, tmp_path)
            for change in changes}
  others.add(records.save({**here, 'device': 'cuda', 'accelerator': 'A 1'}, tmp_path))
  others.add(records.save({**here, 'device': 'cuda', 'accelerator': 'B 2'}, tmp_path))
  assert len(others) == len(changes) + 2 and first not in others
  assert json.loads(first.read_text())['number'] == 1
  assert records.save({**here, 'number': 3}, tmp_path) == first  # the same kind replaces its own
  assert json.loads(first.read_text())['number'] == 3
  assert len(list(tmp_path.rglob('*.json'))) == len(changes) + 3


@pytest.mark.parametrize('change, message', [
  ({'machine': {}}, 'machine.isa is missing'), ({'date': ''}, 'date is missing')])
def test_a_record_without_its_machine_is_not_kept(tmp_path, change, message):
  record = {'case': 'made_up', 'device': 'cpu', 'date': '2026-01-01', 'versions': {'jax': '1'},
            'machine': measure.machine(), **change}
  with pytest.raises(ValueError, match=message):
    records.save(record, tmp_path)
  assert not list(tmp_path.iterdir())


def test_the_page_is_generated_from_the_records():
  assert docs.TARGET.read_text() == docs.page(find_cases()), 'run hrvlm bench --docs'


def test_no_ratio_stands_without_its_machine():
  found = {str(path.relative_to(ROOT)): hits for path in pages()
           if (hits := without_machine(path.read_text()))}
  assert not found


@pytest.mark.parametrize('text, ratios', [
  ('# Speed\nIt is 1.7 times as fast.', 1),
  ('# Speed\nOn AMD family 26 (AVX-512) it is 1.7 times as fast.', 0),
  ('# A\nAMD family 26\n## B\nmemory is 0.97 of the peer', 1),
  ('# A\n| case | ratio |\n| --- | --- |\n| x | 1.8 |', 1), ('# A\nsteps of 3 times 4', 0)])
def test_ratios_are_found(text, ratios):
  assert len(without_machine(text)) == ratios


def test_the_pages_are_looked_at():
  names = {str(path.relative_to(ROOT)) for path in pages()}
  assert {'README.md', 'docs/benchmarks.md', 'benchmarks/findings.md'} <= names
  assert RATIO.search((ROOT / 'benchmarks/findings.md').read_text())
