"""One thread at a time: a second one gets an error at once, since waiting would hide the mistake."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from threading import get_ident
from typing import Any, TypeVar, cast

Method = TypeVar("Method", bound=Callable[..., Any])


class OneThread:
    """A block that only one thread may be in.

    It is no lock: Ctrl-C on the way in or out must not block this thread, nor a fork its child.
    """

    def __init__(self) -> None:
        self._holder: dict[str, int] = {}

    def __enter__(self) -> None:
        me = get_ident()
        if self._holder.setdefault("thread", me) != me:  # tests and sets in one step
            raise RuntimeError(
                "another thread is in update(), apply_shadow(), restore(), copy_to() or load_state_dict() of this "
                "FastEMA right now: call them from one thread, or hold a lock of your own around them"
            )

    def __exit__(self, *exception: object) -> None:
        self._holder.pop("thread", None)


def one_thread(method: Method) -> Method:
    """Decorate a method so that `self._one_thread` keeps other threads out while it runs."""

    @wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._one_thread:
            return method(self, *args, **kwargs)

    return cast(Method, alone)
