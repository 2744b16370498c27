"""Generation, and the second pass of VILA-HD."""

import dataclasses

from benchmarks.harness.case import Case

_PHI = Case(
  name='phi_decode', title='Phi-1.5, 65-token prompt, 32 new tokens', ours='ours.decode:Phi',
  peer='peers.decode:phi', peer_name='transformers Phi',
  variants=('eager', 'onednn', 'compile', 'autotune'),
  settings={'prompt': 65, 'new': 32}, target={'avx2': 1.1, 'avx512': 1.1}, gpu_target=1.0,
  memory_target=1.05,
  work=(32, 'tokens/s'), group='decode')

CASES = [
  _PHI,
  dataclasses.replace(_PHI, name='phi_decode_bf16', title=f'{_PHI.title}, bfloat16 weights',
                      dtype='bfloat16', target=None, memory_target=None,
                      variants=('eager', 'compile'), tolerance=float('inf'), backends=('cpu',)),
  Case(name='pheye_generate', title='Pheye x2-672, 64-token prompt, 50 new tokens; peer: image '
       'keys and values recomputed at every step, as the original does',
       ours='ours.decode:PheyeGenerate', peer='peers.decode:pheye',
       peer_name='transformers Phi + blocks', settings={
         'prompt': 64, 'new': 50, 'release': 'pheye_x2_672'},
       target=3.0, rounds=2, work=(50, 'tokens/s'), bound=False, apart=True, group='decode'),
  Case(name='vila_hd_two_pass', title='VILA-HD-4K to the first token of the answer (PS3-4K, Qwen2 '
       'of width 1536, 8 layers); peer: second pass without reuse',
       ours='ours.decode:TwoPass', peer='ours.decode:TwoPassAgain', peer_side='ours',
       peer_name='full recomputation', settings={
         'question': 32, 'depth': 8, 'release': 'vila_hd_8b_4k_siglip'},
       rounds=2, group='decode'),
]
