"""The names a program uses: `import hrvlm_jax`, then `hrvlm_jax.load(...)` and so on.

Importing this module loads no JAX; calling one of its functions does.

>>> import hrvlm_jax
>>> model = hrvlm_jax.load('runs/quickstart/checkpoint')
>>> answer = model.ask('photo.png', 'What does the red sign say?', max_new_tokens=4)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from hrvlm_jax.front.model import Model
  from hrvlm_jax.systems.contract import ModelConfig

__all__ = ['convert', 'evaluate', 'export', 'finetune', 'load', 'train']


def load(what: str | os.PathLike, *, revision: str | None = None, dtype: str = 'float32',
         encoder: Mapping[str, Any] | None = None,
         methods: Mapping[str, Mapping[str, Any]] | None = None, exif: str = 'apply',
         urls: bool | str = False, max_bytes: int = 32 << 20, mesh: Mapping[str, int] | None = None,
         alpha: str = 'drop', max_pixels: int = 178_956_970, weights: str | None = None) -> Model:
  """A model, ready to be asked.

  Args:
    what: a checkpoint; the work directory of a run (its newest checkpoint); a folder in an
      original's layout, such as an export; or a name on the Hugging Face hub, `owner/name` or
      `owner/name@revision`. A folder of that name wins. Of a name, what lies in the local cache is
      not fetched again; a branch (default: main) is looked up while the hub can be reached, and
      `model.origin` says which commit it was. Code in a repository is neither fetched nor run.
    revision: branch, tag or commit of a name.
    dtype: of activations: 'float32' or 'bfloat16'.
    encoder: settings of the system to replace, such as {'max_crops': 25}.
    methods: inference methods laid over the model, such as {'vicrop': {}} or
      {'fastv': {'ratio': 0.5}}.
    exif: 'apply' turns photographs upright as their EXIF block says, 'ignore' does not.
    urls: images may be http or https addresses; True: of the public internet, 'private': also of
      this machine and its own network.
    max_bytes: of an image that is fetched, or given as a data URL.
    alpha: 'white' puts transparent pictures on a white page, 'drop' forgets transparency.
    max_pixels: larger images are refused before they are decoded.
    weights: of a training with `optimizer.ema`: 'ema', the moving average (the default where there
      is one), or 'raw', the parameters of the last step.
    mesh: devices that the model is cut over, such as {'tensor': 4} or {'fsdp': 8}: each reads its
      part of the weights, and no more. On several processes (`jax.distributed`) every call is made
      on all of them. Default: one device.

  Raises:
    UserError: nothing there, tensors that do not fit (all listed), unknown settings, the hub cannot
      be reached and the cache does not hold it.

  >>> model = load('runs/quickstart/checkpoint', encoder={'max_crops': 4, 'num_tokens': 20})
  >>> model.config.encoder.max_crops
  4
  """
  from hrvlm_jax.front import loading

  return loading.load(what, revision=revision, dtype=dtype, encoder=encoder, methods=methods,
                      exif=exif, urls=urls, max_bytes=max_bytes, mesh=mesh, alpha=alpha,
                      max_pixels=max_pixels, weights=weights)


def train(config: Any, workdir: str | os.PathLike, *, progress: bool = False,
          **overrides: Any) -> Any:
  """Trains one stage of one system; called again with the same work directory, it goes on.

  Args:
    config: a `RunConfig`, a config file or the name of a recipe (as `--config` takes them), or a
      mapping of a config's values.
    workdir: checkpoints, metrics and the tokenizer go there.
    overrides: keys of the config, as `**{'training.steps': 100}`.

  Returns:
    `training.loop.Result`: the step, the loss, whether a signal stopped it.

  Raises:
    UserError: a config or data that cannot be used.

  >>> result = train('run.py', 'runs/mine', **{'training.steps': 2})
  devices: ...
  >>> result.step
  2
  >>> model = load('runs/mine')
  """
  from hrvlm_jax.front import running

  return running.train(config, workdir, overrides, progress=progress)


def finetune(checkpoint: str | os.PathLike, data: str | os.PathLike, out: str | os.PathLike, *,
             images: str | os.PathLike | None = None, lora: int | None = None, epochs: float = 3,
             held_out: float = 0.1, metric: str = 'plain', batch_size: int | None = None,
             learning_rate: float | None = None, seed: int = 0, dtype: str = 'float32',
             encoder: Mapping[str, Any] | None = None, progress: bool = False,
             say: Callable[[str], None] = lambda text: None) -> Any:
  """Tunes a model on one's own questions and answers and scores it on a held-out share.

  Model, chat template, tokenizer and preprocessing are the checkpoint's; what its system freezes
  stays frozen. Called again with the same `out`, it goes on.

  Args:
    checkpoint: what `load` takes; an original's weights are converted once, to `out`/start.
    data: LLaVA's JSON, JSON lines with `messages` (OpenAI, Hugging Face) or `question` and
      `answer`, parquet, a folder that `datasets` saved, ...: what `data.sources.open_source` opens.
    out: work directory of the run; `load` it when it is done.
    images: folder of the images; default: that of the file.
    lora: rank of a LoRA set that is trained in place of the language model itself.
    epochs: times every row is seen.
    held_out: share of the rows kept for the score, drawn by the seed; 0: none.
    metric: of the held-out answers: plain (equal but for case), exact, contains, anls, relaxed,
      gqa, ... (`training.answers.METRICS`), or `module:function`.
    batch_size: default: 8, or as many rows as there are.
    learning_rate: default: 2e-5, with LoRA 2e-4.
    say: told what is done.

  Returns:
    `front.finetune.Tuned`: rows, steps, loss, the score before and after.

  Raises:
    UserError: no usable rows, numbers that cannot be, a row that takes more places than the
      language model knows.

  >>> tuned = finetune('runs/quickstart/checkpoint', 'own.jsonl', 'runs/tuned', epochs=1, lora=2,
  ...                  say=print)
  mc_llava from runs/quickstart/checkpoint: 2 rows to train on, 1 held out; ...
  >>> tuned.rows, tuned.held_out, tuned.metric
  (2, 1, 'plain')
  """
  from hrvlm_jax.front import finetune as tuning

  return tuning.finetune(
    checkpoint, data, out, images=images, lora=lora, epochs=epochs, held_out=held_out,
    metric=metric, batch_size=batch_size, learning_rate=learning_rate, seed=seed, dtype=dtype,
    encoder=encoder, progress=progress, say=say)


def evaluate(model: Any, benchmark: str, *, data: str | os.PathLike, out: str | os.PathLike,
             split: str | None = None, batch_size: int = 8, limit: int | None = None,
             max_new_tokens: int | None = None, metric: str | None = None,
             progress: bool = False) -> Any:
  """Answers a benchmark and scores it; a run that was stopped goes on in the same `out`.

  Args:
    model: of `load`, or what `load` takes (then with `exif='ignore'`, as the published numbers
      were made).
    benchmark: its name (`hrvlm eval --list`), or 'own' for questions of your own with `metric`.
    data: folder with the official files; for 'own' the file of questions.
    out: folder of answers, score, provenance and report.
    limit: only the first samples.

  Returns:
    `evaluation.result.Result`; its `summary()` is a line of text.

  Raises:
    UserError: unknown benchmark or metric, files that are missing, an `out` of another run.

  >>> result = evaluate('runs/quickstart/checkpoint', 'own', data='own.jsonl', metric='exact',
  ...                   out='runs/scored', max_new_tokens=4)
  >>> print(result.summary().split(':')[0])
  own (all), 3 samples
  """
  from hrvlm_jax.front import evaluating

  return evaluating.evaluate(model, benchmark, data=data, out=out, split=split,
                             batch_size=batch_size, limit=limit, max_new_tokens=max_new_tokens,
                             metric=metric, progress=progress)


def convert(source: str | os.PathLike, target: str | os.PathLike, *, dtype: Any = None,
            revision: str | None = None, adapter: str | os.PathLike | None = None,
            say: Callable[[str], None] = lambda text: None) -> ModelConfig:
  """Original weights -> a checkpoint; nothing is written unless all tensors fit.

  Args:
    source: a folder in an original's layout, or a name on the hub.
    target: the checkpoint, absent or empty.
    dtype: of the stored parameters; default: that of the file, tensor by tensor.
    adapter: an adapter folder of peft, kept as a LoRA set of its own.
    say: told about parameters that no tensor gives.

  Raises:
    UserError: see `interop.convert.convert`.

  >>> facts = export('runs/quickstart/checkpoint', 'runs/exported')
  >>> convert('runs/exported', 'runs/again').system
  'mc_llava'
  """
  from hrvlm_jax.interop.convert import convert as run

  return run(source, target, dtype=dtype, revision=revision, adapter=adapter, say=say)


def export(checkpoint: str | os.PathLike, target: str | os.PathLike, *, dtype: Any = None,
           merge_lora: bool = False, layout: str = 'original') -> dict[str, Any]:
  """A checkpoint -> a folder in the original's own layout; complete or not at all.

  Args:
    target: absent or empty.
    dtype: of the written tensors; default: as stored.
    merge_lora: add LoRA sets to the kernels; default: an adapter folder beside them.
    layout: 'transformers' for a folder that transformers opens, with model code of ours.

  Returns:
    The facts of its manifest.

  Raises:
    UserError: see `interop.export.export`.

  >>> facts = export('runs/quickstart/checkpoint', 'runs/exported2', dtype='bfloat16')
  >>> load('runs/exported2').config.system
  'mc_llava'
  """
  from hrvlm_jax.interop.export import export as run

  if isinstance(dtype, str):
    import jax.numpy as jnp

    dtype = jnp.dtype(dtype)
  return run(checkpoint, target, dtype=dtype, merge_lora=merge_lora, layout=layout)
