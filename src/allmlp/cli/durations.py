"""Times as users give them: seconds, or with a unit."""

import math
import re

from allmlp.errors import UserError, brief

UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def seconds_in(option: str, text: str) -> float:
    """The seconds of "90", "90s", "10m" or "1.5h"; ``option`` names it in messages.

    Raises:
        UserError: other text, or no time at all.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)\s*", text)
    seconds = float(found[1]) * UNITS[found[2]] if found else 0.0
    if not 0 < seconds < math.inf:
        raise UserError(f"{option} {brief(text)}: give a time above zero, such as 90s, 10m or 1h")
    return seconds
