"""Values: what they share with frozen dataclasses."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from nexus_auth.value import Value, replace


class Point(Value, hidden={"secret"}):
    x: float
    y: float = 2.0
    secret: str = ""


class Other(Value):
    x: float
    y: float = 2.0
    secret: str = ""


POINT = Point(1.0)


@pytest.mark.parametrize("same", [Point(1.0, 2.0), Point(x=1.0), Point(y=2.0, secret="", x=1.0)])
def test_values_with_equal_fields_are_one(same: Point) -> None:
    assert same == POINT
    assert {same, POINT} == {POINT}
    assert (same.x, same.y, same.secret) == (1.0, 2.0, "")


@pytest.mark.parametrize("other", [Point(2.0), Point(1.0, 3.0), Point(1.0, secret="s"), Other(1.0), (1.0, 2.0, "")])
def test_values_that_differ_in_a_field_or_their_class_are_not_equal(other: object) -> None:
    assert other != POINT
    assert other != POINT


def test_a_value_does_not_change() -> None:
    with pytest.raises(AttributeError, match="Point does not change"):
        POINT.x = 3.0  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError, match="Point does not change"):
        del POINT.x  # pyright: ignore[reportAttributeAccessIssue]
    assert replace(POINT, y=3.0) == Point(1.0, 3.0)
    assert Point(1.0) == POINT


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), {}),
        ((), {"y": 1.0}),
        ((1.0, 2.0, "", ""), {}),
        ((1.0,), {"z": 1.0}),
        ((), {"y": 1.0, "z": 1.0}),
        ((1.0,), {"x": 1.0}),
    ],
)
def test_a_value_takes_its_fields_and_nothing_else(arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="Point takes x, y, secret"):
        Point(*arguments, **named)


def test_a_hidden_field_does_not_show() -> None:
    assert repr(Point(1.0, secret="s3cret")) == "Point(x=1.0, y=2.0)"
    assert repr(Other(1.0, secret="shown")) == "Other(x=1.0, y=2.0, secret='shown')"


def test_a_value_can_be_matched_and_pickled() -> None:
    match POINT:
        case Point(x, secret=secret):
            assert (x, secret) == (1.0, "")
    assert pickle.loads(pickle.dumps(POINT)) == POINT
