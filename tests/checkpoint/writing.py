"""One folder of weights in the Hugging Face style, for tests."""

from collections.abc import Iterable, Mapping
import os
from typing import Any

import numpy as np

from hrvlm_jax.checkpoint import files, hf


def write_folder(
    path: str | os.PathLike, tensors: Iterable[tuple[str, np.ndarray]], *,
    config: Mapping[str, Any] | None = None, extra_files: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None, manifest: Mapping[str, Any] | None = None,
    max_shard_bytes: int = hf.MAX_SHARD_BYTES, overwrite: bool = False,
) -> None:
  """Writes a Hugging Face style folder, whole or not at all, as `interop.export` does.

  Args:
    path: the folder to be made; must be absent or empty unless `overwrite`.
    tensors: (name, array) pairs, consumed one at a time.
    config: becomes `config.json`.
    extra_files: see `write_extra`.
    metadata: strings for the weight files' `__metadata__`.
    manifest: facts recorded in `manifest.json` beside the checksums.

  Raises:
    UserError: the folder is not empty; a tensor twice or of an unknown dtype; disk full.
  """
  with files.staged_folder(path, overwrite=overwrite) as stage:
    hf.write_weights(stage, tensors, metadata=metadata, max_shard_bytes=max_shard_bytes)
    if config is not None:
      hf.write_extra(stage, {'config.json': dict(config)})
    hf.write_extra(stage, extra_files or {})
    hf.write_manifest(stage, manifest)
