"""Pheye, Table 2: what 672 pixels change against 448, by the size of what is asked about.
pheye_table2.py:ROW[,STAGE]

Command:  hrvlm sweep --config configs/ablations/pheye_table2.py --data BENCHMARKS
            --out runs/pheye_table2
          for model in x4 x2; do
            hrvlm analyse sizes --data BENCHMARKS/textvqa --boxes TextVQA_Rosetta_OCR_v0.2_val.json
              --before runs/pheye_table2/${model}_448/eval/textvqa
              --after runs/pheye_table2/${model}_672/eval/textvqa --out ${model}_textvqa.json
            hrvlm analyse sizes --benchmark vqav2 --data BENCHMARKS/vqav2 --count 10000
              --boxes instances_val2014.json --before runs/pheye_table2/${model}_448/eval/vqav2
              --after runs/pheye_table2/${model}_672/eval/vqav2 --out ${model}_vqav2.json
          done
Hardware: not published; 8 x 80 GB.
Time:     not published, not run here.
Expected: the relative change of accuracy in each third of the questions; its numbers were not at
          hand (the paper's text: the gain is largest for the finest details of TextVQA).

The four models are those of Table 1, in the same stages.
"""

from pheye_table1 import ROWS as MODELS, TABLE as MAIN, get_config as main_config

from hrvlm_jax.lab.tables import Table

# Row: (words of the recipe, numbers of the paper).
ROWS = {row: (MODELS[row][0], None) for row in ('x4_448', 'x4_672', 'x2_448', 'x2_672')}
TABLE = Table(
  stages=MAIN.stages, benchmarks=('textvqa', 'vqav2'), parts=MAIN.parts,
  further={'fine, medium, broad': 'hrvlm analyse sizes (the commands are at the head of the file)'})


def get_config(argument=''):
  """The run config of a row's stage, by default the last."""
  config = main_config(argument)
  config.training.init_from = config.training.init_from.replace('pheye_table1', 'pheye_table2')
  return config
