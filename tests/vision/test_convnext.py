"""ConvNeXt: published sizes, scanned stages, the names of its three sources."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.checkpoint.rows import check_names, entries, export_tensors, import_tensors
from hrvlm_jax.core import paths
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.core.module import Functional
from hrvlm_jax.vision import convnext
from hrvlm_jax.vision.convnext import CONVNEXT_L, CONVNEXT_XXL, ConvNeXt, ConvNeXtConfig

TINY = ConvNeXtConfig(depths=(1, 2, 3, 1), widths=(4, 6, 8, 10), classes=3, head_width=5)


def functional(config):
  return Functional(lambda rngs: ConvNeXt(config, rngs=rngs))


def size_of(tree):
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('config,millions,deep', [
  (CONVNEXT_L, 200.1, 27), (CONVNEXT_XXL, 846.5, 30)])
def test_published_sizes(config, millions, deep):
  abstract = functional(config).abstract
  assert round(size_of(abstract) / 1e6, 1) == millions  # the unused classifier included
  for leaf in jax.tree.leaves(abstract['stages']['2']['blocks']):
    assert leaf.shape[0] == deep  # one scanned stack
  assert config.stride == 32 and config.grid(1024) == 32 and config.grid(1024, 0) == 256


def test_depth_does_not_lengthen_the_program():
  lines = []
  for depth in (2, 27):
    fn = functional(ConvNeXtConfig(depths=(1, depth), widths=(4, 6)))
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), np.float32)
    lines.append(jax.jit(fn.apply).lower(fn.abstract, image).as_text().count('\n'))
  assert lines[0] == lines[1]


def test_recomputing_blocks_changes_nothing():
  fn = functional(ConvNeXtConfig(depths=(2,), widths=(4,), classes=3))
  params = jax.tree.map(lambda leaf: leaf + 0.1, fn.init(jax.random.key(0)))
  image = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 16, 3)), jnp.float32)
  loss = lambda p, remat: (fn.apply(p, image, ex=Execution(remat=remat)) ** 2).sum()
  plain, again = (jax.jit(jax.grad(lambda p, r=r: loss(p, r)))(params) for r in ('none', 'layers'))
  for path, leaf in paths.flatten(plain).items():
    np.testing.assert_allclose(paths.flatten(again)[path], leaf, rtol=1e-4, atol=1e-4)
    assert path.startswith('head/') or np.abs(leaf).max() > 0, path


def test_layer_scale_has_two_names():
  abstract = functional(TINY).abstract
  names = {layout: [name for entry in entries(convnext.table(TINY, layout=layout), abstract)
                    for name in entry.names] for layout in ('llava_hr', 'timm', 'open_clip')}
  assert 'stages.2.blocks.1.weight' in names['llava_hr']
  assert 'stages.2.blocks.1.gamma' in names['timm']
  assert 'visual.trunk.stages.2.blocks.1.gamma' in names['open_clip']
  assert not [n for n in names['llava_hr'] if 'gamma' in n]
  assert [n for n in names['timm'] if 'gamma' not in n] == [
    n for n in names['llava_hr'] if not n.split('.')[-2].isdigit() or 'blocks' not in n]
  with pytest.raises(ValueError, match="'pth'"):
    convnext.table(TINY, layout='pth')


@pytest.mark.parametrize('layout', ['llava_hr', 'timm'])
def test_round_trip(layout):
  fn, table = functional(TINY), convnext.table(TINY, layout=layout)
  rng = np.random.default_rng(1)
  theirs = {entry.names[0]: rng.normal(size=entry.shape).astype(np.float32)
            for entry in entries(table, fn.abstract)}
  back = dict(export_tensors(import_tensors(theirs, table, fn.abstract), table))
  assert back.keys() == theirs.keys()
  for name, value in theirs.items():
    np.testing.assert_array_equal(back[name], value)


def test_open_clip_file_lacks_the_classifier():
  fn, table = functional(TINY), convnext.table(TINY, layout='open_clip')
  shapes = {entry.names[0]: entry.shape for entry in entries(table, fn.abstract)
            if not entry.row.optional}
  extra = {'visual.head.proj.weight': (4, 10), 'text_projection': (4, 4), 'logit_scale': (),
           'transformer.resblocks.0.ln_1.weight': (4,)}
  assert len(check_names(table, fn.abstract, shapes | extra)) == len(shapes)
  del shapes['visual.trunk.stem.0.weight']
  with pytest.raises(UserError, match=r'missing tensor visual\.trunk\.stem\.0\.weight'):
    check_names(table, fn.abstract, shapes | extra)


def test_bad_settings():
  with pytest.raises(ValueError, match='one value per stage'):
    ConvNeXtConfig(depths=(1, 2), widths=(4,))
  with pytest.raises(ValueError, match="depthwise must be one of .*'fft'"):
    ConvNeXtConfig(depths=(1,), widths=(4,), depthwise='fft')
