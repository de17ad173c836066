"""The recipe: every wrong value is named; a run goes on only with what it began with."""

import dataclasses
import json
import math

import pytest

from mistral_jax.config import CONFIG_DIR
from mistral_jax.training.recipe import Recipe, read_table

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


EXAMPLES = {"context": 16, "rows": 4, "epochs": 2, "learning_rate": 1e-3}
EXAMPLES["data"] = {"train": ["a.jsonl"]}


@pytest.mark.parametrize("path", sorted((CONFIG_DIR / "training").glob("*.toml")))
def test_shipped_recipes_are_valid(path):
    """Those of examples as they are used, with a file of them."""
    table = read_table(path)
    recipe = Recipe.from_dict(table if "corpus" in table else table | {"data": EXAMPLES["data"]})
    assert recipe.context > 0


def test_json_values_give_an_equal_recipe():
    tables = {"lora": {"rank": 3, "targets": ["q_proj"]}, "dpo": {"beta": 0.2}}
    for fields in (FIELDS | {"microbatches": 2, "seed": 7}, EXAMPLES | tables):
        recipe = Recipe.from_dict(fields)
        assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


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
        ({"corpus": ["python"]}, r"corpus is \['python'\]; expected a table"),
        ({"corpus": {"python": 0}}, r"corpus is \{'python': 0\}; expected a table of dist"),
        ({"microbatches": 3}, r"microbatches is 3; expected a divisor of rows \(4\)"),
        ({"warmup_steps": 10}, r"warmup_steps is 10; expected less than steps \(10\)"),
        ({"model": 7}, "model is 7; expected a string"),
        ({"remat": True}, "remat is True; expected one of none"),
        ({"remat": "some"}, "remat is 'some'; expected one of none, nothing_saveable"),
        ({"schedule": "wave"}, "schedule is 'wave'; expected one of cosine, linear, constant"),
        ({"dtype": "float16"}, "dtype is 'float16'; expected one of auto, float32, bfloat16"),
        ({"optimizer": "adamv"}, "no optimizer 'adamv'"),
        ({"optimizer_options": {"epsilon": 1e-6}}, "adamw has no option 'epsilon'; the nearest"),
        (
            {"optimizer_options": {"eps": "x"}},
            "recipe: optimizer_options.eps is 'x'; expected a finite number",
        ),
        (
            {"optimizer_options": {"mu_dtype": "float31"}},
            "mu_dtype is 'float31'; expected one of float32, bfloat16, float16, or null$",
        ),
        (
            {"optimizer": "adafactor", "optimizer_options": {"min_dim_size_to_factor": "x"}},
            "min_dim_size_to_factor is 'x'; expected an integer of at least 0",
        ),
        ({"optimizer_options": {"learning_rate": 1}}, "learning_rate is no option .* set the reci"),
        ({"optimizer_options": {"b1": 1.0}}, "options.b1 is 1.0; expected a .* below 1"),
        ({"optimizer_options": {"b1": 1 << 40}}, "options.b1 is 1099511627776; expected a finite"),
        ({"optimizer_options": {"mask": {}}}, "options.mask is {}; expected no value, because"),
        ({"optimizer_options": {"nesterov": "yes"}}, "nesterov is 'yes'; expected true or false"),
        ({"beta1": 1}, "beta1 is 1; expected a finite number of at least 0 and below 1"),
        ({"weight_decay": 1e20}, "weight_decay is 1e.20; expected a finite number"),
        ({"corpus": {"python": 10**9}}, "corpus is .*; expected a table .* from 1 to 1000"),
        (
            {"learning_rate": 1e-300, "final_learning_rate": 1.0},
            "learning_rate is 1e-300, too small beside final_learning_rate",
        ),
        ({"optimizer_options": {"name": "sgd"}}, "adamw has no option 'name'"),
        ({"seed": 1 << 32}, "seed is 4294967296; expected an integer below 4294967296"),
        ({"epochs": 1.0}, "epochs is not for training on a corpus"),
        ({"lora": {}}, "lora is not for training on a corpus"),
        ({"data": {"train": ["a"]}}, "model is not for training on data"),
        ({"model": None}, r"a new model on a corpus .*or a checkpoint on files"),
        ({"scan": 1}, "scan is 1; expected true or false"),
    ],
)
def test_a_wrong_value_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(FIELDS | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 3}, "says steps or epochs; expected one of the two"),
        ({"epochs": None}, "says steps or epochs; expected one of the two"),
        ({"epochs": 0}, "epochs is 0; expected more than 0"),
        ({"data": {"train": []}}, "data.train is empty"),
        ({"data": {}}, "missing data.train"),
        ({"data": {"train": "a.jsonl"}}, "data.train is 'a.jsonl'; expected a list of strings"),
        ({"data": ["a"]}, r"data is \['a'\]; expected a table"),
        ({"lora": {"rang": 3}}, "unknown key 'lora.rang'; the nearest known one is 'lora.rank'"),
        ({"lora": {"rank": "3"}}, "lora.rank is '3'; expected an integer"),
        ({"lora": {"targets": ["wq"]}}, "lora.targets has 'wq'; expected some of q_proj"),
        ({"dpo": {"label_smoothing": 0.5}}, r"label_smoothing is 0\.5; expected less than 0\.5"),
        ({"quantize": "nf4"}, r"quantize is 'nf4', but all .* none is frozen: add \[lora\]"),
        ({"quantize": "int2", "lora": {}}, "quantize is 'int2'; expected one of none, int8, nf4"),
        ({"sample_prompts": ["x"] * 65}, "sample_prompts has 65 texts; expected at most 64"),
        ({"sample_prompts": [1]}, r"sample_prompts is \(1,\); expected a list of strings"),
    ],
)
def test_a_wrong_value_of_training_on_examples_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(EXAMPLES | fields)


def test_options_reach_the_optimizers_that_have_them():
    def arguments(**fields):
        return Recipe.from_dict(FIELDS | fields).optimizer_arguments

    adamw = {"clip_norm": 1.0, "b1": 0.9, "b2": 0.95, "weight_decay": 0.1}
    assert arguments() == adamw
    assert arguments(optimizer_options={"b2": 0.99, "eps": 1e-6}, clip_norm=0) == adamw | {
        "b2": 0.99,
        "eps": 1e-6,
        "clip_norm": None,
    }
    assert arguments(optimizer="sgd", optimizer_options={"momentum": 0.9}) == {
        "clip_norm": 1.0,
        "momentum": 0.9,
    }


def test_missing_keys_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="here: missing context, rows"):
        Recipe.from_dict({k: v for k, v in FIELDS.items() if k not in ("context", "rows")}, "here")
    with pytest.raises(
        ValueError, match=r"no recipe named .*absent\.toml'; expected one of dpo, full"
    ):
        Recipe.from_file(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("steps = = 1")
    with pytest.raises(ValueError, match=r"bad\.toml is not valid TOML"):
        Recipe.from_file(tmp_path / "bad.toml")


def test_what_dropout_depends_on_stays():
    plain, dropped = (
        Recipe.from_dict(EXAMPLES | {"lora": {"dropout": dropout}}) for dropout in (0.0, 0.1)
    )
    dataclasses.replace(plain, microbatches=2).check_continues(plain, "runs/x")
    with pytest.raises(ValueError, match="microbatches = 1, and this recipe says 2"):
        dataclasses.replace(dropped, microbatches=2).check_continues(dropped, "runs/x")


def test_a_run_goes_on_longer_but_not_differently():
    recipe = Recipe.from_dict(FIELDS)
    dataclasses.replace(recipe, steps=20, save_every=1, remat="dots_saveable").check_continues(
        recipe, "runs/x"
    )
    with pytest.raises(
        ValueError, match=r"runs/x holds a run with rows = 4, and this recipe says 2"
    ):
        dataclasses.replace(recipe, rows=2).check_continues(recipe, "runs/x")
