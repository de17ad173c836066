"""The server around the engine: refusals, keys, limits, metrics, logs, draining, and faults."""

import contextlib
import json
import logging
import socket
import threading
import time

import httpx2
import jsonschema
import pytest
from servers import loaded, running

from mistral_jax.engine.text import RowText
from mistral_jax.serving import http, protocol
from mistral_jax.serving.app import LOG, JsonLines
from mistral_jax.serving.http import Keys
from mistral_jax.serving.service import Service

ROUTES = {
    "/v1/completions": ("COMPLETION", {"prompt": "one", "max_tokens": 2}),
    "/v1/chat/completions": (
        "CHAT",
        {"messages": [{"role": "user", "content": "one"}], "max_tokens": 2},
    ),
    "/completion": ("NATIVE", {"prompt": "one", "n_predict": 2}),
    "/tokenize": ("TOKENIZE", {"prompt": "one"}),
    "/detokenize": ("DETOKENIZE", {"tokens": [5]}),
}
LONG = {"prompt": "one", "max_tokens": 150, "ignore_eos": True, "temperature": 0}


def refusal(answer, status=400):
    """Returns the message of an error, which is one line."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == status
    assert "\n" not in error["message"]
    return error["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_null_is_the_default_and_unknown_fields_are_refused(served, route):
    table, body = ROUTES[route]
    rules = getattr(protocol, table)
    nothing = dict.fromkeys(rules.keys() - body.keys())
    assert served.client.post(route, json=body | nothing).status_code == 200
    message = refusal(served.client.post(route, json=body | {"modell": "x"}))
    assert "'modell' is not supported" in message
    for name in protocol.REQUIRED.get(table, ()):
        rest = {key: value for key, value in body.items() if key != name}
        assert f"has no '{name}'" in refusal(served.client.post(route, json=rest))


@pytest.mark.parametrize("table", ["COMPLETION", "CHAT", "NATIVE"])
def test_every_field_is_checked(served, table):
    route, body = next((r, b) for r, (t, b) in ROUTES.items() if t == table)
    for name, rule in getattr(protocol, table).items():
        for wrong in ({"a": [None]}, [[{}]], "\x00", -(10**30), 0.5, True):
            if rule.accepts(wrong):
                continue
            message = refusal(served.client.post(route, json=body | {name: wrong}))
            assert name in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 500}, "which with 500 new ones exceed the engine's length of 200"),
        ({"n": 3, "best_of": 2}, "best_of 2; expected 1, which alone is supported"),
        ({"logit_bias": {"x": 1}}, "logit_bias names 'x'; expected a token id"),
        ({"logit_bias": {"99999": 1}}, "logit_bias names token 99999; expected 0 to"),
        ({"stop": ""}, "stop has ''; expected strings that are not empty"),
        ({"stream_options": {"usage": True}}, "expected an object with include_usage or"),
        ({"functions": []}, "'functions' is not supported: use tools"),
        ({"regex": "("}, "the grammar is invalid"),
        ({"regex": "a", "grammar": 'root ::= "a"'}, "has regex and grammar; expected one of them"),
        ({"response_format": {"type": "sound"}}, "response_format has type 'sound'; expected text"),
        ({"response_format": {"type": "json_object", "schema": 1}}, "the JSON schema is 1"),
        ({"suffix": "x"}, "the model cannot fill in the middle"),
        ({"prompt": []}, "expected a string, or a list of at least 1"),
        ({"prompt": [1, "x"]}, "the request has prompt"),
        ({"prompt": [10**6]}, "expected token ids from 0 to"),
        ({"n": 128, "prompt": ["a"] * 1024}, "the engine"),
    ],
)
def test_requests_that_make_no_sense_are_refused(served, fields, message):
    answer = served.client.post("/v1/completions", json={"prompt": "one"} | fields)
    assert answer.status_code in (400, 503)
    assert message in refusal(answer, answer.status_code)


@pytest.mark.parametrize(
    "messages",
    [
        None,
        "string",
        [],
        [123],
        [{}],
        [{"role": 123}],
        [{"role": "user", "content": 123}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
    ],
)
def test_conversations_that_make_no_sense_are_refused(served, messages):
    refusal(served.client.post("/v1/chat/completions", json={"messages": messages}))


def test_likeliest_tokens_belong_to_log_probabilities(served):
    body = {"messages": [{"role": "user", "content": "one"}], "top_logprobs": 2}
    assert "add logprobs" in refusal(served.client.post("/v1/chat/completions", json=body))


def test_a_prompt_that_never_fits_says_how_long_it_is(served):
    body = {"messages": [{"role": "user", "content": "one two three " * 200}]}
    for extra in ({}, {"stream": True}):
        answer = served.client.post("/v1/chat/completions", json=body | extra)
        assert "expected at most 199" in refusal(answer)
        error = answer.json()["error"]
        assert error["type"] == "exceed_context_size_error"
        assert error["n_ctx"] == 200 < error["n_prompt_tokens"]


def test_an_answer_is_continued(served, mistral):
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    asked = {"temperature": 0, "max_tokens": 8}
    continued = served.client.post(
        "/v1/chat/completions",
        json=asked | {"messages": messages, "continue_final_message": True},
    ).json()
    messages[-1]["prefix"] = True
    prefixed = served.client.post("/v1/chat/completions", json=asked | {"messages": messages})
    assert continued["choices"] == prefixed.json()["choices"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\xff\xfe", "is not JSON in UTF-8"),
        (b"{", "is not valid JSON"),
        (b"[1]", "is a JSON list; expected an object"),
        (b'{"prompt": ' + b"[" * 10**5, "nested too deeply"),
        (b'{"prompt": "a", "seed": ' + b"9" * 10**4 + b"}", "too many digits"),
        (b"", "is not valid JSON"),
    ],
)
def test_bodies_that_are_no_requests(served, body, message):
    assert message in refusal(served.client.post("/v1/completions", content=body))


def test_bodies_and_heads_have_a_largest_size(served):
    too_long = served.client.post("/v1/completions", content=b"x" * (9 << 20))
    assert "larger than 8388608 bytes" in refusal(too_long, 413)

    def parts():
        for _ in range(9 << 4):
            yield b"x" * (1 << 16)

    with contextlib.suppress(httpx2.WriteError):  # The server may close the connection first.
        refusal(served.client.post("/v1/completions", content=parts()), 413)
    headers = {f"x-{i}": "a" * 100 for i in range(10**4)}
    with contextlib.suppress(httpx2.HTTPError):
        assert served.client.get("/health", headers=headers).status_code in (400, 431)
    assert served.client.get("/health").status_code == 200


def test_half_a_request_holds_up_nobody(served, monkeypatch):
    monkeypatch.setattr(http, "_BODY_SECONDS", 0.2)
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
        assert served.client.get("/health").status_code == 200
        half.settimeout(10)
        assert b"408" in half.recv(1000).split(b"\r\n")[0]


def test_unknown_routes_and_methods(served):
    assert "no route GET /v2/models" in refusal(served.client.get("/v2/models"), 404)
    assert "another method" in refusal(served.client.get("/v1/completions"), 405)
    assert "there is no model 'other'" in refusal(served.client.get("/v1/models/other"), 404)
    for path, method in (("/v1/models", "GET"), ("/v1/completions", "POST")):
        answer = served.client.options(path)
        assert (answer.status_code, answer.headers["allow"]) == (200, f"{method}, OPTIONS")


def test_the_page_runs_only_its_own_script(served):
    answer = served.client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert policy.count("sha256-") == 2
    assert answer.text.startswith("<!doctype html>")


def test_keys_are_asked_for_and_never_logged(mistral, tmp_path, caplog):
    file = tmp_path / "keys.txt"
    file.write_text("# clients\nfirst-secret\n\nsecond-secret\n")
    service = Service("tiny")
    service.load(lambda: loaded(mistral, slots=1))
    body = {"prompt": "one", "max_tokens": 2}
    LOG.propagate = True
    with (
        caplog.at_level(logging.INFO, LOG.name),
        contextlib.closing(service),
        running(service, keys=Keys.read(file)) as served,
    ):
        post = served.client.post
        for headers in (
            {},
            {"authorization": "Bearer wrong-secret"},
            {"authorization": "Basic first-secret"},
            {"x-api-key": ""},
        ):
            answer = post("/v1/completions", json=body, headers=headers)
            assert "no valid key" in refusal(answer, 401)
            assert answer.json()["error"]["type"] == "authentication_error"
        for headers in ({"authorization": "bearer second-secret"}, {"x-api-key": "first-secret"}):
            assert post("/v1/completions", json=body, headers=headers).status_code == 200
        for path in ("/", "/health", "/v1/models", "/openapi.json"):
            assert served.client.get(path).status_code == 200
        for path in ("/metrics", "/tokenizer_info"):
            refusal(served.client.get(path), 401)
    assert "owner=key-2" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "short\n", "has a space\n", "ümläuts-are-out\n"]
)
def test_files_of_keys_are_checked(tmp_path, text):
    file = tmp_path / "keys.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"has no key|is too short or has a space"):
        Keys.read(file)


def test_browsers_of_other_origins_get_nothing_unless_asked_for(mistral):
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    service = Service("tiny")  # still loading
    with running(service) as served:
        answer = served.client.options("/v1/completions", headers=asked)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
    with running(service, origins=["https://a.example"]) as served:
        answer = served.client.options("/v1/completions", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in answer.headers["access-control-allow-headers"].lower()
        refused = served.client.get("/health", headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in refused.headers
        allowed = served.client.get("/health", headers=asked)
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
    with running(service, origins=["*"]) as served:
        answer = served.client.get("/health", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "*"


def test_a_server_that_loads_or_failed_to_load_says_so(mistral):
    service = Service("tiny")
    with contextlib.closing(service), running(service) as served:
        answer = served.client.get("/health")
        assert "being loaded" in refusal(answer, 503)
        assert answer.headers["retry-after"]
        body = {"prompt": "one"}
        assert "being loaded" in refusal(served.client.post("/v1/completions", json=body), 503)
        assert served.client.get("/v1/models").status_code == 200
        with pytest.raises(ZeroDivisionError):
            service.load(lambda: 1 / 0)
        assert "could not be loaded" in refusal(served.client.get("/health"), 503)


def test_a_full_server_refuses_and_then_goes_on(mistral):
    service = Service("tiny")
    service.load(lambda: loaded(mistral, slots=1, most_waiting=1))
    with contextlib.closing(service), running(service) as served:
        found = []

        def ask():
            with httpx2.Client(base_url=served.url, timeout=60) as client:
                found.append(client.post("/v1/completions", json=LONG))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(answer.status_code for answer in found)
        assert set(statuses) == {200, 503}
        texts = {a.json()["choices"][0]["text"] for a in found if a.status_code == 200}
        assert len(texts) == 1
        refused = next(answer for answer in found if answer.status_code == 503)
        assert refused.headers["retry-after"]
        assert "try again later" in refusal(refused, 503)


def test_draining_ends_what_runs_and_refuses_what_comes(mistral):
    service = Service("tiny")
    service.load(lambda: loaded(mistral, slots=1))
    worker, goes_on = service.loaded.engine._worker, threading.Event()
    turn = worker._turn
    worker._turn = lambda: (turn(), goes_on.wait(0.2))
    body = LONG | {"stream": True}
    with (
        contextlib.closing(service),
        running(service, drain_seconds=60) as served,
        served.client.stream("POST", "/v1/completions", json=body) as answer,
        httpx2.Client(base_url=served.url) as other,
    ):
        lines = answer.iter_lines()
        next(lines)
        served.server.handle_exit(15, None)
        while not service.problem():
            time.sleep(0.01)
        assert "shutting down" in refusal(other.get("/health"), 503)
        refusal(other.post("/v1/completions", json=LONG), 503)
        goes_on.set()
        rest = [json.loads(line.removeprefix("data: ")) for line in lines if "{" in line]
        assert rest[-1]["choices"][0]["finish_reason"] == "length"


def test_a_fault_inside_one_request_takes_only_itself_down(served, monkeypatch):
    push = RowText.push

    def breaks(self, token):
        if self._stop == ["break"]:
            raise TypeError("a fault")
        return push(self, token)

    monkeypatch.setattr(RowText, "push", breaks)
    bad = served.client.post("/v1/completions", json=LONG | {"stop": "break"})
    assert "the answer failed: TypeError: a fault" in refusal(bad, 500)
    with served.client.stream(
        "POST", "/v1/completions", json=LONG | {"stop": "break", "stream": True}
    ) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert "a fault" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
    assert lines[-1] == "data: [DONE]"
    assert served.client.post("/v1/completions", json=LONG).status_code == 200


def test_an_engine_that_died_is_not_healthy(mistral):
    service = Service("tiny")
    service.load(lambda: loaded(mistral, slots=1))
    with contextlib.closing(service), running(service) as served:

        def fails():
            raise MemoryError("no memory")

        service.loaded.engine._worker._turn = fails
        answer = served.client.post("/v1/completions", json=LONG)
        assert answer.status_code == 500
        assert "no memory" in refusal(served.client.get("/health"), 503)
        assert "no memory" in refusal(served.client.post("/v1/completions", json=LONG), 503)


def test_metrics_count_requests_and_tokens(served):
    def read():
        lines = served.client.get("/metrics").text.splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))

    before = read()
    served.client.post("/v1/completions", json=LONG)
    served.client.post("/v1/completions", json={})
    after = read()

    def grown(name):
        return float(after[name]) - float(before.get(name, 0))

    assert grown("mistral_jax_generated_tokens_total") == 150
    assert grown('mistral_jax_responses_total{route="/v1/completions",status="200"}') == 1
    assert grown('mistral_jax_responses_total{route="/v1/completions",status="400"}') == 1
    assert grown('mistral_jax_answers_total{reason="length"}') == 1
    assert grown("mistral_jax_time_to_first_token_seconds_count") == 1
    assert float(after["mistral_jax_slots"]) == 4
    assert float(after["mistral_jax_ready"]) == 1


def test_each_request_is_one_line_of_the_log(served, caplog):
    LOG.propagate = True
    with caplog.at_level(logging.INFO, LOG.name):
        served.client.post("/v1/completions", json=LONG | {"n": 2})
        served.client.post("/v1/completions", json={"prompt": 5})
    good, bad = (json.loads(JsonLines().format(record)) for record in caplog.records)
    assert good["tokens_out"] == 300
    assert (good["status"], good["end"], bad["status"]) == (200, "length", 400)
    assert good["tokens_per_s"] > 0
    assert all("\n" not in record.getMessage() for record in caplog.records)


def test_the_description_fits_the_routes_and_what_they_accept(served):
    described = served.client.get("/openapi.json").json()
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            answer = served.client.request(method, path, json={} if method == "post" else None)
            assert str(answer.status_code) in operation["responses"]
    for name, schema in described["components"]["schemas"].items():
        jsonschema.Draft202012Validator.check_schema(schema)
        for table, body in ROUTES.values():
            if table.title() == name:
                jsonschema.validate(body, schema)
