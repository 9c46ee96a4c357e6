import argparse
import math

import pytest

from pipeline_tango.flags import COUNT, DECAY, FRACTION, INDEX, NOT_NEGATIVE, POSITIVE, Number, check_numbers


@pytest.mark.parametrize(
    ("number", "good", "bad", "words"),
    [
        (COUNT, (1, 9), (0, -1), "at least 1"),
        (INDEX, (0, 9), (-1,), "at least 0"),
        (POSITIVE, (1e-9, 9.0), (0.0, -1.0), "positive"),
        (NOT_NEGATIVE, (0.0, 9.0), (-1e-9,), "at least 0"),
        (FRACTION, (0.0, 1.0), (-0.1, 1.1), "between 0 and 1"),
        (DECAY, (0.0, 0.999), (1.0, -0.1), "between 0 and 1, without 1"),
        (Number(float, above=0, below=1), (0.5,), (0.0, 1.0), "between 0 and 1, without 0 and 1"),
        (Number(float), (-1e9, 0.0), (), "a finite number"),
    ],
)
def test_a_range_holds_what_it_says(number, good, bad, words):
    assert all(value in number for value in good)
    assert not any(value in number for value in (*bad, math.nan, math.inf, -math.inf))
    assert str(number) == words


def test_the_flag_is_named_with_its_range_and_its_value(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=COUNT, nargs="+")
    parser.add_argument("--share", type=FRACTION)
    check_numbers(parser, parser.parse_args(["--size", "1", "2"]))
    for flags, message in (
        (["--size", "1", "0"], "--size has to be at least 1, not 0"),
        (["--share=nan"], "--share has to be between 0 and 1, not nan"),
        (["--size=x"], "argument --size: invalid int value: 'x'"),
    ):
        with pytest.raises(SystemExit):
            check_numbers(parser, parser.parse_args(flags))
        assert message in capsys.readouterr().err
