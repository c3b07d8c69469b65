"""The checkpoint reader and damaged or hostile files; `python tests/fuzz/checkpoints.py` looks further, with atheris.

FASTEMA_FUZZ_CASES says how many.
"""

from __future__ import annotations

import os
import pickle

import checkpoints
import pytest

pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

CASES = int(os.environ.get("FASTEMA_FUZZ_CASES", "200"))
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
quiet = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize="FASTEMA_FUZZ_CASES" not in os.environ,  # the suite is the same every time
    database=None,
    print_blob=True,
    phases=[Phase.generate, Phase.shrink],
)


def test_the_good_file_is_loaded_and_code_would_be_seen() -> None:
    assert checkpoints.read(checkpoints.GOOD, damaged=True) == "loaded"
    assert checkpoints.read(checkpoints.with_pickle(checkpoints.PICKLE)) == "loaded"
    checkpoints._watching = True
    os.system("true")
    checkpoints._watching = False
    assert "os.system" in checkpoints._ran


@quiet
@given(changes=st.binary(max_size=24))
def test_damage(changes: bytes) -> None:
    checkpoints.read(checkpoints.patched(checkpoints.GOOD, changes), damaged=True)


@quiet
@given(changes=st.binary(max_size=24))
def test_pickles_that_were_tampered_with(changes: bytes) -> None:
    checkpoints.read(checkpoints.with_pickle(checkpoints.patched(checkpoints.PICKLE, changes)))


plain = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)  # fmt: skip
pieces = [
    b"cposix\nsystem\n",
    b"cbuiltins\neval\n",
    b"(S'true'\ntR.",
    b"c__builtin__\nexec\n",
    b"\x80\x02",
    b"R",
    b"b",
    b".",
]


@quiet
@given(content=st.one_of(
    st.binary(max_size=64),
    st.lists(st.sampled_from(pieces), max_size=6).map(b"".join),
    st.dictionaries(st.sampled_from(["net", "ema_net", "x"]), plain).map(lambda value: pickle.dumps(value, 2)),
), in_an_archive=st.booleans())  # fmt: skip
def test_any_pickle(content: bytes, in_an_archive: bool) -> None:
    checkpoints.read(checkpoints.with_pickle(content) if in_an_archive else content)
