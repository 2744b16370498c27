"""Views of `relate` and `page` to pre-train an encoder on: labels, and that they can be learned."""

import dataclasses
import json

import numpy as np
import pytest

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab import compare, compare_config, glyphs, needle
from hrvlm_jax.lab.needle import NeedleConfig, kinds, views
from hrvlm_jax.lab.pretrain import pretrain
from hrvlm_jax.language import config as language
from hrvlm_jax.systems.baselines.single_view import SingleViewConfig
from hrvlm_jax.systems.contract import ModelConfig, ProjectorConfig
from hrvlm_jax.training.config import OptimizerConfig
from hrvlm_jax.vision.vit import ViTConfig

COMPOSED = ('relate', 'page')
VISION = ViTConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_width=16)
TEXT = language.phi(vocab_size=384, width=16, depth=1, heads=2, mlp_width=16, max_positions=256)
SYSTEM = ModelConfig(
  system='single_view', text=TEXT, projector=ProjectorConfig(n_in=16, n_out=16),
  encoder=SingleViewConfig(vision=VISION, layer=-1, fit='squash', mean=(0.5,) * 3, std=(0.5,) * 3))


def drawn(task, n=64, **options):
  config = NeedleConfig.medium(task)
  settings = dict(window=80, size=40) | options
  return config, needle.task_views(config, np.random.default_rng(0), n, **settings)


@pytest.mark.parametrize('task', COMPOSED)
def test_views_are_a_function_of_the_source(task):
  (_, one), (_, two) = drawn(task, whole=0.2), drawn(task, whole=0.2)
  assert (one.pixels == two.pixels).all() and (one.letters == two.letters).all()
  assert (one.patch_things(5) == two.patch_things(5)).all()
  different = {view.tobytes() for view in one.pixels}
  assert len(different) > 60


@pytest.mark.parametrize('task', COMPOSED)
def test_patches_and_slots_say_what_a_view_shows(task):
  config, found = drawn(task, n=128)
  patches, things = found.patch_letters(40), found.patch_things(40)
  read = 0
  for i, texts in enumerate(found.shown):
    for letter, colour, box in texts:
      x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
      if letter < 0:
        assert box.min() < 0 or box.max() > 1
        continue
      assert box.min() >= 0 and box.max() <= 1
      assert patches[i, int(40 * y) * 40 + int(40 * x)] == letter
      slot = int(3 * y) * 3 + int(3 * x) if task == 'page' else colour
      assert found.letters[i, slot, 0] in (letter, needle.CUT)
      read += found.letters[i, slot, 0] == letter
    for thing, box in found.things[i]:
      if thing >= 0 and thing != views.THINGS.index('circle'):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        assert things[i, int(40 * y) * 40 + int(40 * x)] == thing
  assert read > 30
  there = set(np.unique(things))
  assert there == ({-1} if task == 'page' else {-1, 0, 1, 2, 3})


def test_a_whole_picture_shows_every_sign_and_thing_and_its_cue():
  config, found = drawn('relate', n=320, whole=0.5)
  whole = [i for i, things in enumerate(found.things) if len(things) == 4]
  assert 130 < len(whole) < 190
  for i in whole:
    assert len(found.shown[i]) == 4 and min(letter for letter, _, _ in found.shown[i]) >= 0
  known = views.states(config)
  red, blue = found.pixels[..., 0].mean((1, 2)), found.pixels[..., 2].mean((1, 2))
  warm, cold = (found.cues == known.index(('tint', state)) for state in (0, 1))
  assert warm.any() and cold.any() and (red - blue)[warm].mean() > (red - blue)[cold].mean() + 20


@pytest.mark.parametrize('task', COMPOSED)
def test_an_encoder_learns_from_them(task):
  head = glyphs.GlyphConfig(needle=NeedleConfig.medium(task), vision=VISION, window=80,
                            last_tokens=2, colour_weight=1.0, steps=40, batch_size=8, warmup=2,
                            learning_rate=1e-2)
  losses = []
  tower, read = pretrain(head, report=lambda _, loss, __: losses.append(loss))
  assert np.mean(losses[-5:]) < 0.96 * np.mean(losses[:5]) and 0 <= read <= 1
  assert 'pos_embed' in tower and not any('scene' in path or 'thing' in path for path in tower)
  plain = dataclasses.replace(head, needle=NeedleConfig.medium())
  assert len(plain.draw(0)) == 4 and len(head.draw(0)) == 6


@pytest.mark.parametrize('task', COMPOSED)
def test_a_description_tells_all_in_rows_from_the_top(task):
  config = NeedleConfig.medium(task)
  for index in range(20):
    made = needle.plan(config, 0, index)
    asked, told = needle.description(config, made)
    assert asked['from'] == 'human' and told['from'] == 'gpt'
    cue, _, rows = told['value'].partition(': ')
    assert cue == kinds.CUES[task][made.cue.kind][made.cue.state]
    assert needle.description(config, dataclasses.replace(made, cue=None))[1]['value'] == rows
    rows = [row.split(', ') for row in rows.split('; ')]
    assert sum(map(len, rows)) == len(made.signs) + len(made.things)
    if task == 'page':
      assert [word for row in rows for word in row] == [word.text for word in made.signs]
      assert len(rows) == len({word.box[1] for word in made.signs})
      continue
    beside = next(row for row in rows if 'house' in row)
    for turn in made.turns:
      if turn.kind == 'side':
        assert {beside[0].split()[-1], beside[2].split()[-1]} == {turn.answer, turn.other}
    circles = next(row for row in rows if 'circle' in row[0])
    assert sorted(circles) == ['largest circle', 'smallest circle']


def test_a_comparison_trains_on_descriptions(tmp_path):
  made = compare_config.CompareConfig(
    task=NeedleConfig.medium('page'), described=True, encoder=compare_config.EncoderConfig(
      vision=VISION, window=80, last_tokens=2, steps=1),
    systems={'plain': SYSTEM}, optimizer=OptimizerConfig(learning_rate=1e-3), train_images=3,
    eval_images=2, train_steps=2, batch_size=2, lengths=(256,))
  comparison = compare.Comparison(made, tmp_path, progress=False)
  comparison.write_data()
  told = json.loads((tmp_path / 'data/train/described.json').read_text())
  plain = needle.read_records(tmp_path / 'data/train')
  for index, (long, short) in enumerate(zip(told, plain, strict=True)):
    task = dataclasses.replace(made.task, turns=made.turns)
    assert long['conversations'][:-2] == short['conversations']
    assert long['conversations'][-2:] == needle.description(task, needle.plan(task, 0, index))
  rows = json.loads((tmp_path / 'data/train/rows.json').read_text())
  assert [row['conversations'][:2] for row in rows] == [
    row['conversations'] for row in needle.single_turns(plain)]
  for number, row in enumerate(rows):
    shown = needle.plan(task, 0, number // made.turns)
    assert row['conversations'][2:] == needle.cue_description(task, shown)
    assert told[number // made.turns]['conversations'][-1]['value'].startswith(
      row['conversations'][-1]['value'])
  assert needle.cue_description(task, dataclasses.replace(shown, cue=None)) == []
  assert any('Describe it.' in text for text in comparison.texts())
  with pytest.raises(UserError, match='needle has no descriptions'):
    dataclasses.replace(made, task=NeedleConfig.medium())


def test_an_encoder_may_learn_to_read_on_a_simpler_task_first(tmp_path, monkeypatch):
  signs, encoder = NeedleConfig.medium(), dict(vision=VISION, window=80, last_tokens=2, steps=1)
  deep = dict(encoder, vision=dataclasses.replace(VISION, depth=2))
  made = compare_config.CompareConfig(
    task=NeedleConfig.medium('page'),
    encoder=compare_config.EncoderConfig(**encoder, first=signs, first_steps=2),
    encoders={'deep': compare_config.EncoderConfig(**deep)}, systems={
      'plain': SYSTEM, 'deep': dataclasses.replace(SYSTEM, encoder=dataclasses.replace(
        SYSTEM.encoder, vision=deep['vision']))}, optimizer=OptimizerConfig(learning_rate=1e-3),
    train_images=3, eval_images=2, train_steps=2, batch_size=2, lengths=(256,))
  learned = []

  def learn(self, title, head, start=None):
    learned.append((title, head.needle.task, head.steps, start))
    return {'pos_embed': np.full(3, len(learned))}, 0.5

  monkeypatch.setattr(compare.Comparison, 'learn', learn)
  comparison = compare.Comparison(made, tmp_path, progress=False)
  shared = comparison.shared()
  assert [step[0] for step in shared['encoder']] == ['encoder first', 'encoder']
  assert [step[0] for step in shared['encoder deep']] == ['encoder deep']
  for name in ('encoder', 'encoder deep'):
    comparison.do(shared[name])
  assert [one[:3] for one in learned] == [
    ('encoder first', 'needle', 2), ('encoder', 'page', 1), ('encoder deep', 'page', 1)]
  assert learned[0][3] is None and learned[2][3] is None
  assert {path: leaf.tolist() for path, leaf in learned[1][3].items()} == {
    'tower/pos_embed': [1, 1, 1]}
  assert all((tmp_path / compare.encoder_folder(name)).is_dir() for name in ('', 'first', 'deep'))
  for broken, said in (
      (dict(encoder=compare_config.EncoderConfig(**encoder, first=signs)), 'given together'),
      (dict(encoders={'deep first': compare_config.EncoderConfig(**deep)}), 'ends in "first"')):
    with pytest.raises(UserError, match=said):
      dataclasses.replace(made, **broken)


def test_a_folder_from_before_a_setting_is_taken_up(tmp_path):
  made = compare_config.CompareConfig(
    task=NeedleConfig.medium(), encoder=compare_config.EncoderConfig(
      vision=VISION, window=80, last_tokens=2, steps=1), systems={'plain': SYSTEM},
    language=compare_config.LanguageConfig(steps=1),
    optimizer=OptimizerConfig(learning_rate=1e-3), train_images=3, eval_images=2, train_steps=2,
    batch_size=2, lengths=(256,))
  compare.Comparison(made, tmp_path, progress=False)
  noted = json.loads((tmp_path / 'config.json').read_text())
  del noted['described'], noted['language']['uncued'], noted['language']['uncued_ask']
  (tmp_path / 'config.json').write_text(json.dumps(noted))
  compare.Comparison(made, tmp_path, progress=False)
  wrong = compare_config.LanguageConfig(steps=1, uncued_ask=('side',))
  with pytest.raises(UserError, match='language.uncued_ask: NeedleConfig: ask: '):
    dataclasses.replace(made, language=wrong)
  other = dataclasses.replace(made, language=compare_config.LanguageConfig(steps=1, uncued=0.5))
  with pytest.raises(UserError, match='language differ'):
    compare.Comparison(other, tmp_path, progress=False)
