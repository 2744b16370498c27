"""The run config: what `configs/*.py` must produce, as strict dataclasses.

`RunConfig` is built by `core.config.from_dict` from an ml_collections ConfigDict; an unknown,
missing or mistyped key is one error with its path.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar, Literal

from hrvlm_jax.core import bounds
from hrvlm_jax.core.images import MAX_PIXELS
from hrvlm_jax.data.background import PasteOnBackground
from hrvlm_jax.data.order import OrderName
from hrvlm_jax.data.packing import Packing
from hrvlm_jax.data.rows import Fields
from hrvlm_jax.data.transforms import TooLong
from hrvlm_jax.parallel.mesh import MeshConfig
from hrvlm_jax.systems.contract import ModelConfig
from hrvlm_jax.systems.objective import ObjectiveOptions
from hrvlm_jax.training.evaluators import EVALUATORS, EvaluatorOptions
from hrvlm_jax.training.objectives import OBJECTIVES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
  """One parameter group; the first whose pattern matches the whole path wins.

  Attributes:
    pattern: regular expression over parameter paths.
    learning_rate: factor on the run's learning rate.
    decay: weight decay acts on the group.
    frozen: no gradient, no optimizer state; the stored dtype is kept.
  """

  pattern: str
  learning_rate: float = 1.0
  decay: bool = True
  frozen: bool = False

  BOUNDS: ClassVar = {'learning_rate': '[0, inf)'}

  def __post_init__(self):
    wrong = bounds.is_pattern(self.pattern)
    bounds.check(
      self, [f'pattern {self.pattern!r} is no regular expression ({wrong})'] if wrong else [])


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """The optimizer and its schedule; moments are float32.

  Attributes:
    name: 'adamw', or 'muon': orthogonalised momentum for the matrices of transformer blocks and
      AdamW for everything else. Small models from scratch learn in a fraction of the steps; the
      published recipes all use AdamW.
    warmup: steps of the linear warm-up; a value below 1 is a share of all steps.
    b1, b2, eps: of AdamW's moments; with muon, of the leaves that AdamW updates there (its own
      momentum is optax's 0.95; eps acts in both).
    clip_norm: largest global gradient norm; None: no clipping.
    ema: decay of an exponential moving average of the trained parameters; None: none is kept.
  """

  learning_rate: float
  name: Literal['adamw', 'muon'] = 'adamw'
  schedule: Literal['cosine', 'linear', 'constant'] = 'cosine'
  warmup: float = 0.0
  warmup_from: int = 0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.0
  clip_norm: float | None = 1.0
  ema: float | None = None

  BOUNDS: ClassVar = {
    'learning_rate': '[0, inf)', 'warmup': '[0, inf)', 'warmup_from': '[0, 1]', 'b1': '[0, 1)',
    'b2': '[0, 1)', 'eps': '(0, inf)', 'weight_decay': '[0, inf)', 'clip_norm': '(0, inf)',
    'ema': '(0, 1)'}

  def __post_init__(self):
    hint = ' (None does not clip)' if self.clip_norm is not None and self.clip_norm <= 0 else ''
    try:
      bounds.check(self)
    except ValueError as error:
      raise type(error)(f'{error}{hint}') from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
  """One stage.

  Attributes:
    batch_size: examples of one optimizer step, over all devices; `accumulate` micro-batches.
    groups: first match wins; every parameter must be covered.
    dtype: of activations; parameters and optimizer state are float32 masters, frozen groups keep
      `frozen_dtype` (None: as loaded).
    layers: how stacked layers run: 'loop' (one compilation for any depth), or 'unrolled' (as many
      copies of the program as layers: slower to compile, faster where memory traffic counts, as
      on a CPU; benchmarks/findings.md has both measured).
    remat: what the backward pass recomputes: 'none', 'attention', 'dots' or 'layers', see
      `core.execution.Execution`.
    loss_average: 'tokens' divides the summed loss by the targets of the whole step (Pheye 3.1);
      'micro_batch' averages the means of micro-batches (the LLaVA trainer), and a contrast stays
      within them.
    objective: what is learned: its name, or a mapping of name and options (`training.objectives`).
    deterministic: fixes what can be fixed for bit-equal losses after a resume; see
      `training.determinism` for what that is and costs.
    keep_heap: True: memory that a step frees stays with the process (`core.heap.keep_freed`), for
      a CPU without huge pages, with which `hrvlm` otherwise begins: faster, and two to three times
      the temporaries. Acts in `hrvlm train`, before JAX is asked for a device.
    profile: first and last step of a window that is traced into `<workdir>/profile`.
    mfu: count the operations of a step (its tracing costs seconds at the first log of a shape).
    wandb: project of Weights & Biases; None: not used.
    evaluators: what is measured inside the run, each with its own options
      (`training.evaluators`).
    eval_every: one more evaluator, the objective's own, on `data.eval`: steps between evaluations,
      which also follow the last step; 0: none.
    eval_images: its `rows`; None: all. eval_overlays: its `overlays`.
    on_bad_step: a step whose loss, gradient or parameters are not finite, or whose gradient norm is
      above `spike_norm`, ends the run ('stop') or is left out ('skip': parameters and optimizer
      stay as they are; parameters that are not finite end the run all the same).
    bad_steps: so many steps may be left out, over all starts of the run; one more ends it.
    spike_norm: a gradient norm above it makes a step a bad one; None: only one that is not finite.
    stall_minutes: a phase (a step, a wait for data, an evaluation; compiling and saving have four
      times as long) that takes longer ends the run with status 5; 0: no limit. See
      `training.watchdog`.
    init_from: checkpoint whose parameters the run starts from.
    init_allow: patterns of parameters that may be missing there and start fresh.
  """

  steps: int
  batch_size: int
  optimizer: OptimizerConfig
  groups: tuple[Group, ...] = (
    Group(pattern=r'.*/(bias|scale)', decay=False), Group(pattern=r'.*'))
  accumulate: int = 1
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  frozen_dtype: Literal['float32', 'bfloat16'] | None = None
  layers: Literal['loop', 'unrolled'] = 'loop'
  remat: Literal['none', 'attention', 'dots', 'layers'] = 'none'
  attention: Literal['xla', 'cudnn', 'splash', 'auto'] = 'auto'
  loss_average: Literal['tokens', 'micro_batch'] = 'tokens'
  loss_chunk: int = 512
  objective: ObjectiveOptions | str = 'next_token'
  deterministic: bool = False
  keep_heap: bool | None = None
  profile: tuple[int, int] | None = None
  mfu: bool = True
  wandb: str | None = None
  log_every: int = 10
  checkpoint_every: int = 500
  keep: int = 2
  keep_every: int | None = None
  on_bad_step: Literal['stop', 'skip'] = 'stop'
  bad_steps: int = 20
  spike_norm: float | None = None
  stall_minutes: float = 30.0
  evaluators: tuple[EvaluatorOptions, ...] = ()
  eval_every: int = 0
  eval_images: int | None = None
  eval_overlays: int = 2
  init_from: str | None = None
  init_allow: tuple[str, ...] = ()

  BOUNDS: ClassVar = {
    **dict.fromkeys(('steps', 'batch_size', 'accumulate', 'loss_chunk', 'log_every',
                     'checkpoint_every', 'keep', 'keep_every', 'eval_images', 'profile',
                     'bad_steps'), '[1, inf)'),
    **dict.fromkeys(('eval_every', 'eval_overlays', 'stall_minutes'), '[0, inf)'),
    'groups': '[0, inf)', 'spike_norm': '(0, inf)'}

  def __post_init__(self):
    if isinstance(self.objective, str):
      object.__setattr__(self, 'objective', OBJECTIVES.default(self.objective))
    problems = []
    if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
      problems.append(f'profile must be (first, last) with 1 <= first <= last, got {self.profile}')
    if self.accumulate >= 1 and self.batch_size % self.accumulate:
      problems.append(f'batch_size {self.batch_size} is no multiple of accumulate '
                      f'{self.accumulate}')
    problems += [f'init_allow {pattern!r} is no regular expression ({wrong})'
                 for pattern in self.init_allow if (wrong := bounds.is_pattern(pattern))]
    bounds.check(self, problems)

  @classmethod
  def field_types(cls, values: Mapping[str, Any]) -> dict[str, Any]:
    """Classes of options follow from the names (see `core.config.from_dict`)."""
    evaluators = tuple(map(EVALUATORS.options, values.get('evaluators', ())))
    return {'objective': OBJECTIVES.options(values.get('objective', 'next_token')) | str,
            'evaluators': tuple[evaluators]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where examples come from and how they become batches.

  Attributes:
    train: the training set: LLaVA JSON, a mixture, ArrayRecord, parquet, TFDS, a folder (see
      `data.sources.open_source`).
    eval: the same for evaluation inside and after the run; None: none.
    images: folder the image paths are relative to; default: the folder of the JSON.
    split: of `train`, where that is a data set of several (TFDS, also 'train[:10%]'; a folder that
      `datasets` saved; a clone from the hub); None: train. eval_split: of `eval`.
    fields: which column of a table (TFDS, parquet, Arrow) is what, see `data.rows.Fields`; None: by
      the usual names. eval_fields: of `eval`.
    tokenizer: a tokenizer folder or file, or 'byte' (one id per byte; tiny models).
    lengths: bucket lengths of text plus visual places; the smallest that holds a batch is used.
    max_length: ids of a row's text, an image counting one; None: no limit but the largest bucket.
    too_long: a longer text is cut ('cut_text'), cut with its visual tokens counted ('cut_row', as
      VILA), or makes a bad row ('refuse'); see `data.transforms.TextLimit`.
    slots: crop slots of one batch; None: the system's default for its rows.
    packing: examples are assigned to rows and crop slots beforehand; `slots` is then not used, see
      `data.packing.Packing`.
    shuffle: a new permutation every epoch; False keeps the order of the file.
    order: 'uniform', or 'grouped': batches of similar length and one modality (LLaVA).
    group: (examples per device and micro-batch, devices) of the grouping; None: whole batches.
    exif: 'apply' turns photographs upright; 'ignore' as the originals did.
    alpha: 'white' puts transparent pictures on a white page; 'drop' forgets transparency as the
      originals did.
    max_pixels: an image of more pixels is a bad row, known before it is decoded; a worker needs
      about 3 bytes for each while it decodes.
    inexact_decode: decode JPEG files at 1/2, 1/4 or 1/8 of their size while both sides stay at
      least so many pixels: several times faster, INEXACT (other pixels than the originals saw, and
      fewer crops where their number depends on the size). None: exact.
    bad_rows: a row that cannot be used is counted and skipped, or ends the run.
    workers: Grain worker processes; 0 reads in the main process.
    shards: parts of a batch that hosts make whole; a multiple of every host count. With `packing`
      the crops of a shard lie together.
    boxes: rows may have a `box` (x0, y0, x1, y1 in pixels of their image) that says where their
      question looks; for systems that learn to look there (VILA-HD).
    background: paste every image on a large page first (high-resolution alignment data).
    draw: settings of the encoder that are drawn anew for every image in training: name -> (lowest,
      highest) whole number, uniformly; of those a system allows (MC-LLaVA: max_crops). Answers use
      the encoder's own value.
  """

  train: str
  eval: str | None = None
  images: str | None = None
  split: str | None = None
  eval_split: str | None = None
  fields: Fields | None = None
  eval_fields: Fields | None = None
  tokenizer: str = 'byte'
  lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
  max_length: int | None = None
  too_long: TooLong = 'cut_text'
  slots: int | None = None
  packing: Packing = Packing()
  shuffle: bool = True
  order: OrderName = 'uniform'
  group: tuple[int, int] | None = None
  exif: Literal['apply', 'ignore'] = 'apply'
  alpha: Literal['drop', 'white'] = 'drop'
  max_pixels: int = MAX_PIXELS
  inexact_decode: int | None = None
  bad_rows: Literal['skip', 'fatal'] = 'skip'
  workers: int = 0
  shards: int = 8
  boxes: bool = False
  background: PasteOnBackground | None = None
  draw: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)

  BOUNDS: ClassVar = {
    **dict.fromkeys(('lengths', 'max_length', 'slots', 'group', 'inexact_decode', 'shards',
                     'max_pixels'), '[1, inf)'), 'workers': '[0, inf)',
    'draw': '[0, inf) ...'}

  def __post_init__(self):
    problems = []
    if not self.train:
      problems.append('train must name a data set, got an empty text')
    bounds.check(self, problems)

  @property
  def reading(self) -> dict[str, Any]:
    """How images are opened, for `core.images.open_image`."""
    return dict(exif=self.exif, alpha=self.alpha, max_pixels=self.max_pixels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """Everything a run depends on."""

  model: ModelConfig
  data: DataConfig
  training: TrainingConfig
  seed: int = 0
  mesh: MeshConfig = MeshConfig()

  BOUNDS: ClassVar = {'seed': '[0, 4294967295]'}

  def __post_init__(self):
    bounds.check(self)
