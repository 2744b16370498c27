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
from hrvlm_jax.interop.export import export
from hrvlm_jax.language.prompt import tokenizer_of
from hrvlm_jax.systems import registry
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import Answerer, text_of

SIZES = ((610, 470), (300, 900), (97, 61))
QUESTIONS = ('What is written on the sign?', 'Describe this photo.', 'Who?')
NEW = 12


def tiny(name):
  """A tiny model as the original's code can be: MC-LLaVA's first window is fixed there, LLaVA-HR's
  ViT sees at least 336 pixels, and its ConvNeXt ends in 1536 channels."""
  config, encoder = registry.get(name).tiny(), registry.get(name).tiny().encoder
  if name == 'mc_llava':
    encoder = dataclasses.replace(encoder, window=384, growth=10)
  elif name == 'llava_hr':
    encoder = dataclasses.replace(
      encoder, image_size=768, fast_size=None,
      fast=dataclasses.replace(encoder.fast, image_size=336, patch_size=14),
      slow=dataclasses.replace(encoder.slow, widths=(16, 32, 64, 1536)))
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, max_positions=1024))
  return dataclasses.replace(config, encoder=encoder)


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


def main(name: str, work: str) -> None:
  """Writes `original/` (weights in the original's layout), pictures and `asked.json`."""
  place = pathlib.Path(work)
  config, tokenizer = tiny(name), tokenizer_of('byte')
  store.save_params(place / 'checkpoint', weights(config), {'model': to_dict(config)},
                    extra_files={f'tokenizer/{n}': data for n, data in tokenizer.files.items()})
  export(place / 'checkpoint', place / 'original')
  answerer, text = Answerer.load(place / 'checkpoint'), text_of(config, tokenizer)
  asked = []
  for number, (size, question) in enumerate(zip(SIZES, QUESTIONS, strict=True)):
    image = picture(size, number)
    image.save(place / f'{number}.png')
    embeds, valid, extras = answerer.generator.prompt(answerer.batch([([image], question)]))
    sampling = answerer.sampling(max_new_tokens=NEW)
    tokens = answerer.generator.generate(embeds, valid, sampling, extras=extras).rows()[0]
    row = text.prompt(question, [1])  # one place for the picture
    ids = np.where(row['visual_index'] >= 0, text.image_id or 0, row['tokens'])
    asked.append({'picture': f'{number}.png', 'ids': ids.tolist(),
                  'tokens': [int(token) for token in tokens]})
  (place / 'asked.json').write_text(json.dumps({
    'asked': asked, 'new': NEW, 'image_id': text.image_id, 'stop': list(text.stop_ids()),
    'model': to_dict(config)}))


if __name__ == '__main__':
  main(*sys.argv[1:])
