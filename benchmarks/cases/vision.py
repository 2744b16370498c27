"""Encoders at their real sizes, one image."""

from benchmarks.harness.case import Case

# Whole cells of the 27 x 27 thumbnail grid: 27, 22 and 21 of them; together 2560 tokens. The
# published package's own budgets (85, 341, 2133) cut through cells whose probabilities tie.
_BUDGETS = (108, 352, 2100)
# By the instructions that both sides may take: with AVX-512 the peer at its best.
_ENCODER = {'target': {'avx2': 1.1, 'avx512': 1.2}, 'memory_target': 1.0, 'group': 'vision'}

CASES = [
  Case(name='ps3_4k', title='PS3-4K-SigLIP, 3780 x 3780 image, 2560 tokens', ours='ours.vision:PS3',
       peer='peers.ps3:encode', peer_name='ps3-torch 0.1.3',
       variants=('eager', 'onednn'), settings={'size': 3780, 'budgets': _BUDGETS, 'looks': 1},
       target={'avx2': 1.3, 'avx512': 1.4}, gpu_target=1.5, memory_target=0.25, apart=True,
       group='vision'),
  Case(name='ps3_low', title='PS3-4K-SigLIP, thumbnail only', ours='ours.vision:PS3',
       peer='peers.ps3:encode', peer_name='ps3-torch 0.1.3',
       variants=('eager', 'onednn', 'compile', 'bfloat16'),
       settings={'size': 3780, 'budgets': _BUDGETS, 'looks': 0}, **_ENCODER, rounds=5),
  Case(name='siglip_13', title='SigLIP-SO400M/14, 13 views of 384 (MC-LLaVA)',
       ours='ours.vision:Siglip', peer='peers.vision:siglip', peer_name='transformers SigLIP',
       variants=('eager', 'onednn', 'compile', 'autotune', 'bfloat16', 'bfloat16-compile'),
       settings={'views': 13}, **_ENCODER),
  Case(name='clip_h_10', title='CLIP-H/14, 10 views of 224, both adapter sets (Pheye 672)',
       ours='ours.vision:Pheye', peer='peers.vision:pheye', peer_name='transformers CLIP + LoRA',
       variants=('eager', 'eager-merged', 'onednn-merged', 'compile-merged', 'autotune-merged'),
       settings={'level': 3}, **_ENCODER),
  Case(name='llava_hr_1024', title='LLaVA-HR-7B dual tower, 1024 pixels',
       ours='ours.vision:LlavaHR', peer='peers.vision:llava_hr',
       peer_name='transformers CLIP + timm ConvNeXt',
       variants=('eager', 'onednn', 'compile', 'autotune', 'bfloat16', 'bfloat16-compile'),
       settings={'size': 1024}, **_ENCODER | {'target': {'avx2': 1.15, 'avx512': 1.2}}),
]
