"""Describes the routes as OpenAPI, from the tables that check requests."""

from typing import Any

from mistral_jax.serving import protocol

_ROUTES = {
    "/v1/completions": ("COMPLETION", "Continue texts"),
    "/v1/chat/completions": ("CHAT", "Answer a conversation"),
    "/completion": ("NATIVE", "Continue texts, in llama.cpp's form"),
    "/infill": ("INFILL", "Fill in a text, in llama.cpp's form"),
    "/tokenize": ("TOKENIZE", "Convert a text or a conversation to tokens"),
    "/detokenize": ("DETOKENIZE", "Convert tokens to a text"),
}
_READ = {
    "/v1/models": "List the models",
    "/health": "Tell whether the server takes requests",
    "/tokenizer_info": "Describe the tokenizer",
    "/metrics": "Prometheus metrics",
    "/openapi.json": "This description",
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {"type": "integer"},
            },
        }
    },
}
_STATUSES = {
    "400": "The request is invalid",
    "401": "The request has no valid key",
    "404": "There is no such model",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "500": "The request failed inside",
    "503": "The server is busy, loading or shutting down",
}


def describe(version: str) -> dict[str, Any]:
    """Returns the OpenAPI document.

    Args:
      version: version of the server.
    """
    paths: dict[str, Any] = {}
    for path, (table, summary) in _ROUTES.items():
        body = {"schema": {"$ref": f"#/components/schemas/{table.title()}"}}
        streams = "stream" in getattr(protocol, table)
        content: dict[str, Any] = {"application/json": {"schema": {}}}
        if streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": {"application/json": body}},
                "responses": _responses(content),
            }
        }
    for path, summary in _READ.items():
        kind = "text/plain" if path == "/metrics" else "application/json"
        schema = {"type": "string"} if path == "/metrics" else {"type": "object"}
        paths[path] = {
            "get": {"summary": summary, "responses": _responses({kind: {"schema": schema}})}
        }
    tables = {table for table, _ in _ROUTES.values()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mistral_jax", "version": version},
        "paths": paths,
        "components": {
            "schemas": {
                "Error": _ERROR,
                **{table.title(): protocol.schema(table) for table in sorted(tables)},
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _responses(content: dict[str, Any]) -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    found = {"200": {"description": "The answer", "content": content}}
    for status, meaning in _STATUSES.items():
        found[status] = {"description": meaning, "content": error}
    return found
