"""Chat templates as data, their rendering, and the token ids of a prompt.

A template says what surrounds the system text, a question and an answer. `render` joins them into
segments whose borders are the borders of the label mask, so that labels follow by construction
(`language/conversation.py`) and a prompt for generation is the same text, cut short.

Sources: visheratin/mc-llava: conversation.py, dataset.py (MC-LLaVA); miguelscarv/pheye: README and
generate.py (Pheye); haotian-liu/LLaVA: llava/conversation.py (Vicuna, plain); NVlabs/VILA:
llava/utils/tokenizer.py and its qwen2 chat template (VILA-HD).
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
from typing import Literal

from hrvlm_jax.core.errors import UserError, unknown
from hrvlm_jax.language.tokenizer import Tokenizer

IMAGE = '<image>'
USER, ASSISTANT = 'user', 'assistant'
IGNORE = -100  # label of a token that is not trained


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn: role 'user' or 'assistant', and its text."""

  role: str
  text: str


@dataclasses.dataclass(frozen=True)
class Dialogue:
  """Turns that wait for an answer: questions and answers without placeholders.

  Attributes:
    messages: alternating, from a question to a question.
    images: how many images each message brings; they stand in front of its text, where the
      originals put them.
    system: in place of the template's system text; None: the template's own.

  Raises:
    UserError: messages that do not alternate, images of an answer.
  """

  messages: tuple[Message, ...]
  images: tuple[int, ...]
  system: str | None = None

  def __post_init__(self):
    check_messages(self.messages, generation=True)
    if len(self.images) != len(self.messages) or any(self.images[1::2]):
      raise UserError(f'images of the messages: found {self.images} for {len(self.messages)} '
                      'messages; expected a number for each, 0 for an answer')

  @property
  def plain(self) -> str | None:
    """The question, where that is all there is."""
    return self.messages[0].text if len(self.messages) == 1 and self.system is None else None

  def written(self, template: Template) -> list[Message]:
    """The messages with the placeholders that the template wants."""
    return [question(template, message.text, count) if message.role == USER
            else Message(ASSISTANT, message.text.replace(IMAGE, ''))
            for message, count in zip(self.messages, self.images, strict=True)]


@dataclasses.dataclass(frozen=True)
class Segment:
  """A stretch of the rendered text; `trained`: its tokens are targets of the loss.

  `message` is the index of the message it belongs to, -1 for the system text.
  """

  text: str
  trained: bool
  message: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
  """Text around the parts of a conversation; `{text}` marks the place of each part.

  Attributes:
    system: default system text; None: only a text that is given stands there.
    system_format: around the system text; '' when the template has none.
    user: a question.
    header: between question and answer, not trained. A prompt for generation ends with it.
    answer: an answer as it is trained, its end sign included.
    after: follows an answer, not trained.
    image: what one image puts in front of a question; '' when images are not part of the text.
    image_leads: in training data a placeholder anywhere in a message moves to its beginning.
    strip: remove white space around every message first.
    first_turn_only: the template knows one question and one answer.
    drop_question: the question's text is not used, only its images (captioning).
    stop: strings of the tokens at which generation ends.
    unit: what is tokenised at once, the whole 'text' or every 'message' on its own.
    border: how the first trained token of an answer is found: by its place in the text ('place'),
      or by counting the header's tokens when tokenised alone ('count', the rule of MC-LLaVA).
    steers: the last token of the first question is marked in every row; its state says where a
      model looks again (VILA-HD).
    masks: rule of the original on odd input, see `language.conversation`: 'segments' (none),
      'rounds' (LLaVA), 'comparison' (VILA).
  """

  name: str
  system: str | None = ''
  system_format: str = ''
  user: str
  header: str
  answer: str
  after: str = ''
  image: str = f'{IMAGE}\n'
  image_leads: bool = False
  strip: bool = False
  first_turn_only: bool = False
  drop_question: bool = False
  stop: tuple[str, ...] = ()
  unit: Literal['text', 'message'] = 'text'
  border: Literal['place', 'count'] = 'place'
  steers: bool = False
  masks: Literal['segments', 'rounds', 'comparison'] = 'segments'


_VICUNA_SYSTEM = (
  'A chat between a curious user and an artificial intelligence assistant. '
  "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_PHEYE_SYSTEM = (
  'You are an AI visual assistant and you are seeing a single image. You will receive an '
  'instruction regarding that image. Your goal is to follow the instruction as faithfully as you '
  'can.'
)

TEMPLATES: dict[str, Template] = {template.name: template for template in (
  # ChatML as MC-LLaVA answers: a newline after every <|im_end|>. Its own prompts have no system
  # text; one that is given takes ChatML's form, which its language model was tuned with.
  Template(
    name='mc_llava',
    system=None,
    system_format='<|im_start|>system\n{text}<|im_end|>\n',
    user='<|im_start|>user\n{text}<|im_end|>\n',
    header='<|im_start|>assistant\n',
    answer='{text}<|im_end|>',
    after='\n',
    stop=('<|im_end|>',),
  ),
  # ChatML as MC-LLaVA was trained: no newline after <|im_end|>, every message tokenised alone.
  Template(
    name='mc_llava_train',
    system=None,  # as above: only a text that a row gives
    system_format='<|im_start|>system\n{text}<|im_end|>',
    user='<|im_start|>user\n{text}<|im_end|>',
    header='<|im_start|>assistant\n',
    answer='{text}<|im_end|>',
    stop=('<|im_end|>',),
    unit='message',
    border='count',
  ),
  # The left strip in the original's answer extraction suggests the space before the answer.
  Template(
    name='pheye',
    system=_PHEYE_SYSTEM,
    system_format='{text}\n\n',
    user='Instruction: {text}\n',
    header='Output:',
    answer=' {text}<|endoftext|>',
    image='',
    first_turn_only=True,
    stop=('<|endoftext|>',),
  ),
  Template(
    name='vicuna_v1',
    system=_VICUNA_SYSTEM,
    system_format='{text} ',
    user='USER: {text}',
    header=' ASSISTANT:',
    answer=' {text}</s>',
    image_leads=True,
    stop=('</s>',),
    masks='rounds',
  ),
  # Stage 1 of LLaVA: caption an image; the newline is the end sign.
  Template(
    name='plain',
    user='{text}',
    header='',
    answer='{text}\n',
    image=IMAGE,
    image_leads=True,
    first_turn_only=True,
    drop_question=True,
    stop=('</s>',),
  ),
  # Pheye's preliminary experiments (appendix B): GPT-2 goes on from fixed words. With the image in
  # the text, and for cross-attention without.
  Template(
    name='this_image_shows',
    user='{text}',
    header='This image shows',
    answer=' {text}<|endoftext|>',
    image=IMAGE,
    image_leads=True,
    first_turn_only=True,
    drop_question=True,
    stop=('<|endoftext|>',),
  ),
  Template(
    name='this_image_shows_beside',
    user='{text}',
    header='This image shows',
    answer=' {text}<|endoftext|>',
    image='',
    first_turn_only=True,
    drop_question=True,
    stop=('<|endoftext|>',),
  ),
  # VILA's own qwen2 template: its system text has no full stop.
  Template(
    name='vila_qwen2',
    system='You are a helpful assistant',
    system_format='<|im_start|>system\n{text}<|im_end|>\n',
    user='<|im_start|>user\n{text}<|im_end|>\n',
    header='<|im_start|>assistant\n',
    answer='{text}<|im_end|>',
    after='\n',
    image=IMAGE,
    strip=True,
    stop=('<|im_end|>',),
    steers=True,
    masks='comparison',
  ),
)}


def get_template(name: str) -> Template:
  """The template of a name.

  Raises:
    UserError: unknown name.
  """
  if name not in TEMPLATES:
    raise UserError(unknown(name, TEMPLATES, what='chat template'))
  return TEMPLATES[name]


def question(template: Template, text: str, images: int = 0) -> Message:
  """A user message about `images` images, with the placeholders the template wants.

  Placeholders inside the text itself are removed: their number must be that of the images.

  Raises:
    UserError: nothing is asked (except under a template that drops the question).
  """
  text = text.replace(IMAGE, '').strip()
  if not text and not template.drop_question:
    raise UserError('the question is empty')
  return Message(USER, template.image * images + text)


def check_messages(messages: Sequence[Message], *, generation: bool = False) -> None:
  """Questions and answers must alternate, beginning with a question.

  Args:
    generation: the last message is a question that awaits its answer.

  Raises:
    UserError: what is wrong, with the index of the message.
  """
  if not messages:
    raise UserError('the conversation is empty')
  for index, message in enumerate(messages):
    expected = (USER, ASSISTANT)[index % 2]
    if message.role != expected:
      raise UserError(f'message {index} comes from {message.role!r}, expected {expected!r}: '
                      'questions and answers must alternate, beginning with a question')
  if generation and len(messages) % 2 == 0:
    raise UserError('the last message is an answer, expected a question')
  if not generation and len(messages) % 2 == 1:
    raise UserError('the last message is a question without an answer')


def render(
  template: Template,
  messages: Sequence[Message],
  *,
  system: str | None = None,
  generation: bool = False,
) -> list[Segment]:
  """The conversation as segments; their texts joined are the rendered text.

  Args:
    template: see `Template`.
    messages: alternating, beginning with the user. Image placeholders stand in their text.
    system: replaces the template's system text ('' gives the format around nothing).
    generation: end with the header, for the model to go on.

  Raises:
    UserError: messages that do not alternate, more turns than the template knows, a system text
      where it has none.
  """
  check_messages(messages, generation=generation)
  if template.first_turn_only and len(messages) > 2:
    raise UserError(f'the template {template.name} has one question and one answer, found '
                    f'{len(messages)} messages; begin a new conversation for every question')
  if system and not template.system_format:
    raise UserError(f'the template {template.name} has no system text; leave it out, or write it '
                    'into the question')
  segments = []
  text = template.system if system is None else system
  if template.system_format and text is not None:
    segments.append(Segment(template.system_format.replace('{text}', text), False, -1))
  for index, message in enumerate(messages):
    text = message.text.strip() if template.strip else message.text
    if message.role == USER:
      if template.drop_question:
        text = template.image * text.count(IMAGE)
      segments.append(Segment(template.user.replace('{text}', text), False, index))
      if generation and index == len(messages) - 1:
        segments.append(Segment(template.header, False, index + 1))
    else:
      segments.append(Segment(template.header, False, index))
      segments.append(Segment(template.answer.replace('{text}', text), True, index))
      segments.append(Segment(template.after, False, index))
  return [segment for segment in segments if segment.text]


def rendered_text(segments: Sequence[Segment]) -> str:
  """All segments as one string."""
  return ''.join(segment.text for segment in segments)


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Token ids and their labels (-100 = not trained), before images take their slots.

  `text` is what was tokenised, for display.
  """

  ids: list[int]
  labels: list[int]
  text: str

  def cut(self, length: int | None) -> Encoded:
    """At most `length` ids; None: all."""
    return Encoded(self.ids[:length], self.labels[:length], self.text)


def encode_prompt(
  messages: Sequence[Message],
  template: Template,
  tokenizer: Tokenizer,
  *,
  image_id: int | None,
  system: str | None = None,
) -> Encoded:
  """Ids of a conversation that waits for an answer; nothing is trained.

  Raises:
    UserError: messages that do not alternate or do not end with a question.
  """
  text = rendered_text(render(template, messages, system=system, generation=True))
  ids, _ = encode_text(text, tokenizer, image_id)
  return Encoded(ids, [IGNORE] * len(ids), text)


def encode_text(
  text: str, tokenizer: Tokenizer, image_id: int | None
) -> tuple[list[int], list[int]]:
  """Ids of a text with images, and the character at which each starts (-1: the begin token).

  With a sentinel (negative `image_id`) the pieces between placeholders are tokenised alone and
  share one begin token, so with sentencepiece each has its own dummy space.

  Source: haotian-liu/LLaVA: llava/mm_utils.py, `tokenizer_image_token`.
  """
  ids = tokenizer.encode('')
  starts = [-1] * len(ids)
  pieces = text.split(IMAGE) if image_id is not None and image_id < 0 else [text]
  place = 0
  for index, piece in enumerate(pieces):
    if index:
      ids.append(image_id)
      starts.append(place)
      place += len(IMAGE)
    more, begins = tokenizer.encode_spans(piece, bos=False)
    ids += more
    starts += [place + begin for begin in begins]
    place += len(piece)
  return ids, starts


def prompt_end(ids: Sequence[int], template: Template, tokenizer: Tokenizer) -> int:
  """Index of the last token of the first question, whose state steers VILA-HD's selection.

  That is one before the first occurrence of what follows a question; the last index when it does
  not occur.

  Source: NVlabs/VILA: llava/model/llava_arch.py (class `LlavaTopDownMetaForCausalLM`).
  """
  marker = prompt_end_marker(template, tokenizer)[1]
  ids = list(ids)
  for place in range(len(ids) - len(marker) + 1):
    if ids[place:place + len(marker)] == marker:
      return place - 1
  return len(ids) - 1


def prompt_end_marker(template: Template, tokenizer: Tokenizer) -> tuple[str, list[int]]:
  """Text and ids of what follows a question up to the answer, white space around it removed."""
  text = (template.user.split('{text}')[1] + template.header).strip()
  return text, tokenizer.encode(text, bos=False)
