"""Pre-training on scenes: what learns, from what it starts, that the loss falls."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.module import Functional
from hrvlm_jax.lab import scenes
from hrvlm_jax.lab.needle import NeedleConfig, glyph_crops
from hrvlm_jax.lab.pretrain import pretrain
from hrvlm_jax.systems.llava_hr.config import LlavaHRConfig
from hrvlm_jax.systems.ps3.config import PoolConfig, PS3Config, SaliencyConfig
from hrvlm_jax.systems.ps3.encoder import Encoder
from hrvlm_jax.systems.vila_hd.config import VilaHDConfig
from hrvlm_jax.vision.convnext import ConvNeXtConfig
from hrvlm_jax.vision.vit import ViTConfig

VISION = ViTConfig(image_size=16, patch_size=8, width=16, depth=4, heads=2, mlp_width=16)
TASK = NeedleConfig.tiny(width=64, height=64, relative_area=(0.05, 0.06), signs=(1, 1),
                         colours=('red', 'blue'), shapes=('rectangle',))


def vila():
  tower = PS3Config(
    vision=VISION, scales=(16, 32, 64), select_layers=(0,), max_select=20, budgets=(4, 16),
    saliency=SaliencyConfig(width=8, out=8, depth=1, kernel=8, input_size=64),
    pool=PoolConfig(width=16, heads=2, mlp_width=16))
  return VilaHDConfig(tower=tower, width=16, select_layer=-1, looks=1)


def llava():
  slow = ConvNeXtConfig(depths=(1, 1, 1, 1), widths=(8, 8, 16, 16))
  return LlavaHRConfig(image_size=64, fast=VISION, slow=slow, fast_size=16, mean=(0.5,) * 3,
                       std=(0.5,) * 3)


@pytest.mark.parametrize('encoder', [vila(), llava()], ids=['vila_hd', 'llava_hr'])
def test_the_part_that_learns_learns(encoder):
  losses = []
  config = scenes.SceneConfig(needle=TASK, encoder=encoder, steps=30, batch_size=8,
                                    warmup=2, learning_rate=5e-3)
  learned, accuracy = pretrain(config, report=lambda _, loss, __: losses.append(loss))
  assert all(path.startswith(tuple(scenes.part(encoder))) for path in learned)
  assert np.mean(losses[-5:]) < 0.95 * np.mean(losses[:5]) and 0 <= accuracy <= 1


def test_a_convnext_learns_from_crops_and_from_a_start_that_is_alive():
  config = scenes.SceneConfig(needle=TASK, encoder=llava(), steps=1, batch_size=3, window=32,
                                    learning_rate=0.0)
  pixels, labels = config.draw(0)
  assert pixels.shape == (3, 32, 32, 3)  # at the scale of the whole image, 64 pixels for 64
  assert sorted(labels) == [1, 2] and labels[1][0].shape == (3, 1)
  learned, _ = pretrain(config)
  np.testing.assert_array_equal(learned['slow/stages/1/blocks/layer_scale'], 1.0)
  kernel = learned['slow/stages/2/downsample/conv/kernel']
  np.testing.assert_allclose(kernel.std() * np.sqrt(2 * 2 * 8), 1.0, rtol=1e-5)
  depthwise = np.abs(learned['slow/stages/1/blocks/conv_dw/kernel'])[0, :, :, 0].sum(axis=-1)
  assert (depthwise[2:5, 2:5] > 0).all() and depthwise.sum() == depthwise[2:5, 2:5].sum()
  with pytest.raises(UserError, match='48 canvas pixels is 48 pixels .* multiple of 32'):
    dataclasses.replace(config, window=48)
  with pytest.raises(UserError, match='VILA-HD learns from whole scenes'):
    dataclasses.replace(config, encoder=vila())


def test_it_starts_from_the_parameters_given():
  config = scenes.SceneConfig(needle=TASK, encoder=vila(), steps=1, batch_size=2,
                                    learning_rate=0.0)
  start = {'ps3/tower/pos_embed': jnp.full((4, 16), 7.0)}
  learned, _ = pretrain(config, start)
  np.testing.assert_array_equal(learned['ps3/tower/pos_embed'], 7.0)


def test_labels_of_letter_and_colour_mark_the_same_patches():
  rng = np.random.default_rng(0)
  task = dataclasses.replace(TASK, signs=(2, 2), relative_area=(0.01, 0.02))
  crops = glyph_crops(task, rng, 12, window=40, size=32)
  letters, colours = crops.patch_letters(8), crops.patch_colours(8)
  np.testing.assert_array_equal(letters < 0, colours < 0)
  np.testing.assert_array_equal(letters[letters < 0], colours[letters < 0])
  for row in range(12):
    for colour in range(len(task.colours)):
      found = set(letters[row][colours[row] == colour].tolist())
      assert found <= {int(crops.letters[row, colour, 0])}
  assert (letters >= 0).any()


@pytest.mark.parametrize('context', [True, False])
def test_looks_see_the_thumbnail_only_with_context(context):
  tower = dataclasses.replace(vila().tower, low_context=context)
  plan = vila().plan()
  fn = Functional(lambda rngs: Encoder(tower, rngs=rngs))
  params = jax.jit(fn.init)(jax.random.key(0))
  images = jax.random.normal(jax.random.key(1), (1, 64, 64, 3))

  @jax.jit
  def high(params, shift):
    encoder = fn.bind(params)
    low = encoder.encode_low(images, select=False)
    low = dataclasses.replace(low, keys=low.keys + shift)
    probs = tuple(jnp.linspace(0, 1, rows * cols).reshape(1, rows, cols)
                  for rows, cols in plan.grids[1:])
    return encoder.encode_high(low, images, probs, plan).last[:, tower.grid**2:]

  moved = jnp.arange(tower.vision.width // tower.vision.heads, dtype=jnp.float32)
  difference = np.abs(high(params, moved) - high(params, 0.0)).max()
  assert (difference > 1e-5) == context
