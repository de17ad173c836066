"""Reads and checks the messages of a conversation, and joins them to turns."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from mistral_jax.base.fields import show
from mistral_jax.tokens import tools
from mistral_jax.tokens.tools import Call

LARGEST_WEIGHT = 1000
_JOINT = "\n\n"
_KEYS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "prefix", "weight", "tool_calls"},
    "tool": {"role", "content", "tool_call_id", "name"},
}


class Thought(NamedTuple):
    """What a reasoning model thinks before it answers.

    Attributes:
      text: the text between the marks of the form.
      closed: whether it is finished.
    """

    text: str
    closed: bool = True


@dataclasses.dataclass(frozen=True)
class Turn:
    """Consecutive messages of one role; a tool's result and a system message may stay alone.

    Attributes:
      role: "system", "user", "assistant" or "tool".
      content: its texts and thoughts; texts are joined, so that none follows another.
      weight: loss weight of an answer.
      calls: tools that an answer calls.
      opened: whether an answer is to be continued.
      call_id: call that a tool's result belongs to.
      name: name of the tool of a result.
    """

    role: str
    content: tuple[str | Thought, ...] = ()
    weight: float = 0.0
    calls: tuple[Call, ...] = ()
    opened: bool = False
    call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """The text of a turn without thoughts."""
        return "".join(part for part in self.content if isinstance(part, str))


class Rules(NamedTuple):
    """What the messages of a chat form may be.

    Attributes:
      tools: whether answers call tools, and tools give results.
      calls_with_text: whether an answer may have both text and calls.
      call_ids: whether calls and results have ids: None, "9" (letters and digits) or "any".
      same_ids: whether results must name the calls before them.
      late_system: whether system messages may follow user messages, and answers come first.
      joins_system: whether system messages are joined to one.
      thoughts: roles whose content may have thoughts.
      joint: what joins the parts of one message.
    """

    tools: bool = False
    calls_with_text: bool = False
    call_ids: str | None = None
    same_ids: bool = False
    late_system: bool = False
    joins_system: bool = True
    thoughts: tuple[str, ...] = ()
    joint: str = _JOINT


def read(messages: Any, rules: Rules, finished: bool) -> list[Turn]:
    """Checks the messages of a conversation, and joins consecutive ones of a role.

    Args:
      messages: see `messages.chat_parts`.
      rules: the rules of the chat form.
      finished: whether the conversation must end with an answer, instead of a question.

    Raises:
      ValueError: a message, their order or a weight is invalid; the message has its index.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise ValueError(f"the conversation is {show(messages)}; expected a list of messages")
    if not messages:
        raise ValueError("the conversation is empty; expected at least a user message")
    previous, calls = "system", _Calls(rules)
    for i, message in enumerate(messages):
        is_last = i == len(messages) - 1
        problem = _problem(message, rules, previous, is_last)
        if not problem and is_last:
            problem = _ending_problem(message, finished)
        if problem:
            raise ValueError(f"messages[{i}] {problem}")
        calls.check(message, f"messages[{i}]", finished and is_last)
        previous = message["role"]
    groups = itertools.groupby(messages, key=lambda message: message["role"])
    turns = []
    for role, group in groups:
        alone = role == "tool" or (role == "system" and not rules.joins_system)
        group = list(group)
        runs = [[message] for message in group] if alone else [group]
        turns += [_merge(role, run, rules) for run in runs]
    return turns


def _merge(role: str, run: Sequence[Mapping[str, Any]], rules: Rules) -> Turn:
    """Joins consecutive messages of one role."""
    weights = {answer_weight(message) for message in run}
    if len(weights) > 1:
        low, *_, high = sorted(weights)
        raise ValueError(
            f"answers in a row are joined, but these have weights {low:g} and {high:g}; expected "
            "equal weights"
        )
    content = _join((message.get("content") or "" for message in run), rules.joint)
    calls = [call for m in run for call in tools.check_calls(m.get("tool_calls"), "an answer")]
    if calls and content and not rules.calls_with_text:
        raise ValueError(
            "answers in a row have text and tool calls; expected only one of them in this chat form"
        )
    opened = bool(run[-1].get("prefix"))
    turn = Turn(role, content, weights.pop(), tuple(calls), opened)
    if role == "tool":
        (only,) = run
        turn = dataclasses.replace(turn, call_id=only.get("tool_call_id"), name=only.get("name"))
    return turn


def answer_weight(message: Mapping[str, Any]) -> float:
    """Returns the loss weight of a message: what it says, or 1 for an answer and 0 for others.

    Raises:
      ValueError: it has an invalid weight.
    """
    weight, role = message.get("weight"), message["role"]
    if weight is None:
        return float(role == "assistant")
    if role != "assistant":
        raise ValueError(f"a message has a weight and role {role!r}; only answers may have one")
    if problem := _weight_problem(weight):
        raise ValueError(f"an answer {problem}")
    return float(weight)


def join(texts: Iterable[str]) -> str:
    """Joins texts that are not empty by an empty line, as all forms do."""
    return _JOINT.join(text for text in texts if text)


def _join(contents: Iterable[Any], joint: str) -> tuple[str | Thought, ...]:
    """Joins the contents of messages: messages by an empty line, parts of one by `joint`."""
    joined: list[str | Thought] = []
    for content in contents:
        between = _JOINT
        for part in [content] if isinstance(content, str) else map(_part, content):
            if isinstance(part, Thought):
                joined.append(part)
            elif part:
                if joined and isinstance(joined[-1], str):
                    joined[-1] += between + part
                else:
                    joined.append(part)
                between = joint
    return tuple(joined)


def _part(part: Mapping[str, Any]) -> str | Thought:
    if part["type"] == "text":
        return part["text"]
    return Thought(part["thinking"], part.get("closed") is not False)


class _Calls:
    """Checks that tools' results follow the calls, and follow all of them."""

    def __init__(self, rules: Rules):
        self._rules = rules
        self._ids: list[str | None] = []  # of calls
        self._results: list[str | None] = []

    def check(self, message: Mapping[str, Any], where: str, is_lesson: bool) -> None:
        if message["role"] == "assistant":
            missing = len(self._ids) - len(self._results)
            if missing:
                raise ValueError(
                    f"{where} is an answer, but {missing} of the tool calls before it "
                    f"{'has' if missing == 1 else 'have'} no result; expected tool messages first"
                )
            calls = tools.check_calls(message.get("tool_calls"), where)
            for i, call in enumerate(calls):
                # The answer to be learnt needs no id.
                if self._rules.call_ids and not (is_lesson and call.id is None):
                    name = f"{where} tool_calls[{i}]"
                    tools.check_id(call.id, name, self._rules.call_ids == "any")
            self._ids, self._results = [call.id for call in calls], []
            if self._rules.same_ids and len(set(self._ids)) < len(self._ids):
                raise ValueError(f"{where} has two tool calls with one id; expected different ids")
        elif message["role"] == "tool":
            call_id = message.get("tool_call_id")
            if self._rules.call_ids:
                tools.check_id(call_id, where, self._rules.call_ids == "any")
            if len(self._results) == len(self._ids):
                raise ValueError(
                    f"{where} is a tool's result without a call; expected one for each call"
                )
            if self._rules.same_ids and (call_id not in self._ids or call_id in self._results):
                raise ValueError(
                    f"{where} has tool_call_id {show(call_id)}; expected that of a call before it, "
                    "once"
                )
            self._results.append(call_id)


def _problem(message: Any, rules: Rules, previous: str, is_last: bool) -> str | None:
    """Returns the error in a message that follows one of the role `previous`, or None."""
    calls = isinstance(message, Mapping) and rules.tools and message.get("tool_calls")
    if not isinstance(message, Mapping) or not ({"role"} if calls else {"role", "content"}) <= (
        message.keys()
    ):
        return f'is {show(message)}; expected a dict with "role" and "content"'
    role, content = message["role"], message.get("content")
    roles = ("system", "user", "assistant", *(["tool"] if rules.tools else []))
    if not isinstance(role, str) or role not in roles:
        return f"has role {show(role)}; expected one of {', '.join(roles)}"
    if problem := _key_problem(message, role, rules):
        return problem
    if not (content is None and calls) and (problem := _content_problem(content, role, rules)):
        return problem
    return _order_problem(message, role, rules, previous, is_last)


def _key_problem(message: Mapping[str, Any], role: str, rules: Rules) -> str | None:
    given = {key for key, value in message.items() if value is not None}
    if "weight" in given and role != "assistant":
        return f"has a weight and role {role!r}; only answers may have a weight"
    if "prefix" in given and not isinstance(message["prefix"], bool):
        return f"has prefix {show(message['prefix'])}; expected true or false"
    known = _KEYS[role] | {"prefix"} if rules.tools else _KEYS[role] - {"tool_calls"} | {"prefix"}
    if unknown := given - known:
        return f"has {show(min(unknown, key=str))}, which is not supported"
    if "weight" in given and (problem := _weight_problem(message["weight"])):
        return problem
    if role == "tool":
        if "name" in given and not tools.is_name(message["name"]):
            return f"has name {show(message['name'])}; expected {tools.NAME_EXPECTED}"
        if not isinstance(message.get("tool_call_id"), str | None):
            return f"has tool_call_id {show(message['tool_call_id'])}; expected a string"
    return None


def _content_problem(content: Any, role: str, rules: Rules) -> str | None:
    if isinstance(content, str):
        return None
    if not isinstance(content, list):
        return f"has content of type {type(content).__name__}; expected a string or text parts"
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "thinking" and role in rules.thoughts and isinstance(part.get("thinking"), str):
            continue
        if kind == "text" and isinstance(part.get("text"), str):
            continue
        if isinstance(kind, str) and kind != "text":
            return f"has content of type {show(kind)}; expected text, which alone this form takes"
        return "has content of type list; expected a string or text parts"
    return None


def _order_problem(
    message: Mapping[str, Any], role: str, rules: Rules, previous: str, is_last: bool
) -> str | None:
    before_system = ("system", "user") if rules.late_system else ("system",)
    if role == "system" and previous not in before_system:
        return "is a system message in mid-conversation; expected it at the beginning"
    if role == "system" and is_last:
        return "is a system message and the last one; expected a user message after it"
    if role == "assistant" and previous == "system" and not rules.late_system:
        return "is an answer to nothing; expected a user message before it"
    if role == "tool" and previous not in ("assistant", "tool"):
        return "has role 'tool'; expected one of system, user, assistant: no tool was called"
    if message.get("prefix") and not (role == "assistant" and is_last):
        return "has a prefix to continue; only the last message, an answer, may have one"
    if message.get("tool_calls"):
        if message.get("content") and not rules.calls_with_text:
            return "has 'tool_calls' and content; expected only one of them in this chat form"
        if message.get("prefix"):
            return "has a prefix to continue and tool_calls; expected text to continue"
    return None


def _weight_problem(weight: Any) -> str | None:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not (is_number and 0 <= weight <= LARGEST_WEIGHT):
        return f"has weight {show(weight)}; expected a number from 0 to {LARGEST_WEIGHT}"
    return None


def _ending_problem(message: Mapping[str, Any], finished: bool) -> str | None:
    """Returns the error in the last message of a finished conversation or a prompt, or None."""
    answer, prefix = message["role"] == "assistant", message.get("prefix")
    if finished and not answer:
        return "is the last message and not an answer; expected an answer to be learnt"
    if finished and prefix:
        return "has a prefix to continue; expected a finished answer to be learnt"
    if answer and not finished and not prefix:
        return (
            'is an answer and the last message; add a user message, or "prefix": True to continue '
            "it"
        )
    return None
