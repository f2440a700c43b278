"""Configs survive the way to plain data and back, and a typo is never ignored."""

from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from infra.config import fingerprint, from_dict, to_dict


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True, kw_only=True)
class Other:
    path: str = ""


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "x"
    inner: Inner = field(default_factory=Inner)
    either: str | Other | Inner = ""
    maybe: Other | None = None
    sizes: tuple[int, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)


finite = st.floats(allow_nan=False, allow_infinity=False)
inners = st.builds(Inner, lr=finite, betas=st.tuples(finite, finite))
outers = st.builds(
    Outer,
    name=st.text(),
    inner=inners,
    either=st.one_of(st.text(), st.builds(Other, path=st.text()), inners),
    maybe=st.one_of(st.none(), st.builds(Other)),
    sizes=st.lists(st.integers()).map(tuple),
    weights=st.dictionaries(st.text(), finite),
)


@given(outers)
def test_there_and_back(config):
    assert from_dict(Outer, to_dict(config)) == config


@given(outers, outers)
@example(Outer(inner=Inner(lr=0.0)), Outer(inner=Inner(lr=-0.0)))
def test_fingerprint_tells_configs_apart(a, b):
    assert (fingerprint(a) == fingerprint(b)) == (to_dict(a) == to_dict(b))


def test_fingerprint_is_golden():
    # A change here makes every artifact of every user stale.
    assert fingerprint(Outer())[:16] == "07dcb252f21a46ef"


def test_a_typo_is_named():
    with pytest.raises(ValueError, match="Did you mean 'inner'"):
        from_dict(Outer, {"iner": {}})
    with pytest.raises(ValueError, match="Expected float"):
        from_dict(Inner, {"lr": "fast"})


def test_an_integer_serves_as_a_float():
    assert from_dict(Inner, {"lr": 1}).lr == 1.0


def test_what_is_no_config_is_refused():
    with pytest.raises(TypeError, match="set"):
        to_dict({1, 2})
