"""What the tasks ask, what decides between two readings of a question, what guessing is worth.

A question of `relate` and `page` (and of `needle` with `cues`) has two readings, such as the sign
left of the house and the one right of it. A global cue of the picture (its light, the weather, the
time of day) says which one counts. No sign and no word shows the cue: it is painted before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
import itertools
from typing import Any

# Task -> the kinds of its questions.
KINDS = {
  'needle': ('colour', 'shape', 'place'),
  'relate': ('side', 'agree', 'count', 'circle', 'arrow'),
  'page': ('after', 'row'),
}
TASKS = tuple(KINDS)

# Task -> cue -> how a question calls its two states.
PICTURE_CUES = {
  'tint': ('in warm light', 'in cold light'),
  'weather': ('in rain', 'in snow'),
  'scene': ('by day', 'by night'),
}
PAGE_CUES = {
  'tint': ('on yellow paper', 'on blue paper'),
  'scene': ('on ruled paper', 'on squared paper'),
}
CUES = {'needle': PICTURE_CUES, 'relate': PICTURE_CUES, 'page': PAGE_CUES}

# Texts of the four signs of `relate`, as letters of a pattern: signs 0 and 1 have one colour and
# agree, 2 and 3 have another and do not. Signs that agree are never two readings of a question.
PATTERN = 'aabc'
ABSENT = 'z'  # a text that no sign says


def counted() -> list[tuple[str, str]]:
  """(counted text, the one of the other reading): said by different numbers, all equally likely."""
  return list(itertools.permutations(('a', 'b', ABSENT), 2))


def count_chance() -> float:
  """The share of the most frequent answer to `count`, by going through all cases."""
  numbers = Counter(PATTERN.count(text) for text, _ in counted())
  return max(numbers.values()) / sum(numbers.values())


def chance(config: Any, kind: str) -> float:
  """Accuracy of the best guess that knows the question and not the picture.

  Of pages from PDF files it is that of a guess among the words of the default page.
  """
  if kind == 'agree':
    return 0.5
  if kind == 'count':
    return count_chance()
  if kind == 'after':  # any word but the one in the question
    return 1 / max(1, len(vocabulary(config.alphabet, config.length)) - 1)
  if kind == 'row':  # the first row is there in every page, the guess knows no better
    low, high = config.signs
    return sum(1 / rows for rows in range(low, high + 1)) / (high - low + 1)
  return float(len(config.alphabet)) ** -config.length


def vocabulary(alphabet: str, length: int) -> Sequence[str]:
  """The words of pages: single characters or pairs, from three on those of `WORDS` that fit."""
  if length <= 2:
    return [''.join(word) for word in itertools.product(alphabet, repeat=length)]
  return [word for word in WORDS if len(word) <= length and set(word) <= set(alphabet)]


# Common words without the letters I, O and Q, which look like digits (config.CLEAR_LETTERS).
_WORDS = """
ACE ACT ADD AGE ALE ANT APE ARC ARK ARM ART ASH ASK ATE AWE AXE BAD BAG BAR BAT BED BEE BET BUD
BUG BUS BUT BUY CAB CAP CAR CAT CUB CUE CUP CUT DAY DEN DEW DRY DUE EAR EAT EEL EGG ELF ELK ELM
END ERA EVE EYE FAN FAR FAX FEE FEW FLY FUN FUR GAP GAS GEL GEM GET GUM GUN GUY GYM HAM HAT HAY
HEM HEN HER HUB HUG HUT JAM JAR JAW JAY JET JUG KEY LAB LAD LAP LAW LAY LEG LET MAD MAN MAP MAT
MAY MEN MET MUD MUG NAP NET NEW NUT PAD PAN PAR PAT PAW PAY PEA PEN PET PLY PUB PUT RAG RAM RAN
RAT RAW RAY RED RUB RUG RUN RYE SAD SAP SAW SAY SEA SET SKY SUM SUN TAB TAG TAN TAP TAR TAX TEA
TEN TRY TUB TUG USE VAN VAT VET WAR WAX WAY WEB WET YAM YES YET ZAP ACRE BAKE BALL BAND BANK BARN
BASE BATH BEAM BEAN BEAR BELL BELT BEND BEST BLUE CAFE CAGE CAKE CALF CALL CALM CAMP CARD CARE
CART CASE CAVE CHEF CLAY CLUB CREW CUBE DARK DATE DAWN DEAL DEER DESK DRUM DUCK DUNE DUST EAST
EASY EDGE FACE FACT FALL FARM FELT FERN FLAG FLAT FUEL GALE GAME GATE GLUE HALF HALL HAND HARP
HEAD HEAT HERB JADE JUNE KELP KEEN LACE LAKE LAMB LAMP LAND LEAF LENS MALL MARK MASK MEAL MELT
NAME NEST PAGE PALM PARK PATH PEAR PEEL RACE RENT REST SALT SAND SEAT SHED TALE TANK TASK TEAM
TENT TREE VASE VEST WALK WALL WAVE WEST YARD ANGLE APPLE BASKET BEACH BENCH BLANK BREAD BRUSH
CANAL CANDLE CHALK CHAPEL CLEAR CRANE CURVE DANCE DESERT EAGLE EARTH FENCE FLAME FRAME FRESH
GARDEN GLASS GRAPE GRASS HAMMER LADDER LANTERN LEMUR MAPLE MARBLE MARKET METAL NEEDLE PANEL PAPER
PEARL PLANE PLANET PLANT PLATE SHELL SHARP SLATE STAMP STEAM STEEL TABLE TEMPLE THREE TRACE TUNNEL
VELVET WATER WHALE WHEAT
"""
WORDS = tuple(_WORDS.split())
