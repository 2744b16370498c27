"""`hrvlm train`: see `training.loop.train`."""

import dataclasses

from hrvlm_jax.cli.arguments import Parser


def main(argv: list[str]) -> int:
  """Trains one stage of one system; run again with the same work directory, it resumes."""
  parser = Parser('train', main.__doc__, config=True)
  parser.add_argument('--workdir', required=True, help='checkpoints, metrics, tokenizer go here')
  parser.add_argument('--quiet', action='store_true', help='lines, not a bar, on a terminal too')
  parser.add_argument('--resume-from', metavar='STEP|last-whole',
                      help='go back to a checkpoint (newer ones are set aside), or to the newest '
                           'undamaged one; default: the newest')
  parser.add_argument('--stopped-status', type=int, default=0, metavar='N',
                      help='exit status of a run that a signal stopped after saving (default 0); '
                           'another one tells a scheduler to start it again')
  parser.add_mesh()
  parser.add_processes()
  arguments = parser.parse(argv)

  from hrvlm_jax.parallel import distributed, fate  # before anything asks for devices

  distributed.initialize(arguments.distributed, coordinator=arguments.coordinator,
                         num_processes=arguments.num_processes, process_id=arguments.process_id)
  from hrvlm_jax.core import heap
  from hrvlm_jax.parallel.mesh import mesh_config
  from hrvlm_jax.training import determinism, loop, resume, run_config
  from hrvlm_jax.training.config import RunConfig

  with fate.shared(parser.prog):
    config = run_config.load(RunConfig, arguments.config, arguments.overrides)
    if arguments.mesh is not None:
      config = dataclasses.replace(config, mesh=mesh_config(arguments.mesh))
    if config.training.keep_heap:
      heap.keep_freed()  # before anything asks for devices
    if config.training.deterministic:
      determinism.pin_threads(arguments.workdir)  # before anything asks for devices
    main_process = distributed.is_main()
    if main_process:
      print(f'training {config.model.system} to step {config.training.steps}, batch '
            f'{config.training.batch_size}, seed {config.seed}; work directory '
            f'{arguments.workdir}', flush=True)
    result = loop.train(config, arguments.workdir, progress='lines' if arguments.quiet else True,
                        resume_from=resume.parse(arguments.resume_from))
    if main_process:
      loss = 'nothing left to do' if result.loss is None else f'loss {result.loss:.4f}'
      state = 'stopped by a signal at' if result.interrupted else 'finished at'
      again = '; run the same command to go on' if result.interrupted else ''
      print(f'{state} step {result.step}, {loss}{again}')
      if result.bad_rows:
        kinds = ', '.join(f'{count} {kind}' for kind, count in sorted(result.bad_rows.items()))
        print(f'rows that could not be used: {kinds} (hrvlm data check lists them)')
  return arguments.stopped_status if result.interrupted else 0
