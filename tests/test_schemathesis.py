"""Random requests made from /openapi.json: each answer must be one that the document describes.

EXAMPLES is the number of requests for each row of the route table. When LONG, others try each limit
of each field, too: the fitting value next to it, and the other one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from harness import API_KEY, LONG, GatewayProcess, a_key, path_key, running, sign
from hypothesis import HealthCheck, settings

import wggw

EXAMPLES = 200 if LONG else 8
KNOWN = [a_key(n) for n in range(4)]

# What the description cannot say, by the row that does so.
UNSAID = {
    "POST /api/v1/configurations": {
        # Random text does not decrypt.
        "positive_data_acceptance": {"expected-statuses": ["2xx", 400, 409, 422]},
    },
    "POST /api/v1/configurations/batch": {  # a bad operation has its error in the results
        "negative_data_rejection": {"enabled": False}
    },
    **{  # no description knows the numbers of changes: what is later than the last is a 410
        f"GET /api/v1/{feed}": {
            "positive_data_acceptance": {"expected-statuses": ["2xx", 410, 422]},
        }
        for feed in ("changes", "usage")
    },
    "PUT /api/v1/configurations": {  # random text is no line of JSON
        "positive_data_acceptance": {"expected-statuses": ["2xx", 400, 409, 422]},
    },
    "PUT /api/v1/snapshot": {  # random bytes are no snapshot
        "positive_data_acceptance": {"enabled": False}
    },
}
CONFIG = {
    # Each process of a run makes them when it collects the tests, which takes 2.5 s.
    "phases": {"coverage": {"enabled": LONG}},
    "checks": {
        # A value may fit its description and yet not this gateway, such as a port.
        "positive_data_acceptance": {"expected-statuses": ["2xx", 404, 409, 422]},
        "ignored_auth": {"enabled": False},  # once for each row is enough: test_openapi.py
    },
    "operations": [{"include-name": name, "checks": checks} for name, checks in UNSAID.items()],
}

SCHEMA = schemathesis.openapi.from_dict(
    json.loads(wggw.openapi_document()),
    config=schemathesis.Config.from_dict(CONFIG),
)


@SCHEMA.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any]) -> dict[str, Any]:
    """Make every other well-formed key one that exists."""
    key = path_parameters.get("public_key") if path_parameters else None
    if isinstance(key, str) and len(key) in (43, 44) and sum(key.encode()) % 2:
        return {"public_key": path_key(KNOWN[sum(key.encode()) // 2 % len(KNOWN)])}
    return path_parameters


@SCHEMA.hook
def map_query(context: Any, query: dict[str, Any]) -> dict[str, Any]:
    """Let no feed wait long for a change that nobody makes."""
    if query and isinstance(query.get("wait"), int) and 0 < query["wait"] <= 60:
        return {**query, "wait": 0}
    return query


@schemathesis.serializer("application/x-ndjson")
def _(_context: Any, value: Any) -> bytes:
    """Lines as the text that they are."""
    return str(value).encode("utf-8", "surrogatepass")


class Signed(requests.auth.AuthBase):
    """The legacy signature, over the body as it is sent."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        body = request.body or b""
        data = body.encode() if isinstance(body, str) else body
        request.headers.pop("Signature-Input", None)  # random: it would choose the other scheme
        request.headers.update(sign(data, API_KEY))
        return request


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    directory = tmp_path_factory.mktemp("gateway")
    subnets = {"WG_IPV4_SUBNET": "10.0.0.0/16", "AWG_IPV4_SUBNET": "10.1.0.0/16"}
    with running(directory, LOG_LEVEL="warning", AWG_INTERFACE="awg0", **subnets) as process:
        yield process


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as kept:
        yield kept


@SCHEMA.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=not LONG or settings.default.derandomize,  # the same ones in every quick run
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_described(
    live: GatewayProcess, session: requests.Session, case: Any
) -> None:
    case.call_and_validate(
        base_url=f"https://127.0.0.1:{live.port}",
        session=session,
        auth=Signed(),
        verify=live.settings["TLS_CERT"],
        timeout=30,
    )


def test_nothing_of_it_was_a_defect(live: GatewayProcess) -> None:
    """Runs last: the gateway is as well as before, and logged no internal error."""
    client = live.client()
    assert client.send("GET", "/api/v1/server/status").json["status"] == "healthy"
    assert "internal error" not in live.text()
