"""The parity certificate of a converted checkpoint: what was compared with its release, and how.

Only comparisons that read the checkpoint at hand count: every tensor against the release's files in
NumPy (`replay`); and, where PyTorch is installed, language model, towers and prompts against
transformers built from the release's own config.json (`side_by_side`), and all other parts against
the model code for PyTorch (`reference`), in float32 with exact matrix products. What has no
reference is NOT CHECKED and named. That our code computes what the originals' code does is no
property of a checkpoint: tests/parity holds it.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import datetime
import importlib.metadata
import os
import pathlib
import platform
from typing import Any

import jax

from hrvlm_jax import __version__
from hrvlm_jax.checkpoint import files as store_files, layout
from hrvlm_jax.checkpoint.leaves import StoredParams
from hrvlm_jax.core import installed, paths
from hrvlm_jax.core.config import to_dict
from hrvlm_jax.core.errors import UserError
from hrvlm_jax.interop import adapters, hub, native, reference, replay, side_by_side
from hrvlm_jax.interop.convert import Release
from hrvlm_jax.interop.export import TEXT_FOLDER, read_source
from hrvlm_jax.interop.replay import Outputs
from hrvlm_jax.systems import registry
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.vision.convnext import ConvNeXtConfig
from hrvlm_jax.vision.vit import ViTConfig
from hrvlm_jax.vlm import model as vlm
from hrvlm_jax.vlm.answer import find_tokenizer, model_config, text_of

FILE = 'parity.json'


@dataclasses.dataclass(frozen=True)
class Compared:
  """One comparison of a part of the checkpoint with a reference.

  Attributes:
    outputs: name -> {'difference': largest absolute one, 'limit': allowed, 'status': word}.
  """

  name: str
  against: str
  outputs: Outputs

  @property
  def passed(self) -> bool:
    """Whether every output did."""
    return all(out['status'] == 'ok' for out in self.outputs.values())


@dataclasses.dataclass(frozen=True)
class Certificate:
  """What `certify` found.

  Attributes:
    not_checked: part -> why nothing was compared.
    facts: the content of the file.
  """

  compared: tuple[Compared, ...]
  not_checked: dict[str, str]
  facts: dict[str, Any]

  @property
  def passed(self) -> bool:
    """Whether something was compared and all of it passed."""
    return bool(self.compared) and all(c.passed for c in self.compared)

  def lines(self) -> list[str]:
    """A line per comparison with the output nearest to (or furthest beyond) its limit, and per
    part without one."""
    lines = []
    for c in self.compared:
      worst = max(c.outputs, key=lambda key: c.outputs[key]['difference'] / (
        c.outputs[key]['limit'] or 1e-30))
      out = c.outputs[worst]
      first = f', first in {out["first"]}' if 'first' in out else ''
      lines.append(f'{"passed" if c.passed else "FAILED"}  {c.name}  ({c.against}; nearest to its '
                   f'limit: {worst}, {out["difference"]:.3g} of {out["limit"]:.3g}{first})')
    return lines + [f'NOT CHECKED  {name}: {why}' for name, why in self.not_checked.items()]


def certify(
  checkpoint: str | os.PathLike, source: str | os.PathLike, *, revision: str | None = None,
  adapter: str | os.PathLike | None = None,
) -> Certificate:
  """Compares a checkpoint with its release and writes `parity.json` into its folder.

  The file is written only when something was compared.

  Args:
    source, revision, adapter: the release, as given to `convert`.

  Raises:
    UserError: no checkpoint, no release, or one of another system.
  """
  folder, config = layout.resolve(checkpoint), model_config(checkpoint)
  place, _ = hub.resolve(source, revision=revision)
  release = Release(place, adapter=adapter)
  if release.config.system != config.system:
    raise UserError(f'{place}: is a {release.config.system}, the checkpoint a {config.system}')
  not_checked: dict[str, str] = {}
  compared = tuple(_compare(config, checkpoint, release, adapter, not_checked))
  facts = _facts(config, folder, compared, not_checked)
  if compared:
    layout.write_json(folder / FILE, facts)
  return Certificate(compared, not_checked, facts)


def _compare(config: ModelConfig, checkpoint: Any, release: Release,
             adapter: str | os.PathLike | None, not_checked: dict[str, str]) -> list[Compared]:
  """All comparisons, one part in memory at a time; fills `not_checked`."""
  stored = StoredParams(checkpoint)
  places = {f'{name}/' if name else '': release.folder / name for name in release.parts or ('',)}
  values = side_by_side.settings(release.folder)
  adapter = pathlib.Path(adapter or release.folder / adapters.FOLDER)
  if adapter.is_dir():
    places[f'{adapters.FOLDER}/'] = adapter
    values['adapter'] = side_by_side.read_json(adapter / adapters.CONFIG)
  plain = replay.PlainTensors(places, rename=native.canonical if release.native else str)
  compared = [Compared('config', 'config.json', _same_config(config, release.config))]
  fresh = read_source(stored.directory).get('fresh', [])
  found = replay.tensors(release.table, vlm.build(release.config).abstract, stored, plain, fresh)
  compared += [Compared(f'{name} (tensors)', f'NumPy, {outputs["tensors"]["count"]} tensors'
                        if 'count' in outputs['tensors'] else 'NumPy', outputs)
               for name, outputs in sorted(found.items())]

  def run(name: str, fn: Callable[..., tuple[str, Outputs]], *arguments: Any) -> None:
    try:
      compared.append(Compared(name, *fn(*arguments)))
    except side_by_side.NotChecked as reason:
      not_checked[name] = str(reason)
    except ImportError as error:
      not_checked[name] = f'{error.name} is not installed ({installed.add("torch")})'

  if config.text is not None:
    run('language', _language, config, values, release, stored, plain)
    run('prompts', _prompts, config, checkpoint, release)
  for path, tower in registry.get(config.system).backbones(config.encoder).items():
    kind = {ViTConfig: side_by_side.tower, ConvNeXtConfig: side_by_side.convnext}.get(type(tower))
    if kind is not None:
      run(path, kind, path, tower, values, stored, plain)
  for path, compare in reference.parts(config, release, stored, plain):
    run(path, lambda compare=compare: (reference.AGAINST, compare()))
  forward = [c.name for c in compared if not c.name.endswith(' (tensors)')]
  for name in [n for n in not_checked if any(n.startswith(f'{whole}/') for whole in forward)]:
    del not_checked[name]  # a tower by itself, whose encoder has a reference
  named = [*forward, *not_checked]
  for name in dict.fromkeys(map(replay.part_of, stored.flat)):
    # A number by itself (a logit scale) is compared where its value is.
    if name not in stored.flat and not any(f'{name}/'.startswith(f'{n}/') for n in named):
      not_checked[f'{name} (forward pass)'] = 'there is no reference for it'
  for path in fresh:
    not_checked[path] = 'drawn at random: the release has no tensor for it'
  return compared


def _language(config: ModelConfig, values: Any, release: Release, stored: StoredParams,
              plain: replay.PlainTensors) -> tuple[str, Outputs]:
  """By the names that transformers has in the release itself, where they are there."""
  try:
    return side_by_side.language(config, values, stored, plain)
  except side_by_side.NotChecked:
    return reference.language(config, release, stored, plain)


def _prompts(config: ModelConfig, checkpoint: Any, release: Release) -> tuple[str, Outputs]:
  place = release.folder / TEXT_FOLDER if TEXT_FOLDER in release.parts else release.folder
  if not release.tokenizer:
    raise side_by_side.NotChecked('the release holds no tokenizer')
  return side_by_side.prompts(config, text_of(config, find_tokenizer(checkpoint)), place)


def _same_config(ours: ModelConfig, theirs: ModelConfig) -> Outputs:
  """Every setting of the checkpoint against what the release's config.json says."""
  ours, theirs = (paths.flatten(to_dict(config)) for config in (ours, theirs))
  wrong = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
  out = {'difference': float(len(wrong)), 'limit': 0.0, 'status': 'different' if wrong else 'ok'}
  return {'settings': out | ({'first': min(wrong)} if wrong else {})}


def _facts(config: ModelConfig, folder: Any, compared: tuple[Compared, ...],
           not_checked: dict[str, str]) -> dict[str, Any]:
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
    'format': 'hrvlm_jax parity certificate', 'version': 2,
    'passed': bool(compared) and all(c.passed for c in compared), 'system': config.system,
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
    'arithmetic': {'dtype': 'float32', 'matmul_precision': str(
      jax.config.jax_default_matmul_precision), 'device': str(jax.devices()[0].device_kind),
      'platform': platform.platform()},
    'versions': versions,
    'checkpoint_sha256': store_files.digest(described),
    'source': {key: source.get(key) for key in ('origin', 'sha256', 'table')},
    'compared': [dataclasses.asdict(c) | {'passed': c.passed} for c in compared],
    'not_checked': not_checked}
