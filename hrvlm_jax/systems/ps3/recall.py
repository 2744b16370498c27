"""How well PS3 finds and reads a captioned region, by its budget of high-resolution tokens.

Three ways to choose patches at the same budget: by the caption (top-down), by saliency (bottom-up),
at random. Measured per way and budget:

- recall: the share of the patches a box touches, over all high scales, that were chosen (paper
  2503.19903, patch selection: 91.2 / 87.4 / 43.7 % at 44 %);
- accuracy: the share of regions whose own caption scores best among captions that differ in what
  only high resolution shows. The image feature is pooled over the chosen patches in the box.

Axis letters: b regions, h w pixels, t text places, k candidate captions, o feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hrvlm_jax.core.layers import unit
from hrvlm_jax.core.module import Functional
from hrvlm_jax.core.resample import normalise
from hrvlm_jax.systems.ps3.config import PS3Config
from hrvlm_jax.systems.ps3.data import target_map
from hrvlm_jax.systems.ps3.model import covered, target_maps
from hrvlm_jax.systems.ps3.plan import make_plan
from hrvlm_jax.systems.ps3.views import squash

WAYS = ('random', 'bottom_up', 'top_down')


@dataclasses.dataclass(frozen=True)
class Score:
  """One way and budget: share of all high-resolution patches, recall and accuracy in 0..1."""

  way: str
  share: float
  tokens: int
  recall: float
  accuracy: float


def probe(
  fn: Functional, params: Mapping[str, Any], batch: Mapping[str, jax.Array], key: jax.Array, *,
  encoder: PS3Config, budgets: Sequence[int],
) -> dict[str, jax.Array]:
  """Recall [b ways budgets] and correctness [b ways budgets] of one batch.

  Args:
    batch: regions: pixels uint8 [b S S 3], target uint8 [b S S], prompt int32 [b t] (what to look
      for, without what is to be read there), candidates int32 [b k t], answer int32 [b].
    fn, params: of `systems.ps3.model.build(encoder)`.
    budgets: numbers of high-resolution tokens.
  """
  module = fn.bind(params)
  vision = module.vision
  images = normalise(batch['pixels'], encoder.mean, encoder.std)
  size = images.shape[1:3]
  rows, choices = batch['candidates'].shape[:2]
  candidates = module.text.features(batch['candidates'].reshape(rows * choices, -1))
  candidates = candidates.reshape(rows, choices, -1)
  low = vision.encode_low(images)
  first = make_plan(*size, encoder, num_looks=1)
  maps = {'bottom_up': vision.probabilities(low, None, first),
          'top_down': vision.probabilities(low, module.prompt(batch['prompt']), first)}
  keys = jax.random.split(key, len(first.cells))
  maps['random'] = tuple(jax.random.uniform(k, p.shape)
                         for k, p in zip(keys, maps['top_down'], strict=True))
  wanted = sum((m > 0).sum(axis=(1, 2)) for m in target_maps(batch['target'], first))
  recall, correct = [], []
  for way in WAYS:
    for budget in budgets:
      plan = make_plan(*size, encoder, num_tokens=budget)
      out = vision.encode_high(low, images, maps[way], plan)
      touched = covered(batch['target'], out.cells, plan) > 0
      recall.append(touched.sum(axis=1) / jnp.maximum(wanted, 1))
      tokens = out.last[:, plan.grids[0][0] * plan.grids[0][1]:]
      feature = unit(vision.pool(tokens, mask=touched))
      correct.append(jnp.einsum('bo,bko->bk', feature, candidates).argmax(1) == batch['answer'])
  shape = (rows, len(WAYS), len(budgets))
  return {'recall': jnp.stack(recall, 1).reshape(shape),
          'correct': jnp.stack(correct, 1).reshape(shape)}


def region_map(size: tuple[int, int], box: Sequence[float], side: int) -> np.ndarray:
  """uint8 [side side]: the box of an image of `size`, squashed to a square."""
  scale = np.array([side / size[0], side / size[1]] * 2)
  return target_map([np.asarray(box, np.float64) * scale], side, side).astype(np.uint8)


def own_probes(
  regions: Sequence[tuple[Image.Image, Sequence[float], str]], captions: Sequence[str],
  encoder: PS3Config, tokenize: Callable[[Sequence[str]], np.ndarray], *, candidates: int,
  batch_size: int, seed: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
  """Batches of anyone's regions for `measure`: (image, box in its pixels, caption) each.

  A region's caption says what to look for and has to score best among `candidates` captions, the
  others drawn from `captions` (all different; fewer where there are not so many).
  """
  side, rng = encoder.scales[-1], np.random.default_rng(seed)
  number = min(candidates, len(captions))
  for start in range(0, len(regions), batch_size):
    rows = []
    for image, box, caption in regions[start:start + batch_size]:
      others = [text for text in captions if text != caption]
      drawn = [others[i] for i in rng.choice(len(others), number - 1, replace=False)]
      place = int(rng.integers(number))
      rows.append({
        'pixels': squash(image, side), 'target': region_map(image.size, box, side),
        'prompt': tokenize([caption])[0],
        'candidates': tokenize([*drawn[:place], caption, *drawn[place:]]),
        'answer': np.int32(place)})
    yield {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def measure(
  fn: Functional, params: Mapping[str, Any], batches: Iterator[Mapping[str, np.ndarray]], *,
  encoder: PS3Config, shares: Sequence[float], seed: int = 0,
) -> list[Score]:
  """Means over all regions, for every way and share.

  Args:
    shares: budgets as shares of all high-resolution patches.
  """
  side = encoder.scales[-1]
  cells = sum(make_plan(side, side, encoder, num_looks=1).cells)
  budgets = [max(1, round(share * cells)) for share in shares]
  run = jax.jit(lambda p, b, k: probe(fn, p, b, k, encoder=encoder, budgets=budgets))
  found = []
  for number, batch in enumerate(batches):
    key = jax.random.fold_in(jax.random.key(seed), number)
    found.append(jax.device_get(run(params, batch, key)))
  mean = {key: np.concatenate([f[key] for f in found]).mean(axis=0) for key in found[0]}
  return [Score(way, float(share), budget, round(float(mean['recall'][i, j]), 4),
                round(float(mean['correct'][i, j]), 4))
          for i, way in enumerate(WAYS)
          for j, (share, budget) in enumerate(zip(shares, budgets, strict=True))]
