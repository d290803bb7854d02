"""A time to keep to, as users write it."""

import re

from allmlp.errors import UserError, printable

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_budget(text: str) -> float:
    """Seconds, from "600", "90s", "10m" or "1.5h".

    Raises:
        UserError: it is none of these, or not above zero.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in UNITS or not 0 < (seconds := float(match[1]) * UNITS[match[2]]) < 1e9:
        raise UserError(f"--budget {printable(text)}: give a time above 0, such as 90s, 10m or 1h")
    return seconds
