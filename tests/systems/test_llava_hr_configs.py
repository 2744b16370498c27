"""Recipes and ablations of LLaVA-HR: every row is a valid run config with the tokens it should."""

import pathlib
import re

import jax.numpy as jnp
import pytest

from hrvlm_jax.core import paths
from hrvlm_jax.core.module import Functional
from hrvlm_jax.systems.llava_hr.encoder import Encoder
from hrvlm_jax.training import run_config
from hrvlm_jax.training.config import RunConfig

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
TOKENS = {
  'ablations/llava_hr_table2.py': {
    'mra': 576, 'clip': 2916, 'convnext': 576, 'clip_resampler': 144, 'clip_average': 729},
  'ablations/llava_hr_table3.py': dict.fromkeys((
    'default', 'fast_none', 'fast_vit_g', 'slow_none', 'slow_convnext_xxl',
    'direction_low_to_high', 'fusion_concat', 'struct_conv_conv', 'struct_conv_mlp',
    'gate_sigmoid', 'gate_hsigmoid', 'gate_vector', 'paper'), 576),
  'llava_hr.py': {f'{size},stage{stage}': tokens for size in ('7b', 'x_13b')
                  for stage, tokens in ((1, 576), (2, 1024))},
}


@pytest.mark.parametrize('file,row', [(f, row) for f, rows in TOKENS.items() for row in rows])
def test_rows_are_run_configs(file, row):
  stage1 = row.endswith('stage1')
  config = run_config.load(RunConfig, f'{CONFIGS / file}:{row}')
  encoder = config.model.encoder
  assert encoder.tokens == TOKENS[file][row]
  assert config.model.projector.n_in == encoder.width
  fn = Functional(lambda rngs: Encoder(encoder, param_dtype=jnp.bfloat16, rngs=rngs))
  names = [f'vision/{path}' for path in paths.flatten(fn.abstract)]
  rules = [(group.pattern, not group.frozen) for group in config.training.groups]
  trained = {n for n, on in paths.match_rules(rules, names, what='group').items() if on}
  unread = {n for n in names if re.fullmatch(config.training.groups[0].pattern, n)}
  if stage1:
    assert trained == {n for n in names if n.startswith('vision/align/')}
  else:
    assert trained == set(names) - unread
  # A micro-batch is what one of the original's devices holds at once.
  assert config.training.batch_size // config.training.accumulate == (
    32 if stage1 else 8)


def test_tiny_config():
  config = run_config.load(RunConfig, str(CONFIGS / 'tiny/llava_hr.py'))
  assert config.model.system == 'llava_hr' and config.model.encoder.tokens == 64
