"""`sample --moderate`: what is judged, what is shown and when, and what is declined."""

import io
import json
import sys

import pytest

import mistral_jax as mj
from mistral_jax.cli import sample
from mistral_jax.evaluation.moderation import Moderation, Moderator, transcript


@pytest.fixture
def judged(monkeypatch):
    """Lets a rule judge in place of the model; returns what was judged."""
    seen = []

    def start(is_bad):
        def judge(self, texts):
            return [judge_one(self.labels, text) for text in texts]

        def judge_one(labels, text):
            seen.append(text)
            category = "hateful" if is_bad(transcript(text)) else "not moderated"
            odds = {label: 0.25 * (label != category) / 3 for label in labels}
            return Moderation(category, odds | {category: 0.75})

        monkeypatch.setattr(Moderator, "__call__", judge)
        return seen

    return start


def test_what_is_acceptable_is_shown_as_without(command, judged):
    seen = judged(lambda text: False)
    for flags in (["def"], ["def", "if"], ["Hi", "--chat"], ["Hi", "Ho", "--chat"]):
        plain = command(*flags)
        assert command(*flags, "--moderate") == plain
        assert plain[0] == 0
    answer = command("Hi", "--chat")[1].removesuffix("\n")
    asked = {"role": "user", "content": "Hi"}
    assert [asked] in seen
    assert [asked, {"role": "assistant", "content": answer}] in seen
    text = command("def")[1].removesuffix("\n")
    assert seen[:2] == ["def", "def" + text]


def test_a_prompt_is_declined_before_it_is_answered(command, judged, monkeypatch):
    judged(lambda text: "bad" in text)
    monkeypatch.setattr(sample._Model, "_run", None)
    expected = "declined: the prompt is 'hateful' (probability 0.75)\n"
    assert command("bad", "--moderate") == (3, "\n", expected)
    assert command("bad", "--moderate", "--chat") == (3, "\n", expected)


def test_an_answer_is_declined_before_any_of_it_is_shown(command, judged):
    for flags in ([], ["--chat"]):
        asked = command("good", *flags)[1].removesuffix("\n")
        judged(lambda text, asked=asked: asked in text)
        code, out, err = command("good", "--moderate", *flags)
        assert (code, out) == (3, "\n")
        assert err == "declined: the answer is 'hateful' (probability 0.75)\n"


def test_a_declined_prompt_changes_no_other_answer(command, judged):
    judged(lambda text: "bad" in text)
    texts = command("good", "bad", "fine")[1].removesuffix("\n").split("\n\n")
    code, out, err = command("good", "bad", "fine", "--moderate")
    assert (code, out) == (3, f"{texts[0]}\n\n\n\n{texts[2]}\n")
    assert err == "declined: prompt 1: the prompt is 'hateful' (probability 0.75)\n"


def test_json_tells_what_was_found(command, judged):
    judged(lambda text: "bad" in text)
    plain = [json.loads(line) for line in command("good", "--json")[1].splitlines()]
    code, out, _ = command("good", "bad", "--json", "--moderate", "--top-logprobs", "2")
    assert code == 3
    good, bad = (json.loads(line) for line in out.splitlines())
    assert good["text"] == plain[0]["text"]
    assert set(good["moderation"]) == {"prompt", "answer"}
    assert good["moderation"]["answer"]["category"] == "not moderated"
    assert (bad["text"], bad["tokens"], bad["logprobs"]) == ("", [], [])
    assert bad["finish_reason"] == "declined"
    assert bad["moderation"]["prompt"]["category"] == "hateful"
    assert sum(bad["moderation"]["prompt"]["probabilities"].values()) == pytest.approx(1)


def test_a_conversation_forgets_what_was_declined(command, judged, monkeypatch):
    def typed(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8"))

    judged(lambda text: "bad" in text)
    typed("Hello\nAnd now?\n")
    plain = command("--chat")
    typed("Hello\nbad\nAnd now?\n")
    code, out, err = command("--chat", "--moderate")
    assert (code, out) == plain[:2]
    assert err == "declined: the prompt is 'hateful' (probability 0.75)\n"
    first = plain[1].split("\n")[0]
    judged(lambda text: first in text)
    typed("Hello\n")
    code, out, err = command("--chat", "--moderate")
    assert (code, out) == (0, "")
    assert err == "declined: the answer is 'hateful' (probability 0.75)\n"


def test_the_model_itself_judges(command, folder):
    record = json.loads(command("Hi", "--chat", "--json", "--moderate")[1])
    found = mj.moderate(*mj.load(folder), "Hi")
    made = record["moderation"]["prompt"]
    assert made["category"] == found.category
    assert made["probabilities"] == pytest.approx(found.probabilities, abs=1e-5)


def test_a_base_model_is_told_of(command, judged):
    judged(lambda text: False)
    code, _, err = command("def", "--moderate", "--chat-form", "none")
    assert code == 0
    assert "has no chat form: it judges by continuing a plain text" in err


def test_the_safe_prompt_comes_before_the_system_message(command, folder):
    model, params, tokenizer = mj.load(folder)
    messages = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}]
    ids = tokenizer.encode_chat(messages, safe_prompt=True)
    options = {"temperature": 1, "top_p": 1, "seed": 4}
    (row,) = mj.generate(model, params, [ids], 12, **options)
    flags = ["--chat", "--system", "Brief.", "--json"]
    assert json.loads(command("Hi", *flags, "--safe-prompt")[1])["tokens"] == row.tokens
    assert json.loads(command("Hi", *flags)[1])["tokens"] != row.tokens
    code, out, err = command("x", "--safe-prompt")
    assert (code, out) == (2, "")
    assert err.startswith("error: --safe-prompt is for --chat")


def test_both_work_together(command, judged):
    seen = judged(lambda text: False)
    flags = ["Hi", "--chat", "--safe-prompt"]
    assert command(*flags, "--moderate") == command(*flags)
    assert all("Always assist" not in transcript(text) for text in seen)


def test_completions_of_a_gap_are_judged_with_the_suffix(folder, judged):
    from mistral_jax.cli.judge import Judge

    seen = judged(lambda text: False)
    row = mj.Completion([5], [0.0], "stop", [], text="middle")
    made = Judge(*mj.load(folder), suffix="end").run(
        lambda prompts, on_text: [row], ["begin"], [[1, 2]]
    )
    assert made == [row]
    assert seen == ["beginend", "beginmiddleend"]
