import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy as Strategy

from unclamp.errors import RecipeError
from unclamp.formats import FORMATS
from unclamp.names import GEMMS, ROLES
from unclamp.recipe import Recipe
from unclamp.rule import ACCUMULATES, Rule, matches
from unclamp.scaling import (
    MX,
    Delayed,
    Dynamic,
    Guarded,
    HighPrecision,
    PerBlock,
    PerRow,
    PerTensor,
    Static,
    parse_granularity,
)

formats = st.sampled_from(sorted(FORMATS))
globs = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
sizes = st.integers(1, 1 << 20)
granularities = st.sampled_from([PerTensor(), PerRow(), MX()]) | st.builds(PerBlock, sizes, sizes)
common = {"margin": st.integers(0, 64), "power_of_two": st.booleans()}
history = {"history_len": sizes, "reduce": st.sampled_from(["max", "most_recent"])}
unremembering = st.builds(Dynamic, **common, granularity=granularities) | st.builds(HighPrecision)
static = st.builds(Static, scale=st.floats(2.0**-126, 2.0**126))


def remembering(granularities: Strategy) -> Strategy:
    kinds = (Delayed, Guarded)
    return st.one_of([st.builds(k, **common, **history, granularity=granularities) for k in kinds])


def recipes_with(
    weights: Strategy, smooth: Strategy, formats: Strategy, ways: Strategy
) -> Strategy:
    """Return recipes with every setting; the arguments are what does not go with everything."""
    modes = ways | st.just(HighPrecision())
    tokens = unremembering | static | remembering(st.just(PerTensor()))
    scalings = {"input": tokens, "weight": weights, "grad_output": tokens}
    rules = st.builds(
        Rule,
        match=globs,
        scalings=st.fixed_dictionaries({}, optional=scalings),
        formats=st.dictionaries(st.sampled_from(ROLES), formats),
        gemms=st.dictionaries(st.sampled_from(GEMMS), modes),
        accumulate=st.none() | ways,
        smooth=st.none() | smooth,
    )
    return st.builds(
        Recipe,
        **scalings,
        **{f"{role}_format": formats for role in ROLES},
        **{gemm: st.none() | modes for gemm in GEMMS},
        accumulate=ways,
        smooth=smooth,
        warmup_steps=st.integers(0, 1 << 40),
        rules=st.lists(rules, max_size=3).map(tuple),
    )


recipes = st.one_of(
    recipes_with(
        unremembering | static | remembering(granularities),
        st.just(False),
        formats,
        st.just("float32"),
    ),
    recipes_with(unremembering, st.booleans(), st.just("e4m3fn"), st.sampled_from(ACCUMULATES)),
)


@given(granularity=granularities)
def test_a_granularity_survives_its_name(granularity):
    assert parse_granularity(str(granularity)) == granularity


@given(recipe=recipes)
def test_a_recipe_survives_dict_and_toml(recipe):
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert hash(Recipe.from_toml(recipe.to_toml())) == hash(recipe)


@given(recipe=recipes)
def test_every_rule_is_a_table_of_its_own_in_toml(recipe):
    text = recipe.to_toml()
    assert text.splitlines().count("[[override]]") == len(recipe.rules)
    written = tomllib.loads(text)
    assert [rule["match"] for rule in written.get("override", [])] == [
        rule.match for rule in recipe.rules
    ]
    # TOML lets nobody extend an inline array: what is pasted at the end is one more entry.
    pasted = tomllib.loads(f'{text}\n[[override]]\nmatch = "pasted"\nsmooth = false\n')
    last = pasted["override"].pop()
    assert last == {"match": "pasted", "smooth": False}
    assert pasted == {**written, "override": written.get("override", [])}


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
        ("recipes/mine.toml", "use Recipe.load"),
        ('input = {scaling = "static"}', "static scaling needs its scale"),
        ('input = {scaling = "static", scale = 0.0}', r"scale in \[2\*\*-126, 2\*\*126\], got 0.0"),
        ('input = {scaling = "static", scale = inf}', "got inf"),
        ('input = {scaling = "static", scale = nan}', "got nan"),
        ('input = {scaling = "static", scale = true}', "got True"),
        ('input = {scaling = "static", scale = "1"}', "got '1'"),
        ('input = {scaling = "static", scale = 1, margin = 1}', "key of the static scaling"),
        ('input = {scaling = "dynamic", granularity = "rows"}', "granularity.*did you mean 'row'"),
        ('input = {scaling = "dynamic", granularity = "1x129x"}', "did you mean '1x128'"),
        ('input = {scaling = "dynamic", granularity = "0x5"}', "integer across in 1.*got 0"),
        ('input = {scaling = "dynamic", granularity = "5x"}', "unknown granularity '5x'"),
        ('input = {scaling = "dynamic", granularity = 5}', "unknown granularity 5"),
        ('input = {scaling = "dynamic", power_of_two = 1}', "True or False for power_of_two"),
        ('input = {scaling = "guarded", granularity = "row"}', "guarded scaling of input per row"),
        ('grad_output = {scaling = "delayed", granularity = "mx"}', "delayed.*grad_output per mx"),
        ('accumulate = "hoper"', "unknown accumulate 'hoper'.*did you mean 'hopper'"),
        ('accumulate = "high_precision"', "unknown accumulate 'high_precision'"),
        ('grad_weight = "high"', r"grad_weight 'high'.*or HighPrecision\(\)"),
        ("grad_weight = true", "unknown grad_weight True"),
        ('grad_wieght = "hopper"', "did you mean 'grad_weight'"),
        ('smooth = "yes"', "True or False for smooth, got 'yes'"),
        ("smooth = 1", "True or False for smooth, got 1"),
        ("smooth = true", "smoothed layer with delayed scaling of its weight"),
        ("warmup_steps = -1", "integer warmup_steps in 0"),
        ("warmup_steps = 1.0", "integer warmup_steps"),
        ("warmup_steps = true", "integer warmup_steps"),
        ('[[override]]\nmatch = "a"\nwarmup_steps = 1', "key of the override 'warmup_steps'"),
        ('[[override]]\nmatch = "a"\nsmooth = true', "smoothed layer with delayed"),
        ('[[override]]\nmatch = "a"\naccumulate = "fast"', "unknown accumulate 'fast'"),
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


@pytest.mark.parametrize("scaling", [3, Dynamic, None, {"scaling": "dynamic"}])
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


# ---- granularity, precision, smoothing -----------------------------------------------------


@pytest.mark.parametrize("granularity", [PerRow(), MX(), PerBlock(1, 128), PerBlock(128, 128)])
@pytest.mark.parametrize("kind", [Delayed, Guarded])
def test_a_history_by_rows_or_blocks_is_for_weights_alone(kind, granularity):
    scaling = kind(granularity=granularity)
    assert Recipe(weight=scaling).plan("a").operands["weight"].scaling == scaling
    for role in ("input", "grad_output"):
        message = f"{role}.*other tokens at every step.*Dynamic with this granularity"
        with pytest.raises(RecipeError, match=message):
            Recipe(**{role: scaling})
        with pytest.raises(RecipeError, match=message):
            Recipe().override("a", **{role: scaling})
    with pytest.raises(RecipeError, match="other tokens"):
        Recipe.uniform(scaling)


@pytest.mark.parametrize("granularity", ["row", PerRow, None, 1])
def test_what_is_no_granularity_object_is_refused(granularity):
    with pytest.raises(RecipeError, match=r"expected a granularity such as PerTensor\(\)"):
        Dynamic(granularity=granularity)


@pytest.mark.parametrize("block", [(0, 1), (1, -1), (1.0, 1), (True, 1), ((1 << 20) + 1, 1)])
def test_a_block_has_at_least_one_element_each_way(block):
    with pytest.raises(RecipeError, match="integer a"):
        PerBlock(*block)


def test_an_override_of_the_scaling_is_for_all_roles_but_those_named():
    dynamic, high = Dynamic(margin=2), HighPrecision()
    plan = Recipe().override("a", scaling=high, weight=dynamic).plan("a")
    scalings = {role: operand.scaling for role, operand in plan.operands.items()}
    assert scalings == {"input": high, "weight": dynamic, "grad_output": high}
    names = [plan.operands[role].format.name for role in ROLES]
    assert names == ["e4m3fn", "e4m3fn", "e5m2"]
    assert Recipe().override("a", scaling=high).plan("b") == Recipe().plan("b")


def gemms_of(recipe: Recipe, fqn: str) -> list[object]:
    return [recipe.plan(fqn).gemms[gemm] for gemm in GEMMS]


def test_a_gemm_follows_the_nearest_setting_that_speaks_of_it():
    high = HighPrecision()
    recipe = (
        Recipe(accumulate="hopper", grad_weight=high)
        .override("a", accumulate="hopper_fast", output="float32")
        .override("b", output=high)
        .override("c", accumulate="float32")
        .override("d", grad_weight="float32")
        .override("e", scaling=Dynamic())
    )
    assert gemms_of(recipe, "other") == ["hopper", "hopper", high]
    assert gemms_of(recipe, "a") == ["float32", "hopper_fast", "hopper_fast"]
    assert gemms_of(recipe, "b") == [high, "hopper", high]
    assert gemms_of(recipe, "c") == ["float32"] * 3
    assert gemms_of(recipe, "d") == ["hopper", "hopper", "float32"]
    assert gemms_of(recipe, "e") == gemms_of(recipe, "other")
    assert Recipe.from_toml(recipe.to_toml()) == recipe


@pytest.mark.parametrize("value", ["fast", HighPrecision(), 1, None])
def test_only_a_known_way_to_add_is_accepted(value):
    with pytest.raises(RecipeError, match="accumulate"):
        Recipe(accumulate=value)


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_smooth_is_true_or_false(value):
    with pytest.raises(RecipeError, match="smooth"):
        Recipe(weight=Dynamic(), smooth=value)


@pytest.mark.parametrize("value", [-1, (1 << 40) + 1, 1.0, True, "1", None])
def test_warm_up_is_a_number_of_steps(value):
    with pytest.raises(RecipeError, match="integer warmup_steps"):
        Recipe(warmup_steps=value)


def test_a_rule_for_an_unknown_gemm_is_refused():
    with pytest.raises(RecipeError, match=r"unknown GEMM 'grad_wieght'.*'grad_weight'"):
        Recipe(rules=(Rule(match="a", gemms={"grad_wieght": "hopper"}),))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("weight", [Delayed(), Static(scale=1.0)])
def test_smoothing_and_a_weight_scaled_by_its_past_do_not_go_together(weight):
    for wrong in (
        lambda: Recipe(weight=weight, smooth=True),
        lambda: Recipe(weight=weight).override("a", smooth=True),
        lambda: Recipe(weight=Dynamic(), smooth=True).override("a", weight=weight),
    ):
        with pytest.raises(RecipeError, match=f"smoothed layer with {weight.kind}"):
            wrong()
    recipe = Recipe(weight=Guarded(), smooth=True).override("a", weight=weight, smooth=False)
    assert (recipe.plan("a").smooth, recipe.plan("b").smooth) == (False, True)
    rescued = Recipe(weight=weight).override("a", weight=Guarded(), smooth=True)
    assert (rescued.plan("a").smooth, rescued.plan("b").smooth) == (True, False)


def test_a_gemm_that_hopper_cannot_do_is_refused_and_says_which_it_can():
    for settings in ({"input_format": "e5m2"}, {"weight_format": "e4m3fnuz"}):
        with pytest.raises(RecipeError, match="e4m3fn x e4m3fn"):
            Recipe(accumulate="hopper", **settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(RecipeError, match="Hopper tensor core multiplies"):
        Recipe(input_format="e5m2").override("a", grad_weight="hopper_fast")
    assert Recipe(input_format="e5m2", output="hopper").plan("a").gemms["output"] == "hopper"


def test_a_rule_says_that_it_takes_scalings_and_not_their_names() -> None:
    with pytest.raises(RecipeError, match=r"not their names: write Dynamic\("):
        Rule(match="x", scalings={"input": "dynamic"})  # pyright: ignore[reportArgumentType]
