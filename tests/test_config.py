"""A config is complete and strict: every mistake is told, all at once, where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lbdet.config import Config, dump_config, load_config, weight_format
from lbdet.errors import UserError
from lbdet.precision import FLOAT, Precision
from lbdet.schedules import Constant, Cyclic, Progressive, Stochastic, TwoStage

TEXT = """
model: {name: ssd_tiny, weights: null}
data: {name: voc, root: datasets/x, train: ["2012:train"], val: ["2012:val"], classes: voc20}
quantizer:
  weight: {format: lbw, solver: semi, ratio: 0.7, granularity: per_tensor}
  overrides: {"head.*": {precision: W8, weight: {format: uniform}}}
  keep_float: ["backbone.0"]
schedule: {target: W4}
train: {epochs: 3, lr: 5e-4}
"""


@pytest.fixture
def load(tmp_path: Path):
    """Load a config from its text."""

    def run(text: str = TEXT, *settings: str) -> Config:
        (tmp_path / "x.yaml").write_text(text)
        return load_config(tmp_path / "x.yaml", settings)

    return run


@pytest.fixture
def mistakes(load, tmp_path: Path):
    """Return the lines that tell what is wrong, without the file's name, which each line begins with."""

    def run(text: str = TEXT, *settings: str) -> list[str]:
        with pytest.raises(UserError) as caught:
            load(text, *settings)
        where = f"{tmp_path / 'x.yaml'}: "
        lines = str(caught.value).splitlines()
        assert all(line.startswith(where) for line in lines), lines
        return [line.removeprefix(where) for line in lines]

    return run


def test_what_is_left_out_has_its_default(load):
    config = load()
    assert config.train.lr == 5e-4
    assert (config.train.epochs, config.train.batch_size, config.seed, config.eval.max_images) == (
        3,
        16,
        0,
        None,
    )
    assert config.schedule.target == Precision(4)
    assert config.quantizer.overrides["head.*"].precision == Precision(8)
    minimal = {**yaml.safe_load(TEXT)}
    del minimal["quantizer"], minimal["train"]
    assert weight_format(load(yaml.safe_dump(minimal)).quantizer.weight).options == {
        "solver": "exact", "granularity": "per_channel",
    }  # fmt: skip


def test_a_dumped_config_comes_back_as_it_was(load):
    for settings in (
        [],
        ["quantizer.weight.format=uniform"],
        ["schedule.target=float", "data.classes=[a, b]"],
    ):
        config = load(TEXT, *settings)
        text = dump_config(config)
        assert load(text) == config
        assert dump_config(load(text)) == text
    assert yaml.safe_load(dump_config(load()))["schedule"]["target"] == "W4"


def test_all_mistakes_are_told_at_once_with_the_closest_name(mistakes):
    text = """
model: {nam: x, weigts: y, batch_norm: frozn}
data: {name: voc, trian: [a], root: r, val: [v], classes: 5}
schedul: {target: W4}
train: {epochs: -1, lr: 0, optimiser: sgd, batch_size: 1.5, amp: 7}
quantizer: {overrides: {"head.*": {precison: W8, weight: {format: lbw, solvr: semi}}}}
"""
    assert set(mistakes(text)) == {
        "model.name: must be given",
        "model.nam: unknown key; closest: 'name'",
        "model.weigts: unknown key; closest: 'weights'",
        "model.batch_norm: must be 'train' or 'frozen', got 'frozn'",
        "data.train: must be given",
        "data.trian: unknown key; closest: 'train'",
        "data.classes: must be a name, a file or a list of names, got 5",
        "schedule: must be given",
        "schedul: unknown key; closest: 'schedule'",
        "train.epochs: must be greater than or equal to 0, got -1",
        "train.lr: must be greater than 0, got 0",
        "train.optimiser: unknown key; closest: 'optimizer'",
        "train.batch_size: must be a whole number, got 1.5",
        "train.amp: must be true or false, got 7",
        "quantizer.overrides.head.*.precison: unknown key; closest: 'precision'",
        "quantizer.overrides.head.*.weight.solvr: unknown key; closest: 'solver'",
    }


MISTAKES = {
    "guidance={}":
        "guidance: a term must have a weight, got none; give logits: 1, boxes: 1 or features: 1",
    "guidance={features: 1}": "guidance: features and taps belong together, got features 1.0 and taps []",
    "guidance={logits: 1, taps: [backbone]}":
        "guidance: features and taps belong together, got features 0.0 and taps ['backbone']",
    "guidance={name: mutual, logits: 1}": "guidance.name: must be 'teacher' or 'joint', got 'mutual'",
    "schedule.name=two-stage":
        "schedule.name: must be one of 'constant', 'two_stage', 'progressive', 'cyclic', got 'two-stage'; "
        "closest: 'two_stage'",
    "schedule.share=0.5": "schedule.share: unknown key; closest: 'target'",
    "schedule={name: two_stage, target: W4, share: 1}": "schedule.share: must be less than 1, got 1",
    "schedule={name: progressive, target: W4}": "schedule.through: must be given",
    "schedule={name: progressive, target: W4, through: [W5, w3]}":
        "schedule.through.1: precision must be 'float' or like W4, W4A8, got 'w3'; write for instance W4",
    "schedule={name: progressive, target: W4, through: [W5], shares: [1]}":
        "schedule: shares must be one a width (2), got 1",
    "schedule={name: progressive, target: W4, through: [W8]}":
        "schedule: format 'lbw' has no 8-bit weights, got W8; it has W2 to W6",
    "schedule={name: cyclic, target: W4, start: W3}":
        "schedule: start must be at least as wide as target W4, got W3",
    "schedule={name: cyclic, target: W4A4, start: W6}":
        "schedule: start must quantize what target W4A4 does, got W6",
    "train.lr_milestones=[0.5, 60]": "train.lr_milestones.1: must be less than 1, got 60",
    "schedule={target: W4, stochastic: {untli: 1}}":
        "schedule.stochastic.untli: unknown key; closest: 'until'",
    "schedule.phase_change={ranges: keep}":
        "schedule.phase_change.ranges: must be 'calibrate' or 'rescale', got 'keep'",
    "guidance={logit: 1}": "guidance.logit: unknown key; closest: 'logits'",
    "train.epochs=abc": "train.epochs: must be a whole number, got 'abc'",
    "train.epochs=yes": "train.epochs: must be a whole number, got True",
    "train.lr=on": "train.lr: must be a number, got True",
    "seed=no": "seed: must be a whole number, got False",
    "train.lr=.nan": "train.lr: must be a finite number, got nan",
    "train.lr=.inf": "train.lr: must be a finite number, got inf",
    "train.lr=1e300": "train.lr: must be less than or equal to 1000000000000000000000000000000, got '1e300'",
    "train.lr=[1]": "train.lr: must be a number, got [1]",
    "train.ema=1": "train.ema: must be less than 1, got 1",
    "seed=99999999999999999999": "seed: must be less than 9223372036854775808, got 99999999999999999999",
    "data.train=2012:train": "data.train: must be a valid list, got '2012:train'",
    "data.train=[]": "data.train: must not be empty, got []",
    "data.score_classes=[]": "data.score_classes: must not be empty, got []",
    "data.classes=[1, yes]": "data.classes: must be a name, a file or a list of names, got [1, True]",
    "schedule=W4": "schedule: must be a mapping of keys, got 'W4'",
    "schedule.target=4": "schedule.target: must be 'float' or like W4, got 4",
    "schedule.target={weight_bits: 4}": "schedule.target: must be 'float' or like W4, got {'weight_bits': 4}",
    "schedule.target=w4":
        "schedule.target: precision must be 'float' or like W4, W4A8, got 'w4'; write for instance W4",
    "schedule.target=W1": "schedule.target: format 'lbw' has no 1-bit weights, got W1; it has W2 to W6",
    "schedule.target=W7": "schedule.target: format 'lbw' has no 7-bit weights, got W7; it has W2 to W6",
    "schedule.target=W4A9":
        "schedule.target: format 'uniform' has no 9-bit activations, got W4A9; it has A1 to A8",
    "quantizer.overrides={a: {precision: W8}}":
        "quantizer.overrides.a: format 'lbw' has no 8-bit weights, got W8; it has W2 to W6",
    "quantizer.overrides=[a]": "quantizer.overrides: must be a mapping of keys, got ['a']",
    "quantizer.weight.solver=exact":
        "quantizer.weight: ratio is for solver 'semi', got solver 'exact'; leave it out",
    "quantizer.weight.format=unifrom":
        "quantizer.weight.format: must be one of 'lbw', 'uniform', 'dorefa', 'binary', 'learned_levels', "
        "got 'unifrom'; closest: 'uniform'",
    "quantizer.activation.format=lbw":
        "quantizer.activation.format: must be one of 'uniform', 'dorefa', 'binary', got 'lbw'",
    "quantizer.activation={format: uniform, objectiv: mse}":
        "quantizer.activation.objectiv: unknown key; closest: 'objective'",
    "quantizer.activation={format: dorefa, clip: -1}":
        "quantizer.activation.clip: must be positive or 'learned', got -1",
    "quantizer.weight={format: uniform, scale: max, symmetric: false}":
        "format 'uniform': scale 'max' is symmetric, got symmetric: false; use scale 'learned'",
    "quantizer.weight={solver: semi}":
        "quantizer.weight.format: must be one of 'lbw', 'uniform', 'dorefa', 'binary', 'learned_levels', "
        "got None",
    "quantizer.weight=null": "quantizer.weight: must be a mapping of keys, got None",
    "1=2": "1: unknown key; keys here: model, data, quantizer, schedule, guidance, train, eval, seed",
}  # fmt: skip


@pytest.mark.parametrize("setting", MISTAKES)
def test_a_value_that_is_none_is_told_with_its_key(mistakes, setting):
    assert mistakes(TEXT, setting) == [MISTAKES[setting]]


def test_a_format_alone_is_an_override(load):
    override = load(TEXT, "quantizer.overrides={a: {weight: {format: uniform}}}").quantizer.overrides["a"]
    assert override.precision is None
    assert override.weight is not None


def test_long_values_are_cut(mistakes):
    (line,) = mistakes(TEXT, f"train.epochs={'x' * 999}")
    assert len(line) < 120


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be a mapping of sections, got NoneType"),
        ("- a", "must be a mapping of sections, got list"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' stands twice in one mapping; remove one"),
        ("a: {b: 1, b: 2}", "line 1, column 11: key 'b' stands twice in one mapping; remove one"),
        ("a: &x [1]\nb: *x", "line 2, column 4: aliases are not allowed; write the value again"),
        ("a: [1", "line 1, column 6: expected ',' or ']', but got '<stream end>'"),
        ("a:\tb: c", "line 1, column 3: found character '\\t' that cannot start any token"),
        ("? [1]\n: 2", "line 1, column 3: keys must be texts, got [1]"),
        ("a: 2020-99-99", "is not YAML: month must be in 1..12"),
        ("a: \0", "is not YAML: unacceptable character #x0000: special characters are not allowed"),
        ("1: 2\n" + TEXT, "line 1, column 1: keys must be texts, got 1"),
    ],
)
def test_a_file_that_is_no_config_is_told_with_the_line(mistakes, text, message):
    (line,) = mistakes(text)
    assert line.startswith(message)


def test_hostile_yaml_runs_no_code_and_takes_no_memory(mistakes, tmp_path):
    (line,) = mistakes(f"a: !!python/object/apply:os.mkdir [{tmp_path / 'was_here'}]")
    assert "tags are not allowed, got 'tag:yaml.org,2002:python/object/apply:os.mkdir'" in line
    for tagged in ("!!timestamp v", "!!bool x", "!!int ''", "!!float x", "!!set {a}", "!x y"):
        assert "tags are not allowed, got " in mistakes(f"a: {tagged}")[0]
    assert not (tmp_path / "was_here").exists()
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += f"{new}: &{new} [" + f"*{old}, " * 9 + "]\n"
    assert "aliases are not allowed" in mistakes(bomb)[0]
    assert "values must not be nested so deeply" in mistakes("a: " + "[" * 5000)[0]


def test_a_file_in_another_encoding_is_told(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match=r"x\.yaml: is not YAML: 'utf-8' codec can't decode"):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("path", "why"), [("none.yaml", "No such file or directory"), (".", "Is a directory")]
)
def test_a_file_that_cannot_be_read_is_told(tmp_path, path, why):
    with pytest.raises(UserError, match=f"cannot be read: {why}"):
        load_config(tmp_path / path)


def test_settings_override_keys_with_values_in_yaml(load):
    config = load(
        TEXT, "train.epochs=1", "train.max_steps=null", "data.classes=[a, b]", "train.amp=true",
        "eval.max_images=5", "model.weights=a=b.pth", "train.lr=1e-2", "train.lr=0.5",
    )  # fmt: skip
    assert (config.train.epochs, config.train.max_steps, config.train.amp) == (1, None, True)
    assert (config.data.classes, config.eval.max_images, config.model.weights) == (["a", "b"], 5, "a=b.pth")
    assert config.train.lr == 0.5  # the last one counts


@pytest.mark.parametrize("setting", ["train.epochs", "=1", "", ".=1", "train.=1", "train..epochs=1"])
def test_a_setting_of_another_form_is_told(load, setting):
    with pytest.raises(UserError) as caught:
        load(TEXT, setting)
    assert str(caught.value) == f"--set: must be like train.epochs=1, got {setting!r}"


@pytest.mark.parametrize("value", ["[1", "{a: 1, a: 2}", "*x", "2020-99-99", "1" * 5000])
def test_a_setting_whose_value_is_not_yaml_is_told(load, value):
    with pytest.raises(UserError, match=r"--set 'train.epochs="):
        load(TEXT, f"train.epochs={value}")


def test_a_format_set_by_name_drops_the_keys_of_the_one_it_replaces(load):
    uniform = load(TEXT, "quantizer.weight.format=uniform")
    assert weight_format(uniform.quantizer.weight).options == {
        "granularity": "per_channel",
        "scale": "learned",
        "symmetric": True,
    }
    same = load(TEXT, "quantizer.weight.format=lbw")
    assert same == load()
    both = load(TEXT, "quantizer.weight.format=uniform", "quantizer.weight.granularity=per_tensor")
    assert weight_format(both.quantizer.weight).options["granularity"] == "per_tensor"


def test_what_a_setting_gave_is_not_dropped_by_a_later_one(load):
    early = load(TEXT, "quantizer.weight.granularity=per_tensor", "quantizer.weight.format=uniform")
    assert early == load(TEXT, "quantizer.weight.format=uniform", "quantizer.weight.granularity=per_tensor")
    assert load(TEXT, "schedule.share=0.3", "schedule={name: two_stage, target: W4A4}").schedule.share == 0.5
    staged = load(TEXT, "schedule.share=0.3", "schedule.target=W4A4", "schedule.name=two_stage")
    assert staged.schedule.share == 0.3
    with pytest.raises(
        UserError, match=r"quantizer\.weight\.granularty: unknown key; closest: 'granularity'"
    ):
        load(TEXT, "quantizer.weight.granularty=per_tensor", "quantizer.weight.format=uniform")


SCHEDULES = {
    "{name: two_stage, target: W4A4, share: 0.25}": TwoStage(Precision(4, 4), 0.25),
    "{name: progressive, through: [float, W5], target: W4, shares: [1, 1, 2], two_stage: true}":
        Progressive((FLOAT, Precision(5), Precision(4)), (1, 1, 2), True),
    "{name: cyclic, start: W5A6, target: W4A4, cycles: 3}": Cyclic(Precision(5, 6), Precision(4, 4), 3),
    "{target: W4, stochastic: {first: 0.2, until: 0.9}}": Stochastic(Constant(Precision(4)), 0.2, 0.9, 7),
}  # fmt: skip


@pytest.mark.parametrize("text", SCHEDULES)
def test_a_schedule_is_built_as_written_and_survives_the_run_folder(load, text, tmp_path):
    config = load(TEXT, f"schedule={text}")
    assert config.schedule.build(7) == SCHEDULES[text]
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_a_schedule_set_by_name_keeps_what_every_schedule_has_and_drops_the_rest(load):
    change = {"ranges": "rescale"}
    cyclic = f"schedule={{name: cyclic, start: W5, target: W2, phase_change: {change}, stochastic: {{}}}}"
    config = load(TEXT, cyclic, "schedule.name=two_stage")
    assert config.schedule.build() == Stochastic(TwoStage(Precision(2)))
    assert config.schedule.phase_change.ranges == "rescale"


def test_float_needs_no_width_of_the_format(load):
    assert load(TEXT, "schedule.target=float").schedule.target == FLOAT


@pytest.mark.parametrize(
    ("format", "target"), [("lbw", "W2"), ("lbw", "W6"), ("uniform", "W2"), ("uniform", "W8")]
)
def test_every_width_of_a_format_is_accepted(load, format, target):
    config = load(TEXT, f"quantizer.weight.format={format}", f"schedule.target={target}")
    assert str(config.schedule.target) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "line 1, column 21: values must not be nested so deeply"),
        ("- " * 100_000, "line 1, column 41: values must not be nested so deeply"),
        ("a: " + "x" * (1 << 18), "cannot be read: a file of more than 256 KiB"),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document in the stream, but found another"),
    ],
)
def test_what_would_take_long_is_refused_at_once(mistakes, text, message):
    (line,) = mistakes(text)
    assert line.startswith(message)


def test_numbers_of_thousands_of_digits_are_told_and_not_counted_to(mistakes):
    huge = f"0x{'f' * 5000}"
    assert mistakes(TEXT, f"seed={huge}")[0].startswith(
        "seed: must be less than 9223372036854775808, got a huge int"
    )
    assert mistakes(TEXT, "schedule={name: cyclic, start: W999999999, target: W4}")[0].startswith(
        "schedule.start: must have at most 32 bits, got W999999999"
    )
    assert mistakes(TEXT, f"schedule.target=W{'9' * 5000}")[0].startswith(
        "schedule.target: must be 'float' or like W4, got 'W999"
    )
    assert mistakes(TEXT, "schedule={name: cyclic, start: W5, target: W4, cycles: 1000000000000}")[
        0
    ].startswith("schedule.cycles: must be less than or equal to 1000")


def test_foreign_text_is_shown_in_one_printable_line(mistakes):
    assert mistakes(TEXT + '"a\\nb\\e[2J": 1\n')[0].startswith(r"a\nb\x1b[2J: unknown key")


def test_thousands_of_mistakes_are_counted_and_thirty_shown(mistakes):
    lines = mistakes(TEXT + "".join(f"k{k}: 1\n" for k in range(5000)))
    assert len(lines) == 31
    assert lines[-1] == "... and 4970 more"
