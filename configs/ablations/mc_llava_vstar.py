"""MC-LLaVA: V* over both knobs of the released model. mc_llava_vstar.py:ROW

Command:  hrvlm convert --from MC-LLaVA-3b --to runs/mc_llava_vstar/model
          hrvlm sweep --config configs/ablations/mc_llava_vstar.py --data BENCHMARKS
            --out runs/mc_llava_vstar
          hrvlm eval --checkpoint runs/mc_llava_vstar/model --benchmark vstar --split gpt4v_hard
            --data BENCHMARKS/vstar --sweep encoder.max_crops=8,25,50,100,200,400
            --sweep encoder.num_tokens=728,1456 --out runs/mc_llava_grid
          (the last one: the same grid of one split without a sweep)
Hardware: one device of 24 GB.
Time:     not published, not run here.
Expected: V*'s GPT4V-hard 52.94 (the best of the grid, whose values were not published), OCR 56.66,
          direct attributes 40.86, relative position 56.57 (the model's card).

`model` is the one that all rows test: where no released one was converted into
`runs/mc_llava_vstar/model`, the recipe's own last stage trains it there.
"""

from hrvlm_jax.lab.tables import Table, Tested
from hrvlm_jax.training.recipe import evaluate, words

CROPS, TOKENS = (8, 25, 50, 100, 200, 400), (728, 1456)
# Row: (None, numbers of the paper).
ROWS = {'model': (None, None)} | {
  f'crops_{crops}_tokens_{tokens}': (None, None) for crops in CROPS for tokens in TOKENS}
TABLE = Table(
  benchmarks=('vstar',),
  tested={row: Tested(model='model', knobs={'encoder': {
    'max_crops': int(row.split('_')[1]), 'num_tokens': int(row.split('_')[3])}})
    for row in ROWS if row != 'model'})


def get_config(argument=''):
  """The recipe's last stage, which trains what every row tests."""
  words(argument, ROWS)
  return evaluate('mc_llava:full')
