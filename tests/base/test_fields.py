"""Laws of the rules: any value is accepted or refused, none raises, and messages stay short."""

import math

import jsonschema
import pytest

from mistral_jax.base import fields

VALUES = (
    *(None, True, False, 0, 1, -1, 2**63, 10**400, 0.5, -0.0, 1e308, math.inf, math.nan),
    *("", "a", [], [1], ["a"], [[]], {}, {"a": 1}, {"a": []}),
)
RULES = [
    (fields.integer(0, 5), [0, 1]),
    (fields.number(0, 1), [0, 1, 0.5, -0.0]),
    (fields.number(0, 1, above=True), [1, 0.5]),
    (fields.boolean(), [True, False]),
    (fields.string(), ["", "a"]),
    (fields.string("a", "b"), ["a"]),
    (fields.list_of(fields.integer(0, 5), 3), [[], [1]]),
    (fields.table_of(), [{}, {"a": 1}, {"a": []}]),
    (fields.table_of(fields.integer(0, 5)), [{}, {"a": 1}]),
    (fields.optional(fields.string()), [None, "", "a"]),
]


@pytest.mark.parametrize(("rule", "valid"), RULES, ids=[rule.expected for rule, _ in RULES])
def test_a_rule_and_its_schema_accept_what_they_say_and_nothing_else(rule, valid):
    assert list(map(repr, filter(rule.accepts, VALUES))) == list(map(repr, valid))
    schema = jsonschema.Draft202012Validator(rule.schema)
    # JSON has no NaN and no infinities, and JSON schema takes -0.0 for an integer.
    values = [x for x in VALUES if not isinstance(x, float) or (x and math.isfinite(x))]
    found = list(map(repr, filter(schema.is_valid, values)))
    assert found == [repr(x) for x in valid if repr(x) != "-0.0"]


def test_a_value_that_is_refused_is_named_and_short():
    with pytest.raises(ValueError, match=r"f has n 'a*[.]*a*'; expected an integer") as caught:
        fields.check_table({"n": "a" * 10**6}, {"n": fields.integer(0, 5), "m": None}, "f")
    assert len(str(caught.value)) < 200
    for value in VALUES:
        assert len(fields.show([value] * 100)) <= 200
