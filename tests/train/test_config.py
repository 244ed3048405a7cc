"""A recipe says what it means or is refused."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmristream.errors import UsageError
from train.config import RECIPES, as_tables, as_toml, load_recipe, recipe_from

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return _write


def test_an_empty_recipe_is_all_defaults(write):
    assert load_recipe(write("")) == recipe_from({})


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_is_found_by_name_and_survives_its_own_text(name):
    recipe = load_recipe(name)
    assert recipe_from(tomllib.loads(as_toml(recipe))) == recipe
    assert recipe_from(as_tables(recipe)) == recipe


def test_the_published_recipe_has_the_published_size():
    recipe = load_recipe("swift_sex")
    assert (recipe.data.grid, recipe.data.window, recipe.data.normalize) == ((96, 96, 96), 20, "global-zscore")
    assert recipe.model.options["embed_dim"] == 36
    assert recipe.model.options["depths"] == [2, 2, 6, 2]
    assert (recipe.optim.lr, recipe.optim.weight_decay) == (5e-5, 1e-2)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[optim]\nlearning_rat = 1", "optim.learning_rat: the recipe has an unknown key;"),
        ("[optim]\nweight_decai = 1", "did you mean weight_decay?"),
        ("[optimm]\nlr = 1", "optimm: the recipe has an unknown section; did you mean optim?"),
        ("lr = 1", "lr: the recipe has an unknown section"),
        ("optim = 3", "optim: expected a section, got 3"),
        ("model = 3", "model: expected a section, got 3"),
        ("[model]\nname = 3", "model.name: expected text, got 3"),
        ("[optim]\nlr = '1e-3'", "optim.lr: expected a finite number, got '1e-3'"),
        ("[optim]\nlr = nan", "optim.lr: expected a finite number, got nan"),
        ("[optim]\nlr = true", "optim.lr: expected a finite number, got True"),
        ("[train]\nsteps = 1.0", "train.steps: expected an integer, got 1.0"),
        ("[train]\nsteps = true", "train.steps: expected an integer, got True"),
        ("[train]\nlog_windows = 1", "train.log_windows: expected true or false, got 1"),
        ("[data]\nurl = 3", "data.url: expected text, got 3"),
        ("[data]\nstride = 'x'", "data.stride: expected an integer, got 'x'"),
        ("[data]\ngrid = [96, 96]", "data.grid: expected a list of 3 values, got [96, 96]"),
        ("[data]\ngrid = [96, 96, 9.5]", "data.grid[2]: expected an integer, got 9.5"),
        ("[data]\nnormalize = 'voxel-zscor'", "did you mean 'voxel-zscore'"),
        ("[train]\nprecision = 'fp64'", "train.precision: 'fp64' is not a choice"),
        ("[train]\nsteps = 0", "train.steps must be at least 1, got 0"),
        ("[optim]\nlr = 0", "optim.lr must be above 0, got 0.0"),
        ("[optim]\nbetas = [0.9, 1.0]", "optim.betas must lie in [0, 1)"),
        ("[eval]\nstride = 0", "eval.stride must be at least 1, got 0"),
        ("[train", "cannot be read as TOML"),
        ("[data]\nnormalize = 'voxel-zscore | pol:2'", "did you mean 'pool'"),
        ("[data]\nstats = 'context'", "expected the number of frames"),
        ("[data]\nwindow = -1", "data.window must be at least 0, got -1"),
        ("[data]\nwindow = 0\nstride = 3", "whole runs, which have no stride"),
        ("[data]\natlases = 3", "data.atlases: expected a table, got 3"),
        ("[data.atlases]\nmine = 3", "data.atlases.mine: expected text, got 3"),
        ("[data]\nviews = 'same-run'", "learns from one view of a sample"),
        ("[objective]\nkind = 'contrastive'", "learns from two views of a sample"),
        ("[objective]\ntemperature = 0.2", "objective.temperature is of contrastive, got kind 'classification'"),
        ("[objective]\nkind = 'regression'\nhuber_delta = 1", "objective.huber_delta is of loss 'huber'"),
        ("[objective]\nkind = 'masked'\nloss = 'huber'", "is mse or l1, got 'huber'"),
        ("[objective]\nkind = 'masked'\nmask_ratio = 1", "objective.mask_ratio must lie in (0, 1), got 1.0"),
        ("[objective]\nmask_ratio = 0.5", "only with objective.reconstruction_weight"),
        ("[start]\nform = 'runs/x'", "start.form: the recipe has an unknown key; did you mean from?"),
        ("[start]\nfreeze = 'model.'", "start.freeze: expected a list"),
        ("[start]\nfreeze = ['model.', 3]", "start.freeze[1]: expected text, got 3"),
        ("[optim]\nschedule = 'step'", "which needs both; got schedule 'step' and neither"),
        ("[optim]\ndecay = 0.5", "are of schedule 'step'"),
        ("[train]\nseed = 9223372036854775807", "train.seed must be below 2^62"),
        ("[eval]\nurls = 'other'", "eval.urls: expected a list in brackets, got 'other'"),
        ("[eval]\nmetric = 'mae'", "eval.metric 'mae': validation of this objective does not give it"),
        ("[eval]\nmetric = 'sex.auroc'", "did you mean auroc?"),
        ("[objective]\nkind = 'masked'\n[eval]\nmetric = 'auroc'", "known: loss"),
        (
            "[objective]\nkind = 'multitask'\ntargets = { age = 'regression', sex = 'classification' }\n"
            "[eval]\nmetric = 'auroc'",
            "did you mean sex.auroc?",
        ),
    ],
)
def test_what_a_recipe_does_not_know_is_an_error_that_says_where(write, text, sentence):
    with pytest.raises(UsageError) as caught:
        load_recipe(write(text))
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "data.url=https://host/x?token=hush",
        "data.url=https://me:hush@host/x",
        "eval.urls=['https://host/x?token=hush']",
        "eval.urls=['s3://me:hush@host/x']",
        "start.from=https://host/x?token=hush",
        "start.from=s3://me:hush@bucket/run",
        "data.atlases.mine=https://host/a.nii?token=hush",
        "data.atlases.mine=https://me:hush@host/a.nii",
        "train.checkpoints=s3://me:hush@bucket/run",
    ],
)
def test_a_secret_in_a_url_is_refused_before_any_file_or_checkpoint_can_keep_it(write, override):
    with pytest.raises(UsageError, match=r"credentials|query") as caught:
        load_recipe(write(""), [override])
    assert "hush" not in str(caught.value)


def test_tables_lists_and_names_that_python_keeps_for_itself_survive(write):
    text = """
        [data]
        atlases = { mine = "atlas.nii", other = "b.nii" }
        normalize = "parcels:mine | voxel-zscore"
        [start]
        from = "runs/x"
        freeze = ["model.", "head."]
    """
    recipe = load_recipe(write(text))
    assert (recipe.start.from_, recipe.start.freeze) == ("runs/x", ("model.", "head."))
    assert dict(recipe.data.atlases) == {"mine": "atlas.nii", "other": "b.nii"}
    assert 'from = "runs/x"' in as_toml(recipe)
    assert recipe_from(tomllib.loads(as_toml(recipe))) == recipe


def test_a_target_is_told_where_there_is_one_and_left_out_where_not():
    assert recipe_from({}).data.target == "sex"
    unscored = recipe_from({"objective": {"kind": "masked"}})
    assert "target" not in as_tables(unscored)["data"]
    with pytest.raises(UsageError, match=r"has no target, got data\.target 'age'"):
        recipe_from({"objective": {"kind": "masked"}, "data": {"target": "age"}})


def test_a_recipe_that_is_not_there_is_told_with_the_nearest_name(tmp_path):
    with pytest.raises(UsageError, match="did you mean swift_sex"):
        load_recipe("swift_sx")
    with pytest.raises(UsageError, match="there is no such recipe"):
        load_recipe(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.lr=5e-4", "optim", "lr", 5e-4),
        ("optim.lr = 1", "optim", "lr", 1.0),
        ("data.grid=[24, 24, 24]", "data", "grid", (24, 24, 24)),
        ("data.url=/data/hcp=1", "data", "url", "/data/hcp=1"),
        ("data.url='s3://lab/hcp'", "data", "url", "s3://lab/hcp"),
        ("data.url=", "data", "url", ""),
        ("data.url=/data/my cohort = 'new'", "data", "url", "/data/my cohort = 'new'"),
        ("data.target=age", "data", "target", "age"),
        ("train.log_windows=false", "train", "log_windows", False),
    ],
)
def test_set_changes_one_value_and_needs_no_quotes_for_text(write, override, section, key, value):
    recipe = load_recipe(write("[optim]\nlr = 1e-3"), [override])
    assert getattr(getattr(recipe, section), key) == value


def test_the_last_set_wins_and_model_options_pass_through(write):
    recipe = load_recipe(write(""), ["model.embed_dim=12", "model.embed_dim=24", "model.name=swift"])
    assert dict(recipe.model.options) == {"embed_dim": 24}


@pytest.mark.parametrize("override", ["lr=1", "optim.lr", "=3", "optim.=3", ".lr=3"])
def test_a_set_without_section_key_and_value_is_refused(write, override):
    with pytest.raises(UsageError, match=r"expected SECTION\.KEY=VALUE"):
        load_recipe(write(""), [override])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [("optim.lrr=1", "did you mean lr"), ("optim.lr.x=1", "lr is a value"), ("train.steps=x", "an integer")],
)
def test_a_set_is_as_strict_as_the_file(write, override, sentence):
    with pytest.raises(UsageError, match=sentence):
        load_recipe(write("[optim]\nlr = 1"), [override])


text = st.text(st.characters(codec="utf-8"))
values = st.recursive(
    text | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(text.filter(lambda key: key != "name"), values, max_size=3), text)
def test_any_options_survive_the_saved_recipe(options, url):
    recipe = recipe_from({"model": {"name": "swift", **options}, "data": {"url": url}})
    assert recipe_from(tomllib.loads(as_toml(recipe))) == recipe
