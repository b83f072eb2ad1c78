"""What is served, as an OpenAPI 3.1 document, made from the structs that decode and encode it."""

from typing import Any, Final

import msgspec

from edge.transports.http.attaching import Attached
from edge.transports.http.chat_shape import ChatCompletion, ChatRequest
from edge.transports.http.errors import ErrorBody
from edge.transports.http.models import Model, ModelList
from edge.transports.http.openai_shape import Completion, CompletionRequest
from edge.transports.mqtt.fleet import FleetView
from shared.errors import ERROR_CODES
from shared.messages import Health

SCHEMAS: Final = (
    CompletionRequest,
    Completion,
    Attached,
    ChatRequest,
    ChatCompletion,
    ErrorBody,
    Model,
    ModelList,
    Health,
    FleetView,
)
ALWAYS: Final = (
    *("bad_request", "unauthorized", "forbidden", "not_found", "method_not_allowed", "too_slow", "too_large"),
    *("queue_full", "headers_too_large", "internal"),
)
"""Codes that any request may be refused with."""
OF_COMPLETIONS: Final = ("conflict", "unsupported_media", "draining", "timeout", "storage_full")
KEY: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "pattern": "^[^/+#\\x00-\\x1f]{1,128}$"},
    "description": "The request's id: sent again with the same body, it gets the same bytes for a day.",
}
TAKES: Final[list[dict[str, Any]]] = [
    {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "segments": {"type": "null"}}},
    {
        "required": ["segments"],
        "properties": {"segments": {"type": "array"}, "prompt": {"type": "null"}, "suffix": {"enum": [None, ""]}},
    },
]
"""A request has exactly one of the two, which a struct cannot say."""

Object = dict[str, Any]


def openapi_document(version: str, *, fleet: bool) -> Object:
    """The document. version: of the daemon. fleet: whether it has a broker, and so knows other devices."""
    _, components = msgspec.json.schema_components(SCHEMAS, ref_template="#/components/schemas/{name}")
    # `\\Z` is Python's end of text; in the schema's dialect that is `$`.
    schemas: Object = msgspec.json.decode(msgspec.json.encode(components).replace(rb"\\Z", b"$"))
    schemas["CompletionRequest"]["oneOf"] = TAKES
    complete = _written("A text", "complete", asked=CompletionRequest, answered=Completion)
    chat = _written("What follows the last message", "chat", asked=ChatRequest, answered=ChatCompletion)
    model = _operation("The bundle by its name", "model", _json(Model))
    model["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    health = _operation("State of the daemon", "health", _json(Health))
    health["responses"]["503"] = {"description": "draining, or the device has failed", "content": _json(Health)}
    devices = _operation("All devices of the broker", "fleet", _json(FleetView), (*ALWAYS, "broker_lost", "draining"))
    return {
        "openapi": "3.1.0",
        "info": {"title": "edgelm", "version": version},
        "paths": {
            "/v1/completions": {"post": complete},
            "/v1/chat/completions": {"post": chat},
            "/v1/attachments/{name}": {"put": _attach()},
            "/v1/models": {"get": _operation("The bundle", "models", _json(ModelList))},
            "/v1/models/{model}": {"get": model},
            "/health": {"get": health},
            "/metrics": {
                "get": _operation("For Prometheus", "metrics", {"text/plain": {"schema": {"type": "string"}}})
            },
            **({"/fleet": {"get": devices}} if fleet else {}),
        },
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
    }


def _written(summary: str, name: str, *, asked: type[msgspec.Struct], answered: type[msgspec.Struct]) -> Object:
    operation = _operation(summary, name, _json(answered), (*ALWAYS, *OF_COMPLETIONS))
    operation["responses"]["200"]["content"]["text/event-stream"] = {}  # events: no schema of one text
    operation["requestBody"] = {"required": True, "content": _json(asked)}
    operation["parameters"] = [KEY]
    return operation


def _attach() -> Object:
    operation = _operation("A picture's file, by a name for `images`", "attach", _json(Attached))
    operation["responses"]["201"] = operation["responses"]["200"]
    operation["responses"]["200"] = {"description": "Taken away, by an empty body", "content": _json(Attached)}
    name = {"type": "string", "pattern": "^[^/+#\\x00-\\x1f\\x7f-\\x9f]{1,64}$"}
    operation["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": name}]
    operation["requestBody"] = {"content": {"application/octet-stream": {}}}
    return operation


def _operation(summary: str, name: str, content: Object, codes: tuple[str, ...] = ALWAYS) -> Object:
    responses: Object = {"200": {"description": summary, "content": content}}
    for code in codes:
        responses.setdefault(str(ERROR_CODES[code][0]), {"description": code, "content": _json(ErrorBody)})
    return {"operationId": name, "summary": summary, "responses": responses}


def _json(kind: type[msgspec.Struct]) -> Object:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
