"""Labels, request ids and what a list shows of them: kept, changed, searched for, chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import Answer, Client, a_key, ok, path_key, running

import wggw

PEERS = "/api/v1/configurations/"
CLASSES = '{"slow": {"down": "1mbit"}, "fast": {}}'
SHARED_SETTINGS = {"SERVICE_CLASSES": CLASSES}


def path_of(key: str) -> str:
    return PEERS + path_key(key)


@pytest.fixture
def api(shared_client: Client) -> Client:
    return shared_client


def listed(api: Client, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ok(api.send("GET", f"{PEERS}?{query}"))["configurations"]
    return found


def test_label_and_class_are_kept_changed_and_taken_away(api: Client) -> None:
    key = a_key("kept")
    made = ok(api.create(key, label="a laptop, ü", service_class="slow"))
    assert (made["label"], made["service_class"]) == ("a laptop, ü", "slow")
    path = path_of(key)
    shown = ok(api.send("PATCH", path, {"label": "a phone", "service_class": "fast"}))
    assert (shown["label"], shown["service_class"]) == ("a phone", "fast")
    assert ok(api.send("PATCH", path, {"dns": "d2"}))["label"] == "a phone"
    bare = ok(api.send("PATCH", path, {"label": None, "service_class": None, "request_id": None}))
    assert (bare["label"], bare["service_class"]) == (None, None)


def test_unknown_class_is_refused_by_name(api: Client) -> None:
    answer = api.create(a_key("unknown"), service_class="gold")
    assert answer.status == 422
    assert answer.json["detail"] == "service_class: must be one of slow, fast"
    ok(api.create(a_key("known")))
    answer = api.send("PATCH", path_of(a_key("known")), {"service_class": "gold"})
    assert answer.status == 422


def test_lists_find_labels_and_request_ids(api: Client) -> None:
    for number in range(6):
        ok(
            api.create(
                a_key(("found", number)), label=f"odd {number % 2}", request_id=f"order {number}"
            )
        )
    keys = [a_key(("found", number)) for number in range(6)]
    assert [p["public_key"] for p in listed(api, "label=odd+1")] == keys[1::2]
    assert [p["public_key"] for p in listed(api, "request_id=order%204")] == [keys[4]]
    assert [p["public_key"] for p in listed(api, "label=odd+1&request_id=order+3")] == [keys[3]]
    assert listed(api, "label=odd") == listed(api, "label=") == []
    first = ok(api.send("GET", PEERS + "?label=odd+0&limit=2"))
    assert [p["public_key"] for p in first["configurations"]] == keys[0:4:2]
    rest = listed(api, f"label=odd+0&limit=2&cursor={first['next_cursor']}")
    assert [p["public_key"] for p in rest] == [keys[4]]


def test_lists_find_why_a_peer_is_suspended(api: Client) -> None:
    ok(api.create(a_key("by hand")))
    ok(api.send("PUT", path_of(a_key("by hand")) + "/status", {"status": "suspended"}))
    assert listed(api, "status_reason=quota") == []
    assert api.send("GET", PEERS + "?status_reason=mood").status == 422


def test_list_shows_the_members_that_are_named(api: Client) -> None:
    ok(api.create(a_key("lean"), label="lean"))
    assert listed(api, "label=lean&fields=public_key,rx_bytes") == [
        {"public_key": a_key("lean"), "rx_bytes": 0}
    ]
    whole = listed(api, "label=lean")[0]
    names = ",".join(reversed(list(wggw.CONFIGURATION)))
    assert listed(api, f"label=lean&fields={names}") == [whole]
    for wrong in ("", "public_key,", "colour", "public_key,+label"):
        assert api.send("GET", f"{PEERS}?fields={wrong}").status == 422


def test_a_desired_state_names_labels_and_classes(tmp_path: Path) -> None:
    with running(tmp_path, SERVICE_CLASSES=CLASSES) as process:
        api = process.client()
        element = {"public_key": a_key(1), "label": "one", "service_class": "slow"}
        done = ok(api.send("PUT", PEERS, [element]))
        assert done["created"] == 1
        assert ok(api.send("PUT", PEERS, [element]))["unchanged"] == 1
        changed = {**element, "label": None, "service_class": "fast"}
        assert ok(api.send("PUT", PEERS, [changed]))["updated"] == 1
        process.kill()
        process.start()
        shown = ok(process.client().send("GET", path_of(a_key(1))))
        assert (shown["label"], shown["service_class"]) == (None, "fast")
        wrong = process.client().send("PUT", PEERS, [{**element, "service_class": "gold"}])
        assert wrong.status == 422


def test_create_tells_what_it_ignores_and_what_differs(api: Client) -> None:
    key = a_key("again")
    made = ok(api.create(key, label="a", rate_limit=5, Colour=None))
    assert made["ignored"] == ["Colour", "rate_limit"] and "differs" not in made
    again = ok(api.create(key, label="a"))
    assert again["status"] == "exists" and not again.keys() & {"ignored", "differs"}
    other = {
        "label": "b",
        "dns": "d2",
        "assigned_ip": "10.0.1.200",
        "protocol": "dual",
        "preshared_key": a_key("psk"),
        "tunnel_traffic": ["ipv4"],
        "obfuscation": True,
    }
    again = ok(api.create(key, **other))
    assert again["differs"] == sorted(other.keys() - {"tunnel_traffic"})
    assert again["label"] == "a"


@pytest.mark.parametrize("end", ["", "batch"])
def test_create_tells_which_members_of_obfuscation_it_ignores(api: Client, end: str) -> None:
    given = {"enabeld": True, "Jc": 4, "generation": "1.0", "warnings": []}
    body = {"public_key": a_key(("typo", end)), "obfuscation": given, "speed": 1}
    if end:
        made = ok(api.send("POST", PEERS + end, {"operations": [{"op": "create", **body}]}))
        [made] = made["results"]
    else:
        made = ok(api.send("POST", PEERS, body))
    assert (made["status"], made["obfuscation"]) == ("created", None)
    assert made["ignored"] == ["obfuscation.enabeld", "speed"]


def test_operations_of_a_batch_tell_it_too(api: Client) -> None:
    create = {"op": "create", "public_key": a_key("batch"), "label": "a"}
    operations = [create, {**create, "label": "b", "speed": 1}, {"op": "suspend", "speed": 1}]
    body = {"operations": operations}
    first, second, third = ok(api.send("POST", PEERS + "batch", body))["results"]
    assert first["status"] == "created" and not first.keys() & {"ignored", "differs"}
    assert (second["differs"], second["ignored"]) == (["label"], ["speed"])
    assert third["status"] == 422 and third["detail"].startswith("speed: is not known here")


@pytest.mark.parametrize(
    ("method", "end", "body"),
    [
        ("PATCH", "", {"rate_limit": 5}),
        ("PUT", "/status", {"status": "active", "reason": "x"}),
        ("POST", "/rotate", {"new_public_key": a_key("new"), "label": "x"}),
    ],
)
def test_unknown_fields_are_refused_by_name(
    api: Client, method: str, end: str, body: dict[str, Any]
) -> None:
    ok(api.create(a_key("strict")))
    answer = api.send(method, path_of(a_key("strict")) + end, body)
    assert answer.status == 422 and answer.json["detail"].startswith(f"{list(body)[-1]}: ")


FIELDLESS = [r for r in wggw.ROUTES if r.method not in ("GET", "DELETE") and not r.fields | r.media]


@pytest.mark.parametrize("route", FIELDLESS, ids=lambda route: route.template)
def test_a_change_without_fields_refuses_any(api: Client, route: wggw.ApiRoute) -> None:
    ok(api.create(a_key("fieldless")))
    path = route.template.format(public_key=path_key(a_key("fieldless")))
    answer = api.send(route.method, path, {"interface": "wg0"})
    assert answer.status == 422
    assert answer.json["detail"] == "interface: is not known here; known are none"
    assert [api.send(route.method, path, b).status for b in (b"[]", b"x", {}, None)] == [
        *(400, 400),
        *(200, 200),
    ]


def test_unknown_field_of_a_desired_state_is_refused_but_what_a_list_shows_is_not(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as process:
        api = process.client()
        shown = ok(api.create(a_key(1), protocol="dual"))
        shown = ok(api.get(a_key(1)))
        assert ok(api.send("PUT", PEERS, [shown]))["unchanged"] == 1
        metered = {"public_key": a_key(1), "quota_period": "day"}
        assert ok(api.send("PUT", PEERS, [metered]))["updated"] == 1
        assert ok(api.get(a_key(1)))["quota_period"] == "day"
        answer = api.send("PUT", PEERS, [{**shown, "speed": 1}])
        assert answer.status == 422 and "speed: is not known here" in answer.json["detail"]
        answer = api.send("PUT", PEERS, [{**shown, "obfuscation": {"enabeld": True}}])
        assert answer.status == 422
        assert "obfuscation.enabeld: is not known here" in answer.json["detail"]


@pytest.mark.parametrize(
    "path", [PEERS + "?q=1", path_of(a_key(1)) + "?verbose", "/api/v1/ip-usage?limit=1"]
)
def test_unknown_query_parameter_is_refused_by_name(api: Client, path: str) -> None:
    answer = api.send("GET", path)
    name = path.partition("?")[2].partition("=")[0]
    assert answer.status == 400
    assert answer.json["detail"] == f"{name}: is no query parameter of this path"


def test_a_quota_has_a_period_and_can_be_reset(api: Client) -> None:
    key, other = a_key("metered"), a_key("for life")
    made = ok(api.create(key, quota_bytes=10**12, quota_period="week"))
    assert (made["quota_period"], made["quota_used"]) == ("week", 0)
    again = ok(api.create(key, quota_period="month"))
    assert (again["status"], again["differs"]) == ("exists", ["quota_period"])
    assert ok(api.create(other))["quota_period"] is None
    shown = ok(api.send("PATCH", path_of(key), {"quota_period": "day"}))
    assert ok(api.send("POST", path_of(key) + "/reset-quota")) == shown
    assert api.send("POST", path_of(a_key("nobody")) + "/reset-quota").status == 404
    operations = [
        {"op": "update", "public_key": key, "quota_period": None},
        {"op": "reset-quota", "public_key": key},
        {"op": "reset-quota", "public_key": a_key("nobody")},
        {"op": "reset-quota", "public_key": key, "quota_bytes": 1},
    ]
    results = ok(api.send("POST", PEERS + "batch", {"operations": operations}))["results"]
    assert [r["status"] for r in results] == ["updated", "reset", 404, 422]
    assert (results[1]["peer_status"], results[1]["quota_period"]) == ("active", None)


def test_a_batch_updates_and_rotates_in_order(api: Client) -> None:
    old, new, other = a_key("old"), a_key("new in a batch"), a_key("other in a batch")
    operations = [
        {"op": "create", "public_key": old, "label": "a"},
        {"op": "update", "public_key": old, "label": "b", "quota_bytes": 5},
        {"op": "rotate", "public_key": old, "new_public_key": new},
        {"op": "update", "public_key": new, "quota_bytes": None},
        {"op": "create", "public_key": old},
        {"op": "rotate", "public_key": other, "new_public_key": a_key("nobody")},
        {"op": "update", "public_key": new, "colour": "red"},
        {"op": "rotate", "public_key": new, "new_public_key": old},
    ]
    results = ok(api.send("POST", PEERS + "batch", {"operations": operations}))["results"]
    assert [r["status"] for r in results] == [
        *("created", "updated", "rotated", "updated", "created"),
        *(404, 422, 409),
    ]
    assert (results[1]["label"], results[1]["quota_bytes"]) == ("b", 5)
    assert (results[2]["public_key"], results[2]["peer_status"]) == (new, "active")
    assert results[2]["assigned_ip"] == results[0]["assigned_ip"] != results[4]["assigned_ip"]
    assert ok(api.get(new))["quota_bytes"] is None


def test_patch_gives_a_family_that_the_peer_did_not_have(api: Client) -> None:
    keys = {name: a_key(("family", name)) for name in ("auto", "named", "four", "protocol", "sent")}
    for name, key in keys.items():
        ok(api.create(key, protocol="ipv6" if name == "four" else "ipv4"))

    def patch(name: str, **fields: Any) -> Answer:
        return api.send("PATCH", path_of(keys[name]), fields)

    shown = ok(patch("auto", assigned_ipv6="auto"))
    assert shown["assigned_ipv6"].startswith("fd42:4242:1::")
    assert (shown["tunnel_traffic"], shown["allowed_ips"]) == (
        ["ipv4", "ipv6"],
        ["0.0.0.0/0", "::/0"],
    )
    assert ok(patch("auto", assigned_ipv6="auto", assigned_ip="auto")) == shown
    assert ok(patch("auto", assigned_ipv6=shown["assigned_ipv6"], protocol="dual")) == shown
    assert ok(patch("auto", protocol="ipv4")) == shown  # it keeps what it has
    assert ok(patch("named", assigned_ipv6="fd42:4242:1::77"))["assigned_ipv6"] == "fd42:4242:1::77"
    assert ok(patch("four", assigned_ip="auto"))["assigned_ip"]
    shown = ok(patch("protocol", protocol="dual", tunnel_traffic=["ipv6"]))
    assert (bool(shown["assigned_ipv6"]), shown["tunnel_traffic"]) == (True, ["ipv6"])
    update = {"op": "update", "public_key": keys["sent"], "assigned_ipv6": "auto"}
    [result] = ok(api.send("POST", PEERS + "batch", {"operations": [update]}))["results"]
    assert (result["status"], bool(result["assigned_ipv6"])) == ("updated", True)
    for fields, status in (
        ({"assigned_ipv6": "fd42:4242:1::78"}, 409),  # it has another one
        *(({name: None}, 422) for name in ("assigned_ip", "assigned_ipv6", "dns", "port")),
        ({"persistent_keepalive": None}, 422),
        ({"assigned_ip": "automatic"}, 422),
        ({"protocol": "both"}, 422),
    ):
        answer = patch("named", **fields)
        assert answer.status == status
        assert answer.json["detail"].startswith(f"{next(iter(fields))}: ")
    ok(api.create(a_key("late"), protocol="ipv4"))
    taken = api.send("PATCH", path_of(a_key("late")), {"assigned_ipv6": "fd42:4242:1::77"})
    assert (taken.status, ok(api.get(a_key("late")))["assigned_ipv6"]) == (409, None)
    assert api.send("DELETE", path_of(keys["named"])).status == 200
    ok(api.send("PATCH", path_of(a_key("late")), {"assigned_ipv6": "fd42:4242:1::77"}))


def test_patch_of_a_family_that_the_interface_does_not_have_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, WG_IPV6_SUBNET="") as process:
        api = process.client()
        ok(api.create(a_key(1)))
        for name, value in {"assigned_ipv6": "auto", "protocol": "dual"}.items():
            answer = api.send("PATCH", path_of(a_key(1)), {name: value})
            assert (answer.status, answer.json["detail"].partition(":")[0]) == (422, name)
