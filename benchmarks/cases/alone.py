"""How time and memory grow with resolution; what the first call costs."""

from benchmarks.harness.case import Alone

SIZES = (336, 448, 672, 1024, 1512, 2016, 3024, 3780)

CASES = [
  Alone(name='ps3_growth', title='PS3-4K-SigLIP at a fixed token budget against image size',
        run='ours.alone:ps3_growth', group='scaling',
        settings={'sizes': (756, 1512, 3780), 'from': 756, 'rounds': 2},
        columns=(('pixels', 'pixels'), ('tokens', 'tokens'), ('whole', 'whole encoder'),
                 ('trunk', 'encoder, resizing and selection apart'), ('resize', 'resizing'),
                 ('select', 'selection network'), ('temporaries_mb', 'temporaries, MB'),
                 ('peak_gb', 'peak memory, GB'))),
  Alone(name='growth', title='Encoders against resolution', run='ours.alone:growth',
        group='scaling', settings={
          'sizes': SIZES, 'systems': ('mc_llava', 'pheye', 'llava_hr', 'ps3'),
          'time_below': 4e12, 'rounds': 1},
        columns=(('system', 'system'), ('pixels', 'pixels'), ('views', 'views'),
                 ('tokens', 'tokens'), ('tflop', 'TFLOP'), ('time', 'time'),
                 ('temporaries_mb', 'temporaries, MB'))),
  Alone(name='warm_start', title='Compilation: first time, and from the persistent cache',
        run='ours.alone:warm_start', group='scaling',
        settings={'programs': ('ps3_4k', 'siglip_13', 'clip_h_10', 'llava_hr_1024',
                               'vila_hd_two_pass')},
        columns=(('program', 'program'), ('trace', 'tracing'), ('first', 'compiling'),
                 ('warm', 'from the cache'), ('cache_mb', 'cache, MB'))),
]
