"""Constants of `hrvlm plan`, measured on a machine with TPUs."""

import dataclasses
import pathlib
from typing import Any

RESULTS = pathlib.Path(__file__).parents[1] / 'results'


@dataclasses.dataclass(frozen=True)
class Calibration:
  """Measures products, memory, messages, attention and one layer; writes a file of constants."""

  name: str = 'tpu_calibrate'
  title: str = 'Constants of hrvlm plan (--costs FILE), measured; needs a TPU'
  group: str = ''
  shown: bool = False

  def measure(self, settings) -> dict[str, Any]:
    """Rows of what was measured, and the path of the file.

    Raises:
      UserError: there is no TPU.
    """
    from benchmarks.ours import tpu

    del settings
    devices, chip = tpu.devices_here()
    return {'case': self.name, **tpu.calibrate(devices, chip, folder=RESULTS)}


CASES = [Calibration()]
