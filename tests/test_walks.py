"""How many files an image and a parameter pass: see `walks.py`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import walks

# Limits: a later issue raises one in a commit of its own, with the reason. Issue 17 asks for 17 and
# 40. An image passes the settings of an answer, how they are drawn, what a text may hold as well,
# and whether the answer has room in the context and on the device (vlm/room, parallel/fitting);
# a parameter the checksums of its checkpoint, the account and the layouts of its release, the loss
# over a mesh and the objectives' files, the bounds of its model's numbers and the reader of JSON.
ASK, PARAMETER = 22, 54


def test_an_image_passes_few_files():
  files = walks.ask('mc_llava')
  assert {'vlm/answer.py', 'core/attention.py'} <= set(files)  # the trace sees both ends
  assert len(files) <= ASK, '\n'.join(files)


def test_a_parameter_passes_few_files():
  files = walks.parameter('mc_llava')
  assert {'core/module.py', 'interop/export.py'} <= set(files)
  assert len(files) <= PARAMETER, '\n'.join(files)
