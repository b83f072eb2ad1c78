"""The OpenAPI document against the server: requests made up from it, right and wrong, get what it says."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge.transports.http import places
from edge.transports.http.openai_shape import UNSUPPORTED, CompletionRequest
from edge.transports.http.openapi import openapi_document
from edge.transports.http.routes import Routes
from edge.transports.http.server import HttpServer
from tests.integration.harness import ROOT
from tests.support.http_server import served
from tests.support.picture_files import picture

schemathesis = pytest.importorskip("schemathesis", reason="of the extra `dev`")
from hypothesis import HealthCheck, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

EXAMPLES = 60
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
DOCUMENT = openapi_document("1", fleet=True)
api = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.fixture
def quick(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> HttpServer:
    """Many requests made up here are refused, and are not to be slowed."""
    monkeypatch.setattr(places, "RATE", 1e6)
    return server


@pytest.mark.slow
@api.parametrize()  # type: ignore[untyped-decorator]
@settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_openapi_says_what_is_served(quick: HttpServer, case: Any) -> None:
    response = case.call(base_url=quick.url)
    late = response.status_code == 504 and "deadline_ms" in str(case.body)  # as the document says
    validate(case, response, also=[] if late else [not_a_server_error])


def validate(case: Any, response: Any, also: Sequence[Any] = ()) -> None:
    """Apply the checks; what is too large is refused unread, and schemathesis does not count 413 as a refusal."""
    unread = response.status_code == 413
    checks = [check for check in CHECKS if not (unread and check is negative_data_rejection)]
    case.validate_response(response, checks=[*checks, *also])


@pytest.fixture
def reading(conditioned_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    """A server whose bundle takes words and pictures."""
    monkeypatch.setattr(places, "RATE", 1e6)
    with served(conditioned_bundle, "ort", tmp_path) as made:
        yield made


@pytest.mark.slow
@api.include(path="/v1/completions").parametrize()  # type: ignore[untyped-decorator]
@settings(max_examples=EXAMPLES // 4, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_openapi_says_what_is_served_of_words_and_pictures(reading: HttpServer, case: Any) -> None:
    """Made up words, and what is no picture; then the same request with a word and a picture that are right."""
    response = case.call(base_url=reading.url)
    validate(case, response)
    if isinstance(case.body, dict):
        case.body = {**case.body, "words": ["cat"], "images": [picture(1)], "max_tokens": 2}
        response = case.call(base_url=reading.url)
        case.validate_response(response, checks=CHECKS[:3])


def test_openapi_served_with_a_picture_is_a_text(reading: HttpServer) -> None:
    """What the test above would miss if every request of it were refused."""
    body = {"prompt": "a", "max_tokens": 2, "words": ["cat"], "images": [picture(1)], "guidance": 1.0}
    case = api["/v1/completions"]["POST"].Case(body=body, media_type="application/json")
    response = case.call(base_url=reading.url)
    assert response.status_code == 200 and response.json()["choices"], response.text
    case.validate_response(response, checks=CHECKS[:3])


def test_openapi_has_every_path_and_field(server: HttpServer) -> None:
    paths = set(server._routes._routes) - {"/openapi.json"}
    assert isinstance(server._routes, Routes) and paths <= DOCUMENT["paths"].keys()
    fields = DOCUMENT["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields.keys() == set(CompletionRequest.__struct_fields__) >= UNSUPPORTED.keys()


def test_openapi_refers_to_what_it_has() -> None:
    text = json.dumps(DOCUMENT)
    schemas = DOCUMENT["components"]["schemas"]
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) <= schemas.keys()
    assert "\\\\Z" not in text


def test_protocol_page_names_every_field_and_path() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text("utf-8").partition("## HTTP")[2]
    names = [*CompletionRequest.__struct_fields__, *(path.partition("/{")[0] for path in DOCUMENT["paths"])]
    assert [name for name in names if not re.search(rf"`(?:GET |POST |PUT )?{re.escape(name)}(?:/NAME)?`", text)] == []
