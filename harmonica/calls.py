"""Calls: a model that runs several times in one step.

With guidance a transformer may run twice in a step, once for each half. Each run keeps features of
its own: the key in the cache is the site's number in the first run, and a `SiteOfCall` in a later
one. As an index both are the same column of the table.
"""

from __future__ import annotations

from contextvars import ContextVar

current_call: ContextVar[int] = ContextVar("call", default=0)
"""The call of a model within a prediction that runs now; `harmonica.override.in_call` sets it."""


class SiteOfCall(int):
    """Site i in a later call, 1 or more, of its model within one prediction.

    >>> site = SiteOfCall(3, call=1)
    >>> "abcd"[site], site == 3, site == SiteOfCall(3, call=1)
    ('d', False, True)
    """

    call: int

    def __new__(cls, site: int, call: int) -> SiteOfCall:
        """Return the key of a site in a call."""
        key = super().__new__(cls, site)
        key.call = call
        return key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SiteOfCall) and (int(self), self.call) == (int(other), other.call)

    def __hash__(self) -> int:
        return hash((int(self), self.call))


def of_call(site: int) -> int:
    """Return the key of a site in the call that runs now: the site itself in the first one."""
    call = current_call.get()
    return SiteOfCall(site, call) if call else site
