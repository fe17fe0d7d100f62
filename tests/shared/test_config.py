"""Settings: names, precedence, and a message for every mistake."""

import resource
import subprocess
import sys
from typing import Literal

import pytest
import yaml
from pydantic import ValidationError, model_validator

from shared.config import (
    RunSection,
    Section,
    TrainingSection,
    accumulation_steps,
    check_resume,
    config_digest,
    fixed_settings,
    load_config,
    load_saved,
    save_config,
    setting,
)
from shared.errors import UserError, command
from tests.launching import ENVIRONMENT, ROOT


class ModelConfig(Section):
    fixed_on_resume = True
    size: Literal["tiny", "small"] = setting("tiny", "size of the model")
    width: int = setting(64, "channels", "hidden_size", ge=1)
    heads: int = setting(4, "attention heads", ge=1)
    patch: Literal[1, 2, 4] = setting(2, "pixels a patch")
    amplify: bool = setting(True, "whether to amplify")
    sizes: list[int] = setting([8, 16], "picture sides")
    words: list[str] | None = setting(None, "words to keep")
    table: dict[str, int] = setting({}, "numbers by name")
    secret: int = setting(0, "not on the command line", hidden=True)

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class DataConfig(Section):
    width: int = setting(32, "pixels")
    root: str | None = setting(None, "folder")


class Config(Section):
    run: RunSection = RunSection()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingSection = TrainingSection()


@pytest.fixture
def presets(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "small.yaml").write_text("training: {batch_size: 4, lr: 5e-5}\nmodel: {heads: 2}\n")
    (folder / "large.yaml").write_text("training: {batch_size: 64}\n")
    return folder


def load(*argv, **options) -> Config:
    return load_config(Config, argv=list(argv), **options)


def refusal(*argv, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(*argv, **options)
    return str(caught.value)


def from_yaml(presets, text, *argv) -> Config:
    (presets / "own.yaml").write_text(text)
    return load("--config", "own", *argv, presets=presets)


def yaml_refusal(presets, text, *argv) -> str:
    (presets / "own.yaml").write_text(text)
    return refusal("--config", "own", *argv, presets=presets)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag",
    ["--batch-size", "--batch_size", "--training.batch-size", "--training.batch_size"],
)
def test_every_spelling_of_a_flag_is_one_setting(flag):
    assert load(flag, "7").training.batch_size == 7
    assert load(f"{flag}=7").training.batch_size == 7


def test_none_is_a_strategy_and_not_the_default():
    """Two ranks with --strategy none trained under ddp, as if nothing had been said."""
    assert load("--strategy", "none").run.strategy == "none" and load("--strategy", "null").run.strategy is None


def test_further_names_work_in_flags_and_yaml(presets):
    assert load("--lr", "0.5").training.learning_rate == 0.5
    assert load("--hidden_size", "8").model.width == load("--hidden-size", "8").model.width == 8
    assert from_yaml(presets, "training: {lr: 0.25}\nmodel: {hidden_size: 16}").model.width == 16


def test_a_flag_replaces_the_further_name_in_the_file(presets):
    assert load("--config", "small", "--learning-rate", "1e-3", presets=presets).training.learning_rate == 1e-3


def test_two_names_of_one_setting_in_one_file_are_refused(presets):
    message = yaml_refusal(presets, "training: {lr: 1, learning_rate: 2}")
    assert "'learning_rate' and 'lr' are two names of one setting" in message


def test_a_short_name_of_two_settings_has_only_dotted_flags():
    config = load("--model.width", "8", "--data.width", "9")
    assert (config.model.width, config.data.width) == (8, 9)
    message = refusal("--width", "8")
    assert "--model.width or --data.width" in message


def test_an_alias_spells_another_flag_in_both_ways(presets):
    aliases = {"--config_path": "--config", "--steps": "--max-steps"}
    for flag in ("--config_path", "--config-path"):
        assert load(flag, "large", presets=presets, aliases=aliases).training.batch_size == 64
    assert load("--steps", "3", aliases=aliases).training.max_steps == 3


def test_a_hidden_setting_has_no_flag_but_can_be_set():
    assert "no such flag" in refusal("--secret", "1")
    assert load("--set", "model.secret=1").model.secret == 1


def test_set_takes_dotted_and_further_names():
    assert load("--set", "training.batch_size=3").training.batch_size == 3
    assert load("--set", "training.lr=0.5", "--set", "grad_clip=none").training.learning_rate == 0.5
    assert "expected section.key=value" in refusal("--set", "training.lr")
    assert "did you mean training.lr?" in refusal("--set", "trainin.lr=1")
    assert "model.width, data.width" in refusal("--set", "width=1")


# --- precedence -------------------------------------------------------------------------------------------------------


def test_defaults_then_preset_then_flags(presets):
    assert load().training.batch_size == 32
    config = load("--config", "small", "--batch-size", "9", presets=presets)
    assert (config.training.batch_size, config.training.learning_rate, config.model.heads) == (9, 5e-5, 2)
    assert load(presets=presets, default="small").training.batch_size == 4
    assert load("--batch-size", "1", "--batch-size", "2").training.batch_size == 2


def test_a_file_is_read_in_place_of_a_preset(presets, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("training: {batch_size: 5}")
    assert load("--config", str(path), presets=presets).training.batch_size == 5
    assert load("--config", "large.yaml", presets=presets).training.batch_size == 64
    assert load_config(Config, argv=["--seed", "3"], presets=None, default="small").run.seed == 3


def test_any_json_is_read_also_by_its_bare_name(presets, tmp_path, monkeypatch):
    text = '{\n\t"model": {\n\t\t"table": {"a\\/b": 1, "c\\\\/d": 2},\n\t\t"width":\t96\n\t}\n}\n'
    (tmp_path / "mine.json").write_text(text)
    monkeypatch.chdir(tmp_path)
    config = load_config(Config, presets=presets, argv=["--config", "mine.json"])
    assert config.model.width == 96 and config.model.table == {"a/b": 1, "c\\/d": 2}


def test_no_setting_leaks_from_one_config_into_the_next():
    first = load("--sizes", "1")
    first.training.batch_size = 1
    first.model.sizes.append(2)
    assert load().training.batch_size == 32 and load().model.sizes == [8, 16]


# --- values -----------------------------------------------------------------------------------------------------------


def test_numbers_as_yaml_and_flags_write_them(presets):
    assert from_yaml(presets, "training: {learning_rate: 5e-5}").training.learning_rate == 5e-5
    assert load("--learning-rate", "5e-5").training.learning_rate == 5e-5
    assert load("--patch", "4").model.patch == 4
    assert load("--run-name", "2024").run.run_name == "2024"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], True),
        (["--amplify"], True),
        (["--amplify", "false"], False),
        (["--no-amplify"], False),
        (["--amplify", "--no_amplify"], False),
        (["--no-amplify", "--amplify"], True),
        (["--set", "amplify=no"], False),
    ],
)
def test_booleans(argv, expected):
    assert load(*argv).model.amplify is expected


def test_null_is_for_optional_settings_only():
    assert load("--max-grad-norm", "none").training.max_grad_norm is None
    assert load("--save-steps", "null").training.save_steps is None
    assert load("--words", "none").model.words is None
    assert "run.seed" in refusal("--seed", "none")
    assert load("--output-dir", "none").run.output_dir == "none"


@pytest.mark.parametrize("argv", [["1", "2", "3"], ["1,2,3"], ["[1, 2, 3]"], ["1, 2, 3"]])
def test_lists_with_spaces_or_commas(argv):
    assert load("--sizes", *argv).model.sizes == [1, 2, 3]


def test_a_sentence_is_not_cut_at_its_commas():
    assert load("--words", "a cat, asleep", "a dog").model.words == ["a cat, asleep", "a dog"]
    assert load("--words", "a cat, asleep").model.words == ["a cat, asleep"]
    assert load("--words", "cat,dog").model.words == ["cat", "dog"]
    assert load("--set", "words=[cat, dog]").model.words == ["cat", "dog"]


class _Words(Section):
    data_root: str | None = setting("datasets", "a folder")
    prompt: str | None = setting(None, "words")
    negative: str = setting("", "words")


@pytest.mark.parametrize("argv", [["--data-root", ""], ["--data-root= "], ["--set", "data_root="]])
def test_an_empty_place_is_not_one_that_was_left_out(argv):
    with pytest.raises(UserError, match="--data-root is empty, as with a shell variable that is not set"):
        load_config(_Words, argv=argv)


def test_words_for_a_model_may_be_empty():
    assert load_config(_Words, argv=["--prompt", "", "--negative", ""]).model_dump() == {
        "data_root": "datasets",
        "prompt": "",
        "negative": "",
    }


def test_mappings_are_read_as_yaml():
    assert load("--table", "{a: 1, b: 2}").model.table == {"a": 1, "b": 2}
    assert "not readable as YAML" in refusal("--table", "{a: 1")


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--batch-size", "0"], ["command line: training.batch_size:", "greater than or equal to 1", "'0'"]),
        (["--batch-size", f"{10**20}"], ["command line: training.batch_size:", "less than or equal to 1000000"]),
        (["--grad-accum", f"{10**9}"], ["training.gradient_accumulation_steps:", "less than or equal to 1000000"]),
        (
            ["--total-steps", f"{10**30}"],
            ["training.total_steps:", "less than or equal to 1000000000000", f"'{10**30}'"],
        ),
        (["--lr", "1e300"], ["training.learning_rate:", "less than or equal to 100", "'1e300'"]),
        (["--batch-size", "x"], ["training.batch_size:", "valid integer", "'x'"]),
        (["--batch-size", "16.5"], ["training.batch_size:", "'16.5'"]),
        (["--size", "huge"], ["model.size:", "'tiny' or 'small'", "'huge'"]),
        (["--patch", "3"], ["model.patch:", "1, 2 or 4", "'3'"]),
        (["--lr", "nan"], ["training.learning_rate:", "finite", "'nan'"]),
        (["--lr", "inf"], ["training.learning_rate:", "finite", "'inf'"]),
        (["--amplify", "perhaps"], ["model.amplify:", "'perhaps'"]),
        (["--lr"], ["--lr", "expected one argument"]),
        (["--nope", "3"], ["--nope: no such flag"]),
        (["--batch-siz", "3"], ["--batch-siz: no such flag; did you mean --batch-size?"]),
        (["--batch", "3"], ["--batch: no such flag"]),  # abbreviations are not taken
        (["small"], ["small: not expected here"]),
        (["--heads", "5"], ["model: width 64 is not divisible by heads 5"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(argv, parts):
    message = refusal(*argv)
    assert all(part in message for part in parts) and "\n" not in message, message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training: {batchsize: 3}", ["own.yaml: training.batchsize: unknown setting; did you mean batch_size?"]),
        ("trainig: {}", ["own.yaml: trainig: unknown setting; did you mean training?"]),
        ("training: {batch_size: 0}", ["own.yaml: training.batch_size:", "(got 0)"]),
        ("training: {learning_rate: .nan}", ["training.learning_rate:", "finite"]),
        ("training: {batch_size: yes}", ["batch_size is True", "yes, no, on and off"]),
        ("training:\n  batch_size: 1\n  batch_size: 2\n", ["duplicate key 'batch_size'", "line 3"]),
        ("training: {}\nmodel: {}\ntraining: {}\n", ["duplicate key 'training'", "line 3"]),
        ("training: 3", ["training: expected a section with keys (got 3)"]),
        ("on: {}", ["True", "quote it"]),
        ("- 1", ["expected sections with keys, found list"]),
        ("a: b: c", ["own.yaml: not readable as YAML", "line 1"]),
        ("? [a]\n: 1", ["own.yaml: not readable as YAML"]),
        ("model: {heads: 5}", ["own.yaml: model: width 64 is not divisible by heads 5"]),
    ],
)
def test_a_mistake_in_a_file_names_the_file(presets, text, parts):
    message = yaml_refusal(presets, text)
    assert all(part in message for part in parts) and "\n" not in message, message


def test_every_mistake_is_listed_with_its_place(presets):
    lines = yaml_refusal(presets, "training: {batch_size: 0}\nmodel: {depth: 3}", "--lr", "-1").splitlines()
    assert len(lines) == 3
    assert any("own.yaml: training.batch_size" in line for line in lines)
    assert any("own.yaml: model.depth" in line for line in lines)
    assert any("command line: training.learning_rate" in line and "own.yaml" not in line for line in lines)


def test_a_fault_between_flag_and_file_names_both(presets):
    assert "command line or" in yaml_refusal(presets, "model: {width: 63}", "--heads", "2")


def test_missing_presets_and_files(presets, tmp_path):
    message = refusal("--config", "smal", presets=presets)
    assert "did you mean small?" in message and "large, small" in message
    assert "no such file" in refusal("--config", str(tmp_path / "nothing.yaml"), presets=presets)
    assert "a folder" in refusal("--config", str(tmp_path) + "/", presets=presets)


def test_assignment_is_checked_too():
    config = load()
    with pytest.raises(ValidationError):
        config.training.batch_size = 0
    with pytest.raises(ValidationError):
        config.training.batchsize = 1


def test_a_mistake_ends_main_with_exit_code_2(capsys):
    @command
    def main(argv=None):
        load(*argv)

    with pytest.raises(SystemExit) as ended:
        main(["--batch-size", "0"])
    printed = capsys.readouterr()
    assert ended.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and len(printed.err.splitlines()) == 1


# --- derived numbers --------------------------------------------------------------------------------------------------


def training(**values) -> TrainingSection:
    return TrainingSection(**values)


def test_a_global_batch_fixes_the_accumulation():
    assert accumulation_steps(training(batch_size=4, gradient_accumulation_steps=3), 2) == 3
    assert accumulation_steps(training(batch_size=4, global_batch_size=24, gradient_accumulation_steps=5), 2) == 3


@pytest.mark.parametrize(("batch", "total", "world"), [(5, 24, 2), (32, 16, 1), (7, 64, 4), (64, 96, 2)])
def test_a_global_batch_that_does_not_divide_names_values_that_would(batch, total, world):
    with pytest.raises(UserError) as caught:
        accumulation_steps(training(batch_size=batch, global_batch_size=total), world)
    message = str(caught.value)
    assert f"global_batch_size {total}" in message and f"{batch} x {world} ranks" in message
    sizes, whole = message.split("--batch-size ")[1].split(", or --global-batch-size ")
    for size in map(int, sizes.split(", ")):
        assert accumulation_steps(training(batch_size=size, global_batch_size=total), world) >= 1
    assert accumulation_steps(training(batch_size=batch, global_batch_size=int(whole)), world) >= 1


def test_a_global_batch_that_no_batch_size_fits():
    with pytest.raises(UserError, match="no batch size fits 3 ranks, or --global-batch-size 12"):
        accumulation_steps(training(batch_size=4, global_batch_size=10), 3)


# --- saved settings ---------------------------------------------------------------------------------------------------


def test_saved_settings_come_back_equal(tmp_path):
    config = load("--lr", "5e-5", "--run-name", "2024", "--words", "no", "yes", "--max-grad-norm", "none")
    save_config(config, tmp_path / "config.yaml")
    assert load_saved(Config, tmp_path / "config.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"training": {"lr": "x"}}))
    with pytest.raises(UserError, match="config.yaml: training"):
        load_saved(Config, tmp_path / "config.yaml")


def test_resume_refuses_what_changes_the_model_or_the_order_and_nothing_else():
    old = load()
    assert (
        check_resume(fixed_settings(old), fixed_settings(load("--lr", "1", "--max-steps", "3", "--device", "cpu")))
        == []
    )
    differing = check_resume(fixed_settings(old), fixed_settings(load("--seed", "7", "--model.width", "128")))
    assert len(differing) == 2
    assert any("run.seed was 42, is 7" in text for text in differing)
    assert any("model.width was 64, is 128" in text for text in differing)
    assert config_digest(old) == config_digest(load("--lr", "1")) != config_digest(load("--seed", "7"))


# --- start-up ---------------------------------------------------------------------------------------------------------

TOY = """
import sys
from shared.config import RunSection, Section, TrainingSection, load_config
class Config(Section):
    run: RunSection = RunSection()
    training: TrainingSection = TrainingSection()
try:
    load_config(Config, description="A toy.")
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


def test_help_imports_no_torch_and_takes_little_time(tmp_path):
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr.split() == ["False"]
    assert "peak learning rate (default: 0.0001)" in done.stdout and "--lr" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_every_setting_has_a_help_text():
    fields = [*RunSection.model_fields.items(), *TrainingSection.model_fields.items()]
    assert all(field.description for _, field in fields)
