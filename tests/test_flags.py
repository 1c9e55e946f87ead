"""Numbers that no command can use are refused by every command, before anything is opened or written."""

from __future__ import annotations

import pytest

from polyrep import InputError
from polyrep.cli import main
from polyrep.flags import refuse_out_of_range
from polyrep.training import plan_of

HUGE = str(10**20)
EVERYWHERE = [("batch_size", "0"), ("batch_size", "-4"), ("batch_size", HUGE)]
MEASURED = [*EVERYWHERE, ("max_length", "0"), ("max_length", "-1"), ("seed", "-1"), ("settings_tried", "0")]
STEPS = [
    *(("learning_rate", value) for value in ("nan", "inf", "-0.1")),
    *(("num_train_epochs", value) for value in ("nan", "0", "-1", "inf")),
    *(("max_steps", value) for value in ("0", "-2")),
    *(("per_device_train_batch_size", value) for value in ("0", "-2")),
    *(("gradient_accumulation_steps", value) for value in ("0", "-1")),
    *(("seed", value) for value in ("-1", "4294967296")),
    *(("weight_decay", "-1"), ("max_grad_norm", "nan"), ("adam_beta2", "1"), ("warmup_steps", "-1")),
    *(("save_steps", "0"), ("logging_steps", "-1"), ("dataloader_num_workers", "-1")),
]
HEADS = [
    *(("encode_batch_size", "0"), ("max_length", "0"), ("depth", "0"), ("negatives", "-1")),
    *(("query_texts", "0"), ("cloze_sentences", "0"), ("regularizer_weight", "nan")),
]
WHOLE = [
    *(("mini_batch_size", "0"), ("score_mini_batch_size", "-1"), ("scale", "-1"), ("lora_rank", "-1")),
    *(("hard_negatives", "101"), ("negative_margin", "nan"), ("max_length", "-3")),
]
COMMANDS = {
    "encode MODEL --input x --output y": [*EVERYWHERE, ("shard_size", "-1"), ("shard_size", HUGE)],
    "evaluate MODEL --dataset x": MEASURED,
    "evaluate ONE TWO --dataset x --hybrid": [
        ("hybrid_weight", "-1"),
        ("hybrid_weight", "nan"),
        ("hybrid_weight", "inf"),
    ],
    "evaluate MODEL --frontier --dataset x": [*MEASURED, ("fit_seconds", "nan")],
    "calibrate MODEL --dataset x": [
        *EVERYWHERE,
        *(("depth", "0"), ("seed", "-1"), ("window", "0"), ("window", HUGE), ("stride", "-1")),
    ],
    "search words --uri faiss:///x": [("k", "0"), ("k", "-1"), ("k", HUGE), ("candidates", "0"), ("candidates", HUGE)],
    "train dense2sparse-minilm": [*STEPS, *HEADS],
    "train late-interaction-minilm": [*STEPS, *WHOLE],
}


@pytest.mark.parametrize(
    ("command", "flag", "value"), [(command, *one) for command, some in COMMANDS.items() for one in some]
)
def test_a_number_out_of_range_is_refused_by_flag_and_value(command, flag, value, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), f"--{flag}={value}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --{flag} ") and "is out of its range. Use " in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_flag_that_a_command_has_not_is_named(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main([*command.split(), "--no_such_flag", "7"])
    assert "unrecognized arguments: --no_such_flag 7" in capsys.readouterr().err


def test_recipes_and_code_are_held_to_the_same_ranges():
    with pytest.raises(InputError, match="--per_device_train_batch_size 2.5: is out of its range"):
        plan_of("late-interaction-minilm", per_device_train_batch_size=2.5)
    with pytest.raises(InputError, match="--learning_rate nan"):
        plan_of("late-interaction-minilm", learning_rate=float("nan"))


def test_what_is_no_number_has_no_range():
    refuse_out_of_range({"batch_size": None, "depth": "many", "max_length": {"query": 3}, "k": True, "other": -5})
