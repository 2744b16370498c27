"""Constants of the reader: of the file, of a chip's data sheet, of a measurement."""

import json
import pathlib

import pytest

from hrvlm_jax.cli import main as cli
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.parallel.topology import chips
from hrvlm_jax.planning.costs import costs

STORED = pathlib.Path(__file__).with_name('programs')


def test_the_files_constants_agree_with_the_data_sheets():
  for name in ('v5e', 'v5p', 'v6e'):
    found, chip = costs(name), chips()[name]
    assert found.rates.flops_per_cycle * found.rates.clock == pytest.approx(chip.peak_flops, 0.01)
    assert found.rates.hbm == pytest.approx(chip.hbm_bandwidth, 0.01) and not found.source
    assert found.rates.ring == chip.link_bandwidth / chip.torus
    assert found.between == chip.dcn_bandwidth


@pytest.mark.parametrize('name', ['v4', 'tpu7x'])
def test_other_tpus_are_read_by_their_data_sheets_which_is_said(name):
  found, chip = costs(name), chips()[name]
  assert found.rates.flops_per_cycle * found.rates.clock == pytest.approx(chip.peak_flops)
  assert 'data sheet' in found.source and found.product_efficiency == 0.92


def test_a_measurement_replaces_what_it_measured(tmp_path, capsys):
  path = tmp_path / 'costs.json'
  path.write_text(json.dumps({
    'about': 'measured on a v5e:2x2', 'chips': {'v5e': {'hbm': 409.5e9}}, 'likely': 1.1,
    'splash': {'steps': {'2048': [20000, 40000]}}}))
  found = costs('v5e', path)
  assert (found.rates.hbm, found.rates.ring, found.likely) == (409.5e9, 100e9, 1.1)
  assert found.splash_steps[2048] == (20000, 40000) and 1024 in found.splash_steps
  assert 'measured on a v5e:2x2' in found.source and costs('v5e').rates.hbm == 819e9
  program = str(STORED / 'ew.txt.xz')  # bound by memory: twice as long
  times = []
  for extra in ([], ['--costs', str(path)]):
    out = tmp_path / 'out.json'
    assert cli.run(['plan', '--explain', program, '--json', str(out), *extra]) == 0
    times.append(json.loads(out.read_text())['seconds'])
  assert times[1] == pytest.approx(2 * times[0], rel=0.01)
  assert 'measured on a v5e:2x2' in capsys.readouterr().out


@pytest.mark.parametrize(
  'values, sentence',
  [
    ({'clip': 1}, 'clip: unknown key clip'),
    ({'chips': {'v5e': {'hbn': 1}}}, 'chips.v5e.hbn: unknown key hbn .*hbm'),
    ({'chips': {'v5e': {'hbm': 0}}}, 'chips.v5e.hbm: found 0, expected a number above 0'),
    ({'chips': {'v9': {'hbm': 1}}}, 'chips.v9: found no clock'),
    ({'latency': '2us'}, "latency: found '2us', expected a number"),
    ({'splash': {'steps': {'128': [1]}}}, 'expected 2 numbers'),
    ({'splash': 3}, 'splash: found 3, expected keys'),
    ([1], 'found list, expected the keys'),
  ],
)
def test_mistakes_in_a_file_of_constants(tmp_path, values, sentence):
  path = tmp_path / 'c.json'
  path.write_text(json.dumps(values))
  with pytest.raises(UserError, match=sentence):
    costs('v5e', path)
  path.write_text('{')
  with pytest.raises(UserError, match='cannot be read as constants'):
    costs('v5e', path)
