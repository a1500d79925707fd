"""The recipes: docs/recipes.md says what the configs hold, and both what the sources say.

Numbers of the sources are entered by hand here, from the paper's official code (TF) and
its authors' PyTorch code (PT), so that a slip in a config and in its docs is found too.
"""

import math
import pathlib
import re

import pytest

from configs import common
from supcon_jax.builders import scaled_learning_rate
from supcon_jax.config.check import check_config, flatten
from supcon_jax.config.keys import KEYS
from tests.config_files import ALL, FILES, load, load_named, variants

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
DEFAULTS = flatten(common.get_config().to_dict())
IMAGES = {"imagenet2012": 1_281_167, "cifar10": 50_000, "cifar100": 50_000}
# Where a run lies, how often it reports, how it fits a machine: not the recipe.
NOT_A_RECIPE = {
    *(key for key, known in KEYS.items() if known.free),
    *("mode", "seed", "pretrained", "total_steps", "microbatch_size", "encoder.remat"),
    *("representation", "encoder.init_from"),
    *("log_every", "eval_every", "checkpoint_every", "keep_checkpoints"),
    *(key for key in KEYS if key.startswith(("knn.", "probe.", "finetune."))),
}
# What common.set_augmentation sets by name; in this order in common.AUGMENTATIONS.
AUGMENT = tuple(
    f"augment.{key}"
    for key in ("jitter_probability", "policy", "grayscale_probability")
)
CONTRASTIVE = {
    *("loss.temperature", "loss.scale", "loss.contrast_mode", "loss.summation"),
    *("loss.denominator", "loss.positives_cap"),
}
# Those of fine-tuning are in docs/transfer.md, see test_finetune.py; what a folder decides
# is in docs/your_own_data.md.
ELSEWHERE = ("digits", "evaluate", "finetune", "folder", "robustness", "transfer")
RECIPES = [(s, v) for s, v in ALL if not any(word in s for word in ELSEWHERE)]


def recipe(name):
    """A config as flat keys, without what is no part of its recipe."""
    flat = flatten(load_named(name).to_dict())
    flat = {key: value for key, value in flat.items() if has_effect(key, flat)}
    triple = tuple(flat.get(key, 0.0) for key in AUGMENT)
    for augmentation, (jitter, policy, grayscale, _) in common.AUGMENTATIONS.items():
        if triple == (jitter, policy, grayscale):
            flat["augment"] = augmentation
    return {key: flat[key] for key in flat if key not in NOT_A_RECIPE}


def has_effect(key, flat):
    """Whether a key means anything in a config; the tables have "-" where not."""
    linear = flat["mode"] == "linear_eval"
    contrastive = not linear and flat["loss.name"] != "cross_entropy"
    schedule, optimizer = flat["optimizer.schedule"], flat["optimizer.name"]
    if flat["probe.solver"] == "lbfgs" and key.startswith(("optimizer.", "epochs")):
        return False  # it takes no steps
    if key.startswith(("projection.", "momentum_encoder.")) or key in CONTRASTIVE:
        return contrastive
    conditions = {
        "loss.name": not linear,
        "encoder.batch_norm_devices": not linear,
        "classifier.init": not contrastive,
        "loss.label_smoothing": not contrastive,
        "augment.jitter_strength": flat["augment.jitter_probability"] > 0,
        "augment.jitter_probability": flat["augment.jitter_probability"] > 0,
        "augment.jitter_kind": flat["augment.jitter_probability"] > 0,
        "augment.blur_border": flat["augment.blur_probability"] > 0,
        "augment.grayscale_probability": flat["augment.grayscale_probability"] > 0,
        "augment.rand_augment_layers": flat["augment.policy"] == "rand_augment",
        "augment.rand_augment_magnitude": flat["augment.policy"] == "rand_augment",
        "optimizer.decay_rate": schedule in ("staircase", "piecewise"),
        "optimizer.decay_epochs": schedule == "staircase",
        "optimizer.boundaries_epochs": schedule == "piecewise",
        "optimizer.cosine_end": schedule == "cosine",
        "optimizer.warmup_start": flat["optimizer.warmup_epochs"] > 0,
        "optimizer.exclude": flat["optimizer.weight_decay"] > 0,
        "optimizer.trust_coefficient": optimizer == "lars",
        "optimizer.rmsprop_decay": optimizer == "rmsprop",
        "optimizer.rmsprop_epsilon": optimizer == "rmsprop",
    }
    return conditions.get(key, True)


def steps(config):
    return config.epochs * IMAGES[config.data.name] / config.batch_size


def number(text):
    """A number as docs and sources write it: 1e-4, 72,983 or 0.1 / 0.07."""
    dividend, _, divisor = text.replace(",", "").partition("/")
    return float(dividend) / float(divisor or 1)


def says(cell, value):
    """Whether a cell of the tables means a config's value."""
    if value is None:
        return cell == "-"
    if isinstance(value, bool):
        return cell == ("yes" if value else "no")
    if isinstance(value, tuple):
        parts = [] if cell == "none" else cell.split(", ")
        return len(parts) == len(value) and all(map(says, parts, value))
    if isinstance(value, int | float):
        return math.isclose(number(cell), value, rel_tol=1e-9)
    if re.fullmatch(r"[\d.]+ / 0\.07", cell):  # a loss scale, text in the config
        return math.isclose(number(cell), float(value), rel_tol=1e-9)
    return cell == value


def tables(text):
    """Section title -> rows of cells, the header first."""
    found = {}
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        title, _, body = section.partition("\n")
        lines = re.findall(r"^\|(.*)\|$", body, re.M)
        rows = [[cell.strip() for cell in line.split("|")] for line in lines]
        found[title] = [row for row in rows if set("".join(row)) - set("-")]
    return found


TABLES = tables(DOCS.read_text())
# Those whose columns are configs, and whose rows are settings.
SETTINGS = {
    title: rows
    for title, rows in TABLES.items()
    if rows and rows[0][0] == "setting" and rows[0][1].startswith("`")
}
COLUMNS = {title: [c.strip("`") for c in t[0][1:-1]] for title, t in SETTINGS.items()}
CHANGES = {row[0].strip("`"): row[1:] for row in TABLES["Variants"][1:]}


@pytest.mark.parametrize("title", SETTINGS)
def test_every_cell_is_the_configs_value(title):
    for row in SETTINGS[title][1:]:
        assert len(row) == len(SETTINGS[title][0]), row
        label, cells, source = row[0], row[1:-1], row[-1]
        for name, cell in zip(COLUMNS[title], cells, strict=True):
            config = load_named(name)
            solved = config.probe.solver == "lbfgs"  # takes no steps
            if label in ("steps", "peak learning rate") and solved:
                expected = None
            elif label == "steps":
                expected = int(steps(config))  # as create_plan has it
            elif label == "peak learning rate":
                expected = scaled_learning_rate(config)
            else:
                expected = recipe(name).get(label.strip("`"))
                assert label.strip("`") in (*KEYS, "augment"), label
            assert says(cell, expected), f"{name} {label}: {cell}, not {expected}"
        assert source or label in ("`data.name`", "peak learning rate"), row


@pytest.mark.parametrize("title", [title for title in SETTINGS if title != "Data"])
def test_a_table_has_a_row_for_what_is_not_the_default(title):
    """So that a key without a row has the default of common.py, as the docs say."""
    labels = {row[0].strip("`") for row in SETTINGS[title][1:]}
    assert len(labels) == len(SETTINGS[title]) - 1
    for name in COLUMNS[title]:
        for key, value in recipe(name).items():
            data = key.startswith("data.") and key != "data.views"
            if value != DEFAULTS.get(key) and key not in AUGMENT and not data:
                assert key in labels, f"{name}: {key} = {value!r}"


def test_what_all_share():
    for key, cell, source in TABLES["Shared by all"][1:]:
        values = [recipe(common.with_variant(*r)).get(key.strip("`")) for r in RECIPES]
        values = [value for value in values if value is not None]
        assert values and all(says(cell, value) for value in values), key
        assert source


def test_variants_change_what_the_docs_say():
    for name, (base, changes, source) in CHANGES.items():
        before, after = recipe(base.strip("`")), recipe(name)
        stated = dict(re.findall(r"`([\w.]+)` ([^;]+?)(?:;|$)", changes))
        for key in (before.keys() | after.keys()) - {*AUGMENT}:
            # A key that only now has an effect may have its default.
            old = before.get(key, DEFAULTS.get(key))
            new = after.get(key, DEFAULTS.get(key))
            assert (key in stated) == (old != new), f"{name}: {key}"
        for key, cell in stated.items():
            assert says(cell, after[key]), f"{name}: {key}"
        assert source


def without_data(flat):
    statistics = ("data.name", "data.mean", "data.std")
    return {key: value for key, value in flat.items() if key not in statistics}


@pytest.mark.parametrize("stem, variant", RECIPES)
def test_every_recipe_is_in_the_docs(stem, variant):
    """In a column or a row of its own, or equal to one that is."""
    documented = [name for columns in COLUMNS.values() for name in columns]
    documented += CHANGES
    ours = recipe(common.with_variant(stem, variant))
    if "cifar100" in stem:  # "differ in the data alone"
        ours = without_data(ours)
        assert ours in [without_data(recipe(n)) for n in documented if "cifar10" in n]
    else:
        assert ours in [recipe(name) for name in documented]


@pytest.mark.parametrize("stem, variant", RECIPES)
def test_data_are_those_of_the_data_table(stem, variant):
    config = load(stem, variant)
    columns = [c for c in COLUMNS["Data"] if ("queue" in c) == ("queue" in stem)]
    (column,) = [n for n in columns if load_named(n).data.name == config.data.name]
    expected = load_named(column).data
    for key, value in config.data.items():
        if key != "views":
            assert value == expected[key], key


def test_official_whitening_is_for_pixels_from_minus_one_to_one():
    mean, std = common.CIFAR_STATISTICS[10]
    assert [2 * m - 1 for m in mean] == pytest.approx([-0.0172, -0.0356, -0.107])
    assert [2 * s for s in std] == pytest.approx([0.4046, 0.3988, 0.402])


# config: batch, epochs, rate for 256 images, peak rate, optimizer, weight decay,
# steps at the end of the stage (stage 2: counted from the beginning of stage 1).
TF_IMAGENET = {
    "supcon_r50": (6144, 350, 0.4, 9.6, "lars", 1e-3, 72_983),
    "supcon_r101": (4096, 350, 0.4, 6.4, "lars", 1e-4, 109_474),
    "supcon_r200": (4096, 700, 0.2, 3.2, "lars", 1e-4, 218_949),
    "simclr_r50": (6144, 100, 0.3, 7.2, "lars", 1e-4, 20_852),
    "cross_entropy_r50": (6144, 200, 0.1, 2.4, "nesterov", 1e-4, 41_704),
    "cross_entropy_r200": (4096, 700, 0.1, 1.6, "nesterov", 1e-4, 218_949),
    "linear_r50": (6144, 90, 0.05, 1.2, "rmsprop", 1e-6, 91_750),
    "linear_r101": (4096, 90, 0.05, 0.8, "rmsprop", 1e-6, 137_625),
    "linear_r200": (4096, 90, 0.05, 0.8, "rmsprop", 1e-6, 247_100),
    "linear_r50:simclr": (6144, 90, 0.1, 2.4, "nesterov", 1e-6, 39_619),
}
STAGE_1 = {"linear_r50:simclr": "simclr_r50"} | {
    f"linear_{depth}": f"supcon_{depth}" for depth in ("r50", "r101", "r200")
}


@pytest.mark.parametrize("name", TF_IMAGENET)
def test_imagenet_recipes_are_the_official_ones(name):
    config = load_named(name)
    batch, epochs, rate, peak, optimizer, weight_decay, last_step = TF_IMAGENET[name]
    assert (config.batch_size, config.epochs) == (batch, epochs)
    assert config.optimizer.learning_rate == rate
    assert scaled_learning_rate(config) == pytest.approx(peak)
    assert config.optimizer.name == optimizer
    assert config.optimizer.weight_decay == weight_decay
    assert config.optimizer.warmup_epochs == 12
    before = steps(load(STAGE_1[name])) if name in STAGE_1 else 0
    assert int(steps(config) + before) == last_step
    if config.optimizer.name == "rmsprop":
        # After 78 epochs of stairs: 0.97 ** 156.
        stairs = (90 - 12) / config.optimizer.decay_epochs
        assert config.optimizer.decay_rate**stairs == pytest.approx(0.0086, rel=0.01)
        assert config.optimizer.rmsprop_epsilon == 1e-3


# config: batch, epochs, warm-up, rate, peak rate, optimizer, weight decay.
CIFAR = {
    "supcon_cifar10:official_2022": (4096, 1000, 10, 0.5, 8.0, "momentum", 1e-4),
    "supcon_cifar10:official_2020": (4096, 1000, 10, 0.125, 2.0, "momentum", 1e-4),
    "simclr_cifar10:official_2022": (1024, 400, 10, 0.5, 2.0, "momentum", 1e-4),
    "cross_entropy_cifar10:official_2022": (1024, 1000, 12, 0.1, 0.4, "nesterov", 5e-4),
    "linear_cifar10:official_2022": (4096, 100, 0, 2.5, 40.0, "momentum", 0),
    "linear_cifar10:simclr_official_2022": (1024, 90, 0, 0.25, 1.0, "momentum", 0),
    "supcon_cifar10:pytorch": (1024, 1000, 10, 0.5, 0.5, "momentum", 1e-4),
    "simclr_cifar10:pytorch": (1024, 1000, 10, 0.5, 0.5, "momentum", 1e-4),
    "cross_entropy_cifar10:pytorch": (1024, 500, 10, 0.8, 0.8, "momentum", 1e-4),
    "linear_cifar10:pytorch": (512, 100, 0, 5.0, 5.0, "momentum", 0),
    "linear_cifar10:simclr_pytorch": (512, 100, 0, 1.0, 1.0, "momentum", 0),
}
CIFAR |= {
    name.replace("cifar10", "cifar100"): values
    for name, values in CIFAR.items()
    if name.endswith("pytorch")
}


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_recipes_are_those_of_the_sources(name):
    config = load_named(name)
    batch, epochs, warmup, rate, peak, optimizer, weight_decay = CIFAR[name]
    assert (config.batch_size, config.epochs) == (batch, epochs)
    assert config.optimizer.warmup_epochs == warmup
    assert config.optimizer.learning_rate == rate
    assert scaled_learning_rate(config) == pytest.approx(peak)
    assert config.optimizer.name == optimizer
    assert config.optimizer.weight_decay == weight_decay
    if config.mode == "linear_eval" and config.optimizer.schedule == "piecewise":
        assert tuple(config.optimizer.boundaries_epochs) == (60, 75, 90)
        assert config.optimizer.decay_rate == 0.2
    if name.endswith("pytorch") and config.mode == "pretrain":
        assert config.optimizer.warmup_start * peak == pytest.approx(0.01)
        assert config.optimizer.cosine_end == 1e-3
        assert tuple(config.optimizer.exclude) == ()


@pytest.mark.parametrize(
    "name, temperature, factor",
    [
        ("supcon_r50", 0.1, 0.1),
        ("supcon_r50:official_2020", 0.07, 1.0),
        ("supcon_r101:official_2020", 0.1, 0.1 / 0.07),
        ("simclr_r50", 0.1, 1.0),
        ("supcon_cifar10:official_2022", 0.1, 0.1),
        ("simclr_cifar10:official_2022", 0.5, 1.0),
        ("supcon_cifar10:pytorch", 0.1, 1.4286),
        ("simclr_cifar10:pytorch", 0.5, 7.1429),
        ("supcon_queue_r50", 0.07, 1.0),
    ],
)
def test_the_loss_is_multiplied_as_in_the_source(name, temperature, factor):
    loss = load_named(name).loss
    named = {"none": 1.0, "temperature": loss.temperature}
    assert loss.temperature == temperature
    scale = named.get(loss.scale) or float(loss.scale)
    assert scale == pytest.approx(factor, rel=1e-4)


def test_revisions_of_the_official_code():
    """Temperature, weight decay, rate: the drift of ResNet-50, -101 and -200."""
    found = {
        name: (c.loss.temperature, c.optimizer.weight_decay, c.optimizer.learning_rate)
        for name in (
            *("supcon_r50:official_2020", "supcon_r50:official_2022"),
            *("supcon_r101:official_2020", "supcon_r101:official_2022"),
            *("supcon_r200:official_2020", "supcon_r200:official_2022"),
        )
        if (c := load_named(name))
    }
    assert list(found.values()) == [
        *((0.07, 1e-4, 0.3), (0.1, 1e-3, 0.4)),
        *((0.1, 1e-4, 0.3), (0.1, 1e-4, 0.4)),
        *((0.1, 1e-4, 0.3), (0.1, 1e-4, 0.2)),
    ]
    assert tuple(load("simclr_r50", "official_2020").projection.hidden_dims) == (2048,)


@pytest.mark.parametrize("stem, variant", RECIPES)
def test_both_stages_treat_the_embedding_alike(stem, variant):
    config = load(stem, variant)
    if config.next_config:
        following = load_named(config.next_config)
        ours, theirs = config.encoder, following.encoder
        assert ours.normalize_embedding == theirs.normalize_embedding
        assert ours.dtype == theirs.dtype
        assert config.data.name == following.data.name


@pytest.mark.parametrize("stem", [s for s in FILES if len(variants(s)) > 1])
def test_the_default_is_a_variant_with_a_name(stem):
    names = variants(stem)
    with pytest.raises(ValueError, match="unknown variant 'official_1999'") as refusal:
        load(stem, "official_1999")
    for name in names[1:]:
        assert repr(name) in str(refusal.value)
    if stem.endswith(("r50", "r101", "r200")):
        first = "batch_256" if "queue" in stem else "official_2022"
        assert recipe(f"{stem}:{first}") == recipe(stem)


# Which jitter, and what lies outside a blurred image, wherever a recipe has them.
JITTER_AND_BLUR = {
    "supcon_r200": ("tensorflow", "grey"),
    "linear_r200": ("tensorflow", "grey"),
    "simclr_r50": ("tensorflow", "grey"),
    "linear_r50:simclr": ("tensorflow", "grey"),
    "cross_entropy_r200": ("tensorflow", "grey"),
    "supcon_r101:paper": ("tensorflow", "grey"),
    "linear_r101:paper": ("tensorflow", "grey"),
    "supcon_queue_r50": ("torchvision", "edge"),
    "supcon_cifar10:official_2022": ("torchvision", None),
    "cross_entropy_cifar10:official_2022": ("torchvision", None),
    "supcon_cifar10:pytorch": ("torchvision", None),
    "supcon_r50": (None, None),
    "supcon_r101": (None, None),
    "linear_queue_r50": (None, None),
}


@pytest.mark.parametrize("name", JITTER_AND_BLUR)
def test_jitter_and_blur_are_those_of_the_source(name):
    found = recipe(name)
    kind, border = JITTER_AND_BLUR[name]
    assert found.get("augment.jitter_kind") == kind
    assert found.get("augment.blur_border") == border


@pytest.mark.parametrize("stem, variant", RECIPES)
def test_a_source_has_one_jitter_on_imagenet(stem, variant):
    """Also where a recipe without jitter is given one by an override."""
    options = load(stem, variant)
    official = options.data.name == "imagenet2012" and "queue" not in stem
    assert (options.augment.jitter_kind == "tensorflow") == official
    assert (options.augment.blur_border == "edge") == ("queue" in stem)


def test_the_papers_first_version():
    """Batch 8192, 700 epochs, temperature 0.07; all else is the default variant's."""
    first = load("supcon_r50", "paper_v1")
    assert (first.batch_size, first.epochs) == (8192, 700)
    assert first.loss.temperature == 0.07
    assert scaled_learning_rate(first) == pytest.approx(12.8)
    assert int(steps(first)) == 109_474
    assert first.eval_every == first.checkpoint_every == 1563  # ten epochs
    stated = {"batch_size": 8192, "epochs": 700.0, "loss.temperature": 0.07}
    assert recipe("supcon_r50:paper_v1") == recipe("supcon_r50") | stated
    linear = load_named(first.next_config)
    assert linear.pretrained == "runs/supcon_r50_paper_v1"
    assert recipe("linear_r50:paper_v1") == recipe("linear_r50") | {"batch_size": 8192}


@pytest.mark.parametrize("name", ["supcon_r50", "supcon_r50:official_2020"])
def test_batch_8192_is_one_override(name):
    config = load_named(name)
    base = config.optimizer.learning_rate
    config.batch_size = 8192
    check_config(config)
    assert scaled_learning_rate(config) == pytest.approx(32 * base)


SPEC_COLUMNS = [name for name in TF_IMAGENET if "linear" not in name]
SPEC_LINEAR = [name for name in TF_IMAGENET if "linear" in name]


def test_table_of_the_collected_facts(shared_dir):
    """The numeric rows of table 1.1, where the file is at hand."""
    text = (shared_dir / "spec" / "paper_and_recipes.md").read_text()
    section = text.partition("### 1.1")[2].partition("###")[0]
    rows = {}
    for line in re.findall(r"^\|(.*)\|$", section, re.M):
        label, *cells = [cell.strip().strip("*") for cell in line.split("|")]
        rows[label.partition(" [")[0]] = cells
    stage_1 = {
        "batch (images, before x2 views)": lambda c: c.batch_size,
        "stage-1 epochs": lambda c: c.epochs,
        "stage-1 base lr (per 256)": lambda c: c.optimizer.learning_rate,
        "stage-1 absolute lr = base*batch/256": scaled_learning_rate,
        "stage-1 weight decay": lambda c: c.optimizer.weight_decay,
        "temperature": lambda c: c.loss.temperature,
    }
    stage_2 = {
        "stage-2 epochs": lambda c: c.epochs,
        "stage-2 weight decay (classifier only)": lambda c: c.optimizer.weight_decay,
        "label smoothing (CE loss, IMAGENET_FLAGS)": lambda c: c.loss.label_smoothing,
    }
    compared = 0
    for expected, columns in ((stage_1, SPEC_COLUMNS), (stage_2, SPEC_LINEAR)):
        for label, read in expected.items():
            for name, cell in zip(columns, rows[label], strict=False):
                if cell != "-":
                    assert float(cell) == pytest.approx(read(load_named(name))), label
                    compared += 1
    for name, cell in zip(
        SPEC_LINEAR, rows["stage-2 base lr / absolute"], strict=False
    ):
        rate, peak = map(float, cell.split(" / "))
        config = load_named(name)
        assert config.optimizer.learning_rate == rate
        assert scaled_learning_rate(config) == pytest.approx(peak)
    for name, cell in zip(SPEC_COLUMNS, rows["stage-1 optimizer"], strict=True):
        assert load_named(name).optimizer.name == cell.lower()
    label = "steps/epoch; stage-1 steps; total"
    for name, cell in zip(SPEC_COLUMNS, rows[label], strict=True):
        first = cell.split("; ")[1]
        assert int(steps(load_named(name))) == int(first.replace(",", ""))
    assert compared == 6 * 6 - 2 + 3 * 4
