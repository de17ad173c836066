"""llama.cpp's own forms of a completion and of filling in, for the clients that speak them."""

import itertools
from typing import Any

from mistral_jax.serving import logprobs
from mistral_jax.serving.jobs import Job, _Writer
from mistral_jax.serving.requests import Fields, Prompt
from mistral_jax.tokens.tokenizer import Tokenizer

_STOPS = {"stop": "eos", "length": "limit"}


def prompts(tokenizer: Tokenizer, fields: Fields) -> list[Prompt]:
    """Returns the prompts of a completion: a text, ids, both mixed, or a list of such."""
    given = fields["prompt"]
    if isinstance(given, str) or all(isinstance(one, int) for one in given):
        given = [given]
    elif any(isinstance(one, int) for one in given):
        parts = (
            one
            if isinstance(one, list)
            else [one]
            if isinstance(one, int)
            else tokenizer.encode(one, continues=i > 0)
            for i, one in enumerate(given)
        )
        given = [list(itertools.chain.from_iterable(parts))]
    encoded = (
        tokenizer.encode(one, bos=tokenizer.adds_bos) if isinstance(one, str) else one
        for one in given
    )
    return [Prompt(ids or [tokenizer.first_id]) for ids in encoded]


def infill_prompts(tokenizer: Tokenizer, fields: Fields) -> list[Prompt]:
    """Returns the prompt that fills in the text between a prefix and a suffix."""
    before = fields["input_prefix"] + fields.get("prompt", "")
    return [Prompt(tokenizer.encode_fim(before, fields["input_suffix"]))]


def settled(fields: Fields) -> dict[str, Any]:
    """Returns fields with OpenAI's names for what llama.cpp calls otherwise."""
    fields = dict(fields)
    most = fields.pop("n_predict", fields.pop("max_tokens", -1))
    if most >= 0:
        fields["max_tokens"] = most
    return fields


class NativeJob(Job):
    """A completion in llama.cpp's form: one object, or a list of them."""

    top_field = "n_probs"
    new_tokens = None

    def response(self) -> Any:
        """Returns the whole response."""
        made = [
            writer.choice(answer.pieces(0), answer.result().finish_reason)
            for writer, answer in zip(self._writers, self.context.answers, strict=True)
        ]
        is_list = isinstance(self.context.fields.get("prompt"), list) and len(made) > 1
        return made if is_list else made[0]

    def _writer(self, i: int) -> _Writer:
        return _NativeWriter(self, i)

    def _chunk(self, choice: Any) -> Any:
        return choice


class _NativeWriter(_Writer):
    """Writes one answer."""

    def __init__(self, job: Job, i: int):
        super().__init__(job, i)
        self._top = self._fields.get("n_probs", 0)
        self._text = ""

    def chunks(self, pieces, reason):
        yield self._part(pieces)
        if reason is not None:
            yield self._last("", [], reason)

    def choice(self, pieces, reason):
        tokens = [piece.token for piece in pieces if piece.token is not None]
        part = self._part(pieces)
        shown = tokens if self._fields.get("return_tokens") else []
        made = self._last(part["content"], shown, reason)
        probabilities = {k: v for k, v in part.items() if k == "completion_probabilities"}
        return made | probabilities

    def _part(self, pieces):
        text = "".join(piece.text for piece in pieces)
        self._text += text
        made = {
            "index": self._i,
            "content": text,
            "tokens": [piece.token for piece in pieces if piece.token is not None],
            "stop": False,
            "id_slot": -1,
        }
        if self._top:
            made["completion_probabilities"] = logprobs.native(self._texts, pieces, self._top)
        return made

    def _last(self, text, tokens, reason):
        answer = self._job.context.answers[self._i]
        completion, prompt = answer.result(), self._job.prompt(self._i)
        row, count = answer.row, len(answer.row.tokens)
        first, seconds = completion.first_seconds, completion.seconds
        read = len(prompt.ids) - answer.cached_tokens
        decoding = max(seconds - first, 1e-9)
        word = reason == "stop" and self._fields.get("stop") and count == row.chosen
        return {
            "index": self._i,
            "content": text,
            "tokens": tokens,
            "stop": True,
            "stop_type": "word" if word else _STOPS.get(reason, "none"),
            "model": self._job.context.model,
            "tokens_predicted": count,
            "tokens_evaluated": len(prompt.ids),
            "tokens_cached": answer.cached_tokens,
            "truncated": False,
            "has_new_line": "\n" in self._text,
            "generation_settings": {
                "n_predict": row.new_tokens,
                "seed": row.sampling.seed,
                "temperature": row.sampling.temperature,
                "top_k": row.sampling.top_k,
                "top_p": row.sampling.top_p,
                "min_p": row.sampling.min_p,
                "repeat_penalty": row.sampling.repetition_penalty,
                "presence_penalty": row.sampling.presence_penalty,
                "frequency_penalty": row.sampling.frequency_penalty,
            },
            "timings": {
                "cache_n": answer.cached_tokens,
                "prompt_n": read,
                "prompt_ms": 1e3 * first,
                "prompt_per_second": read / max(first, 1e-9),
                "predicted_n": count,
                "predicted_ms": 1e3 * decoding,
                "predicted_per_second": max(count - 1, 0) / decoding,
            },
        }
