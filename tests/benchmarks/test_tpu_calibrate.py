"""The calibration for plans: its logic on CPU devices with tiny sizes, no TPU refused."""

import json

import jax
import pytest

from benchmarks.ours import tpu
from hrvlm_jax.cli import main as cli
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel.topology import chip_named
from hrvlm_jax.planning.costs import costs

TINY = tpu.Sizes(product=(32, 32, 32), elements=64, messages=(256, 4096), blocks=(128,), length=128,
                 heads=1, layer=(32, 32, 2), turns=2, rounds=1, interpret=True)


def test_without_a_tpu_it_says_so_in_a_sentence():
  with pytest.raises(UserError, match='measures a TPU, and this machine shows .* x cpu'):
    cli.run(['bench', 'tpu_calibrate'])


def test_it_writes_constants_that_a_plan_takes(tmp_path):
  result = tpu.calibrate(jax.devices()[:1], chip_named('v5e'), folder=tmp_path, sizes=TINY)
  assert [row['what'] for row in result['rows']] == [
    'product', 'memory', 'attention 128, forward', 'attention 128, backward',
    'one layer, measured / read']
  assert all(row['measured'] != 0 for row in result['rows'])
  path = tmp_path / 'tpu_costs_v5e.json'
  assert str(path) == result['written'] and json.loads(path.read_text()) == result['values']
  found = costs('v5e', path)
  assert found.product_efficiency == result['values']['product_efficiency'] > 0
  assert found.hbm_efficiency == result['values']['hbm_efficiency'] > 0
  assert found.likely == result['values']['likely'] >= 1
  assert found.splash_steps[128] == tuple(result['values']['splash']['steps']['128'])
  assert found.rates == costs('v5e').rates  # one device: no messages
  assert 'measured on 1 x cpu' in found.source


def test_messages_fit_a_line(monkeypatch):
  """Seconds = latency + hops + bytes sent / rate, from two sizes."""
  known = costs('v5e')

  def timed(body, x, sizes):
    size = x.shape[0] // 4 * 2
    return 5e-6 + 2 * known.hop + size * 3 / 50e9

  devices = [jax.devices()[0]] * 4
  monkeypatch.setattr(tpu, 'per_turn', timed)
  monkeypatch.setattr(tpu, 'Mesh', lambda devices, axes, axis_types: None)
  monkeypatch.setattr(jax, 'shard_map', lambda body, **how: body)
  monkeypatch.setattr(jax.sharding, 'NamedSharding', lambda mesh, spec: None)
  monkeypatch.setattr(jax, 'device_put', lambda x, place: x)
  ring, latency = tpu.messages(devices, TINY, known)
  assert ring == pytest.approx(50e9) and latency == pytest.approx(5e-6)
