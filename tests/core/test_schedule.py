"""Schedules of strengths over the sampling range."""

import pytest

from lora_weave.lora_core.schedule import STEPS, Schedule, keyframes


def test_linear_between_points_and_constant_outside():
    schedule = Schedule.parse("0.2:0, 0.4:1; 1:0.5")
    expected = {0.0: 0.0, 0.2: 0.0, 0.3: 0.5, 0.4: 1.0, 0.7: 0.75, 1.0: 0.5, 1.5: 0.5}
    assert {place: pytest.approx(schedule.at(place)) for place in expected} == expected


def test_a_step_takes_the_later_point():
    schedule = Schedule.parse("0:1, 0.5:1, 0.5:0, 1:0")
    assert [schedule.at(place) for place in (0.0, 0.499, 0.5, 0.9)] == [1, 1, 0, 0]


def test_one_point_and_none():
    assert Schedule.parse("0.5:0.3").at(0.0) == Schedule.parse("0.5:0.3").at(1.0) == 0.3
    assert Schedule.parse("  ") is None
    assert str(Schedule.parse("0:0,0.30:1")) == "0:0, 0.3:1"


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ValueError) as error:
        Schedule.parse("0:0, x, 0.5:y, 2:1, 0.4:nan, 0.3:1, 0.1:1, 7")
    for part in ("'x' is no point", "'0.5:y'", "position 2 is not", "0.4:nan", "0.1 comes after"):
        assert part in str(error.value)


def test_keyframes_are_the_values_at_fiftieths():
    schedule = Schedule.parse("0:0, 0.3:1, 1:0.5")
    frames = keyframes([schedule])
    assert len(frames) == STEPS + 1
    assert all(factor == schedule.at(place) for place, factor in frames)
    assert keyframes([Schedule.parse("0:1, 0.5:1, 0.5:0")]) == [(0.0, 1.0), (0.5, 0.0)]


def test_keyframes_of_two_schedules_are_their_product():
    """Also where one of them steps, and between the points of two ramps."""
    ramp, step = Schedule.parse("0:0, 1:1"), Schedule.parse("0:0, 0.5:0, 0.5:1, 1:1")
    for pair in ((step, Schedule.parse("0:1, 1:1")), (ramp, ramp), (ramp, step)):
        for start, factor in keyframes(pair):
            assert factor == pytest.approx(pair[0].at(start) * pair[1].at(start))
    assert keyframes((step, Schedule.parse("0:1"))) == [(0.0, 0.0), (0.5, 1.0)]
    assert dict(keyframes((ramp, ramp)))[0.5] == pytest.approx(0.25)
