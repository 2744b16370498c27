"""`hrvlm finetune`: see `front.finetune`."""

from hrvlm_jax.cli.arguments import Parser, read_seed
from hrvlm_jax.cli.ask import take_knobs


def main(argv: list[str]) -> int:
  """Tunes a model on your own questions and answers, and scores it on a held-out share.

  Data: LLaVA's JSON, JSON lines with `messages` (OpenAI, Hugging Face) or with `question` and
  `answer`, parquet, folders that `datasets` saved. Model, chat template and preprocessing are the
  checkpoint's. Run again, it goes on. --encoder.KEY=VALUE sets a knob of the system.
  """
  argv, knobs = take_knobs(argv, ('encoder',))
  parser = Parser('finetune', main.__doc__)
  parser.add_argument('checkpoint', help='checkpoint, work directory of a run, folder in the '
                      'layout of an original, or a name on the hub (owner/name@revision)')
  parser.add_argument('--data', required=True, help='questions and answers')
  parser.add_argument('--images', metavar='DIR', help='where the images of --data are; default: '
                      'beside it')
  parser.add_argument('--out', required=True, metavar='DIR', help='the run; ask it when it is done')
  parser.add_argument('--lora', type=int, metavar='RANK',
                      help='train a LoRA set of this rank in place of the language model itself')
  parser.add_argument('--epochs', type=float, default=3, help='times every row is seen')
  parser.add_argument('--eval', type=float, default=0.1, metavar='SHARE', dest='held_out',
                      help='of the rows, kept for the score; 0: none')
  parser.add_argument('--metric', default='plain',
                      help='of the held-out answers: plain, exact, contains, anls, relaxed, ...')
  parser.add_argument('--batch-size', type=int, help='default: 8, or as many rows as there are')
  parser.add_argument('--learning-rate', type=float, help='default: 2e-5, with --lora 2e-4')
  parser.add_argument('--seed', type=read_seed, default=0)
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--quiet', action='store_true', help='no progress bar')
  arguments = parser.parse(argv)

  from hrvlm_jax.front import finetune

  tuned = finetune.finetune(
    arguments.checkpoint, arguments.data, arguments.out, images=arguments.images,
    lora=arguments.lora, epochs=arguments.epochs, held_out=arguments.held_out,
    metric=arguments.metric, batch_size=arguments.batch_size,
    learning_rate=arguments.learning_rate, seed=arguments.seed, dtype=arguments.dtype,
    encoder=knobs.get('encoder'), progress=not arguments.quiet,
    say=lambda text: print(text, flush=True))
  if tuned.interrupted:
    print(f'stopped by a signal at step {tuned.steps}; run the same command to go on')
    return 0
  print(finetune.summary(tuned))
  return 0
