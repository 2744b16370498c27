"""What a run needs of chips that are not here, by arithmetic: no compiler, no chip."""

from __future__ import annotations

from typing import Any

from hrvlm_jax.core.config import to_dict
from hrvlm_jax.parallel.fitting import USABLE, Choice
from hrvlm_jax.parallel.topology import Topology
from hrvlm_jax.training import batches, fitting, program
from hrvlm_jax.training.config import RunConfig


def trains_on(config: RunConfig, topology: Topology, *, length: int | None = None,
              image: tuple[int, int] = (1024, 768), images: int = 1) -> Choice:
  """The mesh of a run on a topology and what its train step needs there, see `training.fitting`.

  Args:
    length: places of a row; default: the longest bucket.
    image: width and height of the images. images: of an example.

  Raises:
    UserError: a batch that no mesh of the devices can cut.
  """
  shapes = batches.batch_shapes(config, program.micro_rows(config), length=length, image=image,
                                images=images)
  return fitting.chosen_mesh(
    config, program.outline_of(config), topology.devices, int(topology.chip.hbm_bytes * USABLE),
    slices=topology.slices, shapes=shapes)


def report(topology: Topology, choice: Choice) -> dict[str, Any]:
  """A plan by arithmetic as JSON values."""
  return {'effort': 'arithmetic', 'topology': topology.name, 'slices': topology.slices,
          'mesh': to_dict(choice.mesh), 'bytes_per_device': dict(choice.need.parts),
          'usable_bytes': choice.limit, 'fits': choice.fits}
