"""The model class that lmms-eval loads; importing it needs the extra `lmms`."""

from collections.abc import Sequence
import gc

import jax
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm

from hrvlm_jax.core.errors import UserError
from hrvlm_jax.core.execution import Execution
from hrvlm_jax.evaluation import lmms_eval_plugin as plugin
from hrvlm_jax.evaluation.model import EvaluatedModel
from hrvlm_jax.vlm.answer import Answerer, answer_all


class HrvlmJax(lmms):
  """A model of this library behind lmms-eval's interface.

  Args (all come from `--model_args a=b,c=d`, except `batch_size` and `device`):
    checkpoint: folder of a converted checkpoint or of a training run.
    batch_size: questions per call.
    exif: 'ignore' (as the original evaluations) or 'apply'.
    device: given by lmms-eval; JAX chooses its own devices.
    dtype: of activations, float32 or bfloat16.
    options: settings of the system's encoder, such as `max_crops=100`.
  """

  is_simple = False

  def __init__(self, checkpoint: str, batch_size: int | str = 1, exif: str = 'ignore',
               device: str | None = None, dtype: str = 'float32', **options):
    super().__init__()
    del device
    if str(batch_size) == 'auto':
      raise UserError('batch_size=auto is not supported; give a number')
    options = {key: value for key, value in options.items()
               if key not in ('max_batch_size', 'use_cache', 'batch_size')}
    self.model_name = checkpoint
    self._answerer = Answerer.load(checkpoint, ex=Execution(dtype=dtype), exif=exif,
                                   encoder_options=options or None)
    self._batch_size = int(batch_size)
    self._rank, self._world_size = jax.process_index(), jax.process_count()

  @property
  def batch_size(self) -> int:
    return self._batch_size

  def generate_until(self, requests: list[Instance]) -> list[str]:
    """Answers of chat requests, in their order."""
    read = [plugin.chat_request(request.args, self.task_dict, position)
            for position, request in enumerate(requests)]
    with tqdm(total=len(read), desc=plugin.MODEL_ID, disable=self.rank > 0) as bar:
      return plugin.run(
          read, lambda pairs, sampling: self._answerer.answer(pairs, **sampling),
          batch_size=self._batch_size, done=bar.update)

  def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
    """(log-probability, is greedy) of each continuation after its context."""
    model = EvaluatedModel(self._answerer, max_new_tokens=1)
    triples = [self._continuation(request.args) for request in requests]
    ask = lambda batch: model.score(batch, stop=False)
    return [(score.log_probability, score.greedy)
            for _, scores in answer_all(ask, triples, batch_size=self._batch_size)
            for score in scores]

  def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
    """The base class demands it. An answerer takes one question about its images, no dialogue."""
    raise NotImplementedError('tasks of several rounds are not supported')

  def clean(self) -> None:
    """Frees the parameters; the base class would call into CUDA's allocator of torch."""
    self._answerer = None
    gc.collect()

  def _continuation(self, arguments):
    context, target, to_images, number, task, split = arguments
    document = self.task_dict[task][split][number]
    target = target(document) if callable(target) else target
    images = tuple(to_images(document) or ()) if to_images else ()
    return images, context, target
