"""Original layout -> Orbax -> original layout for every system; what is refused, all at once."""


import numpy as np
import pytest

from hrvlm_jax.checkpoint import hf, store
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.interop.convert import convert, recognise
from hrvlm_jax.interop.export import export
from hrvlm_jax.systems import registry
from tests import levels
from tests.interop.releases import KINDS, layout, random_tensors, read_release, write_release


def bits(array):
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_bit_equal(found, expected):
  assert set(found) == set(expected)
  for name, value in expected.items():
    assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
    np.testing.assert_array_equal(bits(found[name]), bits(value), err_msg=name)


@pytest.mark.parametrize('kind', levels.rows('interop', KINDS, first=['bfloat16']))
@pytest.mark.parametrize('name', registry.names())
def test_original_to_orbax_to_original_is_bit_exact(name, kind, tmp_path):
  config = registry.get(name).tiny()
  tensors = random_tensors(name, KINDS[kind])
  write_release(tmp_path / 'original', config, tensors)
  assert convert(tmp_path / 'original', tmp_path / 'ours') == config
  assert {leaf.dtype for leaf in store.describe(tmp_path / 'ours').values()} == {KINDS[kind]}
  export(tmp_path / 'ours', tmp_path / 'back')
  assert_bit_equal(read_release(tmp_path / 'back', config), tensors)
  hf.check_manifest(tmp_path / 'back')
  assert recognise(tmp_path / 'back') == config


def test_storage_that_differs_inside_one_stacked_leaf_is_kept(tmp_path):
  """Pheye's release mixes bfloat16 and float32; here even the layers of one kernel do."""
  config = registry.get('pheye').tiny()
  kinds = (KINDS['float32'], KINDS['bfloat16'], KINDS['float16'])
  tensors = random_tensors('pheye', lambda name: kinds[len(name) % 2 + ('.1.' in name)])
  assert len({tensors[f'lang_encoder.model.layers.{i}.decoder_layer.mlp.fc1.weight'].dtype
              for i in range(2)}) == 2
  write_release(tmp_path / 'original', config, tensors)
  convert(tmp_path / 'original', tmp_path / 'ours')
  export(tmp_path / 'ours', tmp_path / 'back')
  assert_bit_equal(hf.TensorFolder(tmp_path / 'back'), tensors)
  # The file that the original's own loader reads holds the same, aliases stored once.
  assert_bit_equal(hf.TensorFolder(tmp_path / 'back' / 'checkpoint.pt'), tensors)
  size = lambda name: (tmp_path / 'back' / name).stat().st_size
  assert size('checkpoint.pt') < size('model.safetensors')


DAMAGED = [name for name in registry.names() if name not in ('s2', 's2_dynamic', 'tiling')]


@pytest.mark.parametrize('name', levels.rows('interop', DAMAGED, first=['pheye', 'vila_hd']))
def test_everything_wrong_with_a_folder_is_one_message_and_nothing_is_written(name, tmp_path):
  """Missing, extra, renamed, misshapen, not a number, and a shard that was cut short."""
  config = registry.get(name).tiny()
  tensors = random_tensors(name, KINDS['float32'])
  single = [names[0] for names, _ in layout(name) if len(names) == 1]
  folders = registry.get(name).folders
  own = [n for n in single if not folders or n.startswith(folders[0])]
  missing, renamed, misshapen, nan, *_ = [n for n in own if tensors[n].ndim == 1]
  del tensors[missing]
  tensors[f'{renamed}_old'] = tensors.pop(renamed)
  tensors[misshapen] = np.zeros(tensors[misshapen].size + 1, np.float32)
  tensors[nan] = np.full_like(tensors[nan], np.nan)
  extra = f'{folders[0]}/surprise' if folders else 'surprise'
  tensors[extra] = np.zeros(2, np.float32)
  source = write_release(tmp_path / 'original', config, tensors)
  place = source / (folders[0] if folders else '')
  weights = {n: np.array(x) for n, x in hf.TensorFolder(place).items()}
  (place / 'model.safetensors').unlink()
  lost, weights = split(weights, missing, renamed, misshapen, nan, prefix=extra[:-8])
  hf.write_weights(place, [*weights.items(), *lost.items()],
                   max_shard_bytes=sum(x.nbytes for x in weights.values()))
  shard = sorted(place.glob('model-*.safetensors'))[-1]
  shard.write_bytes(shard.read_bytes()[:-8])
  with pytest.raises(UserError) as caught:
    convert(source, tmp_path / 'out')
  text = str(caught.value)
  cut = [n for n in lost if f'{n}: ends at byte' in text]
  assert cut, text
  for sentence in (f'missing tensor {missing}', f'missing tensor {renamed}',
                   f'unexpected tensor {renamed}_old', f'unexpected tensor {extra}',
                   f'{misshapen}: shape', f'{nan}: holds infinities or NaN'):
    assert sentence in text, (sentence, text)
  assert len(text.splitlines()) == 1 + 6 + len(cut), text
  assert sorted(p.name for p in tmp_path.iterdir()) == ['original']


def split(weights, *kept, prefix):
  """(the last large tensors, the others): what will lie in the damaged shard."""
  names = {name.removeprefix(prefix) for name in kept}
  free = [n for n, x in weights.items() if n not in names and x.ndim == 2]
  last = free[-1:]
  return ({n: weights[n] for n in last}, {n: x for n, x in weights.items() if n not in last})
