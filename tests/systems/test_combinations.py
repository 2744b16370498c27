"""Any encoder x fusion x language model is a config; what cannot be joined is refused with why."""

import dataclasses
import functools

import jax
from PIL import Image
import pytest

from hrvlm_jax.core.module import Functional
from hrvlm_jax.language import config as language
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.systems.fusion import CrossAttentionFusion, PrefixFusion, TwoPassFusion
from hrvlm_jax.vlm import model as vlm
from tests import levels

SIZES = dict(vocab_size=264, width=128, depth=2, heads=4, mlp_width=128, max_positions=512)
TEXTS = {
  'phi': language.phi(**SIZES),
  'llama': language.llama(**SIZES),
  'qwen2': language.qwen2(kv_heads=2, **SIZES),
}
NAMES = registry.names()


@functools.cache
def width_of(name):
  """Width of the tokens that leave a system's tiny encoder."""
  system = registry.get(name)
  encoder = system.tiny().encoder
  fn = Functional(lambda rngs: system.encoder(encoder, rngs=rngs))
  views = system.batch([system.views([Image.new('RGB', (64, 48))], encoder)], encoder)
  return jax.eval_shape(fn.apply, fn.abstract, views).values.shape[-1]


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('text', levels.rows('systems', sorted(TEXTS), first=['qwen2']))
def test_every_encoder_joins_every_language_model(name, text):
  """By prefix (through a projector where the widths differ) and by cross-attention."""
  system, decoder = registry.get(name), TEXTS[text]
  encoder = system.tiny().encoder
  width = width_of(name)
  # An encoder with a projector of its own has the language model's width already.
  own = hasattr(encoder, 'projector') and encoder.projector is not None
  projector = None if own else ProjectorConfig(n_in=width, n_out=decoder.width)
  assert not own or width == decoder.width
  prefix = ModelConfig(system=name, encoder=encoder, text=decoder, projector=projector)
  crossed = ModelConfig(
    system=name, encoder=encoder, text=decoder, image_token=None,
    fusion=CrossAttentionFusion(width=width, interval=1))
  for config in (prefix, crossed):
    assert 'language' in vlm.build(config).abstract


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'vila_hd'])
def test_two_passes_need_an_encoder_that_looks_twice(name):
  system = registry.get(name)
  config = ModelConfig(system=name, encoder=system.tiny().encoder, text=TEXTS['qwen2'],
                       fusion=TwoPassFusion())
  with pytest.raises(ValueError, match='needs an encoder that looks twice'):
    vlm.build(config)


def test_a_projector_of_another_width_is_refused():
  base = registry.get('single_view').tiny()
  with pytest.raises(ValueError, match='projector.n_out 64 is not text.width 128'):
    dataclasses.replace(base, projector=ProjectorConfig(n_in=96, n_out=64))
  with pytest.raises(ValueError, match='no decoder layer gets a cross-attention block'):
    dataclasses.replace(base, fusion=CrossAttentionFusion(width=96, interval=9))
  assert isinstance(base.fusion, PrefixFusion)
