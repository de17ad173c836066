"""What a run shows while it goes: a line that fits a terminal, and lines that can be searched."""

import io
import json
import re
import sys

import pytest

from mistral_jax.training import display

LONG = {
    "step": 123450,
    "steps": 850000,
    "loss": 12.345678,
    "grad_norm": 0.98765,
    "accuracy": 0.75,
    "margin": -0.25,
    "skipped": 0,
    "learning_rate": 3e-4,
    "tokens": 10**10,
    "seconds": 1e5,
    "tokens_per_second": 123456.7,
    "mfu": 0.4149,
    "memory": 123_400_000_000,
}
SAMPLES = {"step": 20, "samples": [{"prompt": "def f(", "text": 'x):\n    """[bold]\x1b[2J'}]}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def on_terminal(monkeypatch):
    """Shows entries on a terminal of 100 columns; returns what it was sent, without colours."""

    def show(*entries, steps=None):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        with display.show(steps) as report:
            for entry in entries:
                report(entry)
        return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", terminal.getvalue())

    return show


def plain(capsys, *entries):
    with display.show() as report:
        for entry in entries:
            report(entry)
    return capsys.readouterr().err.splitlines()


def test_a_plain_line_tells_in_units_of_people(capsys):
    (line,) = plain(capsys, LONG)
    assert line == (
        "step 123450  loss 12.35  grad norm 0.9877  accuracy 0.75  margin -0.25  "
        "learning rate 0.0003  123k tokens/s  41% MFU  123 GB"
    )


def test_a_plain_line_is_of_every_tenth_step_and_the_last(capsys):
    entries = [{"step": step, "steps": 23, "loss": 1.0} for step in range(1, 24)]
    lines = plain(capsys, *entries, {"step": 23, "validation_loss": 1.0})
    assert [int(line.split()[1]) for line in lines] == [10, 20, 23, 23]


def test_plain_lines_tell_what_else_there_is(capsys):
    entries = (
        {"step": 10, "validation_loss": 4.5, "validation_accuracy": 0.5},
        {"step": 20, "loss": None, "skipped": 3},
        SAMPLES,
    )
    assert plain(capsys, *entries) == [
        "step 10  validation loss 4.5  validation accuracy 0.5",
        "step 20  loss not finite  skipped 3",
        r'step 20  sample  "def f(" "x):\n    \"\"\"[bold]\u001b[2J"',
    ]


def test_the_time_left_is_at_the_pace_since_this_start(capsys):
    """What a run has taken before does not count, compilation before the first line neither."""
    lines = plain(
        capsys,
        {"step": 510, "steps": 1000, "loss": 1.0, "seconds": 9000.0},
        {"step": 510, "validation_loss": 1.0},
        {"step": 520, "steps": 1000, "loss": 1.0, "seconds": 9020.0},
        {"step": 700, "steps": 1000, "loss": 1.0, "seconds": 9000.0 + 190 * 60},
        {"step": 1000, "steps": 1000, "loss": 1.0, "seconds": 99999.0},
    )
    left = [line.partition("loss 1")[2].strip() for line in lines]
    assert left == ["", "", "16:00 left", "5:00:00 left", ""]


def test_a_bar_has_all_on_one_line_of_100_columns(on_terminal):
    later = LONG | {"step": 123460, "seconds": 1e5 + 0.5}
    shown = on_terminal(LONG, later)
    told = "123460/850000 loss 12.35  123k tokens/s  41% MFU  123 GB  10:05:27 left"
    lines = [line for line in re.split(r"[\r\n]+", shown) if told in line]
    assert lines
    assert max(map(len, lines)) <= 100


def test_a_bar_stands_below_what_stays(on_terminal):
    entries = (
        {"step": 0, "validation_loss": 9.0},
        LONG | {"skipped": 2},
        {"step": 20, "validation_loss": 4.5},
        SAMPLES,
    )
    lines = [line.strip() for line in re.split(r"[\r\n]+", on_terminal(*entries))]
    assert "step 0  validation loss 9" in lines
    assert "step 20  validation loss 4.5" in lines
    assert sum(line.endswith("skipped 2") or "skipped 2 " in line for line in lines) == 1
    start = lines.index("step 20  sample")
    assert lines[start + 1 : start + 3] == ["def f(x):", '"""[bold]�[2J']


def test_a_bar_knows_its_length_before_the_first_entry_if_it_is_told(on_terminal):
    assert "0/20" in on_terminal(steps=20)
    assert "0/?" in on_terminal()
    assert "10/20" in on_terminal({"step": 10, "loss": 5.0}, steps=20)


def test_a_long_prompt_is_shown_by_its_end(capsys):
    samples = [{"prompt": "a" * 300 + "b" * 199, "text": ""}]
    (line,) = plain(capsys, {"step": 1, "samples": samples})
    assert line.endswith(json.dumps("…a" + "b" * 199, ensure_ascii=False) + ' ""')


def test_amounts_and_durations():
    values = (0.5, 950, 999.7, 12_345, 4_567_000, 7.2e9)
    assert list(map(display.amount, values)) == ["0.5", "950", "1k", "12.3k", "4.57M", "7.2G"]
    assert list(map(display.duration, (5, 245, 59.6, 45296))) == [
        "0:05",
        "4:05",
        "1:00",
        "12:34:56",
    ]
