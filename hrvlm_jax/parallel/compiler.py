"""Options of the compiler by backend, as data."""

from __future__ import annotations


def compiler_options(platform: str) -> dict[str, bool]:
  """Options for `jax.jit(..., compiler_options=)` by backend, for large sharded steps.

  TPU: none; libtpu schedules around latency and fuses asynchronous collectives by itself. GPU: the
  latency-hiding scheduler, without which gathers of weights are not overlapped, is said explicitly,
  because its default has changed between versions.
  """
  return {'gpu': {'xla_gpu_enable_latency_hiding_scheduler': True}}.get(platform, {})
