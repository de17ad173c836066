"""The recipe: every wrong value is named; a run goes on only with what it began with."""

import dataclasses
import math

import pytest

from mistral_jax.config import CONFIG_DIR
from mistral_jax.training.recipe import Recipe

FIELDS = {
    "model": "nano",
    "corpus": {"python": 2, "jax": 1},
    "context": 16,
    "rows": 4,
    "steps": 10,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "final_learning_rate": 0.0,
}


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "training").glob("*.toml")))
def test_shipped_recipes_are_valid(path):
    assert Recipe.from_file(path).model_config.vocab_size > 0


def test_json_values_give_an_equal_recipe():
    recipe = Recipe.from_dict(FIELDS | {"microbatches": 2, "seed": 7})
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"learning_rat": 1.0},
            "unknown key 'learning_rat'; the nearest known one is 'learning_rate'",
        ),
        ({"steps": 0}, "steps is 0; expected an integer of at least 1"),
        ({"steps": True}, "steps is True; expected an integer"),
        ({"rows": 2.0}, "rows is 2.0; expected an integer"),
        ({"seed": -1}, "seed is -1; expected an integer of at least 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan; expected a finite number"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; expected a finite number of at least 0"),
        ({"clip_norm": "1"}, "clip_norm is '1'; expected a finite number"),
        ({"corpus": {}}, r"corpus is \{\}; expected a table of distributions"),
        ({"corpus": ["python"]}, r"corpus is \['python'\]; expected a table of distributions"),
        ({"corpus": {"python": 0}}, r"corpus is \{'python': 0\}; expected a table of dist"),
        ({"microbatches": 3}, r"microbatches is 3; expected a divisor of rows \(4\)"),
        ({"warmup_steps": 10}, r"warmup_steps is 10; expected less than steps \(10\)"),
        ({"model": 7}, "model is 7; expected a string"),
        ({"remat": 1}, "remat is 1; expected true or false"),
    ],
)
def test_a_wrong_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(FIELDS | fields)


def test_missing_keys_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="here: missing context, rows"):
        Recipe.from_dict({k: v for k, v in FIELDS.items() if k not in ("context", "rows")}, "here")
    with pytest.raises(ValueError, match=r"no file .*absent\.toml"):
        Recipe.from_file(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("steps = = 1")
    with pytest.raises(ValueError, match=r"bad\.toml is not valid TOML"):
        Recipe.from_file(tmp_path / "bad.toml")


def test_a_run_goes_on_longer_but_not_differently():
    recipe = Recipe.from_dict(FIELDS)
    dataclasses.replace(recipe, steps=20, save_every=1, remat=True).check_continues(
        recipe, "runs/x"
    )
    with pytest.raises(
        ValueError, match=r"runs/x holds a run with rows = 4, and this recipe says 2"
    ):
        dataclasses.replace(recipe, rows=2).check_continues(recipe, "runs/x")
