"""From an answer in words to the letter of a choice, as a person reads it.

A person first looks for what the text commits to ("the answer is C", a letter on a line of its own,
a choice word for word) and takes the last commitment; letters that are only mentioned or ruled out
("not B", "option A is wrong") do not count against it. Without a commitment the only letter, or
else the only choice, that is mentioned and not ruled out is the answer; anything else cannot be
read. The article *A* and the pronoun *I* are no letters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import re
import unicodedata

LETTERS = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'


def letters(count: int) -> str:
  """The first `count` capital letters."""
  if not 1 <= count <= len(LETTERS):
    raise ValueError(f'expected 1 to {len(LETTERS)} choices, got {count}')
  return LETTERS[:count]


def mcq_letter(text: str, choices: Sequence[str]) -> str | None:
  """The letter that an answer commits to.

  Case, full width, markdown, brackets, `\\boxed{}` and tags do not matter; what stands inside
  `<think>` is not read, and of `<answer>` and `\\boxed{}` the last is the answer.

  Args:
    text: the model's answer.
    choices: texts of the choices in order; choice i has the i-th letter. An empty text (a gap) has
      a letter but is never found by its text.

  Returns:
    A letter of the choices, or None where a person could not tell.
  """
  known = letters(len(choices))
  text = _plain(_inner(text))
  if found := _alone(text, known):
    return found
  read = _Answer(text, known, tuple(_bare(_plain(choice)) for choice in choices))
  return read.whole() or read.committed() or read.mentioned()


def mcq_simple(text: str, choices: Sequence[str]) -> str | None:
  """The rule of earlier versions, kept as a named variant: the first of these that applies.

  1. The text is a letter, or begins with one followed by `.`, `)`, `:` or `,`.
  2. `(X)` anywhere: the last one.
  3. The first stand-alone letter after `answer is`, `answer:`, `option` or `choice`.
  4. A stand-alone letter, when it is the only one; an `A` in more than three words is an article.
  5. Exactly one choice's text is contained in the answer (lower case).
  """
  known = letters(len(choices))
  text = text.strip()
  if match := re.match(rf'([{known}])(?:[.):,]|$)', text):
    return match.group(1)
  if found := re.findall(rf'\(([{known}])\)', text):
    return found[-1]
  alone = rf'(?<![A-Za-z0-9\'])([{known}])(?![A-Za-z0-9\'])'
  for marker in re.finditer(r'answer is|answer:|option|choice', text, re.IGNORECASE):
    if match := re.search(alone, text[marker.end():]):
      return match.group(1)
  found = re.findall(alone, text)
  if len(text.split()) > 3:
    found = [letter for letter in found if letter != 'A']
  if len(found) == 1:
    return found[0]
  return only_text(text, choices)


def only_text(text: str, choices: Sequence[str]) -> str | None:
  """The only choice whose text is contained in the answer (lower case), or None."""
  lower = text.lower()
  found = [letter for letter, choice in zip(letters(len(choices)), choices)
           if choice and choice.lower() in lower]
  return found[0] if len(found) == 1 else None


# --- the text without its dress -----------------------------------------------------------------


def _inner(text: str) -> str:
  """What stands inside the last `<answer>` or `\\boxed{}`; reasoning in `<think>` is cut away."""
  text = re.sub(r'<think(?:ing)?>.*?</think(?:ing)?>', ' ', text, flags=re.DOTALL | re.IGNORECASE)
  text = re.sub(r'^.*</think(?:ing)?>', ' ', text, flags=re.DOTALL | re.IGNORECASE)
  for form in (r'<answer>(.*?)(?:</answer>|$)', r'\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}'):
    found = [part for part in re.findall(form, text, flags=re.DOTALL | re.IGNORECASE)
             if part.strip()]
    if found:
      text = found[-1]
  return text


def _plain(text: str) -> str:
  """Compatibility forms, markdown, LaTeX and tags undone; one kind of quote; lines are kept."""
  text = unicodedata.normalize('NFKC', text)
  text = re.sub(r'[‘’ʼ´]', "'", text)
  text = re.sub(r'[“”„«»]', '"', text)
  text = re.sub(r'[\u200b-\u200f\u2060\ufeff]', '', text)
  text = re.sub(r'\\(?:text|textbf|mathrm|mathbf|mathsf|operatorname)\s*\{([^{}]*)\}', r'\1', text)
  text = re.sub(r'</?[A-Za-z][A-Za-z0-9_|-]*\s*/?>|<\|[^|<>]*\|>', ' ', text)
  text = re.sub(r'\*+|`+|~~+|(?<![A-Za-z0-9])_+|_+(?![A-Za-z0-9])|\$+', '', text)
  text = re.sub(r'^[ \t]*(?:#+|>|[-•])[ \t]+', '', text, flags=re.MULTILINE)
  return re.sub(r'[^\S\n]+', ' ', text).strip()


def _bare(text: str) -> str:
  """Lower case, without outer punctuation."""
  return re.sub(r'\s+', ' ', text).strip(' .,;:!?"\'()[]{}').casefold()


def _alone(text: str, known: str) -> str | None:
  """The letter when there is nothing else but punctuation."""
  match = re.fullmatch(rf'[^\w]*([{known}{known.lower()}])[^\w]*', text)
  return match.group(1).upper() if match else None


# --- reading it ---------------------------------------------------------------------------------

_FILLER = (r"(?:(?:that|the|this|be|is|it|it's|its|would|should|must|most|more|very|likely|"
           r"probably|definitely|clearly|certainly|therefore|thus|then|so|option|choice|letter|number|"
           r"answer|correct|right|best|one|labeled|labelled|marked|as|to|of|i|think|believe)\b|"
           r"[\s:=\"'>→-])*")
# Words after which a letter, or a choice, is what the text commits to.
_CUES = re.compile(
  r"\b(?:answer|choice|option|selection|solution|response|guess|pick|conclusion)s?\s*"
  r"(?:\(?(?:here|letter)\)?\s*)?"
  r"(?:is|was|would be|should be|must be|will be|has to be|'s|:|=|->|→|-)(?!\s*not\b)"
  r"|\bi(?:'d| would|'ll| will| must| have to)?(?: therefore| thus| also)? "
  r"(?:choose|chose|pick|picked|select|selected|go(?: with| for)|went with|say|vote for|answer|"
  r"settle on)\b"
  r"|\bi (?:think|believe|guess|suppose)\b(?: that)?(?!\s*not\b)"
  r"|\b(?:it|this|that|which)(?:'s| is| was| must be| should be| would be| has to be)(?!\s*not\b)"
  r"|\b(?:must|has to|should) be\b"
  r"|\b(?:so|therefore|thus|hence|finally|consequently)\b,?"
  r"|\b(?:corresponds to|matches|points to|choose|select|pick|go with|leaves(?: us with)?)\b",
  re.IGNORECASE)
_RIGHT = (r"(?:(?:(?:is|was|'s|seems|looks|must be|would be|has to be|appears(?: to be)?)\s+"
          r"(?:(?:clearly|obviously|definitely|probably|likely|indeed|thus|therefore|the|most|my|a)\s+)*"
          r"(?:correct|right|true|best|accurate|answer|one|match(?:es)?|choice|it)\b)"
          r"|(?:fits|matches|suits|describes|works|makes)\s+(?:\w+\s+){0,3}?"
          r"(?:better|best|more sense|most sense)\b)")
_WRONG = (r"(?:(?:is|are|was|were|seems?|looks?|would be|must be)\s+"
          r"(?:(?:clearly|obviously|definitely|also|both|all|simply|probably|the|thus|therefore)\s+)*"
          r"(?:not|wrong|incorrect|false|impossible|ruled out|eliminated|excluded|inaccurate|"
          r"invalid|out\b|untrue|mistaken|no\b)"
          r"|(?:isn't|aren't|wasn't|cannot|can't|can not|couldn't|doesn't|does not|don't|do not|"
          r"won't|fails|shows? nothing)\b)")
_NOT = re.compile(
  r"(?:\bnot|n't|\bneither|\bnor|\bexcept(?: for)?|\bwithout|\brul(?:e[sd]?|ing) out|"
  r"\beliminat\w+|\bexclud\w+|\brather than|\binstead of|\bunlike|\bdiscard\w*|\breject\w*|\bno|"
  r"\bnever|\bother than)\s+"
  r"(?:(?:think|believe|say|mean|it|it's|that|be|the|a|an|any|option|options|choice|answer|letter|correct|right|in|is|really|just|"
  r"both)\s+)*[\"'(\[]*$", re.IGNORECASE)
# Words that can follow a letter but no article.
_AFTER_A = frozenset((
  'because', 'since', 'as', 'and', 'or', 'but', 'which', 'that', 'by', 'due', 'is', 'was', 'are',
  'were', 'would', 'seems', 'looks', 'must', 'can', 'cannot', 'based', 'given', 'not', "isn't",
  "doesn't", 'has', 'shows', 'in', 'though', 'although', 'while', 'so', 'here', 'for', 'fits',
  'matches'))
_AFTER_I = frozenset((
  'because', 'since', 'as', 'and', 'or', 'but', 'which', 'is', 'was', "isn't"))


@dataclasses.dataclass(frozen=True)
class _Found:
  """A letter at a place of the text: where it begins and ends, and whether it is in brackets."""

  letter: str
  start: int
  end: int


class _Answer:
  """One answer and what is ruled out in it."""

  def __init__(self, text: str, known: str, choices: tuple[str, ...]):
    self.text, self.known, self.choices = text, known, choices
    self.letters = list(self._letters())
    self.texts = list(self._texts())
    self.undecided = self._undecided()
    self.negated = {f for f in (*self.letters, *self.texts) if self._negated(f)}
    self.out = self._ruled_out()

  def whole(self) -> str | None:
    """The choice that the text is, word for word."""
    return self._same(self.text)

  def _same(self, part: str) -> str | None:
    found = [letter for letter, choice in zip(self.known, self.choices)
             if choice and choice == _bare(part)]
    return found[0] if len(found) == 1 else None

  def committed(self) -> str | None:
    """The last letter or choice that the text commits to."""
    found = [f for f in self._commitments() if f.letter not in self._out_after(f)]
    return max(found, key=lambda f: f.start).letter if found else None

  def mentioned(self) -> str | None:
    """The only letter, or else the only choice, that is mentioned and not ruled out."""
    for mentions in (self.letters, self.texts):
      left = {f.letter for f in mentions} - self.out
      if len(left) == 1:
        return left.pop()
      if len(left) > 1:
        return None
    left = set(self.known) - self.out
    return left.pop() if len(left) == 1 and self.out else None

  def _letters(self) -> Iterator[_Found]:
    """Stand-alone letters that are neither article nor pronoun."""
    form = rf"(?<!\w)(?<!\w')([{self.known}{self.known.lower()}])(?!\w|'[a-z])"
    for match in re.finditer(form, self.text, re.ASCII):
      letter, before, after = match.group(1), self.text[:match.start()], self.text[match.end():]
      bracket = before[-1:] in ('(', '[', '{', '"') and after[:1] in (')', ']', '}', '"')
      named = re.search(r'\b(?:options?|choices?|letter|answers?)\s*(?:is|:)?\s*$', before,
                        re.IGNORECASE)
      closing = re.match(r'\s*(?:$|\n|[.,;:!?)\]])', after)
      if letter.islower() and not (bracket or (named and (letter != 'a' or closing))
                                   or self._listed(match, before)):
        continue
      if letter.upper() in 'AI' and not bracket and not self._stands(letter.upper(), after, named):
        continue
      yield _Found(letter.upper(), match.start(), match.end())

  def _listed(self, match: re.Match, before: str) -> bool:
    """A small letter with `)` or `.` at the head of a line: `b) dog`."""
    head = not before.split('\n')[-1].strip()
    return head and bool(re.match(r'\s*(?:[).:]|\n|$)', self.text[match.end():]))

  def _stands(self, letter: str, after: str, named) -> bool:
    """Whether an A or I before `after` is a letter rather than a word."""
    follows = re.match(r" ([A-Za-z][\w']*)", after)
    if follows is None:
      return True
    word = follows.group(1).lower()
    if letter == 'I':
      return bool(named) or word in _AFTER_I
    if _bare(after) == self.choices[0]:
      return True
    if word in _AFTER_A:
      return True
    # "option A shows a cat": named, and what follows is no choice that the article could belong to.
    return bool(named) and not any(c and _bare(after).startswith(c) for c in self.choices)

  def _texts(self) -> Iterator[_Found]:
    """Choices by their text, whole words, a longer choice hiding a shorter one inside it."""
    taken: list[tuple[int, int]] = []
    lower = self.text.casefold()
    if len(lower) != len(self.text):  # a letter that folds to two: places would not fit
      lower = self.text.lower()
    for letter, choice in sorted(zip(self.known, self.choices), key=lambda x: -len(x[1])):
      short = re.sub(r'^(?:a|an|the) (?=\w)', '', choice)
      forms = [form for form in (choice, short) if form]
      for form in forms[:1] if forms[:1] == forms[1:] else forms:
        pattern = rf'(?<!\w)(?<!\d[.,]){re.escape(form)}(?!\w)(?![.,]\d)'.replace(r'\ ', r'\s+')
        for match in re.finditer(pattern, lower):
          if not any(a < match.end() and match.start() < b for a, b in taken):
            taken.append(match.span())
            yield _Found(letter, *match.span())
    # Equal texts cannot be told apart: the first has taken the place, the others stay silent.

  def _ruled_out(self) -> set[str]:
    # What is called right somewhere is not ruled out by a word like "not only".
    return {f.letter for f in self.negated} - {f.letter for f in self._commitments()}

  def _negated(self, f: _Found) -> bool:
    before = re.sub(r'\s+', ' ', self.text[max(0, f.start - 60):f.start])
    # "not A, B or C": what stands before a list belongs to each of its members.
    letter = rf"(?:option |choice )?[\"'(\[]?[{self.known}][\"')\]]?"
    separator = r'\s*(?:,? or|,? nor|,? and|,|/|&)\s*'
    members = rf'(?<!\w){letter}(?:{separator}{letter})*{separator}(?:option |choice )?'
    before = re.sub(rf'{members}[\"\'(\[]*$', '', before)
    if _NOT.search(before):
      return True
    rest = self.text[f.end:]
    rest = re.sub(rf'^[\"\')\]]*(?:{separator}{letter})*', '', rest)
    wrong = rf"[\"')\]]*\s*{self._own(f)}(?:{_WRONG}|\?\s*(?:no|nope|not)\b)"
    return bool(re.match(wrong, rest, re.IGNORECASE))

  def _own(self, f: _Found) -> str:
    """The choice of a letter, which may stand between it and a verdict: "(A) cat is wrong"."""
    own = self.choices[self.known.index(f.letter)]
    return rf"(?:[.:,-]?\s*(?:an? |the )?{re.escape(own)}[\"')\]]*\s+)?" if own else ''

  def _out_after(self, f: _Found) -> set[str]:
    """Letters ruled out behind a commitment ("The answer is A. No, A is wrong")."""
    return {g.letter for g in self.negated if g.start > f.start}

  def _commitments(self) -> list[_Found]:
    found = [*self._lines(), *self._right(), *self._cued(), *self._counted()]
    return [f for f in found if f not in self.undecided and not self._negated(f)]

  def _undecided(self) -> set[_Found]:
    """ "A or B", "a dog or a cat", "between A and B": no commitment to either."""
    between = re.compile(r"[\"')\]]*\s*(?:,?\s*\bor\b|/|\band\b|&)\s*"
                         r"(?:(?:option|choice|a|an|the)\s+)?[\"'(\[]*", re.IGNORECASE)
    found = sorted((*self.letters, *self.texts), key=lambda f: f.start)
    pairs = ((first, second) for number, first in enumerate(found)
             for second in found[number + 1:number + 4])
    return {f for first, second in pairs
            if first.letter != second.letter
            and between.fullmatch(self.text, first.end, max(first.end, second.start))
            for f in (first, second)}

  def _lines(self) -> Iterator[_Found]:
    """A letter or choice on a line of its own, or a letter that leads the text."""
    start = 0
    for number, line in enumerate(self.text.split('\n')):
      if letter := _alone(line, self.known) or self._same(line):
        yield _Found(letter, start, start + len(line))
      if number == 0:
        yield from self._leading(line)
      start += len(line) + 1
    yield from self._leading_text()
    # "C. dog" on the last of several lines.
    last = self.text.rsplit('\n', 1)
    if len(last) == 2:
      offset = len(self.text) - len(last[1])
      for f in self._leading(last[1]):
        if _bare(last[1][f.end:]) == self.choices[self.known.index(f.letter)]:
          yield _Found(f.letter, offset + f.start, offset + f.end)

  def _leading_text(self) -> Iterator[_Found]:
    """A choice that leads the text and stands by itself: "Yes, there is no dog"."""
    for f in self.texts:
      rest = self.text[f.end:]
      if not self.text[:f.start].strip(' "\'([') and re.match(r'["\')\]]*\s*[,.;:!\n-]', rest):
        others = '|'.join(re.escape(c) for c in self.choices if c)
        if not re.match(rf'\W*(?:a |an |the )?(?:{others})\b', rest, re.IGNORECASE):
          yield f

  def _leading(self, line: str) -> Iterator[_Found]:
    match = re.match(rf"[\"'(\[{{]*([{self.known}{self.known.lower()}])(?![\w'])", line)
    if not match:
      return
    letter, rest = match.group(1).upper(), line[match.end():]
    own = self.choices[self.known.index(letter)]
    dressed = re.match(r'\s*[.):,\]};-]|\s*$', rest)
    because = re.match(r'\s+(?:because|since|as|due)\b', rest, re.IGNORECASE)
    # "A cat and a dog" begins with an article.
    text = own and match.group(1).isupper() and (
      _bare(rest) == own or letter != 'A' and _bare(rest).startswith(own))
    comma = dressed and dressed.group().strip() == ','
    if comma and re.match(rf'\s*,\s*[{self.known}](?![\w\'])', rest):
      return  # "A, B and C": a list
    if dressed and not (comma and match.group(1).islower()) or because or text:
      yield _Found(letter, 0, match.end())

  def _right(self) -> Iterator[_Found]:
    """ "C is correct", "option C is the answer"."""
    for f in self.letters:
      if re.match(rf"[\"')\]]*\s*{self._own(f)}{_RIGHT}", self.text[f.end:], re.IGNORECASE):
        yield f

  def _counted(self) -> Iterator[_Found]:
    """ "the second option"."""
    ordinals = ['first', 'second', 'third', 'fourth', 'fifth', 'sixth', 'seventh', 'eighth']
    form = rf"\bthe ({'|'.join([*ordinals, 'last'])}) (?:option|choice|answer)\b"
    for match in re.finditer(form, self.text, re.IGNORECASE):
      word = match.group(1).lower()
      number = len(self.known) - 1 if word == 'last' else ordinals.index(word)
      if number < len(self.known):
        yield _Found(self.known[number], *match.span())

  def _cued(self) -> Iterator[_Found]:
    """Letters and choices directly behind a word of commitment."""
    small = rf"[\"'(\[]*([{self.known.lower()}])[\"')\]]*\s*(?:[.,;!?]|\n|$)"
    by_start = {f.start: f for f in (*self.texts, *self.letters)}
    for cue in _CUES.finditer(self.text):
      begin = cue.end()
      filler = re.compile(_FILLER, re.IGNORECASE).match(self.text, begin)
      for end in {begin, filler.end()}:
        place = re.compile(r"[\s\"'(\[{]*").match(self.text, end).end()
        if place in by_start:
          yield by_start[place]
          continue
        if match := re.compile(small).match(self.text, place):
          yield _Found(match.group(1).upper(), match.start(1), match.end(1))
          continue
        article = re.compile(r'(?:a|an|the)\s+', re.IGNORECASE).match(self.text, place)
        if article and article.end() in by_start:
          f = by_start[article.end()]
          if f in self.texts:
            yield f
