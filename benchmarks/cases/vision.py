"""Encoders at their real sizes, one image."""

from benchmarks.harness.case import Case

# Whole cells of the 27 x 27 thumbnail grid: 27, 22 and 21 of them; together 2560 tokens. The
# published package's own budgets (85, 341, 2133) cut through cells whose probabilities tie.
_BUDGETS = (108, 352, 2100)

CASES = [
  Case(name='ps3_4k', title='PS3-4K-SigLIP, 3780 x 3780 image, 2560 tokens', ours='ours.vision:PS3',
       peer='peers.ps3:encode', peer_name='ps3-torch 0.1.3',
       settings={'size': 3780, 'budgets': _BUDGETS, 'looks': 1},
       target=2.2, gpu_target=1.5, memory_target=1 / 3, apart=True, group='vision'),
  Case(name='ps3_low', title='PS3-4K-SigLIP, thumbnail only', ours='ours.vision:PS3',
       peer='peers.ps3:encode', peer_name='ps3-torch 0.1.3',
       settings={'size': 3780, 'budgets': _BUDGETS, 'looks': 0}, target=1.2, rounds=5,
       group='vision'),
  Case(name='siglip_13', title='SigLIP-SO400M/14, 13 views of 384 (MC-LLaVA)',
       ours='ours.vision:Siglip', peer='peers.vision:siglip', peer_name='transformers SigLIP',
       variants=('eager', 'compile', 'autotune'), settings={'views': 13}, target=1.5,
       group='vision'),
  Case(name='clip_h_10', title='CLIP-H/14, 10 views of 224, both adapter sets (Pheye 672)',
       ours='ours.vision:Pheye', peer='peers.vision:pheye', peer_name='transformers CLIP + LoRA',
       variants=('eager', 'eager-merged', 'compile-merged', 'autotune-merged'),
       settings={'level': 3}, target=1.5, group='vision'),
  Case(name='llava_hr_1024', title='LLaVA-HR-7B dual tower, 1024 pixels',
       ours='ours.vision:LlavaHR', peer='peers.vision:llava_hr',
       peer_name='transformers CLIP + timm ConvNeXt', variants=('eager', 'compile', 'autotune'),
       settings={'size': 1024}, target=1.2, group='vision'),
]
