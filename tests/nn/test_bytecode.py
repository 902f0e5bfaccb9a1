"""What a function's code says about it."""

import pytest

from syncbn.nn.bytecode import code_objects, has_in_place_operator, instructions, names_in


def outer(values):
    def inner(value):
        return value.first()

    return [inner(value).second() for value in values if (lambda: value.third())()]


def test_names_of_inner_functions_comprehensions_and_lambdas_are_found():
    assert {"first", "second", "third"} <= names_in(outer.__code__)
    assert "fourth" not in names_in(outer.__code__)


def test_every_code_object_comes_once_the_outer_one_first():
    found = list(code_objects(outer.__code__))
    assert found[0] is outer.__code__
    assert len(found) == len(set(found)) >= 3
    assert {one.argval for one in instructions(outer.__code__)} >= {"first", "second", "third"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("lambda a, b: a + b", False),
        ("lambda a, b: a == b", False),
        ("lambda a, b: a.add_(b)", False),  # a method, which a trace shows as what it is
    ],
)
def test_only_operators_that_assign_are_in_place(source, expected):
    assert has_in_place_operator(eval(source).__code__) is expected


def adds_in_place(a, b):
    a += b
    return a


def multiplies_inside(values):
    def inner(value):
        value *= 2
        return value

    return [inner(value) for value in values]


@pytest.mark.parametrize("function", [adds_in_place, multiplies_inside])
def test_an_operator_that_assigns_is_found_inside_too(function):
    assert has_in_place_operator(function.__code__)
