"""Configs survive the way to plain data and back, and a typo is never ignored."""

import json
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from infra.config import FieldError, fingerprint, from_dict, setting, to_dict, with_floats


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
    with pytest.raises(ValueError, match='lr: expected a number, found "fast"'):
        from_dict(Inner, {"lr": "fast"})


@dataclass(frozen=True, kw_only=True)
class Deep:
    must: int
    some: tuple[Outer, ...] = ()
    maybe: Outer | None = None
    named: dict[str, Inner | Other] = field(default_factory=dict)
    kind: Literal["a", "b"] = "a"
    on: bool = False

    def __post_init__(self):
        if self.must < 0:
            raise ValueError("must is 0 or more.")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"must": "many"}, 'deep.must: expected a whole number, found "many"'),
        ({"must": 1.5}, "deep.must: expected a whole number, found 1.5"),
        ({"maybe": {"inner": {"lr": None}}}, "deep.maybe.inner.lr: expected a number, found null"),
        ({"some": [{}, {"name": 3}]}, "deep.some.1.name: expected a text, found 3"),
        ({"some": [{}, []]}, "deep.some.1: expected an object (Outer), found []"),
        ({"named": {"x": {"class": "Nobody"}}}, 'deep.named.x: expected "class": one of Inner, Other, found "Nobody"'),
        ({"named": {"x": {"class": [1]}}}, 'deep.named.x: expected "class": one of Inner, Other, found [1]'),
        ({"maybe": {"either": 4}}, "deep.maybe.either: expected a text or an object (Other or Inner), found 4"),
        ({"kind": "c"}, 'deep.kind: expected one of "a", "b", found "c"'),
        ({"on": 1}, "deep.on: expected true or false, found 1"),
        ({"maybe": {"iner": 1}}, "deep.maybe: Outer has no field 'iner'. Did you mean 'inner'?"),
        ({"must": -1, "maybe": None}, "deep: must is 0 or more."),
    ],
)
def test_an_error_names_the_field(data, said):
    holder = make_dataclass("Holder", [("deep", Deep)])
    with pytest.raises(FieldError) as caught:
        from_dict(holder, {"deep": {"must": 1, **data}})
    assert str(caught.value) == said


def test_a_field_that_is_left_out_is_named():
    with pytest.raises(ValueError, match="must: expected a whole number, found nothing"):
        from_dict(Deep, {})


def test_an_integer_serves_as_a_float():
    assert from_dict(Inner, {"lr": 1}).lr == 1.0


numbers = st.one_of(finite, st.integers())  # Python lets both stand in the field of a float


@given(
    st.builds(
        Outer,
        inner=st.builds(Inner, lr=numbers, betas=st.tuples(numbers, numbers)),
        weights=st.dictionaries(st.text(), numbers),
    )
)
@example(Outer(inner=Inner(lr=1)))
def test_what_is_read_back_has_the_fingerprint_of_what_was_written(config):
    written = json.loads(json.dumps(to_dict(config)))
    assert fingerprint(from_dict(Outer, written)) == fingerprint(config)


def test_what_is_no_config_is_refused():
    with pytest.raises(TypeError, match="set"):
        to_dict({1, 2})


# Generated types of configs. A kind is a type of a field and a strategy of its values; few values, so that they meet.
PLAIN = [
    (int, st.integers(-1, 2)),
    (float, st.sampled_from([-0.0, 0.0, 1.0, 0.5])),
    (bool, st.booleans()),
    (str, st.sampled_from(["", "a", "class"])),
    (Literal["a", "b"], st.sampled_from(["a", "b"])),
]


@dataclass(frozen=True, kw_only=True)
class Twin:  # of Inner, but for its name
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)


def tables(draw, depth, name):
    fields = {each: draw(kinds(depth - 1)) for each in draw(st.sampled_from([["x"], ["x", "y"]]))}
    cls = make_dataclass(name, [(each, hint) for each, (hint, _) in fields.items()], frozen=True, kw_only=True)
    return cls, st.builds(cls, **{each: values for each, (_, values) in fields.items()})


@st.composite
def kinds(draw, depth=2):
    """A type and its values. `tuple | list` is left out: they are one choice, written the same."""
    if not depth:
        return draw(st.sampled_from(PLAIN))
    form = draw(st.sampled_from(["plain", "table", "either", "maybe", "tuple", "list", "fixed", "dict", "tables"]))
    if form == "plain":
        return draw(st.sampled_from(PLAIN))
    if form == "table":
        return tables(draw, depth, "Table")
    if form == "tables":  # classes of the same fields
        values = st.sampled_from([Inner(), Inner(lr=0.5), Twin(), Twin(lr=0.5)])
        return draw(
            st.sampled_from(
                [
                    (Inner | Twin, values),
                    (tuple[Inner | Twin, ...], st.lists(values, max_size=2).map(tuple)),
                    (dict[str, Inner | Twin] | None, st.dictionaries(st.sampled_from("ab"), values, max_size=2)),
                    (tuple[Inner, ...] | tuple[Twin, ...], st.sampled_from([(Inner(),), (Twin(),), ()])),
                    (Inner | dict[str, float], st.sampled_from([Inner(), {}, {"lr": 0.1}])),
                ]
            )
        )
    if form == "either":
        some = [draw(kinds(0)), tables(draw, depth, "First"), tables(draw, depth, "Second")]
        return Union[tuple(hint for hint, _ in some)], st.one_of([values for _, values in some])  # noqa: UP007
    hint, values = draw(kinds(depth - 1))
    if form == "maybe":
        return Optional[hint], st.none() | values  # noqa: UP045 - made at run time
    if form == "list":
        return list[hint], st.lists(values, max_size=2)
    if form == "tuple":
        return tuple[hint, ...], st.lists(values, max_size=2).map(tuple)
    if form == "fixed":
        other, others = draw(kinds(depth - 1))
        return tuple[hint, other], st.tuples(values, others)
    return dict[str, hint], st.dictionaries(st.sampled_from(["a", "class"]), values, max_size=2)


def strict(value):
    """What `==` compares, and the types."""
    if is_dataclass(value):
        return type(value), tuple(strict(getattr(value, each.name)) for each in fields(value))
    if isinstance(value, dict):
        return dict, frozenset((key, strict(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(strict, value))
    return type(value), value


@given(st.data())
def test_configs_of_any_type_survive_and_are_told_apart(data):
    hint, values = data.draw(kinds())
    cls = make_dataclass("Config", [("field", hint)], frozen=True, kw_only=True)
    a, b = cls(field=data.draw(values)), cls(field=data.draw(values))
    written = to_dict(a)
    again = from_dict(cls, json.loads(json.dumps(written)))
    assert strict(again) == strict(a)
    assert fingerprint(again) == fingerprint(a)
    assert (strict(a) == strict(b)) == (fingerprint(a) == fingerprint(b))


def test_two_choices_of_equal_fields_in_a_tuple_have_two_fingerprints():
    @dataclass(frozen=True, kw_only=True)
    class Links:
        links: tuple[Inner | Twin, ...] = ()

    one, other = Links(links=(Inner(),)), Links(links=(Twin(),))
    assert fingerprint(one) != fingerprint(other)
    assert from_dict(Links, to_dict(other)) == other


def test_true_and_one_are_two_choices_and_a_list_and_a_tuple_are_one():
    assert fingerprint([1]) != fingerprint([True]) != fingerprint([1.0])
    assert fingerprint([1]) == fingerprint((1,))


def test_what_could_not_be_told_apart_is_refused():
    namesake = make_dataclass("Inner", [("lr", float, 0.1)], frozen=True, kw_only=True)
    with pytest.raises(TypeError, match="two classes Inner"):
        to_dict(make_dataclass("C", [("one", Inner | namesake)])(Inner()))
    with pytest.raises(TypeError, match="does not name"):  # it would be read as an Inner
        to_dict(make_dataclass("C", [("one", Inner)])(make_dataclass("Sub", [], bases=(Inner,), frozen=True)()))
    with pytest.raises(TypeError, match="does not name"):
        to_dict(make_dataclass("C", [("one", Any)])([Inner()]))
    with pytest.raises(TypeError, match="strings"):
        to_dict({1: "x", "1": "y"})
    with pytest.raises(TypeError, match="'class'"):
        to_dict(make_dataclass("C", [("one", Inner | dict[str, float])])({"class": 1.0}))


def test_a_table_of_another_class_is_refused():
    with pytest.raises(ValueError, match="'Other'"):
        from_dict(Inner, {"class": "Other", "lr": 1.0})
    assert from_dict(Inner, {"class": "Inner", "lr": 1.0}) == Inner(lr=1.0)


def test_a_word_is_no_list_of_letters():
    with pytest.raises(ValueError, match="sizes: expected a list, found"):
        from_dict(Outer, {"sizes": "12"})
    with pytest.raises(ValueError, match="betas: expected 2 values"):
        from_dict(Inner, {"betas": [0.5]})
    with pytest.raises(ValueError, match="weights: expected an object"):
        from_dict(Outer, {"weights": [1.0]})


# What a config was, and what it became.
Before = make_dataclass("Grown", [("one", Inner), ("some", tuple[Inner, ...], ())], frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class Grown:
    one: Inner | Twin = setting(was=Inner)
    some: tuple[Inner | Twin, ...] = setting((), was=Inner)
    later: tuple[Inner | Twin, ...] = setting(default_factory=lambda: (Twin(),), since="0.2")
    flag: int = setting(1, since="0.2")


@given(inners, st.lists(inners, max_size=2).map(tuple))
def test_what_was_made_before_a_field_came_or_grew_stays_good(one, some):
    old, new = Before(one=one, some=some), Grown(one=one, some=some)
    assert fingerprint(new) == fingerprint(old)
    assert from_dict(Grown, to_dict(old)) == new
    assert from_dict(Grown, to_dict(new)) == new
    assert to_dict(new)["one"] == to_dict(one)


def test_a_later_field_counts_when_it_is_used():
    plain, inner = Grown(one=Inner()), Inner()
    others = [
        Grown(one=Twin()),
        Grown(one=inner, some=(Twin(),)),
        Grown(one=inner, later=()),
        Grown(one=inner, later=(Inner(),)),
        Grown(one=inner, flag=2),
        Grown(one=inner, flag=True),
    ]
    assert len({fingerprint(each) for each in [plain, *others]}) == 1 + len(others)
    for each in others:
        assert from_dict(Grown, json.loads(json.dumps(to_dict(each)))) == each
    assert to_dict(plain)["flag"] == 1  # a manifest says it all the same


def test_a_later_field_has_a_default_and_what_was_a_class_becomes_no_dict():
    with pytest.raises(TypeError, match="needs a default"):
        setting(since="0.2")
    with pytest.raises(TypeError, match="could be read as one"):
        to_dict(make_dataclass("C", [("one", Inner | dict[str, float], setting(was=Inner))])(one=Inner()))


@given(st.builds(Inner, lr=st.integers(-9, 9), betas=st.tuples(st.integers(-9, 9), st.booleans())))
def test_integers_become_the_floats_that_they_were_read_as(inner):
    found = with_floats(Outer(inner=inner, either=inner, sizes=(1,), weights={"a": 1}))
    assert [type(each) for each in (found.inner.lr, found.inner.betas[0], found.weights["a"])] == [float] * 3
    assert [type(each) for each in (found.inner.betas[1], found.sizes[0])] == [bool, int]
    assert found.either == found.inner == inner
