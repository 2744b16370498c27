"""Small faults put into a copy of the sources; each must be killed by the test named beside it.

    python -m tests.mutants [WORD ...]      those whose name holds a word; default: all

A mutant that lives is a test that cannot fail. Every bug that is found adds its own: file, the text
that is right, the text of the bug, and the test that was missing. Status 1 when one lives.
"""

import dataclasses
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
COPIED = ('hrvlm_jax', 'configs', 'tests', 'pyproject.toml')


@dataclasses.dataclass(frozen=True)
class Mutant:
  """One fault.

  Attributes:
    name: in the table.
    path: of the file, from the root.
    right, wrong: the text, which stands there once, and what takes its place.
    test: pytest's arguments; must fail with the fault, and pass without it.
  """

  name: str
  path: str
  right: str
  wrong: str
  test: str


MUTANTS = (
  Mutant('generated_place', 'hrvlm_jax/interop/torch/modeling_hrvlm.py',
         'places[:, end:] = False', 'pass',
         'tests/interop/test_transformers.py -k generated_placeholder'),
  Mutant('merged_tiles', 'hrvlm_jax/interop/torch/vision_pheye.py',
         'if which == TILES and self.merged is not None:', 'if self.merged is not None:',
         'tests/interop/test_transformers_calls.py -k merged_adapters'),
  Mutant('few_rows', 'hrvlm_jax/interop/torch/convnext.py',
         'torch.addcmul(own, self.mlp', 'torch.addcmul(rows, self.mlp',
         'tests/interop/test_transformers_calls.py -k "few_rows and llava_hr"'),
  Mutant('planned_cache', 'hrvlm_jax/planning/programs.py', "sharding=ex.laid('cache', s.shape)",
         "sharding=ex.laid('hidden', s.shape)",
         'tests/parallel/test_programs.py -k cuts_the_cache'),
  Mutant('one_memory', 'hrvlm_jax/planning/schedule.py',
         'found.memory_bound * found.costs.rates.clock', '0.0',
         'tests/planning/test_schedule.py -k share_the_memory'),
  Mutant('vstar_letter', 'hrvlm_jax/evaluation/benchmarks/choice.py',
         '(letters[order.index(0)],)', "('A',)",
         'tests/evaluation/test_samples.py -k vstar'),
  Mutant('stage_3_prompt', 'hrvlm_jax/data/mixture.py',
         "Share(name='textvqa', amount=35_000, format=_ONE_SHORT)",
         "Share(name='textvqa', amount=35_000, format=_LETTER)",
         'tests/data/test_mixture.py -k stage_3'),
  Mutant('stage_3_two_turns', 'hrvlm_jax/data/mixture.py',
         'turns=2, each=True)  # Pheye', 'turns=2)  # Pheye',
         'tests/data/test_mixture.py -k files_open'),
  Mutant('gate_of_table_3', 'configs/ablations/llava_hr_table3.py',
         "mra(gate='sigmoid')", "mra(gate='hsigmoid')",
         'tests/configs/test_ablations.py -k names_say'),
  Mutant('share_of_table_1', 'configs/ablations/vila_hd_table1.py',
         "'ps3_1512_44': (ps3(1512, 6400)", "'ps3_1512_44': (ps3(1512, 2916)",
         'tests/configs/test_ablations.py -k names_say'),
  Mutant('stage_3_rate', 'configs/pheye.py', 'learning_rate=5e-5', 'learning_rate=5e-4',
         'tests/configs/test_published.py -k "golden_text and stage3"'),
  Mutant('drawn_crops', 'hrvlm_jax/data/transforms.py', 'rng.integers(low, high + 1',
         'rng.integers(low, high', 'tests/cli/test_data.py -k drawn'),
  Mutant('view_buckets_go_on', 'hrvlm_jax/systems/mc_llava/encoder.py',
         'size = 2 * size - 1 if size > 1 else 2', 'return size',
         'tests/systems/test_mc_llava.py -k buckets_follow'),
  Mutant('a_number_or_a_word', 'hrvlm_jax/training/run_config.py',
         'if text in words:', 'if text == words:',
         'tests/cli/test_arguments.py -k number_or_a_word'),
  Mutant('tensors_without_a_name', 'hrvlm_jax/interop/layouts.py',
         'return fields or ([] if abstract is None else _nameless(config, abstract))',
         'return fields', 'tests/interop/test_layouts.py -k without_a_name'),
  Mutant('bad_image_in_a_run', 'hrvlm_jax/evaluation/runner.py',
         "return {'text': ''", "return {'text': 'yes'",
         'tests/evaluation/test_runner.py -k bad_image'),
  Mutant('quotation_mark', 'hrvlm_jax/evaluation/benchmarks/tables.py',
         "delimiter='\\t', strict=True", "delimiter='\\t', strict=False",
         'tests/evaluation/test_bad_files.py -k quotation'),
  Mutant('bleu_clipping', 'hrvlm_jax/evaluation/metrics/bleu.py', 'min(count, most[gram])', 'count',
         'tests/evaluation/test_samples.py -k coco'),
  Mutant('share_of_table_4', 'configs/ablations/vila_hd_table4.py',
         "'ratio': 1 - int(share[0]) / 100", "'ratio': int(share[0]) / 100",
         'tests/configs/test_ablations.py -k names_say'),
  Mutant('keys_of_tiles', 'hrvlm_jax/systems/baselines/resamplers.py',
         'round(y0 * rows), round(x0 * columns)', 'round(x0 * rows), round(y0 * columns)',
         'tests/systems/test_baselines.py -k global_view'),
  Mutant('split_of_evaluation', 'hrvlm_jax/training/answers.py',
         'split=o.split or run.data.eval_split', 'split=o.split', 'tests/data/test_splits.py'),
  Mutant('crop_of_an_export', 'hrvlm_jax/interop/torch/views_baselines.py',
         "  return centre(image, side) if c.fit == 'crop' else squash(image, (side, side))\n",
         '  return squash(image, (side, side))\n',
         'tests/interop/test_native.py -k of_crop'),
  Mutant('size_told_to_llava_next', 'hrvlm_jax/interop/torch/processing_hrvlm.py',
         '[llava_next_size(image, encoder)]', '[image.size[::-1]]',
         'tests/interop/test_native.py -k tells_the_size'),
  Mutant('chat_of_an_export', 'hrvlm_jax/interop/layouts.py',
         'or theirs[key] != value]', 'and theirs[key] != value]',
         'tests/interop/test_layouts.py -k "qwen2 or prefix"'),
  Mutant('end_of_a_long_list', 'hrvlm_jax/core/errors.py',
         'problems[most - last:count - last] = [', 'problems[most:] = [',
         'tests/core/test_errors.py -k first_and_its_last'),
  Mutant('rare_problem', 'hrvlm_jax/core/errors.py',
         'in sorted(kinds, key=len) for', 'in kinds for',
         'tests/core/test_errors.py -k rare_kind'),
  Mutant('verdict_on_a_choice', 'hrvlm_jax/evaluation/metrics/letter.py',
         '{self._own(f)}(?:{_WRONG}', '(?:{_WRONG}',
         'tests/evaluation/metrics/test_letter.py -k person_reads'),
  Mutant('row_out_of_memory', 'hrvlm_jax/lab/planned.py',
         'out = choice.need.total > choice.limit', 'out = choice.need.total > 2 * choice.limit',
         'tests/configs/test_ablations.py -k out_of_memory'),
)


def run(mutant: Mutant, folder: pathlib.Path) -> tuple[bool, float]:
  """(whether the test fails, seconds) with the fault in the copy; the file is put back."""
  path = folder / mutant.path
  text = path.read_text('utf-8')
  if text.count(mutant.right) != 1:
    raise SystemExit(f'{mutant.name}: {mutant.right!r} stands {text.count(mutant.right)} times in '
                     f'{mutant.path}, expected once; the source moved on, so must the mutant')
  path.write_text(text.replace(mutant.right, mutant.wrong), 'utf-8')
  began = time.monotonic()
  try:
    command = f'{sys.executable} -m pytest -q -x -p no:cacheprovider {mutant.test}'
    found = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True)
  finally:
    path.write_text(text, 'utf-8')
  if found.returncode not in (0, 1):  # 1: a test failed; others: nothing ran
    end = found.stdout[-2000:]
    raise SystemExit(f'{mutant.name}: {command} ended with {found.returncode}\n{end}')
  return found.returncode == 1, time.monotonic() - began


def main(words: list[str]) -> int:
  """Prints a line per mutant."""
  chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
  lives = []
  with tempfile.TemporaryDirectory() as place:
    folder = pathlib.Path(place)
    for name in COPIED:
      source = ROOT / name
      (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    for mutant in chosen:
      killed, seconds = run(mutant, folder)
      verdict = 'killed' if killed else 'LIVES '
      print(f'{verdict:<7} {mutant.name:<20} {seconds:5.0f} s  {mutant.test}', flush=True)
      lives += [] if killed else [mutant.name]
  print(f'{len(chosen) - len(lives)} of {len(chosen)} killed')
  return 1 if lives else 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
