"""From the bytes of an image to a system's views."""

from benchmarks.harness.case import Alone

_COLUMNS = (
  ('system', 'system'), ('views', 'views'), ('same_bytes', 'same bytes'),
  ('peer_ms', 'original, ms'), ('ours_ms', 'ours, ms'), ('images_per_second', 'images/s/core'),
  ('ratio', 'ratio'), ('target', 'target'),
  ('inexact_ms', 'ours, scaled decoding (inexact), ms'),
)

CASES = [
  Alone(name='views_12mp', title="12-megapixel JPEG to views, against the originals' processors",
        run='ours.data:measure', group='data', columns=_COLUMNS,
        settings={'size': (4000, 3000), 'rounds': 9,
                  'systems': ('ps3', 'vila_hd', 'llava_hr', 'mc_llava', 'pheye', 'anyres')}),
]
