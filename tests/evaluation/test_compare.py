"""`evaluation.compare`: refusals, table and plot, one tiny run that is taken up again."""

import dataclasses

import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.data.needle import NeedleConfig
from hrvlm_jax.evaluation import compare
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines.anyres.config import AnyResConfig
from hrvlm_jax.systems.baselines.single_view.config import SingleViewConfig
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.training.config import OptimizerConfig
from hrvlm_jax.vision.vit import ViTConfig

VISION = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_width=16,
                   pool='map')
TEXT = language.phi(vocab_size=384, width=16, depth=1, heads=2, mlp_width=16, max_positions=256)
HALF = (0.5, 0.5, 0.5)


def single(vision=VISION, text=TEXT):
  encoder = SingleViewConfig(vision=vision, layer=-1, fit='squash', mean=HALF, std=HALF)
  return ModelConfig(system='single_view', encoder=encoder, text=text,
                     projector=ProjectorConfig(n_in=vision.width, n_out=text.width))


def config(**systems):
  return compare.CompareConfig(
    task=NeedleConfig.tiny(),
    encoder=compare.EncoderConfig(vision=VISION, window=80, last_tokens=2, steps=1),
    systems=systems, optimizer=OptimizerConfig(learning_rate=1e-3), train_images=4, eval_images=3,
    train_steps=2, batch_size=2, answer_batch=3, latency_answers=1, lengths=(128, 256))


def test_systems_that_cannot_be_compared_are_refused_with_all_reasons():
  other = dataclasses.replace(TEXT, width=32, mlp_width=32)
  wide = dataclasses.replace(VISION, width=32)
  tiled = AnyResConfig(vision=VISION, layer=-1, pinpoints=((160, 160),), merge='flat', width=16,
                       mean=HALF, std=HALF)
  with pytest.raises(UserError) as error:
    config(plain=single(), other=single(text=other), wide=single(vision=wide),
           tiled=ModelConfig(system='anyres', encoder=tiled, text=TEXT))
  text = str(error.value)
  assert 'the language models of plain, other, wide, tiled are not equal' in text
  assert 'wide: its tower (16 pixels, width 32, depth 1) is not the shared encoder' in text
  assert 'tiled:' in text and 'leave no room for text in 256 places' in text


def test_table_and_plot_name_machine_and_chance(tmp_path):
  row = {'accuracy': 0.5, 'accuracy_by_size': {'small': 0.25, 'medium': 0.5, 'large': 0.75},
         'tokens': 25.0, 'views': 1.0, 'encoder_gflops': 0.01, 'latency_ms': 3.0,
         'peak_memory_mb': 10.0, 'family': 'prefix'}
  results = {'systems': {'a': row, 'b': row | {'family': 'cross_attention'}}, 'chance': 0.04,
             'images': {'eval': 8}, 'steps': 2,
             'machine': {'device': 'cpu', 'devices': 1, 'cores': 2}}
  text = compare.table(results)
  assert '25.0%' in text and 'chance 4.0%' in text and 'cpu x 1, 2 cores' in text
  assert 'only' in text  # tokens of the cross-attention family are not comparable
  compare.plot(results, tmp_path / 'plot.png')
  assert (tmp_path / 'plot.png').stat().st_size > 1000


def test_a_comparison_runs_and_is_taken_up_again(tmp_path, monkeypatch):
  made = config(plain=single())
  results = compare.compare(made, tmp_path, progress=False)
  row = results['systems']['plain']
  assert row['tokens'] == 4 and row['encoder_gflops'] > 0 and row['peak_memory_mb'] > 0
  assert (tmp_path / 'table.txt').exists() and (tmp_path / 'plot.png').exists()
  monkeypatch.setattr(compare.Comparison, 'train', None)  # done before: not called
  assert compare.compare(made, tmp_path, progress=False)['systems']['plain'] == row
  with pytest.raises(UserError, match='holds another comparison .train_steps differ'):
    compare.compare(dataclasses.replace(made, train_steps=3), tmp_path, progress=False)
