"""Pictures of results that are curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

PANELS = (('tflop', 'TFLOP'), ('temporaries_mb', 'temporaries, MB'), ('cpu_s', 'processor seconds'))
TICKS = (336, 672, 1024, 1512, 2016, 3780)


def growth(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> pathlib.Path:
  """Operations, temporaries and time of each system's encoder against the side of the image."""
  from matplotlib.figure import Figure

  panels = [(key, label) for key, label in PANELS if any(key in row for row in rows)]
  figure = Figure(figsize=(4.2 * len(panels), 3.6), layout='constrained')
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (key, label) in zip(axes, panels):
    for system in dict.fromkeys(row['system'] for row in rows):
      points = [(r['pixels'], r[key]) for r in rows if r['system'] == system and key in r]
      axis.plot(*zip(*points), marker='o', markersize=3, label=system)
    axis.set(xscale='log', yscale='log', xlabel='side of the image, pixels', ylabel=label)
    axis.set_xticks(TICKS, [str(tick) for tick in TICKS], rotation=45)
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
  axes[0].legend(frameon=False)
  figure.savefig(path, dpi=110, metadata={'Software': None})
  return path
