"""The faults of `tests/mutants.py` still fit the sources (killing them takes minutes: apart)."""

from tests.mutants import MUTANTS, ROOT


def test_every_mutant_can_be_made():
  assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
  for mutant in MUTANTS:
    text = (ROOT / mutant.path).read_text('utf-8')
    assert text.count(mutant.right) == 1 and mutant.right != mutant.wrong, mutant.name
    assert (ROOT / mutant.test.split()[0]).is_file(), mutant.name
