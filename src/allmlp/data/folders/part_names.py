"""Which folders are the parts of a dataset (train, val, test), by all the names that are usual for them."""

import re
from collections.abc import Iterable
from typing import NamedTuple

PARTS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
PART_OF_WORD = {word: part for part, words in PARTS.items() for word in words}
NOUN = r"(?:sets?|data|datasets?|images?|imgs?|splits?|parts?|folders?|dir)"
WORDS = "|".join(sorted(PART_OF_WORD, key=len, reverse=True))
NAME = re.compile(rf"(?P<word>{WORDS})(?:_?{NOUN})?(?:_?\d{{1,2}})?")
AFFIXED = re.compile(rf"(?P<prefix>(?:.*_)?)(?P<word>{WORDS})(?P<suffix>(?:_?{NOUN})?(?:_.*|\d+)?)")


class Affixes(NamedTuple):
    """What a name has before and after the word of its part: seg_train has ("seg_", ""), train2017 ("", "2017")."""

    prefix: str
    suffix: str


def find_parts(names: Iterable[str]) -> dict[str, str]:
    """The folders among ``names`` that are parts: name → "train", "val" or "test". Folders of one parent.

    The usual words count in any case and with the usual endings (Training, test_set, test1). With something before or
    after them they count where several parts have the same, as seg_train beside seg_test, or train2017 beside val2017,
    and where all folders begin with such a word, as test_a beside test_b.
    """
    found: dict[str, str] = {}
    affixed: dict[Affixes, dict[str, str]] = {}
    names = list(names)
    for name in names:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)  # of trainA
        plain = re.sub(r"[\W_]+", "_", words.casefold()).strip("_")
        if match := NAME.fullmatch(plain):
            found[name] = PART_OF_WORD[match["word"]]
        elif match := AFFIXED.fullmatch(plain):
            alike = affixed.setdefault(Affixes(match["prefix"], match["suffix"]), {})
            alike[name] = PART_OF_WORD[match["word"]]
    for alike in affixed.values():
        if len(set(alike.values())) > 1:
            found |= alike
    beginning = {name: part for (prefix, _), alike in affixed.items() if not prefix for name, part in alike.items()}
    return beginning | found if found.keys() | beginning.keys() == set(names) else found
