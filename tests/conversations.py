"""Random conversations shared by the tests of the chat form."""

from tokenizer_samples import random_text


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def random_conversation(rng, roles=("user", "assistant")):
    """A valid conversation: runs of messages of one role, some empty, perhaps an open answer."""
    messages = [said("system", short_text(rng)) for _ in range(rng.choice((0, 0, 1, 2)))]
    messages.append(said("user", short_text(rng)))
    for _ in range(rng.randrange(6)):
        role = rng.choice(roles)
        # The oracle refuses empty answers; see test_an_empty_answer_is_its_end_alone.
        messages.append(
            said(role, short_text(rng) or "." if role == "assistant" else short_text(rng))
        )
    if messages[-1]["role"] == "assistant":
        messages[-1]["prefix"] = True
    return messages


def short_text(rng):
    return "" if rng.random() < 0.1 else random_text(rng, words=4)


def finished_conversation(rng):
    """A finished conversation of alternating messages, with a weight at some of the answers."""
    messages = random_conversation(rng)
    if messages[-1]["role"] == "user":
        messages.append(said("assistant", "."))
    messages[-1].pop("prefix", None)
    for message in messages:
        # The oracle refuses answers that are empty to it.
        if message["role"] == "assistant" and not message["content"].rstrip(" "):
            message["content"] = "."
    return messages
