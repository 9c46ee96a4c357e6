"""Numbers on a command line: each flag says in which range it makes sense, and one check refuses what lies outside."""

import math


class Number:
    """The `type` of a flag, for argparse, with the range that `check_numbers` asks for. NaN and infinity lie in none.

    Args:
        kind (`type`): `int` or `float`.
        low, high (`float`, *optional*): the smallest and the largest value.
        above, below (`float`, *optional*): what values have to be greater and less than.
    """

    def __init__(self, kind, low=None, high=None, *, above=None, below=None):
        self.kind, self.low, self.high, self.above, self.below = kind, low, high, above, below
        self.__name__ = kind.__name__  # argparse names the type by it

    def __call__(self, text):
        return self.kind(text)

    def __contains__(self, value):
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self):
        """What it has to be, for a message."""
        if self.low is None and self.above is None:
            return "a finite number"
        if self.high is None and self.below is None:
            return "positive" if self.above == 0 else f"at least {self.low:g}"
        first = self.above if self.low is None else self.low
        last = self.below if self.high is None else self.high
        excluded = [f"{end:g}" for end in (self.above, self.below) if end is not None]
        return f"between {first:g} and {last:g}" + (f", without {' and '.join(excluded)}" if excluded else "")


COUNT = Number(int, 1)
INDEX = Number(int, 0)
POSITIVE = Number(float, above=0)
NOT_NEGATIVE = Number(float, 0)
FRACTION = Number(float, 0, 1)
DECAY = Number(float, 0, below=1)


def check_numbers(parser, args):
    """`parser.error` if a flag whose type is a `Number` has a value outside of its range."""
    for action in parser._actions:
        if not isinstance(action.type, Number):
            continue
        value = getattr(args, action.dest, None)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each not in action.type:
                name = action.option_strings[-1] if action.option_strings else action.dest
                parser.error(f"{name} has to be {action.type}, not {each}")
