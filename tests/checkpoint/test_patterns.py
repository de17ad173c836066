"""Patterns of names: what `re` finds, found in linear time."""

import re

import pytest
from bounds import bounded

from mistral_jax.checkpoint import patterns

NAMES = [
    *(
        f"model.layers.{i}.{module}"
        for i in (0, 1, 2, 10, 11, 21, 101)
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
    ),
    *("lm_head", "q_proj", "", "a", "a.b", "a-b", "a]b"),
]
KNOWN = [
    *("q_proj", "self_attn.q_proj", "layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
    *(
        r"layers\.1\.mlp\.down_proj",
        r"layers\.1\..*k_proj",
        r".*\.1\..*(q|o)_proj",
        "o_pro",
        "proj",
    ),
    *("^model.layers.1.self_attn.q_proj", "^q_proj", "^q_proj$", "q_proj$", "q_proj|o_proj", "a|"),
    *(r"layers\.(0|1|2)\.self_attn\.[qk]_proj", r"layers\.[0-9]+\..*", r"layers\.\d\..*", r".*"),
    *(r"layers\.([0-9]|1[0-5])\..*_proj", r"model\.layers\.\d+\.(self_attn|mlp)\.\w+", ".+?_proj"),
    *(r"(?:q|o)_proj", r"lm_head", "", ".", "..?", r"[^.]*", r"[^.]+\.[^.]+", "[a-]b", "a[]]b"),
    *(r"layers.1?1.*q_proj", r"layers.1*\..*", "()", "(a|(b|(a.b)))", r"[\w.]+q_proj", r"a[\]\-]b"),
    *(
        r"\w",
        r"\d",
        r"\w\w*",
        "a.b$",
        "$",
        "^$",
        "^",
        "a$b",
        r"\s*",
        "[a-c].[a-c]",
        r"a[\,-.]b",
    ),
]


@pytest.mark.parametrize("pattern", KNOWN)
def test_a_pattern_means_what_it_does_to_peft(pattern):
    """Which compiles it so."""
    match, expected = patterns.suffix(pattern), re.compile(rf"(.*\.)?({pattern})$")
    for name in NAMES:
        assert match(name) == bool(expected.match(name)), name


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"it has a '\(' without a '\)'"),
        ("a)", r"it has a '\)' without a '\('"),
        ("a)(b", r"it has a '\)' without a '\('"),
        ("[a", "it ends too early"),
        ("a\\", "it ends too early"),
        ("*a", r"it has '\*' where there is nothing to repeat"),
        ("a**", r"it has '\*' where there is nothing to repeat"),
        ("^*", r"it has '\*' where there is nothing to repeat"),
        ("a{3}", r"it has '\{' where"),
        ("(a+)+", "it repeats a group"),
        ("(a|b){2}", "it repeats a group"),
        ("(?=a)", r"it has '\?' where"),
        ("(?i)a", r"it has '\?' where"),
        (r"(a)\1", r"it has '\\1', which is not known"),
        (r"\bq", r"it has '\\b', which is not known"),
        ("[z-a]", "it has a range to 'a' that has no letters"),
        (r"[\d-z]", "it has a range to 'z' that has no letters"),
        ("a" * 1001, "it has 1001 characters; expected at most 1000"),
        ("(" * 20, "its groups are nested too deeply"),
    ],
)
def test_what_is_not_known_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        patterns.suffix(pattern)


@pytest.mark.parametrize(
    "pattern",
    ["a?" * 400 + "a" * 200, ".*" * 400 + "x", "(.*|.*)" * 100 + "x", "[\0-\U0010ffff]*" * 60],
)
def test_no_pattern_takes_long(pattern):
    name = "model.layers." + "a" * 60
    with bounded(10, 1 << 26):
        match = patterns.suffix(pattern)
        for _ in range(10):
            match(name)
