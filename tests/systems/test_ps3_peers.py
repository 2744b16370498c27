"""ps3-torch loads an exported folder and computes the same (scripts/peers.sh makes its place)."""

import dataclasses
import json
import os
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hrvlm_jax.checkpoint import store
from hrvlm_jax.core import paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.interop.export import export
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.ps3 import model
from hrvlm_jax.systems.ps3.config import PoolConfig, PS3Config, SaliencyConfig, TextConfig
from hrvlm_jax.systems.ps3.plan import make_plan
from hrvlm_jax.vision.vit import ViTConfig

SCRIPT = pathlib.Path(__file__).with_name('ps3_peer.py')
# Every budget is three whole cells of the thumbnail's 4 x 4: neither the remainder that 0.1.3 loses
# nor its order of ties decides anything.
CONFIG = PS3Config(
  vision=ViTConfig(image_size=56, patch_size=14, width=32, depth=3, heads=2, mlp_width=64,
                   activation='gelu'),
  scales=(56, 112, 224), select_layers=(0, 2), max_select=60, budgets=(12, 48),
  saliency=SaliencyConfig(width=24, out=20, depth=1),
  pool=PoolConfig(width=32, heads=2, mlp_width=64),
  text=TextConfig(vocab_size=300, context=16, width=32, depth=2, heads=2, mlp_width=64, out=24,
                  prompt_width=32))


@pytest.mark.peers
def test_an_exported_folder_gives_the_same_features_in_ps3_torch(tmp_path):
  fn = model.build(CONFIG)
  params = paths.map_with_path(
    # Zero residuals and tiny layer scales would hide mistakes.
    lambda path, leaf: leaf + 0.2 * jax.random.normal(
      jax.random.key(sum(map(ord, path))), leaf.shape)
    if 'residual' in path or path.endswith('/weight') else leaf, fn.init(jax.random.key(0)))
  config = ModelConfig(system='ps3', encoder=CONFIG, text=None, image_token=None)
  store.save_params(tmp_path / 'checkpoint', params, {'model': to_dict(config)})
  folder = tmp_path / 'folder'
  export(tmp_path / 'checkpoint', folder)
  # No published trunk has these sizes: the peer registers one with timm under this name.
  values = json.loads((folder / 'config.json').read_text())
  values['vision_config']['model_name'] = 'tiny_trunk_of_a_test'
  (folder / 'config.json').write_text(json.dumps(values))
  (folder / 'trunk.json').write_text(json.dumps(
    {'patch_size': 14, 'embed_dim': 32, 'depth': 3, 'num_heads': 2, 'mlp_ratio': 2.0}))

  rng = np.random.default_rng(0)
  images = {'square': rng.standard_normal((2, 224, 224, 3)).astype(np.float32),
            'wide': rng.standard_normal((2, 120, 200, 3)).astype(np.float32)}
  tokens = rng.integers(2, 300, (2, 16)).astype(np.int32)
  np.savez(tmp_path / 'in.npz', tokens=tokens,
           **{key: np.moveaxis(x, -1, 1) for key, x in images.items()})
  python = pathlib.Path(os.environ['HRVLM_PEERS']) / 'bin' / 'python'
  ran = subprocess.run([python, SCRIPT, folder, tmp_path / 'in.npz', tmp_path / 'out.npz'],
                       capture_output=True, text=True, env=os.environ | {'HF_HUB_OFFLINE': '1'})
  assert ran.returncode == 0, ran.stderr[-3000:]
  theirs = dict(np.load(tmp_path / 'out.npz'))

  module = fn.bind(params)
  ours = {'pooled': module.text(tokens), 'prompt': module.prompt(jnp.asarray(tokens))}
  for shape, x in images.items():
    for name, looks in (('bottom_up', 1), ('two', 2), ('all', 'all')):
      plan = make_plan(*x.shape[1:3], CONFIG, num_looks=looks)
      out = jax.jit(lambda p, x, prompt, plan=plan: fn.bind(p).vision.encode(
        x, plan, prompt=prompt, keep=2))(
          params, x, None if name == 'bottom_up' else ours['prompt'])
      ours |= {f'{shape}.{name}.last': out.last, f'{shape}.{name}.penultimate': out.hidden[1]}
      ours |= {f'{shape}.{name}.map{i}': m for i, m in enumerate(out.maps)}
  assert set(ours) == set(theirs)
  for key, value in theirs.items():
    limit = 1e-4 * max(1.0, float(np.abs(value).max()))
    np.testing.assert_allclose(ours[key], value, atol=limit, rtol=0, err_msg=key)
    if '.map' in key:
      np.testing.assert_array_equal(ours[key], value, err_msg=key)
  assert dataclasses.replace(CONFIG, budgets=None).resolved_budgets == (12, 48)
