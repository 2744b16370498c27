"""Our side of scripts/originals.sh: random weights in the original's layout, questions, tokens.

    python -m scripts.originals.ours SYSTEM FOLDER
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np
from PIL import Image

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.resample import CLIP_MEAN, CLIP_STD
from hrvlm_jax.interop.export import export
from hrvlm_jax.language import config as language
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer, text_of
from hrvlm_jax.vlm.encode import ImageEncoder

SIZES = ((610, 470), (300, 900), (97, 61))
QUESTIONS = ('What is written on the sign?', 'Describe this photo.', 'Who?')
NEW = 12


def tiny(name):
  """A tiny model as the original's code can be: MC-LLaVA's first window is fixed there, LLaVA-HR's
  ViT sees at least 336 pixels, its ConvNeXt ends in 1536 channels, and PS3 looks for places in a
  picture of 1512 pixels. Its looks end with a whole place (4 and 16 patches): which of equal ones
  `torch.topk` takes is left open there."""
  config, encoder = registry.get(name).tiny(), registry.get(name).tiny().encoder
  if name == 'mc_llava':
    encoder = dataclasses.replace(encoder, window=384, growth=10)
  elif name == 'llava_hr':
    encoder = dataclasses.replace(
      encoder, image_size=768, fast_size=None,
      fast=dataclasses.replace(encoder.fast, image_size=336, patch_size=14),
      slow=dataclasses.replace(encoder.slow, widths=(16, 32, 64, 1536)))
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, max_positions=1024))
  elif name == 'ps3':
    encoder = whole_places(encoder)
  elif name == 'vila_hd':
    encoder = dataclasses.replace(encoder, tower=whole_places(encoder.tower))
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, max_positions=1024))
  elif name in ('single_view', 'anyres', 's2'):
    return llava(config)
  return dataclasses.replace(config, encoder=encoder)


def whole_places(tower):
  """PS3 as its code can be, in which ties at the end of a look do not matter."""
  return dataclasses.replace(tower, max_select=40, budgets=(8, 32), saliency=dataclasses.replace(
    tower.saliency, input_size=1512, kernel=28))


def llava(config):
  """A baseline with a CLIP tower and LLaMA, as haotian-liu/LLaVA has them."""
  vision = ViTConfig(
    image_size=40, patch_size=8, width=64, depth=3, heads=4, mlp_width=96, activation='quick_gelu',
    norm_eps=1e-5, class_token=True, patch_bias=False, pre_norm=True)
  text = language.llama(vocab_size=config.text.vocab_size, width=128, depth=2, heads=4,
                        mlp_width=192, max_positions=1024)
  encoder = dataclasses.replace(config.encoder, vision=vision, layer=-2, mean=CLIP_MEAN,
                                std=CLIP_STD)
  projector = config.projector
  if projector is not None:
    wide = vision.width * (len(encoder.sizes) if config.system == 's2' else 1)
    projector = dataclasses.replace(projector, n_in=wide, n_out=text.width)
  if config.system == 'single_view':
    encoder = dataclasses.replace(encoder, fit='pad')
  return dataclasses.replace(config, encoder=encoder, text=text, projector=projector,
                             chat='vicuna_v1')


def weights(config, seed=0):
  """Random parameters large enough that every part is felt; norms scale by about one."""
  rng = np.random.default_rng(seed)
  return paths.unflatten({
    path: (rng.standard_normal(leaf.shape) * (0.15 if path.endswith('kernel') else 0.05)
           + path.endswith('scale')).astype(np.float32)
    for path, leaf in paths.flatten(vlm.build(config).abstract).items()})


def picture(size, seed):
  """Blocks of random colours under noise."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 200, (12, 12, 3)).astype(np.uint8))
  noise = rng.integers(0, 56, (size[1], size[0], 3))
  return Image.fromarray((np.asarray(coarse.resize(size, Image.Resampling.NEAREST))
                          + noise).astype(np.uint8))


def answers(place, config, tokenizer):
  """The greedy tokens of every question, and the ids of its prompt."""
  answerer, text = Answerer.load(place / 'checkpoint'), text_of(config, tokenizer)
  asked = []
  for number, question in enumerate(QUESTIONS):
    image = Image.open(place / f'{number}.png')
    embeds, valid, extras = answerer.generator.prompt(answerer.batch([([image], question)]))
    sampling = answerer.sampling(max_new_tokens=NEW)
    tokens = answerer.generator.generate(embeds, valid, sampling, extras=extras).rows()[0]
    row = text.prompt(question, [1])  # one place for the picture
    ids = np.where(row['visual_index'] >= 0, text.image_id or 0, row['tokens'])
    asked.append({'picture': f'{number}.png', 'question': question, 'ids': ids.tolist(),
                  'tokens': [int(token) for token in tokens]})
  return asked, {'image_id': text.image_id, 'stop': list(text.stop_ids())}


def looks(place):
  """The places of the chosen patches, counted over all scales, and the features of every picture
  (PS3, which gives no tokens)."""
  encoder, asked = ImageEncoder.load(place / 'checkpoint'), []
  for number in range(len(SIZES)):
    found = encoder(Image.open(place / f'{number}.png'))
    maps = np.concatenate([np.asarray(one)[0].reshape(-1) for one in found.info['maps']])
    np.save(place / f'{number}.ours.npy', np.asarray(found.values[0])[np.asarray(found.valid[0])])
    asked.append({'picture': f'{number}.png', 'ids': [],
                  'tokens': np.flatnonzero(maps).tolist()})
  return asked, {}


def main(name: str, work: str) -> None:
  """Writes `original/` (weights in the original's layout), pictures and `asked.json`."""
  place = pathlib.Path(work)
  config, tokenizer = tiny(name), tokenizer_of('byte')
  store.save_params(place / 'checkpoint', weights(config), {'model': to_dict(config)},
                    extra_files={f'tokenizer/{n}': data for n, data in tokenizer.files.items()})
  export(place / 'checkpoint', place / 'original')
  for number, size in enumerate(SIZES):
    picture(size, number).save(place / f'{number}.png')
  asked, more = looks(place) if config.text is None else answers(place, config, tokenizer)
  (place / 'asked.json').write_text(json.dumps({
    'asked': asked, 'new': NEW, 'model': to_dict(config), **more}))


if __name__ == '__main__':
  main(*sys.argv[1:])
