"""The OpenAPI document against the server: requests made up from it, right and wrong, get what it says."""

import json
import re
from typing import Any

import pytest

from edge.transports.http import places
from edge.transports.http.openai_shape import UNSUPPORTED, CompletionRequest
from edge.transports.http.openapi import openapi_document
from edge.transports.http.routes import Routes
from edge.transports.http.server import HttpServer
from tests.integration.harness import ROOT

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
DOCUMENT = openapi_document("1")
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
    case.validate_response(response, checks=CHECKS if late else [*CHECKS, not_a_server_error])


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
    assert [name for name in names if not re.search(rf"`(?:GET |POST )?{re.escape(name)}`", text)] == []
