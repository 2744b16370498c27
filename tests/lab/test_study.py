"""`lab.study`: which parts there are, who does them, what goes wrong; kept results and the page."""

import dataclasses
import functools
import json
import os
import pathlib
import socket

import pytest

from hrvlm_jax.cli.main import main
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.lab import locks, study, study_kept, study_page, study_run, verdicts
from hrvlm_jax.lab.claims import Claim, Point
from hrvlm_jax.lab.compare import Comparison
from hrvlm_jax.lab.compare_config import AdaptConfig, CompareConfig, systems_of
from hrvlm_jax.lab.experiment import Interrupted
from hrvlm_jax.lab.study import Study
from hrvlm_jax.training import run_config


def claim(task, *systems, **options):
  points = tuple(Point(label=name, system=name, paper=50.0 + i) for i, name in enumerate(systems))
  return Claim(**dict(says=f'{systems[-1]} is better', source='table 1', paper='PS3', task=task,
                      points=points, order='rises') | options)


@functools.cache
def loaded(task):
  return run_config.load(CompareConfig, f'configs/compare/needle_tiny.py:smoke,{task}')


def configs(**changes):
  """Two tasks of the miniature with a claim each, one of them with two seeds more."""
  claims = {'sharp': claim('needle', 'single_view', 'pheye'),
            'whole': claim('relate', 'mc_llava', 'pheye')}
  made = {}
  for task in ('needle', 'relate'):
    made[task] = dataclasses.replace(loaded(task), **dict(
      seeds=(0, 1), claims=claims, everywhere=('single_view',)) | changes)
  return made


class Fake(Comparison):
  """Trains nothing: writes what the parts leave behind, and notes which were done."""

  log: list
  wrong: str = ''

  def part(self, name, fn, *args, **options):
    def act():
      type(self).log.append(f'{self.folder.name} {name}')
      if name == self.wrong:
        raise ValueError('it broke')
      word, _, rest = name.partition(' ')
      if word == 'answer':
        better = rest != 'single_view'
        rows = [{'area': 0.01 * (i + 1), 'correct': better or i % 3 == 0} for i in range(6)]
        self.write(f'answers_{rest}.json', rows)
      elif word == 'measure':
        self.write(f'cost_{rest}.json', {'tokens': 4})
      elif word == 'train':
        (self.folder / 'runs' / rest).mkdir(parents=True, exist_ok=True)
        (self.folder / 'runs' / rest / 'weights').write_text(self.folder.parent.name)
    super().part(name, act)


@pytest.fixture
def fake(monkeypatch):
  made = type('Made', (Fake,), {'log': []})
  monkeypatch.setattr(study, 'PAUSE', 0.01)
  # It compiled nothing; to free what other tests compiled would take seconds, and theirs again.
  monkeypatch.setattr(study, 'freed', lambda: None)
  return made


def test_every_claim_is_run_on_its_task_with_every_seed(tmp_path, fake):
  made = Study(configs(), tmp_path, make=fake)
  titles = [part.title for part in made.parts()]
  assert titles == [
    'needle-0 data', 'needle-0 encoder', 'needle-0 language', 'needle-0 pheye',
    'needle-0 single_view', 'relate-0 data', 'relate-0 encoder', 'relate-0 language',
    'relate-0 mc_llava', 'relate-0 pheye', 'relate-0 single_view', 'needle-1 data',
    'needle-1 encoder', 'needle-1 language', 'needle-1 pheye', 'needle-1 single_view',
    'relate-1 data', 'relate-1 encoder', 'relate-1 language', 'relate-1 mc_llava',
    'relate-1 pheye']
  chosen = [p.title for p in made.parts(['pheye'], ['relate'], [1])]
  assert chosen == ['relate-1 data', 'relate-1 encoder', 'relate-1 language', 'relate-1 pheye']
  with pytest.raises(UserError, match='page'):
    made.parts(tasks=['page'])


def test_a_seed_has_images_that_no_other_one_has():
  drawn = []
  for seed in (0, 1, 2):
    seeded = study.of_experiment(configs(seeds=(0, 1, 2))['needle'], 'needle', seed).seed
    drawn += [seeded, seeded + 1]  # training, evaluation (`Comparison.write_data`)
  assert len(set(drawn)) == 6 and drawn[0] == 0


def test_like_systems_and_their_pre_training_come_along():
  base = configs()['needle']
  config = dataclasses.replace(
    base, systems={**base.systems, 'other': base.systems['llava_hr']},
    adapt={'llava_hr': base.adapt['llava_hr'], 'other': AdaptConfig(like='llava_hr')},
    claims={'sharp': claim('needle', 'single_view', 'other')})
  made = study.of_experiment(config, 'needle', 1)
  assert set(made.systems) == {'single_view', 'other', 'llava_hr'}
  assert set(made.adapt) == {'llava_hr', 'other'}


def test_all_parts_are_done_once_and_taken_up_again(tmp_path, fake):
  made = Study(configs(), tmp_path, make=fake)
  parts = made.parts()
  assert made.run(parts) == {}
  assert sorted(set(fake.log)) == sorted(fake.log) and 'relate-1 answer pheye' in fake.log
  before = list(fake.log)
  again = Study(configs(), tmp_path, make=fake)
  assert again.run(again.parts()) == {} and fake.log == before
  assert not list((tmp_path / 'locks').glob('*.json'))


def test_a_mistake_is_noted_and_the_other_parts_go_on(tmp_path, fake):
  fake.wrong = 'train pheye'
  made = Study(configs(), tmp_path, make=fake)
  failed = made.run(made.parts())
  assert set(failed) == {f'{t}-{s} pheye' for t in ('needle', 'relate') for s in (0, 1)}
  assert set(failed.values()) == {'it broke'} and 'relate-1 answer mc_llava' in fake.log
  part = next(p for p in made.parts() if p.title == 'needle-0 pheye')
  assert made.state(part) == 'failed: ValueError: it broke'
  fake.wrong = ''
  again = Study(configs(), tmp_path, make=fake)
  assert again.run(again.parts()) == {} and again.state(part) == 'done'


def test_what_needs_a_part_that_failed_is_not_begun(tmp_path, fake):
  fake.wrong = 'encoder'
  made = Study(configs(), tmp_path, make=fake)
  failed = made.run(made.parts(tasks=['needle'], seeds=[0]))
  assert failed == {'needle-0 encoder': 'it broke', 'needle-0 pheye': 'encoder failed',
                    'needle-0 single_view': 'encoder failed'}
  assert 'needle-0 train pheye' not in fake.log


def test_an_interruption_stops_everything(tmp_path, fake):
  made = Study(configs(), tmp_path, make=fake)
  parts = made.parts()
  made.owner(parts[0]).do = lambda work: (_ for _ in ()).throw(Interrupted('stopped'))
  with pytest.raises(Interrupted):
    made.run(parts)
  assert fake.log == [] and not list((tmp_path / 'locks').glob('*.json'))


def lock(path, **who):
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps({'pid': os.getpid(), 'host': socket.gethostname(),
                              'life': locks._life(os.getpid())} | who))


def test_a_part_belongs_to_one_process_at_a_time(tmp_path):
  path = tmp_path / 'locks' / 'a.json'
  with locks.claimed(path) as mine, locks.claimed(path) as also:
    assert mine and not also
    assert locks.holder(path) == f'process {os.getpid()} on {socket.gethostname()}'
  assert not path.exists()


def test_stale_claims_are_taken_over(tmp_path):
  path = tmp_path / 'locks' / 'a.json'
  for who in ({'pid': 2**22 + 5}, {'life': 'another process of this number'}):
    lock(path, **who)
    with locks.claimed(path) as mine:
      assert mine, who
  lock(path, host='elsewhere')
  with locks.claimed(path) as mine:
    assert not mine  # touched a moment ago
  os.utime(path, (0, 0))
  with locks.claimed(path) as mine:
    assert mine
  path.write_text('{"pid": 1')  # cut short
  with locks.claimed(path) as mine:
    assert mine


def test_a_process_waits_for_what_another_one_does(tmp_path, fake, monkeypatch):
  made = Study(configs(), tmp_path, make=fake)
  parts = made.parts(tasks=['needle'], seeds=[0])
  lock(made.lock(parts[0]))  # as if another thread had it
  ended = []

  def wait(seconds):  # the other one ends
    ended.append(seconds)
    made.lock(parts[0]).unlink()
    made.owner(parts[0]).note('data', 1.0, 1.0)
    made.owner(parts[0]).note('tokenizer', 1.0, 1.0)

  monkeypatch.setattr(study.time, 'sleep', wait)
  assert made.run(parts) == {} and len(ended) == 1
  assert 'needle-0 data' not in fake.log and 'needle-0 answer pheye' in fake.log


def test_parts_of_other_folders_are_merged_whole(tmp_path, fake):
  one, two = (Study(configs(), tmp_path / name, make=fake) for name in ('one', 'two'))
  one.run(one.parts(tasks=['needle']))
  two.run(two.parts(tasks=['relate'], seeds=[0]))
  two.run(two.parts(['pheye'], tasks=['needle'], seeds=[0]))
  said = study_kept.merge(one, [tmp_path / 'two'], one.parts())
  assert 'took 6 parts (relate-0 data' in said[0] and '4 parts were done here too' in said[1]
  assert (tmp_path / 'one/needle-0/runs/pheye/weights').read_text() == 'one'
  assert (tmp_path / 'one/relate-0/runs/pheye/weights').read_text() == 'two'
  assert (tmp_path / 'one/relate-0/answers_pheye.json').exists()
  before = len(fake.log)
  assert one.run(one.parts(seeds=[0])) == {} and len(fake.log) == before


def test_another_study_is_not_merged(tmp_path, fake):
  one = Study(configs(), tmp_path / 'one', make=fake)
  two = Study(configs(train_steps=4), tmp_path / 'two', make=fake)
  two.run(two.parts())
  with pytest.raises(UserError, match='two/needle-0: holds another comparison .train_steps differ'):
    study_kept.merge(one, [tmp_path / 'two'], one.parts())
  with pytest.raises(UserError, match='holds none of needle-0'):
    study_kept.merge(one, [tmp_path / 'nowhere'], one.parts())
  assert not (tmp_path / 'one/needle-0/times.json').exists()


def test_a_system_whose_settings_changed_is_forgotten_and_done_again(tmp_path, fake):
  made = Study(configs(), tmp_path, make=fake)
  made.run(made.parts())
  changed = configs()
  for task, config in changed.items():
    encoder = dataclasses.replace(config.systems['pheye'].encoder, level=2)
    changed[task] = dataclasses.replace(config, systems={
      **config.systems, 'pheye': dataclasses.replace(config.systems['pheye'], encoder=encoder)})
  with pytest.raises(UserError, match='systems.pheye differ'):
    Study(changed, tmp_path, make=fake).parts()
  with pytest.raises(UserError, match='has nothing of other'):
    study_kept.forget(tmp_path, ['other'])
  gone = study_kept.forget(tmp_path, ['pheye'])
  assert len(gone) == 12 and 'needle-0 train pheye' in gone
  assert not (tmp_path / 'needle-0/runs/pheye').exists()
  fake.log.clear()
  again = Study(changed, tmp_path, make=fake)
  assert again.run(again.parts()) == {} and sorted(fake.log) == sorted(gone)


def test_kept_results_give_the_page_without_the_folder(tmp_path, fake):
  made = Study(configs(), tmp_path / 'run', make=fake)
  made.run(made.parts())
  kept = study_kept.of_study(made)
  assert kept['needle', 0]['right'] == {'pheye': '111111', 'single_view': '100100'}
  assert kept['needle', 1]['seed'] == 1 and kept['needle', 1]['areas'].startswith('10000 20000')
  study_kept.keep(kept, tmp_path / 'kept')
  read = study_kept.read(tmp_path / 'kept')
  text = study_page.markdown(configs(), read, 'results', {})
  assert text == study_page.markdown(configs(), kept, 'results', {})
  assert '2 claims: 1 hold, 0 do not, 1 cannot be told, 0 not run yet' in text
  assert '| single_view: 33.3 ± ' in text and '| single_view: 50, pheye: 51 (table 1) |' in text
  assert '[needle-0](results/needle-0.json) [needle-1](results/needle-1.json)' in text
  assert '| relate, seed 0 (chance' in text and '| single view | 33.3% |' in text
  for path in study_page.pictures(configs(), read, tmp_path):
    assert path.stat().st_size > 1000
  none = study_page.markdown(configs(), {}, 'results', {})
  assert '2 not run yet' in none and '| not run yet |' in none and '.png' not in none


def test_what_was_learnt_stands_with_its_follow_up(tmp_path, fake):
  claims = {'worse': claim('needle', 'pheye', 'single_view', note='The task is too easy.'),
            'why': claim('needle', 'single_view', 'pheye', follows='worse'),
            'flat': claim('needle', 'pheye', 'mc_llava'),
            'also': claim('needle', 'mc_llava', 'single_view', note='The task is too easy.')}
  made = configs(claims=claims)
  run = Study(made, tmp_path, make=fake)
  run.run(run.parts())
  text = study_page.markdown(made, study_kept.of_study(run), 'r', {})
  table, _, rest = text.partition('## What was learnt')
  assert table.count('| pheye is better') == 0  # the follow-up is not a claim of the paper
  assert '**PS3: single_view is better** — does not hold, two seeds. The task is too easy.' in rest
  assert '- Follow-up: pheye is better: single_view: 33.3' in rest
  assert '**PS3: mc_llava is better** — cannot be told, two seeds. Not looked into yet.' in rest
  # A reader meets what was learnt once.
  assert rest.count('too easy') == 1 and 'two seeds. As above: "single_view is better".' in rest


def test_fewer_answers_do_not_take_the_place_of_more(tmp_path, fake, capsys):
  made = Study(configs(), tmp_path / 'run', make=fake)
  made.run(made.parts())
  study_kept.keep(study_kept.of_study(made), tmp_path / 'kept')
  few = Study(configs(), tmp_path / 'few', make=fake)
  few.run(few.parts(['pheye']))
  written = study_kept.keep(study_kept.of_study(few), tmp_path / 'kept')
  assert [path.name for path in written] == [] and 'single_view' in capsys.readouterr().out
  assert 'single_view' in study_kept.read(tmp_path / 'kept')['needle', 0]['right']


def call(tmp_path, fake, monkeypatch, **asked):
  monkeypatch.setattr(study_run, 'Study', lambda *a, **k: Study(*a, **k, make=fake))
  return study_run.StudyRun(configs(), study_run.Asked(
    spec=f'{tmp_path}/claims.py:smoke', folder=tmp_path / 'run', **asked))


def test_the_list_says_state_and_seconds(tmp_path, fake, monkeypatch):
  made = call(tmp_path, fake, monkeypatch)
  part = made.parts[0]
  for step in part.steps:
    made.study.owner(part).note(step, 20.0, 20.0)
  text = made.listed()
  assert 'needle-0 data' in text and '1 of 21 parts are done' in text
  rows = {line.rsplit(maxsplit=2)[0].strip(): line.split()[-2:] for line in text.splitlines()}
  assert rows['needle-0 data'] == ['done', '40'] and rows['relate-1 data'] == ['open', '40']
  assert rows['relate-1 pheye'] == ['open', '?']


def test_machines_share_whole_seeds(tmp_path, fake, monkeypatch):
  shares = [{p.folder for p in call(tmp_path, fake, monkeypatch, share=f'{n}/2').parts}
            for n in (1, 2)]
  assert shares[0] | shares[1] == {'needle-0', 'needle-1', 'relate-0', 'relate-1'}
  assert not shares[0] & shares[1] and len(shares[0]) == len(shares[1])
  with pytest.raises(UserError, match='expected N/M'):
    call(tmp_path, fake, monkeypatch, share='3/2').parts  # noqa: B018 - read when it is asked for


def test_a_document_is_made_from_what_is_kept(tmp_path, fake, monkeypatch):
  made = call(tmp_path, fake, monkeypatch)
  page = tmp_path / 'claims.md'
  page.write_text('head\n<!-- study:begin -->\n<!-- study:end -->\n')
  assert made.work() == {}
  made.report(keep=True, document=str(page))
  assert '(results/claims/needle-0.json)' in page.read_text()
  assert (tmp_path / 'results/claims/ps3.png').exists()
  assert (tmp_path / 'run/kept/claims.md').exists()
  text, agree = made.against(tmp_path / 'run/kept')
  assert agree and '2 of 2 rows are within 2 joint standard errors' in text
  assert verdicts.HOLDS in text


def test_a_config_without_seeds_or_of_one_task_only_is_no_study():
  with pytest.raises(UserError, match='names no seeds'):
    study.check(configs(seeds=()), 'a.py')
  with pytest.raises(UserError, match='claims.why follows nothing, which is no claim'):
    study.check(configs(claims={'why': claim('page', 'pheye', 's2', follows='nothing')}), 'a.py')
  made = configs()
  with pytest.raises(UserError, match='with the word relate it gives the task needle'):
    study.check({'relate': made['needle']}, 'a.py')


def test_claims_without_seeds_are_refused_before_anything_is_done(tmp_path, capsys):
  asked = ['compare', '--config', f'{ROOT}/configs/compare/claims.py:needle',
           '--config.seeds=()', '--out', str(tmp_path / 'run')]
  assert main(asked) == 2
  assert 'has claims, which a study tells, and names no seeds' in capsys.readouterr().err
  assert not (tmp_path / 'run').exists()


@pytest.mark.full('training')
def test_a_study_trains_and_judges_for_real(tmp_path):
  recall = claim('needle', 'vila_hd', 'vila_hd', order='falls')
  ways = tuple(dataclasses.replace(point, measure='recall', encoder={'mode': mode})
               for point, mode in zip(recall.points, ('after_prompt', 'random'), strict=True))
  attention = claim('needle', 'pheye', 'pheye')
  sizes = tuple(dataclasses.replace(point, measure='attention_global', size=size)
                for point, size in zip(attention.points, ('small', 'large'), strict=True))
  made = {'needle': dataclasses.replace(configs()['needle'], seeds=(0,), everywhere=(), claims={
    'recall': dataclasses.replace(recall, points=ways),
    'attention': dataclasses.replace(attention, points=sizes)})}
  run = Study(made, tmp_path, progress=False)
  assert run.run(run.parts()) == {}
  kept = study_kept.of_study(run)
  found = study_page.judged(study_page.claims_of(made), kept)
  assert [p.value for p in found['attention'].points] == pytest.approx([0.1, 0.1], abs=0.02)
  assert all(0 < point.value < 1 for point in found['recall'].points)
  assert 'one seed' in study_page.markdown(made, kept, 'kept', {})


ROOT = pathlib.Path(__file__).parents[2]


def test_the_page_says_what_is_kept():
  made = study.load(f'{ROOT}/configs/compare/claims.py')
  page = ROOT / 'docs/claims.md'
  wanted = study_run.document_text(made, ROOT / 'configs/compare/results/claims', page)
  found = page.read_text().split('<!-- study:begin -->')[1].split('<!-- study:end -->')[0]
  assert found.strip() == wanted.strip(), 'run hrvlm compare --report --document docs/claims.md'
  # Every claim has its experiment: its systems are trained on its task with three seeds.
  for name, claim in study_page.claims_of(made).items():
    for seed in (0, 1, 2):
      own = study.of_experiment(made[claim.task], claim.task, seed)
      assert name in own.claims and systems_of(claim) <= own.systems.keys()


def test_slopes_of_both_axes_of_a_picture_may_be_compared():
  from matplotlib.figure import Figure
  axes = Figure().subplots()
  other = axes.twinx()
  for panel, numbers in ((axes, (95.4, 96.0)), (other, (58.0, 79.0))):
    panel.plot((0, 1), numbers)
  study_page._same_span((axes, other))
  spans = [high - low for low, high in (panel.get_ylim() for panel in (axes, other))]
  assert spans[0] == pytest.approx(spans[1]) and spans[0] >= 21
  study_page._same_span((alone := Figure().subplots(),))
  assert alone.get_ylim()[1] - alone.get_ylim()[0] == pytest.approx(study_page.NARROW)
