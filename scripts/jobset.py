#!/usr/bin/env python
"""Prints a JobSet manifest (jobset.x-k8s.io/v1alpha2) for a run on GKE's TPU slices, as JSON.

    python scripts/jobset.py --name hr1 --topology v6e:4x4 --slices 2 --image IMAGE -- \\
      train --config llava_hr:7b,stage2,v6e:16x16 --workdir gs://BUCKET/hr1 | kubectl apply -f -

What stands after `--` goes to `hrvlm`, the entry point of the image (Dockerfile, target tpu). GKE
tells the pods of a slice of each other (TPU_WORKER_*, MEGASCALE_*). A user's mistake (status 2)
ends the run; a run that was told to stop saves, ends with 75 and is started again, like one whose
nodes went away, at most --restarts times.
"""

import argparse
import json
import math
import re
import sys
from typing import Any

from hrvlm_jax.core.errors import UserError, nearest
from hrvlm_jax.parallel.topology import Topology, parse

# GKE's name of a slice's chips: value of the node label gke-tpu-accelerator.
ACCELERATORS = {'v4': 'tpu-v4-podslice', 'v5e': 'tpu-v5-lite-podslice', 'v5p': 'tpu-v5p-slice',
                'v6e': 'tpu-v6e-slice', 'tpu7x': 'tpu7x'}
# v5e and v6e have machines with 1, 4 and 8 chips for slices of one host.
ONE_HOST = {'v5e': {'1x1': 1, '2x2': 4, '2x4': 8}, 'v6e': {'1x1': 1, '2x2': 4, '2x4': 8}}
PORTS = {'tpu': 8471, 'megascale': 8080, 'coordinator': 8482}
STOPPED, MISTAKE = 75, 2  # `hrvlm train --stopped-status`; status of a user's mistake


def hosts(topology: Topology) -> tuple[int, int]:
  """Hosts of a slice, and chips of each."""
  chips, shape = math.prod(topology.shape), 'x'.join(map(str, topology.shape))
  here = ONE_HOST.get(topology.chip.name, {}).get(shape, topology.chip.chips_per_host)
  here = min(here, chips)
  return chips // here, here


def manifest(*, name: str, topology: Topology, image: str, arguments: list[str], restarts: int = 50,
             spot: bool = False, queue: str | None = None) -> dict[str, Any]:
  """The JobSet: a Job per slice, a pod per host.

  Args:
    arguments: of `hrvlm` in every pod.
    queue: Kueue's local queue, where the cluster has one.

  Raises:
    UserError: a name that Kubernetes refuses, a chip that GKE has no slices of, no arguments.
  """
  # Names of pods are NAME-slice-SLICE-HOST-xxxxx, at most 63 characters.
  if not re.fullmatch(r'[a-z]([a-z0-9-]*[a-z0-9])?', name) or len(name) > 40:
    raise UserError(f'--name {name}: expected at most 40 small letters, digits and hyphens, a '
                    'letter first')
  accelerator = ACCELERATORS.get(topology.chip.name)
  if accelerator is None:
    raise UserError(f'--topology {topology.name}: GKE has slices of {", ".join(ACCELERATORS)} '
                    f'(nearest: {nearest(topology.chip.name, ACCELERATORS)})')
  if not arguments:
    raise UserError('nothing to run: give the arguments of hrvlm after --')
  count, chips = hosts(topology)
  selector = {'cloud.google.com/gke-tpu-accelerator': accelerator,
              'cloud.google.com/gke-tpu-topology': 'x'.join(map(str, topology.shape))}
  if spot:
    selector['cloud.google.com/gke-spot'] = 'true'
  if arguments[0] == 'train' and '--stopped-status' not in arguments:
    arguments = [*arguments, '--quiet', '--stopped-status', str(STOPPED)]
  container = {
    'name': 'hrvlm', 'image': image, 'args': arguments,
    'ports': [{'name': key, 'containerPort': port} for key, port in PORTS.items()],
    'resources': {kind: {'google.com/tpu': chips} for kind in ('requests', 'limits')},
    'securityContext': {'privileged': True},  # memory locking of the TPU's driver
    'volumeMounts': [{'name': 'shm', 'mountPath': '/dev/shm'}]}
  pod = {
    'restartPolicy': 'Never', 'nodeSelector': selector, 'hostNetwork': True,
    'dnsPolicy': 'ClusterFirstWithHostNet', 'terminationGracePeriodSeconds': 120,
    'containers': [container],
    'volumes': [{'name': 'shm', 'emptyDir': {'medium': 'Memory'}}]}
  if spot:
    pod['tolerations'] = [{'key': 'cloud.google.com/gke-spot', 'operator': 'Equal',
                           'value': 'true', 'effect': 'NoSchedule'}]
  job = {
    'parallelism': count, 'completions': count, 'completionMode': 'Indexed', 'backoffLimit': 0,
    'podFailurePolicy': {'rules': [{'action': 'FailJob', 'onExitCodes': {
      'containerName': 'hrvlm', 'operator': 'In', 'values': [MISTAKE]}}]},
    'template': {'spec': pod}}
  metadata: dict[str, Any] = {'name': name, 'annotations': {
    'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}}
  if queue:
    metadata['labels'] = {'kueue.x-k8s.io/queue-name': queue}
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet', 'metadata': metadata,
    'spec': {
      'network': {'enableDNSHostnames': True, 'publishNotReadyAddresses': True},
      'failurePolicy': {'maxRestarts': restarts, 'rules': [
        {'name': 'mistake', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}]},
      'replicatedJobs': [{'name': 'slice', 'replicas': topology.slices,
                          'template': {'spec': job}}]}}


def main(argv: list[str]) -> int:
  """Prints the manifest; a mistake is one sentence and status 2."""
  own, _, arguments = (argv, '', []) if '--' not in argv else (
    argv[:argv.index('--')], '--', argv[argv.index('--') + 1:])
  parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--name', required=True)
  parser.add_argument('--topology', required=True, help='of one slice: v6e:4x4, v5p:4x4x4')
  parser.add_argument('--slices', type=int, default=1)
  parser.add_argument('--image', required=True)
  parser.add_argument('--restarts', type=int, default=50)
  parser.add_argument('--spot', action='store_true')
  parser.add_argument('--queue', help="Kueue's local queue")
  options = parser.parse_args(own)
  try:
    made = manifest(name=options.name, image=options.image, arguments=arguments,
                    topology=parse(options.topology, slices=options.slices),
                    restarts=options.restarts, spot=options.spot, queue=options.queue)
  except UserError as error:
    print(f'jobset.py: {error}', file=sys.stderr)
    return 2
  print(json.dumps(made, indent=2))
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
