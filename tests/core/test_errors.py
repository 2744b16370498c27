import numpy as np
import pytest

from hrvlm_jax.checkpoint import trees
from hrvlm_jax.core.errors import UserError, raise_all, rarest_first


def message(problems, **kwargs):
  with pytest.raises(UserError) as caught:
    raise_all('file', problems, **kwargs)
  return str(caught.value).splitlines()


def test_a_long_list_keeps_its_first_and_its_last_problems():
  listed = [f'problem {i}' for i in range(100)]
  shown = message(iter([*listed, 'all of them: read the page']), most=20)
  assert shown[0] == 'file: 101 problems' and len(shown) == 22
  assert shown[1] == '  problem 0' and shown[-1] == '  all of them: read the page'
  assert '  and 81 more' in shown
  assert len(message(listed[:20], most=20)) == 21
  assert message(listed, most=1)[1:] == ['  problem 0', '  and 99 more']


def test_a_rare_kind_is_not_cut_away():
  """A hundred missing parameters do not hide the one of another name that explains them."""
  assert rarest_first(['a', 'b', 'c'], [], ['d']) == ['d', 'a', 'b', 'c']
  shape = lambda *s: np.zeros(s, np.float32)
  wanted = {f'layer{i}/kernel': shape(2) for i in range(200)} | {'head': shape(3)}
  found = message(trees.mismatches({'lost': shape(1), 'head': shape(4)}, wanted))
  assert '  not in the model: lost (1,)' in found
  assert '  shape: head is (3,) in the model, (4,) in the checkpoint' in found
