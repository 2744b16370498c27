"""Every published stage trains on what it says: all rows of its mixture but the planted bad ones.

The recipe's own data policy, groups, losses and optimizer; a tiny model of its system; a made-up
copy of its data, ten rows a set, two of them bad, in the published file formats.
"""

from collections import Counter
import dataclasses
import json
import math
import pathlib
import runpy

import numpy as np
from PIL import Image
import pytest

from hrvlm_jax.data.checks import check_batches
from hrvlm_jax.data.faults import Fault
from hrvlm_jax.data.mixture import MIXTURES, Share
from hrvlm_jax.systems import registry
from hrvlm_jax.training import run_config
from hrvlm_jax.training.batches import make_batches
from hrvlm_jax.training.config import RunConfig
from hrvlm_jax.training.loop import train
from tests.levels import rows as levels

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
# Stage -> its mixture; of the LLaVA recipes and VILA's, a file whose rows carry their prompts.
STAGES = {
  **{f'pheye:x2_448,stage{n}': f'pheye_stage_{n}' for n in (1, 2, 3)},
  **{f'mc_llava:{stage}': 'mc_llava' for stage in ('full', 'lora')}, 'mc_llava:projector': None,
  **{f'llava_hr:{size},{stage}': None for size in ('7b', '13b', 'x_13b')
     for stage in ('stage1', 'stage2')},
  **{f'vila_hd:1_5k,{stage}': 'vila_1_5_sft' if stage == 'sft' else None
     for stage in ('align', 'tower', 'pretrain', 'sft')},
}
FIRST = ('pheye:x2_448,stage3', 'mc_llava:full', 'llava_hr:7b,stage2', 'vila_hd:1_5k,sft')
ROWS = 8  # usable ones of a set
# Settings of the recipe's encoder that say what trains, kept in the tiny one.
KEPT = ('adapters', 'aspect', 'mode', 'select_target', 'train_first_adapter')


def talk(*turns, first=''):
  return [{'from': who, 'value': (first if n == 0 else '') + text} for n, (who, text) in enumerate(
    (who, text) for q, a in turns for who, text in (('human', q), ('gpt', a)))]


def conversations(*, text_alone: bool, captions: bool = False):
  """Rows as the published files have them, then two that cannot be used.

  captions: one turn each, as LLaVA's first stage has them; its template knows no further ones.
  """
  one, two = ('What is it?', 'A sign.'), ('Which colour?', 'Red.')
  found = [
    {'image': 'wide.png', 'conversations': talk(one, first='<image>\n')},
    {'image': 'tall.png', 'conversations': talk(one, two, ('More?', 'No.'), first='<image>\n')},
    {'image': 'large.png', 'conversations': talk(('What is it?\n<image>', 'A house.'), two)},
    {'image': 'small.png', 'conversations': talk(one, two)},
    {'image': 'wide.png', 'conversations': [{'from': 'gpt', 'value': 'Hello.'}] + talk(one)},
    {'image': ['small.png'], 'conversations': talk(one, first='<image>\n')},
    {'image': 'large.png', 'conversations': talk(one, one, two, two, first='<image>\n')},
    {'conversations': talk(one, two)} if text_alone else
    {'image': 'tall.png', 'conversations': talk(two, first='<image>\n')},
  ]
  assert len(found) == ROWS
  if captions:
    found = [row | {'conversations': row['conversations'][:2]} if row['conversations'][0]['from']
             == 'human' else row for row in found]
  return found + [{'image': 'missing.png', 'conversations': talk(one)},
                  {'image': 'wide.png', 'conversations': talk(one) + talk(one)[:1] + talk(one)[:1]}]


def write(folder, mixture, *, text_alone, captions=False):
  """The mixture's file; returns it, and the numbers of examples and of bad ones."""
  rng = np.random.default_rng(0)
  (folder / 'images').mkdir()
  for name, size in (('wide', (120, 40)), ('tall', (30, 90)), ('large', (200, 160)),
                     ('small', (20, 20))):
    Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(
      folder / 'images' / f'{name}.png')
  shares = MIXTURES[mixture] if mixture else (Share(name='rows'),)
  parts, each = [], []
  for share in shares:
    rows = [{'id': f'{share.name} {n}', **row}
            for n, row in enumerate(conversations(text_alone=text_alone, captions=captions))]
    (folder / f'{share.name}.json').write_text(json.dumps(rows))
    form = dataclasses.asdict(share.format)
    parts.append({'name': share.name, 'path': f'{share.name}.json', 'images': 'images',
                  'format': form})  # every row once: the amounts of an epoch are the papers'
    each.append(share.format.turns if share.format.each else 1)
  path = folder / 'copy.mixture.json'
  path.write_text(json.dumps({'parts': parts}))
  return path, (ROWS + 2) * sum(each), 2 * sum(each)


def small(name, data):
  """The run of the recipe with a tiny model of its system."""
  config = run_config.load(RunConfig, str(CONFIGS / f'{name.split(":")[0]}.py') + ':' +
                           name.split(':')[1])
  tiny, model = registry.get(config.model.system).tiny(), config.model
  fields = {field.name for field in dataclasses.fields(model.encoder)}
  kept = {key: getattr(model.encoder, key) for key in KEPT if key in fields}
  tiny = dataclasses.replace(
    tiny, chat=model.chat, image_token=model.image_token, after_image=model.after_image,
    encoder=dataclasses.replace(tiny.encoder, **kept),
    text=dataclasses.replace(tiny.text, lora=model.text.lora))
  accumulate = min(config.training.accumulate, 2)
  return dataclasses.replace(
    config, model=tiny, mesh=type(config.mesh)(),
    data=dataclasses.replace(
      config.data, train=str(data), tokenizer='byte', lengths=(512, 1024), max_length=None,
      group=config.data.group and (2, 2)),
    training=dataclasses.replace(
      config.training, steps=4, batch_size=8, accumulate=accumulate, log_every=1, init_from=None,
      init_allow=()))


@pytest.mark.parametrize('name', levels('recipes', STAGES, first=FIRST))
def test_a_published_stage_trains_on_its_mixture(name, tmp_path):
  mixture = STAGES[name]
  text_alone = mixture is None or mixture.startswith('vila')
  captions = name.endswith('stage1') and mixture is None
  data, examples, bad = write(tmp_path, mixture, text_alone=text_alone and not captions,
                              captions=captions)
  config = small(name, data)
  batches = make_batches(config)
  report = check_batches(batches, progress=False)
  assert (report.rows, len(report.faults)) == (examples, bad), report.counts
  made = batches.mapped(batches.transform)  # steps may go beyond the first epoch
  seen = Counter(made[i].kind for i in range(4 * 8) if isinstance(made[i], Fault))
  result = train(config, tmp_path / 'run', progress=False)
  assert result.step == 4 and math.isfinite(result.loss)
  assert result.bad_rows == dict(seen)  # training counts what the check finds


def test_every_stage_is_here():
  """A stage added to a recipe needs a row above; PS3's records: tests/training/test_regions.py."""
  for system in ('pheye', 'mc_llava', 'llava_hr', 'vila_hd'):
    stages = runpy.run_path(str(CONFIGS / f'{system}.py'))['STAGES']
    assert all(any(name.startswith(system) and stage in name.replace(':', ',').split(',')
                   for name in STAGES) for stage in stages), stages
