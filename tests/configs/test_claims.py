"""`configs/compare/claims.py`: every claim has its row, every model and point can be made."""

import dataclasses

import numpy as np
import pytest

from hrvlm_jax.core import paths
from hrvlm_jax.core.config import from_dict, to_dict
from hrvlm_jax.lab import claims, compare_config
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.training import run_config
from hrvlm_jax.vlm import fastv, model as vlm, prune

FILE = 'configs/compare/claims.py'
# What the papers say -> the claims that tell it.
LISTED = {
  'MC-LLaVA': {
    'more crops for small targets': ['mc_crops'],
    'crops against tokens of a crop at a constant number': [
      'mc_crops_or_tokens_test', 'mc_crops_or_tokens', 'mc_both_knobs'],
    'training with varied crops': ['mc_varied_few', 'mc_varied_many'],
  },
  'Pheye': {
    'gain of resolution by thirds (table 2)': ['pheye_gain_by_size'],
    'cross-attention, prefix, one token (table 4)': ['pheye_fusion', 'pheye_all_tokens'],
    'resolution and resamplers (table 5)': ['pheye_resolution', 'pheye_resolution_monkey'],
    'attention on the global view (appendix C)': ['pheye_global_attention'],
    'interval (table 1)': ['pheye_blocks', 'pheye_resolution_or_blocks'],
  },
  'LLaVA-HR': {
    'each path (table 3)': ['lhr_paths'], 'direction': ['lhr_direction'], 'gate': ['lhr_gate'],
    'structure': ['lhr_structure'], 'baselines (table 2)': ['lhr_baselines'],
    'resolution with cost (table 1)': ['lhr_resolution', 'lhr_resolution_vit', 'lhr_tokens'],
  },
  'PS3': {
    'recall and accuracy of the selection (table 7)': [
      'ps3_recall', 'ps3_selection', 'ps3_selection_all'],
    'cost over resolution': ['ps3_cost', 'ps3_cost_encoder', 'ps3_constant_tokens',
                             'ps3_constant_tokens_further'],
    'tokens in training and at test (table 1, figure 9)': [
      'ps3_tokens_train', 'ps3_tokens_test', 'ps3_tokens_test_all'],
    'ToMe, FastV, VisionZip (table 4)': ['ps3_pruning_50', 'ps3_pruning_25', 'ps3_pruning_cost'],
    'AnyRes and S2 (table 1)': ['ps3_equal_tokens', 'ps3_fewer_tokens'],
    'design (table 6)': [
      'ps3_target_selection', 'ps3_target_pooling', 'ps3_global_contrast', 'ps3_intra_contrast',
      'ps3_multi_scale', 'ps3_scale_positions', 'ps3_extra_positions'],
    'low-resolution cache (table 6)': ['ps3_low_context'],
    'another trunk (table 5)': ['ps3_trunk', 'ps3_trunk_radio'],
    'alignment data (table 8)': ['ps3_alignment_data'],
  },
}


def loaded(words):
  return run_config.load(compare_config.CompareConfig, f'{FILE}:{words}', [])


@pytest.fixture(scope='module')
def made():
  return loaded('full')


def test_every_claim_of_the_papers_has_its_row(made):
  listed = {name: paper for paper, parts in LISTED.items() for names in parts.values()
            for name in names}
  assert {name: claim.paper for name, claim in made.claims.items()
          if not claim.follows} == listed
  used = set().union(*map(compare_config.systems_of, made.claims.values()))
  assert set(made.systems) == used, 'models that no claim needs'


def test_a_word_gives_the_systems_and_claims_of_a_task(made):
  parts = {task: loaded(f'{task},smoke') for task in ('needle', 'relate', 'page')}
  for task, part in parts.items():
    assert part.task.task == task and part.train_steps == 3
    assert set(part.claims) == {n for n, claim in made.claims.items() if claim.task == task}
    assert {'single_view', 'mc_llava', 'pheye', 'llava_hr', 'vila_hd'} <= set(part.systems)
    assert {a.like for a in part.adapt.values()} - {None} <= set(part.adapt)
    assert all(a.like or a.steps == 3 for a in part.adapt.values())
  assert set().union(*(part.systems for part in parts.values())) == set(made.systems)


def test_every_model_starts_from_a_pretrained_tower(made):
  towers = {}
  for name, model in made.systems.items():
    flat = paths.flatten(vlm.build(model).abstract)
    encoder = compare_config.encoder_of(made, model)
    if encoder is None:  # a ConvNeXt alone, which learns from scenes
      assert name in made.adapt and not any('pos_embed' in path for path in flat)
      continue
    place = {'llava_hr': 'fast', 'vila_hd': 'ps3/tower', 'reduced': 'inner/tower'}.get(
      model.system, 'tower')
    if encoder not in towers:
      alone = made.systems['radio_single' if encoder else 'single_view']
      towers[encoder] = {
        path.removeprefix('vision/tower/'): np.zeros(leaf.shape, np.float32)
        for path, leaf in paths.flatten(vlm.build(alone).abstract).items()
        if path.startswith('vision/tower/')}
    assert compare_config.tower_path(model, towers[encoder]) == f'vision/{place}/'
    if change := made.changes.get(name):
      assert not change.frozen or any(path.startswith('language/') for path in flat)
  assert set(towers) == {'', 'radio'}


def test_every_point_can_be_asked(made):
  """Settings at test time suit their models, methods lie over them."""
  for claim in made.claims.values():
    for point in claim.points:
      model = made.systems[point.system]
      if point.encoder:
        encoder = from_dict(type(model.encoder), to_dict(model.encoder)
                            | point.encoder)
        model = dataclasses.replace(model, encoder=encoder)
      assert isinstance(model, ModelConfig)
      for method, settings in point.methods.items():
        module, kind = {'fastv': (fastv, fastv.FastV), 'prune': (prune, prune.Prune)}[method]
        module.build(model, kind(**settings))
      if point.measure == 'attention_global':
        assert model.fusion.kind == 'cross_attention'
      if point.measure == 'recall':
        assert model.system == 'vila_hd'


def test_numbers_of_tokens_are_those_the_claims_speak_of(made):
  def tokens(name):
    model = made.systems[name]
    return registry.get(model.system).count(240, 240, model.encoder).tokens

  assert [tokens(p.system) for p in made.claims['ps3_cost'].points] == [33, 33, 33]
  assert [tokens(p.system) for p in made.claims['ps3_equal_tokens'].points] == [109, 90, 100]
  assert [tokens(p.system) for p in made.claims['ps3_fewer_tokens'].points] == [33, 265, 100]
  assert [tokens(p.system) for p in made.claims['mc_crops_or_tokens'].points] == [50, 50, 52]
  assert [tokens(p.system) for p in made.claims['lhr_tokens'].points] == [400, 25]
  for name in ('pheye_perceiver', 'pheye_monkey', 'pheye_small'):
    assert tokens(name) == 25
  assert tokens('pheye_one_token') == 1 and tokens('pheye_prefix') == tokens('pheye_frozen') == 250
  two, one = (made.systems[name].encoder for name in ('vila_hd_two_scales', 'vila_hd'))
  assert sum(two.tower.budgets) == sum(one.tower.budgets) == 96


def test_costs_are_measures_and_papers_are_named(made):
  for name, claim in made.claims.items():
    assert claim.paper in claims.PAPERS and claim.source.startswith(('article', claim.paper)), name
    assert (claim.order == 'constant') <= (claim.measure in claims.COSTS)
