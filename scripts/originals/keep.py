"""The end of scripts/originals.sh: holds both sides' tokens together and keeps the row.

    python -m scripts.originals.keep SYSTEM CHECKOUT FOLDER PAGE.md
"""

import datetime
import json
import pathlib
import subprocess
import sys

import numpy as np

HEAD = """# The originals' own code beside ours

`./scripts/originals.sh DIR` takes a checkout of an original, writes a tiny model of random weights
in its layout (`hrvlm export --for original`), and compares the greedy tokens of its code and ours
for three pictures (one view, several, elongated). PS3 gives no tokens: there the chosen patches
stand for them, and an answer is equal where the features are, too, within 1e-4 of their largest
magnitude. NVlabs/VILA imports `ps3` (a checkout of NVlabs/PS3), haotian-liu/LLaVA for S2
`s2wrapper` (bfshi/scaling_on_scales): put both on PYTHONPATH.

What is not the originals' own there (`scripts/originals/theirs.py`): transforms of torchvision,
whose wheels do not load beside a PyTorch for CPUs (Pheye, PS3, VILA-HD); a stand-in for it where
timm asks for it (`benchmarks/shield`); stand-ins for packages that VILA imports for training and
other models; the name `s3_scales`, which VILA still has for PS3's `ps3_scales`; a trunk of tiny
sizes under a name that timm knows. The placeholder of an image is -200 in LLaVA and LLaVA-HR.
Which of equal patches `torch.topk` takes is left open there: looks of these models end with a
whole place. What it gave last:

| original | commit | date | versions | answers equal | tokens equal |
|---|---|---|---|---|---|
"""


def commit(checkout: str) -> str:
  """Of the checkout; with a mark where its code was changed."""
  git = lambda *args: subprocess.run(['git', '-C', checkout, *args], capture_output=True,
                                     text=True)
  head = git('rev-parse', '--short', 'HEAD')
  if head.returncode:
    return 'no repository'
  changed = git('status', '--porcelain', '*.py').stdout.strip()
  return head.stdout.strip() + ('+changes' if changed else '')


def features_agree(place: pathlib.Path, number: int) -> bool:
  """Whether both sides' features of a picture, if they wrote any, are equal within 1e-4 of the
  largest magnitude (PS3)."""
  ours, theirs = (place / f'{number}.{side}.npy' for side in ('ours', 'theirs'))
  if not ours.exists():
    return True
  a, b = np.load(ours), np.load(theirs)
  if a.shape != b.shape:
    print(f'features {number}: ours {a.shape}, theirs {b.shape}')
    return False
  most = float(np.abs(a - b).max() / np.abs(b).max())
  print(f'features {number}: {a.shape}, largest difference {most:.1e} of the largest magnitude')
  return most <= 1e-4


def main(name: str, checkout: str, work: str, page: str) -> int:
  """Prints every question, replaces or adds the row; 1 where tokens differ."""
  place = pathlib.Path(work)
  ours = [one['tokens'] for one in json.loads((place / 'asked.json').read_text())['asked']]
  found = json.loads((place / 'theirs.json').read_text())
  same = total = answers = 0
  for number, (mine, theirs) in enumerate(zip(ours, found['tokens'], strict=True)):
    equal = sum(a == b for a, b in zip(mine, theirs, strict=False))
    same, total = same + equal, total + max(len(mine), len(theirs))
    answers += mine == theirs and features_agree(place, number)
    print(f'question {number}: ours {mine}, theirs {theirs}')
  versions = ', '.join(f'{key} {value}' for key, value in found['versions'].items())
  row = (f'| {name} | {commit(checkout)} | {datetime.datetime.now(datetime.UTC).date()} | '
         f'{versions} | {answers} of {len(ours)} | {same} of {total} |')
  path = pathlib.Path(page)
  old = path.read_text(encoding='utf-8') if path.exists() else HEAD
  rows = old.partition('|---|')[2].splitlines()[1:]
  kept = [line for line in rows if not line.startswith(f'| {name} |')]
  path.write_text(HEAD + '\n'.join([*kept, row]) + '\n', encoding='utf-8')
  print(row)
  return int(answers != len(ours))


if __name__ == '__main__':
  raise SystemExit(main(*sys.argv[1:]))
