import pytest
from hypothesis import given
from hypothesis import strategies as st

from unclamp.errors import RecipeError
from unclamp.formats import FORMATS
from unclamp.recipe import ROLES, Recipe, Rule, matches
from unclamp.scaling import Delayed, Dynamic, HighPrecision

margins = st.integers(0, 64)
scalings = st.one_of(
    st.builds(Dynamic, margin=margins),
    st.builds(
        Delayed,
        history_len=st.integers(1, 1 << 20),
        reduce=st.sampled_from(["max", "most_recent"]),
        margin=margins,
    ),
    st.builds(HighPrecision),
)
formats = st.sampled_from(sorted(FORMATS))
globs = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
rules = st.builds(
    Rule,
    match=globs,
    scalings=st.dictionaries(st.sampled_from(ROLES), scalings),
    formats=st.dictionaries(st.sampled_from(ROLES), formats),
)
recipes = st.builds(
    Recipe,
    input=scalings,
    weight=scalings,
    grad_output=scalings,
    input_format=formats,
    weight_format=formats,
    grad_output_format=formats,
    rules=st.lists(rules, max_size=3).map(tuple),
)


@given(recipe=recipes)
def test_a_recipe_survives_dict_and_toml(recipe):
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert hash(Recipe.from_toml(recipe.to_toml())) == hash(recipe)


def test_a_recipe_survives_a_file(tmp_path):
    recipe = Recipe(weight=Dynamic(margin=1)).override("blk.*", input=HighPrecision())
    (tmp_path / "recipe.toml").write_text(recipe.to_toml(), encoding="utf-8")
    assert Recipe.load(tmp_path / "recipe.toml") == recipe


def test_equal_rules_hash_equally_whatever_the_order_of_their_roles():
    one = Rule(match="a", scalings={"input": Dynamic(), "weight": Delayed()})
    two = Rule(match="a", scalings={"weight": Delayed(), "input": Dynamic()})
    assert one == two
    assert hash(one) == hash(two)


def test_empty_toml_is_the_default_recipe():
    assert Recipe.from_toml("") == Recipe()


@pytest.mark.parametrize(
    ("fqn", "glob", "expected"),
    [
        ("model.layers.3.mlp.down_proj", "layers.*.mlp.down_proj", True),
        ("layers.3.mlp.down_proj", "layers.*.mlp.down_proj", True),
        ("model.layers.3.mlp.down_proj", "down_proj", True),
        ("model.layers.3.mlp.down_proj", "own_proj", False),
        ("model.layers.3.mlp.down_proj", "layers.3", False),
        ("model.layers.3.mlp.down_proj", "layers.3.*", True),
        ("model.layers.13.up", "layers.3.up", False),
        ("model.layers.13.up", "layers.?3.up", True),
        ("lm_head", "lm_head", True),
        ("LM_head", "lm_head", False),
        ("", "*", True),
        ("", "", True),
        ("a.b", "*", True),
        ("a.b", "", False),
    ],
)
def test_a_glob_matches_a_name_or_a_tail_after_a_dot(fqn, glob, expected):
    assert matches(fqn, glob) is expected


def test_the_first_matching_rule_decides_alone():
    recipe = (
        Recipe(input=Delayed(), weight=Delayed())
        .override("layers.0.*", input=Dynamic())
        .override("layers.*", input=HighPrecision(), weight=HighPrecision())
    )
    first, second = recipe.plan("m.layers.0.up").operands, recipe.plan("m.layers.1.up").operands
    assert (first["input"].scaling, first["weight"].scaling) == (Dynamic(), Delayed())
    assert second["input"].scaling == second["weight"].scaling == HighPrecision()
    assert recipe.plan("other").operands["input"].scaling == Delayed()


def test_a_rule_can_change_a_format_alone():
    recipe = Recipe(weight=Dynamic()).override("a", weight_format="e5m2")
    assert recipe.plan("a").operands["weight"].format.name == "e5m2"
    assert recipe.plan("a").operands["weight"].scaling == Dynamic()
    assert recipe.plan("b").operands["weight"].format.name == "e4m3fn"


def test_override_leaves_the_first_recipe_as_it_was():
    recipe = Recipe()
    recipe.override("a", input=Dynamic())
    assert recipe == Recipe()


def test_a_scaling_object_shared_by_roles_keeps_grad_output_in_e5m2():
    shared = Dynamic()
    for recipe in (
        Recipe.uniform(shared),
        Recipe(input=shared, weight=shared, grad_output=shared),
        Recipe().override("a", input=shared, weight=shared, grad_output=shared),
        Recipe.from_toml(Recipe.uniform(shared).to_toml()),
    ):
        names = {role: operand.format.name for role, operand in recipe.plan("a").operands.items()}
        assert names == {"input": "e4m3fn", "weight": "e4m3fn", "grad_output": "e5m2"}


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(input=Delayed(reduce=lambda history: history[:, 0])),
        Recipe().override("a", weight=Delayed(reduce=lambda history: history[:, 0])),
    ],
)
def test_a_reduce_function_cannot_be_written(recipe):
    with pytest.raises(RecipeError, match="reduce function cannot be written"):
        recipe.to_dict()
    with pytest.raises(RecipeError, match="reduce function cannot be written"):
        recipe.to_toml()


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('input = {scaling = "delaid"}', "unknown scaling 'delaid'.*did you mean 'delayed'"),
        ('input = {scaling = "Dynamic"}', "unknown scaling.*did you mean 'dynamic'"),
        ("input = {margin = 1}", "unknown scaling None"),
        ('input = {format = "e4m3"}', "unknown format 'e4m3'.*did you mean 'e4m3fn'"),
        ("input = {format = 3}", "unknown format 3"),
        ('grad_ouput = {scaling = "dynamic"}', "key of the recipe.*did you mean 'grad_output'"),
        ('input = {scaling = "delayed", histroy_len = 4}', "did you mean 'history_len'"),
        ('input = {scaling = "dynamic", history_len = 4}', "key of the dynamic scaling"),
        ('input = {scaling = "delayed", history_len = 0}', "integer history_len in 1"),
        ('input = {scaling = "delayed", history_len = 4.0}', "integer history_len"),
        ('input = {scaling = "delayed", history_len = true}', "integer history_len"),
        ('input = {scaling = "dynamic", margin = -1}', "integer margin in 0..64"),
        ('input = {scaling = "delayed", reduce = "maxx"}', "unknown reduce.*did you mean 'max'"),
        ("input = 3", "expected a table for input"),
        ('[[override]]\ninput = {scaling = "dynamic"}', "needs match"),
        ('[[override]]\nmatch = 3\ninput = {scaling = "dynamic"}', "needs match"),
        ('[[override]]\nmatch = "a"\nwieght = {}', "did you mean 'weight'"),
        ('override = {match = "a"}', "override"),
        ("override = [3]", "override"),
        ("override = 3", "override"),
        ("input = ", "not valid TOML"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(toml, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.from_toml(toml)


def test_a_rule_for_an_unknown_role_is_refused():
    with pytest.raises(RecipeError, match=r"unknown role 'grad_ouput'.*'grad_output'"):
        Recipe(rules=(Rule(match="a", scalings={"grad_ouput": Dynamic()}),))  # pyright: ignore[reportArgumentType]
    with pytest.raises(RecipeError, match=r"unknown role 'wieght'.*'weight'"):
        Recipe(rules=(Rule(match="a", formats={"wieght": "e5m2"}),))  # pyright: ignore[reportArgumentType]


def test_a_rule_with_an_unknown_format_is_refused():
    with pytest.raises(RecipeError, match="did you mean 'e5m2'"):
        Recipe().override("a", input_format="e5m3")


@pytest.mark.parametrize("scaling", ["dynamic", Dynamic, None, {"scaling": "dynamic"}])
def test_what_is_no_scaling_object_is_refused(scaling):
    with pytest.raises(RecipeError, match="expected a scaling such as"):
        Recipe(input=scaling)


def test_an_override_that_changes_nothing_is_refused():
    with pytest.raises(RecipeError, match="changes nothing"):
        Recipe().override("a")


def test_a_file_that_cannot_be_read_is_a_recipe_error(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            Recipe.load(path)
