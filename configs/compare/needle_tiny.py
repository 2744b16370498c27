"""Systems on the built-in task with one shared encoder, language model and number of steps.

Command:  hrvlm compare --config configs/compare/needle_tiny.py --out runs/compare_tiny
Hardware: 2 CPU cores.
Expected: table.txt, plot.png and results.json in the folder; run again, it goes on where it
          stopped.
          With the argument `smoke` (needle_tiny.py:smoke) a few steps of everything.
"""

import dataclasses

import ml_collections

from hrvlm_jax.cli import quickstart
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.systems.baselines.anyres.config import AnyResConfig
from hrvlm_jax.systems.baselines.s2.config import S2Config
from hrvlm_jax.systems.baselines.single_view.config import SingleViewConfig
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig

HALF = (0.5, 0.5, 0.5)


def systems():
  """Models by name: the same tower and language model in all."""
  vision, text = quickstart.VISION, quickstart.TEXT
  size = vision.image_size
  common = dict(vision=vision, layer=-1, mean=HALF, std=HALF)
  project = lambda width: ProjectorConfig(n_in=width, n_out=text.width)
  single = SingleViewConfig(fit='squash', **common)
  # The panorama is 8 times as wide as high: one row of 8 tiles shows it at the crops' scale.
  anyres = AnyResConfig(pinpoints=((8 * size, size), (4 * size, size), (4 * size, 2 * size)),
                        width=text.width, **common)
  # S2 takes squares: most of the largest scale is padding here, which is its price.
  s2 = S2Config(sizes=(size, 2 * size, 8 * size), output=1, fit='pad', **common)
  return {
    'single_view': ModelConfig(system='single_view', encoder=single, text=text,
                               projector=project(vision.width)),
    'mc_llava': quickstart.model(quickstart.RUNS['multi_crop']),
    'anyres': ModelConfig(system='anyres', encoder=anyres, text=text),
    's2': ModelConfig(system='s2', encoder=s2, text=text, projector=project(s2.channels)),
  }


def get_config(size='full'):
  sizes = quickstart.Sizes() if size == 'full' else quickstart.Sizes.smoke()
  smoke = size != 'full'
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.task = dataclasses.asdict(quickstart.task())
  config.encoder = dict(vision=to_dict(quickstart.VISION), window=quickstart.WINDOW,
                        last_tokens=quickstart.LAST_TOKENS, steps=sizes.encoder_steps)
  config.systems = {name: to_dict(model) for name, model in systems().items()}
  config.optimizer = dict(name='muon', learning_rate=2e-3, warmup=0.08, weight_decay=0.01, b2=0.98)
  config.train_images = sizes.train_images
  config.eval_images = sizes.eval_images
  config.train_steps = sizes.train_steps
  config.batch_size = sizes.batch_size
  config.lengths = (96, 128, 160, 224, 288, 352, 512)
  config.answer_batch = 3 if smoke else 25
  config.latency_answers = 2 if smoke else 20
  return config
