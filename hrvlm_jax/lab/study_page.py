"""The page of a study: what every paper claims, what was found, what was learnt where it differs.

Made from what is kept (`study_kept`) and from the claims of the config, without training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib
import textwrap
from typing import Any

import numpy as np

from hrvlm_jax.lab import rates, verdicts
from hrvlm_jax.lab.claims import COSTS, PAPERS, Claim
from hrvlm_jax.lab.compare_config import CompareConfig
from hrvlm_jax.lab.report import SIZES, accuracy, accuracy_by_size, figure, markdown_table
from hrvlm_jax.lab.study_kept import observed
from hrvlm_jax.lab.verdicts import HOLDS, Number, Verdict

Kept = Mapping[tuple[str, int], Mapping[str, Any]]
Found = dict[str, Verdict | None]
NOT_RUN = 'not run yet'
TITLE = 52  # characters of a line above a panel
NARROW = 10.0  # per cent that a panel shows at least


def claims_of(configs: Mapping[str, CompareConfig]) -> dict[str, Claim]:
  """All claims by name, each with the settings of its task."""
  return {name: claim for task, config in configs.items()
          for name, claim in config.claims.items() if claim.task == task}


def judged(claims: Mapping[str, Claim], kept: Kept) -> Found:
  """The verdict of every claim; None where it was not run."""
  seen = {key: observed(value) for key, value in kept.items()}
  return {name: verdicts.judge(claim, {seed: one for (task, seed), one in seen.items()
                                       if task == claim.task})
          for name, claim in claims.items()}


def _number(claim: Claim, number: Number) -> str:
  """A mean with its error: per cent, or a cost in its own unit."""
  if claim.measure in COSTS:
    error = f' ± {number.error:.2g}' if number.error else ''
    return f'{number.value:.4g}{error}'
  return f'{100 * number.value:.1f} ± {100 * number.error:.1f}'


def _points(claim: Claim, found: Verdict | None) -> str:
  if found is None:
    return NOT_RUN
  return ', '.join(f'{point.label}: {_number(claim, number)}'
                   for point, number in zip(claim.points, found.points, strict=True))


def _paper(claim: Claim) -> str:
  numbers = ', '.join(f'{p.label}: {p.paper:g}' for p in claim.points if p.paper is not None)
  return f'{numbers or "no numbers printed"} ({claim.source})'


def _verdict(found: Verdict | None) -> str:
  if found is None:
    return NOT_RUN
  few = {1: ', one seed', 2: ', two seeds'}.get(len(found.seeds), '')
  return found.verdict + few


def _data(claim: Claim, found: Verdict | None, link: str) -> str:
  seeds = () if found is None else found.seeds
  return ' '.join(f'[{claim.task}-{s}]({link}/{claim.task}-{s}.json)' for s in seeds) or '-'


def _difference(claim: Claim, found: Verdict | None) -> str:
  if found is None:
    return '-'
  if claim.order == 'constant':
    return f'{100 * found.difference.value:.1f} % of the first'
  return _number(claim, found.difference)


_UNITS = {'accuracy': '', 'attention_global': 'share of attention on the global view',
          'recall': "share of the target's patches that are selected", 'tokens': 'tokens',
          'views': 'views', 'encoder_gflops': 'GFLOP of the encoder',
          'peak_memory_mb': 'MB', 'latency_ms': 'ms'}


def _says(claim: Claim) -> str:
  told = [_UNITS[claim.measure], f'gain over {claim.minus}' if claim.minus else '']
  extra = ', '.join(filter(None, told)).replace('_', ' ')
  return claim.says + (f' ({extra})' if extra else '')


def paper_table(paper: str, claims: Mapping[str, Claim], found: Found, link: str) -> list[str]:
  """Lines of one paper's table."""
  rows = [[_says(claim), claim.task, _points(claim, found[name]), _paper(claim),
           _difference(claim, found[name]), str(len(found[name].seeds)) if found[name] else '-',
           _verdict(found[name]), _data(claim, found[name], link)]
          for name, claim in claims.items() if claim.paper == paper and not claim.follows]
  header = ['claim', 'task', 'here', 'paper', 'd', 'seeds', 'verdict', 'data']
  return markdown_table(header, rows, rest='---') if rows else []


def learnt(claims: Mapping[str, Claim], found: Found, link: str) -> list[str]:
  """What was looked into: claims that do not hold (or have a note), with their follow-ups."""
  lines, first = [], {}  # by note, the claim that shows it
  for name, claim in claims.items():
    verdict = found[name]
    follow = {n: c for n, c in claims.items() if c.follows == name}
    open_ = verdict is not None and verdict.verdict != HOLDS
    if claim.follows or not (open_ or claim.note or follow):
      continue
    note, shown = claim.note.strip(), first.setdefault(claim.note, claim)
    note = f'As above: "{shown.says}".' if note and shown is not claim else note
    lines += [f'**{claim.paper}: {claim.says}** — {_verdict(verdict)}. '
              + (note or 'Not looked into yet.'), '']
    for other, run in follow.items():
      told = f'{_points(run, found[other])}; {_verdict(found[other])}'
      lines.append(f'- Follow-up: {_says(run)}: {told} ({_data(run, found[other], link)}). '
                   + run.note.strip())
    lines += [''] if follow else []
  return lines


def everywhere(names: Sequence[str], kept: Kept) -> list[str]:
  """The systems on every task: right answers, in all and by size."""
  first = {}
  for (task, _), one in sorted(kept.items(), key=lambda item: item[0][1]):
    first.setdefault(task, one)
  lines = []
  for task, one in sorted(first.items()):
    seen, rows = observed(one), []
    for name in names:
      if name in one['right']:
        marks = [{'area': area, 'correct': bool(right)} for area, right in zip(
          seen.areas, seen.values['accuracy'][name], strict=True)]
        by_size = accuracy_by_size(marks)
        rows.append([name.replace('_', ' '), f'{accuracy(marks):.1%}',
                     *(f'{by_size[size]:.1%}' if size in by_size else '-' for size in SIZES)])
    if rows:
      lines += [*markdown_table([f'{task}, seed {one["seed"]} (chance {one["chance"]:.1%})', 'all',
                                 *SIZES], rows), '']
  return lines


def summary(claims: Mapping[str, Claim], found: Found, kept: Kept) -> list[str]:
  """How many claims hold, what it cost, on which machines."""
  own = [found[name] for name, claim in claims.items() if not claim.follows]
  counts = {word: sum(v is not None and v.verdict == word for v in own)
            for word in (HOLDS, verdicts.FAILS, verdicts.UNTOLD)}
  lines = [f'{len(own)} claims: {counts[HOLDS]} hold, {counts[verdicts.FAILS]} do not, '
           f'{counts[verdicts.UNTOLD]} cannot be told, {sum(v is None for v in own)} not run yet.']
  if kept:
    spent = sum(sum(one['seconds'].values()) for one in kept.values())
    busy = sum(one.get('cpu_seconds', 0) for one in kept.values())
    kinds = sorted({one['machine']['kind'] for one in kept.values()})
    lines.append(f'{spent / 3600:.1f} hours of one process in all, {busy / 3600:.1f} of its '
                 f'processor, on {"; ".join(kinds)}.')
  return [' '.join(lines), '']


def markdown(configs: Mapping[str, CompareConfig], kept: Kept, link: str,
             searched: Mapping[str, Mapping[str, Any]]) -> str:
  """The whole generated part of the page.

  Args:
    link: path from the page to the folder of kept results and pictures.
    searched: of `rates.read`.
  """
  claims = claims_of(configs)
  found = judged(claims, kept)
  lines = summary(claims, found, kept)
  for paper in PAPERS:
    table = paper_table(paper, claims, found, link)
    if table:
      lines += [f'## {paper}', '', *table, '']
      if any(v is not None for n, v in found.items() if _pictured(claims[n], paper)):
        lines += [f'![{paper}]({link}/{picture_name(paper)})', '']
  if told := learnt(claims, found, link):
    lines += ['## What was learnt', '', *told]
  names = list(dict.fromkeys(n for config in configs.values() for n in config.everywhere))
  if rows := everywhere(names, kept):
    lines += ['## The systems on every task', '', *rows]
  if rows := rates.markdown(searched):
    lines += ['## The same search for every model', '',
              'Right answers (%) on images of its own, by learning rate and length.', '', *rows]
  return '\n'.join(lines).rstrip() + '\n'


def picture_name(paper: str) -> str:
  """File of a paper's picture."""
  return f'{paper.lower().replace("-", "_")}.png'


def _pictured(claim: Claim, paper: str) -> bool:
  return claim.paper == paper and not claim.follows


def pictures(configs: Mapping[str, CompareConfig], kept: Kept, place: pathlib.Path
             ) -> list[pathlib.Path]:
  """One picture per paper: a panel per claim with error bars, the paper's numbers on the right."""
  claims = claims_of(configs)
  found, written = judged(claims, kept), []
  for paper in PAPERS:
    shown = {name: claim for name, claim in claims.items()
             if _pictured(claim, paper) and found[name] is not None}
    if shown:
      written.append(place / picture_name(paper))
      _picture(shown, found, written[-1])
  return written


def _same_span(both) -> None:
  """The same number of per cent from bottom to top, at least NARROW: slopes may be compared, and a
  fraction of a per cent does not look like a gain."""
  limits = [axes.get_ylim() for axes in both]
  span = max(NARROW, *(high - low for low, high in limits))
  for axes, (low, high) in zip(both, limits, strict=True):
    middle = (low + high) / 2
    axes.set_ylim(middle - span / 2, middle + span / 2)


def _picture(claims: Mapping[str, Claim], found: Found, path: pathlib.Path) -> None:
  columns = min(3, len(claims))
  rows = -(-len(claims) // columns)
  with figure(path, rows, columns, size=(4.6 * columns, 3.4 * rows)) as panels:
    for axes, (name, claim) in zip(panels, claims.items(), strict=False):
      verdict, places = found[name], np.arange(len(claim.points))
      scale = 1 if claim.measure in COSTS else 100
      # A line says that the points follow each other; one against others is no row.
      line = dict(linestyle='') if claim.order == 'first' else {}
      axes.errorbar(places, [scale * p.value for p in verdict.points],
                    [scale * p.error for p in verdict.points], marker='o', capsize=3,
                    color='#1b6ca8', **line)
      axes.set_xticks(places, [p.label.replace(', ', ',\n') for p in claim.points], fontsize=7)
      axes.set_ylabel(f'here ({"%" if scale == 100 else claim.measure.replace("_", " ")})',
                      color='#1b6ca8', fontsize=8)
      both = [axes]
      if any(p.paper is not None for p in claim.points):
        both.append(other := axes.twinx())
        other.plot(places, [np.nan if p.paper is None else p.paper for p in claim.points],
                   **dict(marker='s', linestyle='--', color='#c8553d') | line)
        other.set_ylabel('paper', color='#c8553d', fontsize=8)
        other.tick_params(labelsize=7)
      if scale == 100:
        _same_span(both)
      axes.tick_params(axis='y', labelsize=7)
      axes.margins(x=0.15)
      said = textwrap.fill(f'{claim.says} ({claim.task}; {_verdict(verdict)})', TITLE)
      axes.set_title(said, fontsize=8)
