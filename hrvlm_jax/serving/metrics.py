"""What a server counts, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from hrvlm_jax.serving.driver import Driver

_SECONDS = (.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
  """Counters of one server; those of the driver are read when somebody asks for them.

  Attributes:
    requests: by HTTP status; 499: the client went away.
    prompt_tokens: read, those of images among them.
    first_token, whole: seconds from the last byte of a request to its first token, to its last.
    prepared: seconds that images and text of a request took on the host.
  """

  def __init__(self, driver: Driver):
    self._driver = driver
    self.registry = CollectorRegistry()
    make = dict(registry=self.registry, namespace='hrvlm')
    self.requests = Counter('requests', 'Requests by HTTP status', ['status'], **make)
    self.prompt_tokens = Counter('prompt_tokens', 'Tokens of prompts', **make)
    seconds = dict(buckets=_SECONDS, **make)
    self.first_token = Histogram('time_to_first_token_seconds', 'To the first token', **seconds)
    self.whole = Histogram('request_seconds', 'To the last token', **seconds)
    self.prepared = Histogram('prepare_seconds', 'Images and text on the host', **seconds)
    self.registry.register(self)

  def collect(self) -> Iterator[Metric]:
    """The driver's numbers; called by the registry."""
    now = self._driver.snapshot()
    gauges = {'slots': ('Requests that can run at a time', self._driver.engine.count),
              'slots_busy': ('Slots with a request', now.busy),
              'pending': ('Requests on their way', now.pending),
              'waiting': ('Requests that are ready and have no slot', now.waiting)}
    counters = {'generated_tokens': ('Tokens drawn', now.counts.tokens),
                'decode_steps': ('Steps of all slots', now.counts.steps),
                'prompts': ('Prompts read', now.counts.prompts),
                'cancelled': ('Answers given up', now.cancelled),
                'failures': ('Times all answers in slots were lost to an error', now.failures),
                'compilations': ('Programs compiled', self._driver.engine.compilations())}
    for name, (text, value) in gauges.items():
      yield GaugeMetricFamily(f'hrvlm_{name}', text, value=value)
    for name, (text, value) in counters.items():
      yield CounterMetricFamily(f'hrvlm_{name}', text, value=value)

  def text(self) -> bytes:
    """All of it."""
    return generate_latest(self.registry)
