"""The parity certificate of a converted checkpoint: largest difference per output, and of what.

Two kinds of comparison, both in float32 with exact matrix products: the recorded cases of the
checkpoint's system, and, where PyTorch is installed, the checkpoint's language model and vision
towers side by side with the classes of transformers, which get their weights from the original
files by name, past our weight tables.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
from typing import Any

import jax

from hrvlm_jax import __version__
from hrvlm_jax.checkpoint import files as store_files, layout
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.interop import hub
from hrvlm_jax.interop.convert import Release
from hrvlm_jax.interop.export import read_source
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vlm.answer import model_config
from tests.parity.cases.runner import find_cases, run_case

FILE = 'parity.json'
GOLDENS = 'HRVLM_GOLDENS'


@dataclasses.dataclass(frozen=True)
class Compared:
  """One comparison: a recorded case or a part of the model.

  Attributes:
    outputs: name -> {'difference': largest absolute one, 'limit': allowed, 'status': word}.
    sha256: of the recorded case's files, None for a part.
  """

  name: str
  against: str
  outputs: dict[str, dict[str, Any]]
  passed: bool
  sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Certificate:
  """What `certify` found; `facts` is the content of the file."""

  compared: tuple[Compared, ...]
  facts: dict[str, Any]

  @property
  def passed(self) -> bool:
    """Whether all comparisons did."""
    return all(c.passed for c in self.compared)

  def lines(self) -> list[str]:
    """One line per comparison, with the output nearest to (or furthest beyond) its limit."""
    lines = []
    for c in self.compared:
      numbers = {key: out for key, out in c.outputs.items() if out['status'] != 'waived'}
      worst = max(numbers, key=lambda key: numbers[key]['difference'] / (
        numbers[key]['limit'] or 1e-30), default=None)
      detail = '' if worst is None else (
        f'; nearest to its limit: {worst}, {numbers[worst]["difference"]:.3g} of '
        f'{numbers[worst]["limit"]:.3g}')
      lines.append(f'{"passed" if c.passed else "FAILED"}  {c.name}  ({c.against}, '
                   f'{len(numbers)} outputs{detail})')
    return lines


def certify(
  checkpoint: str | os.PathLike, *, source: str | os.PathLike | None = None,
  against: str | os.PathLike | None = None, revision: str | None = None,
  adapter: str | os.PathLike | None = None,
) -> Certificate:
  """Compares a checkpoint with its original and writes `parity.json` into its folder.

  Args:
    source: the original's folder (or name on the hub), as given to convert.
    against: a folder of recorded cases, or one of PyTorch weights to take instead of `source`.
      Default: the cases in $HRVLM_GOLDENS, else in tests/goldens.
    adapter: as given to convert.

  Raises:
    UserError: nothing to compare with.
  """
  folder = layout.resolve(checkpoint)
  config = model_config(checkpoint)
  cases, weights = _cases(config, against), source
  if against is not None and not cases:
    weights, revision, adapter = against, None, None
  compared = [_run(case) for case in cases]
  skipped: list[str] = []
  if weights is not None:
    compared += _side_by_side(config, folder, weights, revision, adapter, skipped)
  if not compared:
    raise UserError(
      f'{checkpoint}: nothing to compare with: no recorded case of {config.system} '
      f'({GOLDENS} is {os.environ.get(GOLDENS)!r}), and ' + '; '.join(skipped or ['no original']))
  facts = _facts(config, folder, compared, skipped)
  layout.write_json(folder / FILE, facts)
  return Certificate(tuple(compared), facts)


def _cases(config: ModelConfig, against: str | os.PathLike | None) -> list[pathlib.Path]:
  """Recorded cases of the system and of its language model's family."""
  if against is None:
    root = pathlib.Path(os.environ.get(GOLDENS) or 'tests/goldens')
    if not root.is_dir():
      return []
  else:
    root = pathlib.Path(against)
  try:
    found = find_cases(root)
  except UserError:
    return []
  if against is not None:
    return found
  family = None if config.text is None else config.text.family
  kept = []
  for case in found:
    values = json.loads((case / 'config.json').read_text())
    language = values['system'] == 'language_models' and values.get('model_type') == family
    if values['system'] == config.system or language:
      kept.append(case)
  return kept


def _run(case: pathlib.Path) -> Compared:
  report = run_case(case)
  outputs = {r.key: {'difference': r.difference, 'limit': r.limit, 'status': r.status}
             for r in report.results}
  described = store_files.describe(store_files.all_files(case), case)
  return Compared(f'{report.system}/{case.name}', 'recorded case', outputs, report.passed,
                  store_files.digest(described))


def _side_by_side(config: ModelConfig, folder: Any, source: str | os.PathLike,
                  revision: str | None, adapter: str | os.PathLike | None,
                  skipped: list[str]) -> list[Compared]:
  try:
    import torch  # noqa: F401
    import transformers  # noqa: F401
  except ImportError as error:
    skipped.append(f'{error.name} is not installed (pip install hrvlm-jax[torch]), without which '
                   'nothing runs side by side')
    return []
  from hrvlm_jax.interop import side_by_side

  place, _ = hub.resolve(source, revision=revision)
  release = Release(place, adapter=adapter)
  if registry.get(release.config.system) is not registry.get(config.system):
    raise UserError(f'{place}: is a {release.config.system}, the checkpoint a {config.system}')
  return [Compared(name, against, outputs,
                   all(out['status'] == 'ok' for out in outputs.values()))
          for name, against, outputs in side_by_side.compare(config, folder, release, skipped)]


def _facts(config: ModelConfig, folder: Any, compared: list[Compared], skipped: list[str]
           ) -> dict[str, Any]:
  described = store_files.describe(
    (p for p in store_files.all_files(folder) if p.name != FILE), folder)
  source = read_source(folder)
  versions = {'hrvlm_jax': __version__, 'python': platform.python_version()}
  for name in ('jax', 'jaxlib', 'flax', 'numpy', 'orbax-checkpoint', 'torch', 'transformers'):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = None
  return {
    'format': 'hrvlm_jax parity certificate', 'version': 1,
    'passed': all(c.passed for c in compared), 'system': config.system,
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'arithmetic': {'dtype': 'float32', 'matmul_precision': str(
      jax.config.jax_default_matmul_precision), 'device': str(jax.devices()[0].device_kind),
      'platform': platform.platform()},
    'versions': versions,
    'checkpoint_sha256': store_files.digest(described),
    'source': {key: source.get(key) for key in ('origin', 'sha256', 'table')},
    'compared': [dataclasses.asdict(c) for c in compared], 'not_compared': skipped}
