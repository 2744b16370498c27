"""Golden check of PS3's preprocessing: processor, resizing, crops with boxes, captions."""

from __future__ import annotations

import random

import jax.numpy as jnp
import numpy as np

from hrvlm_jax.core import resample
from hrvlm_jax.core.resample import normalise_host
from hrvlm_jax.systems.ps3 import data
from hrvlm_jax.systems.ps3.views import squash
from tests.parity.cases.runner import OPERATOR, Case, check


@check('ps3', 'preprocess')
def preprocess(case: Case) -> None:
  """Image processor, in-encoder resizing, crop with boxes, caption cleaning."""
  cfg = case.config
  side = cfg['image_size']
  stats = {kind: (tuple(cfg[f'mean_{kind}'].plain()), tuple(cfg[f'std_{kind}'].plain()))
           for kind in ('siglip', 'radio')}
  case.waive('config.json:pillow', 'version of the reference; bytes are equal in every version')
  case.waive('config.json:patch_size', 'no patches in this case')
  values = {}
  for key in case.keys:
    kind, _, file = key.partition('.')
    if kind in stats:
      pixels = squash(case.image(f'{file}.png'), side)
      values[key] = normalise_host(pixels, *stats[kind], rescale='quotient')
      case.expect(key, values[key].transpose(2, 0, 1), tol=1e-6)
  image = case.image('rgb.png')
  case.expect_json(('image_hw',), [image.height, image.width])
  for i, size in enumerate(cfg['scales'].plain()):
    small = resample.bicubic(jnp.asarray(values['siglip.rgb'])[None], size, size)[0]
    case.expect(f'scale.{i}', np.asarray(small).transpose(2, 0, 1), tol=OPERATOR)
  spec = cfg['fixed_crop']
  crop = data.Crop(top=spec['top'], left=spec['left'], height=spec['height'], width=spec['width'])
  pixels = normalise_host(data.crop_image(image, crop, side), *stats['siglip'], rescale='quotient')
  case.expect('train.pixel_values', pixels.transpose(2, 0, 1), tol=1e-6)
  for name in cfg['train_boxes']:
    boxes = data.crop_boxes(cfg['train_boxes'][name]['boxes'].plain(), crop, side)
    stated = cfg['train_boxes'][name]['boxes_after'].plain()
    gap = float(np.max(np.abs(np.asarray(boxes, np.float64) - np.asarray(stated)), initial=0.0))
    limit = OPERATOR * max(1.0, float(np.max(np.abs(stated))))
    case.expect_json(('train_boxes', name, 'boxes_after'),
                     stated if gap <= limit else np.asarray(boxes).tolist())
    case.expect(f'train.{name}.gt_selection_map', data.target_map(boxes, side, side))
  _captions(case)


def _captions(case: Case) -> None:
  if 'caption_filter' not in case.config:
    return
  spec = case.config['caption_filter']
  inputs = spec['inputs'].plain()
  cleaned = [data.clean_caption(text) for text in inputs]
  case.expect_json(('caption_filter', 'outputs'), cleaned)
  # The original draws from Python's generator; ours takes the two numbers from any source.
  rng = random.Random(spec['sentence_masking_samples_python_random_seed'])
  rows = [[data.mask_sentences(text, rng.randint) for text in cleaned]
          for _ in spec['sentence_masking_samples']]
  case.expect_json(('caption_filter', 'sentence_masking_samples'), rows)
