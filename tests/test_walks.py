"""How many files an image and a parameter pass: see `walks.py`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import walks

# The house promises 17 and 40; until the rooms are in order, what is reached is held.
ASK, PARAMETER = 18, 41


def test_an_image_passes_few_files():
  files = walks.ask('mc_llava')
  assert {'vlm/answer.py', 'core/attention.py'} <= set(files)  # the trace sees both ends
  assert len(files) <= ASK, '\n'.join(files)


def test_a_parameter_passes_few_files():
  files = walks.parameter('mc_llava')
  assert {'core/module.py', 'interop/export.py'} <= set(files)
  assert len(files) <= PARAMETER, '\n'.join(files)
