"""Moderation by self-reflection: the model itself says which category a text belongs to.

The model chooses among the names of the categories: each name is scored as an answer to Mistral's
moderation prompt, and no generated text is parsed (Mistral 7B, arXiv 2310.06825, section 5.2).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from mistral_jax.base.fields import show
from mistral_jax.engine.prefill import Params
from mistral_jax.engine.request import listed
from mistral_jax.engine.score import likelihoods
from mistral_jax.engine.text import Messages, conversation, listed_conversations
from mistral_jax.model.transformer import Transformer
from mistral_jax.tokens.conversation import Rules, Thought, Turn, read
from mistral_jax.tokens.tokenizer import Tokenizer
from mistral_jax.tokens.tools import to_json

# The three categories of the paper, with its own descriptions.
CATEGORIES = {
    "illegal": "Illegal activities such as terrorism, child abuse or fraud.",
    "hateful": "Hateful, harassing or violent content such as discrimination, self-harm or "
    "bullying.",
    "unqualified advice": "Unqualified advice for instance in legal, medical or financial domains.",
}
ACCEPTABLE = "not moderated"

# Mistral's documentation published this prompt; the paper prints none.
_PROMPT = """\
You're given a list of moderation categories as below:

{categories}

Please classify the following text into one of these categories, and answer with that single word \
only.

If the sentence does not fall within these categories, is safe and does not need to be moderated, \
please write "{acceptable}".

{text}"""

_RULES = Rules(
    tools=True,
    calls_with_text=True,
    late_system=True,
    joins_system=False,
    thoughts=("system", "assistant"),
)
_NAMES = {"user": "User", "assistant": "Assistant", "tool": "Tool"}


@dataclasses.dataclass(frozen=True)
class Moderation:
    """What a model says about a text.

    Attributes:
      category: the likeliest category; "not moderated" if the text is acceptable.
      probabilities: the probability of each category, "not moderated" included; the sum is 1.
    """

    category: str
    probabilities: dict[str, float]


def moderate(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    text: str | Messages | Sequence[str | Messages],
    *,
    categories: Mapping[str, str] | Sequence[str] = CATEGORIES,
    acceptable: str = ACCEPTABLE,
) -> Moderation | list[Moderation]:
    """Classifies a text, or a conversation, as acceptable or as one of several categories.

    The model answers Mistral's moderation prompt, which ends with the text, in the chat form of the
    checkpoint. A base model continues the prompt as plain text. The probability of a category is
    that of its whole name and the end of the answer, normalised over all categories. The text is
    read once, and nothing in it can become a control token. Only the model judges: a text may
    persuade it.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      text: a text, or a conversation as for `chat`, which may also end with an answer; or a list of
        them. System messages are not judged.
      categories: what is not acceptable: a description for each name, or only names. Their order
        has no influence.
      acceptable: the name for a text that falls within none of them.

    Returns:
      The category and the probabilities of all categories; a list for a list of texts.

    Raises:
      ValueError: the text is empty or too long for the model, a category or message is invalid, or
        the model's logits are not finite.
    """
    items, alone = listed_conversations(text)
    moderator = Moderator(model, params, tokenizer, categories=categories, acceptable=acceptable)
    found = moderator(items)
    return found[0] if alone else found


class Moderator:
    """Classifies texts with one set of categories.

    Attributes:
      labels: the names of all categories; that of acceptable texts is the last one.
    """

    def __init__(
        self,
        model: Transformer,
        params: Params,
        tokenizer: Tokenizer,
        *,
        categories: Mapping[str, str] | Sequence[str] = CATEGORIES,
        acceptable: str = ACCEPTABLE,
    ):
        """Checks the categories; for arguments and errors, see `moderate`."""
        described = check_categories(categories, acceptable)
        self._loaded = model, params, tokenizer
        self.labels = [*described, acceptable]
        # The caller's order has no influence.
        self._categories = "\n".join(
            f"- {name}: {why}" if why else f"- {name}" for name, why in sorted(described.items())
        )

    def __call__(
        self,
        texts: Sequence[str | Messages],
        batch: int = 8,
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Moderation]:
        """Classifies texts and conversations; see `moderate`. `choose` explains the arguments."""
        questions = [
            _PROMPT.format(
                categories=self._categories, acceptable=self.labels[-1], text=transcript(text)
            )
            for text in texts
        ]
        found = choose(*self._loaded, questions, self.labels, batch, report)
        return [*map(of, found)]


def of(probabilities: dict[str, float]) -> Moderation:
    """Returns the result for the probabilities of all categories."""
    likeliest = max(probabilities, key=lambda name: (probabilities[name], name))
    return Moderation(likeliest, probabilities)


def choose(
    model: Transformer,
    params: Params,
    tokenizer: Tokenizer,
    questions: Sequence[str],
    labels: Sequence[str],
    batch: int = 8,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, float]]:
    """Lets a model answer questions with one of a few labels.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: its tokenizer.
      questions: the questions; what they have in common is read once.
      labels: the possible answers.
      batch: rows per batch.
      report: called repeatedly with the number of tokens read so far, and in total.

    Returns:
      For each question, the probability of each label as the whole answer; their sum is 1.

    Raises:
      ValueError: a question is too long for the model, or its logits are not finite.
    """
    rows, given = [], []
    for question in questions:
        context, answers = encode(tokenizer, question, labels)
        most, tokens = model.config.max_positions, len(context) + max(map(len, answers))
        if tokens > most:
            raise ValueError(
                f"the text is too long to be moderated: with the instructions it has {tokens} "
                f"tokens, and the model has {most} positions; moderate it in parts"
            )
        rows += [context + answer for answer in answers]
        given += [len(context)] * len(answers)
    found = likelihoods(model, params, rows, batch, report, given)
    sums = iter(math.fsum(row.logprobs.tolist()) for row in found)
    return [_normalised(labels, [next(sums) for _ in labels]) for _ in questions]


def _normalised(labels: Sequence[str], logprobs: Sequence[float]) -> dict[str, float]:
    largest = max(logprobs)
    weights = [math.exp(logprob - largest) for logprob in logprobs]
    total = math.fsum(weights)
    return {label: weight / total for label, weight in zip(labels, weights, strict=True)}


def encode(
    tokenizer: Tokenizer, question: str, labels: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Encodes a question, and each label as its whole answer.

    In a chat form an answer ends with the form's end token. Without a form, the question is a plain
    text, "Answer:" follows it, and an answer ends with its line.

    Returns:
      Token ids of the question, and of each answer with its end.

    Raises:
      ValueError: the checkpoint's chat template writes the question in another way if an answer
        follows it.
    """
    if tokenizer.chat_form == "none":
        context = tokenizer.encode(f"{question}\n\nAnswer:", bos=tokenizer.adds_bos)
        return context, [tokenizer.encode(f" {label}\n", continues=True) for label in labels]
    asked = {"role": "user", "content": question}
    context, rows = tokenizer.encode_chat([asked]), []
    for label in labels:
        ids, weights = tokenizer.encode_lesson([asked, {"role": "assistant", "content": label}])
        end = max(i for i, weight in enumerate(weights) if weight) + 1
        if ids[: len(context)] != context or end <= len(context):
            raise ValueError(
                "the chat template writes a question in another way if an answer follows it; "
                "choose another chat form to moderate texts"
            )
        rows.append(ids[len(context) : end])
    return context, rows


def transcript(text: str | Messages) -> str:
    """Returns the text to judge: a single message as it is, or a conversation with its speakers.

    Raises:
      ValueError: a message is invalid, or there is no text.
    """
    messages = conversation(text, text)
    answered = messages[-1].get("role") == "assistant" and not messages[-1].get("prefix")
    turns = [turn for turn in read(messages, _RULES, answered) if turn.role != "system"]
    texts = [(_NAMES[turn.role], _text(turn)) for turn in turns]
    texts = [(name, said) for name, said in texts if said.strip()]
    if not texts:
        raise ValueError("the text to moderate is empty; expected at least one character")
    if len(texts) == 1:
        return texts[0][1]
    return "\n\n".join(f"{name}: {said}" for name, said in texts)


def _text(turn: Turn) -> str:
    """Returns all that a turn says: texts, thoughts and calls of tools."""
    parts = [part.text if isinstance(part, Thought) else part for part in turn.content]
    calls = [to_json({"name": call.name, "arguments": call.arguments}) for call in turn.calls]
    return "\n\n".join([*parts, *calls])


def check_categories(
    categories: Mapping[str, str] | Sequence[str], acceptable: str = ACCEPTABLE
) -> dict[str, str]:
    """Checks the names and descriptions of categories.

    Returns:
      The description of each category, perhaps "", without the acceptable one.

    Raises:
      ValueError: a name or description is not a string of one line, a name is empty or given
        twice, or there is no category.
    """
    names = list(categories) if isinstance(categories, Mapping) else listed(categories)
    if names is None:
        raise ValueError(
            f"categories is {show(categories)}; expected a dict from names to descriptions, or a "
            "list of names"
        )
    described = {name: "" for name in names if isinstance(name, str)}
    if isinstance(categories, Mapping):
        described = dict(categories)
    for name in [*names, acceptable]:
        if not isinstance(name, str) or len(name.splitlines()) != 1 or name != name.strip():
            raise ValueError(
                f"a category is {show(name)}; expected a name of one line, without spaces around it"
            )
    for name, why in described.items():
        if not isinstance(why, str) or len(why.splitlines()) > 1:
            raise ValueError(
                f"the description of {show(name)} is {show(why)}; expected a text of one line"
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the category {show(twice)} is given twice; expected different names")
    described.pop(acceptable, None)
    if not described:
        raise ValueError(
            f"there is no category besides {show(acceptable)}; expected at least one of what is "
            "not acceptable"
        )
    return described
