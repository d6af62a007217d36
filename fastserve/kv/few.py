"""Members of something that mostly has one, and may have thousands: a tuple while they are few, a dict beyond."""

from __future__ import annotations

from typing import Final, TypeVar

T = TypeVar("T")
Few = tuple[T, ...] | dict[T, None]

_MOST: Final = 4  # of a tuple, which is made anew with each that comes or goes


def with_one(members: Few[T], one: T) -> Few[T]:
    """The members and one that is not among them. A dict is changed in place."""
    if type(members) is dict:
        members[one] = None
        return members
    if len(members) < _MOST:
        return (*members, one)
    return dict.fromkeys((*members, one))


def without_one(members: Few[T], one: T) -> Few[T]:
    """The members but one that is among them. A dict is changed in place, and stays one until it is empty."""
    if type(members) is dict:
        del members[one]
        return members or ()
    return tuple([each for each in members if each is not one])
