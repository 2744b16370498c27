"""How time and memory grow with resolution; what the first call costs."""

from benchmarks.harness.case import Alone

SIZES = (336, 672, 1024, 1512, 2016, 3780)
SYSTEMS = ('mc_llava', 'pheye', 'llava_hr', 'ps3')

_GROWTH = (('pixels', 'pixels'), ('views', 'views'), ('tokens', 'tokens'), ('tflop', 'TFLOP'),
           ('time', 'processor time'), ('temporaries_mb', 'temporaries, MB'))

CASES = [
  Alone(name='ps3_growth', title='PS3-4K-SigLIP at a fixed token budget against image size',
        run='ours.alone:ps3_growth', group='scaling',
        settings={'sizes': (756, 1512, 3780), 'from': 756, 'rounds': 1},
        columns=(('pixels', 'pixels'), ('tokens', 'tokens'), ('whole', 'whole encoder'),
                 ('trunk', 'encoder, resizing and selection apart'), ('resize', 'resizing'),
                 ('select', 'selection network'), ('temporaries_mb', 'temporaries, MB'),
                 ('peak_gb', 'peak memory, GB'))),
  *(Alone(name=f'growth_{system}', title=f'Encoder against resolution: {system}',
          run='ours.alone:growth', group='scaling', columns=_GROWTH,
          picture='growth' if system == SYSTEMS[-1] else '',
          settings={'sizes': SIZES, 'systems': (system,), 'time_below': 1.2e13, 'rounds': 1})
    for system in SYSTEMS),
  Alone(name='gpu_train', title='Utilisation of a train step (bfloat16; asked for: >= 45 % MFU)',
        run='ours.gpu:train', group='gpu', backends=('gpu',),
        settings={'systems': ('mc_llava',), 'rows': 8, 'picture': 768, 'text': 512, 'rounds': 5},
        columns=(('system', 'system'), ('parameters', 'parameters'), ('places', 'places'),
                 ('step', 'step'), ('tflop', 'model TFLOP'), ('mfu', 'MFU'))),
  Alone(name='gpu_latency', title='Latency ratios of the papers (bfloat16)',
        run='ours.gpu:latency', group='gpu', backends=('gpu',), settings={'rounds': 10},
        columns=(('what', 'what'), ('short', 'first'), ('long', 'second'), ('ratio', 'ratio'),
                 ('paper', 'paper'))),
  Alone(name='warm_start',
        title='Compilation: first time, and from the persistent cache (processor seconds)',
        run='ours.alone:warm_start', group='scaling',
        settings={'programs': ('ps3_4k', 'siglip_13', 'clip_h_10', 'llava_hr_1024',
                               'vila_hd_two_pass', 'train_step_mc_llava_100m')},
        columns=(('program', 'program'), ('trace', 'tracing'), ('first', 'compiling'),
                 ('warm', 'from the cache'), ('cache_mb', 'cache, MB'))),
]
