"""Weight tables: mixed dtypes in one leaf, optional and tied tensors, versions, lazy streaming."""

import jax
import ml_dtypes
import numpy as np
import pytest

from hrvlm_jax.checkpoint import hf
from hrvlm_jax.checkpoint.folders import open_folders
from hrvlm_jax.checkpoint.rows import (
  Row,
  Table,
  check_names,
  common_dtype,
  filled,
  identity,
  import_tensors,
  joined,
  linear,
  prefixed,
  split_rows,
  stream_tensors,
  transpose,
  widened,
)
from hrvlm_jax.core.errors import UserError

BF16, F16, F32 = (np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16, np.float32))
TABLE = Table((Row('k', 'l.{i}.w', transpose), Row('n', 'n')))
ABSTRACT = {'k': jax.ShapeDtypeStruct((3, 2, 4), F32), 'n': jax.ShapeDtypeStruct((2,), F32)}


def tensors(*kinds):
  rng = np.random.default_rng(0)
  found = {f'l.{i}.w': rng.normal(size=(4, 2)).astype(kind) for i, kind in enumerate(kinds)}
  return found | {'n': np.ones(2, BF16)}


@pytest.mark.parametrize('kinds, expected', [
  ((BF16, BF16, BF16), BF16), ((BF16, F32, BF16), F32), ((F32, BF16, BF16), F32),
  ((BF16, F16, BF16), F32), ((F16, np.float64, BF16), np.float64)])
def test_a_stacked_leaf_holds_every_layer_exactly(kinds, expected):
  """Not the dtype of the first layer: a later, wider one would be rounded without a word."""
  source = tensors(*kinds)
  found = import_tensors(source, TABLE, ABSTRACT)
  assert found['k'].dtype == expected and found['n'].dtype == BF16
  for i in range(3):
    np.testing.assert_array_equal(found['k'][i].T, source[f'l.{i}.w'].astype(expected))
  present = check_names(TABLE, ABSTRACT, {n: x.shape for n, x in source.items()})
  assert widened(present, {n: x.dtype for n, x in source.items()}) == {
    f'l.{i}.w': np.dtype(kind) for i, kind in enumerate(kinds) if kind != expected}
  assert common_dtype(kinds) == expected


OPTIONAL = Table((Row('k', 'l.{i}.w', transpose, optional=True), Row('n', 'n')))


def test_an_optional_row_is_there_with_all_layers_or_not_at_all():
  source = tensors(F32, F32, F32)
  assert set(import_tensors(source, OPTIONAL, ABSTRACT)) == {'k', 'n'}
  assert set(import_tensors({'n': source['n']}, OPTIONAL, ABSTRACT)) == {'n'}
  del source['l.0.w'], source['l.2.w']
  with pytest.raises(UserError) as caught:
    import_tensors(source, OPTIONAL, ABSTRACT)
  assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
    f'missing tensor l.{i}.w (for k[{i}]; other layers have it)' for i in (0, 2)]


def test_tied_tensors_must_be_equal_and_are_not_written():
  table = Table((Row('n', 'embed'),), tied={'head': 'embed'})
  inside = prefixed(joined(table), ours='language/', theirs='llm.')
  assert inside.tied == {'llm.head': 'llm.embed'} and inside.is_ignored('llm.head')
  abstract = {'n': jax.ShapeDtypeStruct((2, 3), F32)}
  embed = np.arange(6, dtype=np.float32).reshape(2, 3)
  for source in ({'embed': embed}, {'embed': embed, 'head': embed.copy()}):
    found = import_tensors(source, table, abstract)
    assert list(dict(stream_tensors(found, table, lambda path, layer: embed))) == ['embed']
  with pytest.raises(UserError, match='head: differs from embed, to which it is tied'):
    import_tensors({'embed': embed, 'head': embed + 1}, table, abstract)
  with pytest.raises(UserError, match=r'head: shape \(2,\), but it is tied to embed of shape'):
    import_tensors({'embed': embed, 'head': embed[:, 0]}, table, abstract)


def test_names_and_values_are_complained_of_together():
  source = tensors(F32, F32, F32) | {'x': np.ones(1)}
  del source['n']
  source['l.1.w'][0, 0] = np.inf
  with pytest.raises(UserError, match='3 problems') as caught:
    import_tensors(source, TABLE, ABSTRACT, finite=True)
  for text in ('missing tensor n', 'unexpected tensor x', 'l.1.w: holds infinities'):
    assert text in str(caught.value)


def test_a_narrower_dtype_that_cannot_hold_the_values():
  source = tensors(F32, F32, F32)
  source['l.2.w'][0, 0] = 7e4
  with pytest.raises(UserError, match='l.2.w: holds values beyond the range of float16'):
    import_tensors(source, TABLE, ABSTRACT, dtype=np.float16)
  assert import_tensors(source, TABLE, ABSTRACT, dtype=BF16)['k'].dtype == BF16


def test_the_version_of_a_table_is_its_content():
  base = Table((*linear('a', 'b'),))
  same = Table(tuple(reversed(base.rows)), {}, {'a/*': 'only a remark'})
  assert base.fingerprint() == same.fingerprint()
  others = [prefixed(base, theirs='x.'), Table(base.rows[:1]), Table(base.rows, {'c': 'left out'}),
            Table(base.rows, tied={'c': 'b.weight'}), Table((base.rows[0], Row('a/bias', 'b.bias',
                                                                               transpose)))]
  assert len({table.fingerprint() for table in (base, *others)}) == 6


def test_streaming_reads_one_layer_at_a_time():
  table = Table((Row(('q', 'k'), 'l.{i}.qk', split_rows(2, transpose)), Row('n', 'n')))
  values = {'q': np.arange(24.0).reshape(2, 3, 4), 'k': -np.arange(24.0).reshape(2, 3, 4),
            'n': np.ones(2)}
  asked = []

  def read(path, layer):
    asked.append((path, layer))
    return values[path] if layer is None else values[path][layer]

  stream = stream_tensors(values, table, read)
  name, first = next(stream)
  assert name == 'l.0.qk' and asked == [('q', 0), ('k', 0)]
  np.testing.assert_array_equal(first, np.concatenate([values['q'][0].T, values['k'][0].T]))
  assert [name for name, _ in stream] == ['l.1.qk', 'n'] and asked[-1] == ('n', None)


def test_folders_list_the_damage_of_all(tmp_path):
  hf.write_weights(tmp_path, [('x', np.ones(1))])
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    hf.write_weights(tmp_path / name, [('w', np.ones(4, np.float32)), ('v', np.zeros(1))])
  file = tmp_path / 'b' / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-4])
  found = open_folders(tmp_path, ('a', 'b', 'c'))
  assert set(found) == {'a/w', 'a/v', 'b/v'} and found.dtypes['a/w'] == F32
  np.testing.assert_array_equal(found['a/w'], np.ones(4))
  assert len(found.problems) == 2 and 'w: ends at byte' in found.problems[0]
  assert 'c: no such file or folder' in found.problems[1]
  assert 'b/w' in found.unreadable and 'c/anything' in found.unreadable
  assert 'a/w' not in found.unreadable and 'b/u' not in found.unreadable
  with pytest.raises(KeyError):
    found['d/x']


def test_rows_that_fill_up_are_not_in_the_file():
  value = np.arange(15, dtype=np.float32).reshape(5, 3)
  for inner, ours in ((identity, (8, 3)), (transpose, (3, 8))):
    op = filled(5, 8, inner)
    loaded = op.load(value)
    assert loaded.shape == ours and op.shape(ours) == (5, 3) and loaded.sum() == value.sum()
    np.testing.assert_array_equal(op.save(loaded), value)
  bias = filled(5, 8).load(value[:, 0])
  assert bias.shape == (8,) and filled(5, 8).shape((8,)) == (5,)
  assert filled(5, 5, transpose) is transpose  # tables of other models keep their version
