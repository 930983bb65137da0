"""/metrics: names and values, promtool's opinion, and that rules and dashboard fit to it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ROOT, Client, GatewayProcess, a_key, running, wait_for

import wggw

DOCS = ROOT / "docs/monitoring"
SAMPLE = re.compile(r"([a-z_]+)(?:\{(.*)\})? (\S+)")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    classes = {"SERVICE_CLASSES": '{"slow": {"down": "1mbit"}}'}
    settings = {"PER_PEER_METRICS": "true", "SAMPLE_INTERVAL": "0.2", **classes}
    with running(tmp_path_factory.mktemp("metrics"), **settings) as gateway:
        client = gateway.client()
        for number in range(3):
            assert client.create(a_key(number)).status == 200
        client.status(a_key(0), "suspended")
        client.raw("GET", "/api/v1/ip-usage", b"", {})  # a failed authentication
        yield gateway


def scrape(client: Client) -> str:
    answer = client.raw("GET", "/metrics", b"", {})
    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    return answer.body.decode()


def samples(text: str) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert (match[1], match[2] or "") not in found, line
            found[match[1], match[2] or ""] = float(match[3])
    return found


def promtool(*arguments: str, given: str | None = None) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool: tests/run --full installs it")
    done = subprocess.run(
        ["promtool", *arguments], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and not done.stderr.strip(), done.stdout + done.stderr


def test_promtool_finds_nothing_to_say_about_the_metrics(watched: GatewayProcess) -> None:
    promtool("check", "metrics", given=scrape(watched.client()))


def test_promtool_accepts_the_alert_rules() -> None:
    promtool("check", "rules", str(DOCS / "alerts.yml"))


def test_promtool_accepts_the_configuration(tmp_path: Path) -> None:
    found = re.search(r"^```yaml\n(.*?)^```", (DOCS / "README.md").read_text(), re.M | re.S)
    assert found
    shutil.copy(DOCS / "alerts.yml", tmp_path)
    (tmp_path / "wggw.token").write_text("a token of sixteen or more")
    wggw.make_certificate(str(tmp_path / "wggw-cert.pem"), str(tmp_path / "key.pem"), ["localhost"])
    path = tmp_path / "prometheus.yml"
    path.write_text(found[1].replace("/etc/prometheus", str(tmp_path)))
    promtool("check", "config", str(path))


# An alert of the remote copy: what it is about, what passes, and what is told, in promtool's form.
CASE = """
rule_files: [{rules}]
tests:
  - interval: 1m
    input_series:
      - {{series: '{metric}{{instance="gateway:8000"}}', values: {values}}}
    alert_rule_test:
      - {{eval_time: 4m, alertname: {alert}, exp_alerts: []}}
      - eval_time: 20m
        alertname: {alert}
        exp_alerts:
          - exp_labels: {{severity: warning, instance: "gateway:8000"}}
            exp_annotations: {{summary: "{summary}", description: "{description}"}}
"""
WHY = "`wggw status` on the host says why."
BEHIND = {
    "alert": "WggwRemoteCopyBehind",
    "metric": "wggw_remote_copy_lag_seconds",
    "values": "2 0 60 60 2 0 90x20",
    "summary": "The remote copy of gateway:8000 is 1m 30s behind",
    "description": f"What it lacks is lost when the node is lost: {WHY}",
}
FAILING = {
    "alert": "WggwRemoteCopyFailing",
    "metric": "wggw_remote_copy_failing",
    "values": "0 1 1 1 0 1x20",
    "summary": "gateway:8000 cannot bring its remote copy up to date",
    "description": WHY,
}


@pytest.mark.parametrize("case", [BEHIND, FAILING], ids=lambda case: case["alert"])
def test_alerts_of_the_remote_copy_fire(tmp_path: Path, case: dict[str, str]) -> None:
    path = tmp_path / "case.yml"
    path.write_text(CASE.format(rules=DOCS / "alerts.yml", **case))
    promtool("test", "rules", str(path))


EXPECTED = {
    ("wggw_peers", 'interface="wg0",state="active",reason=""'): 2,
    ("wggw_peers", 'interface="wg0",state="suspended",reason="asked"'): 1,
    ("wggw_peers", 'interface="wg0",state="suspended",reason="expired"'): 0,
    ("wggw_peers", 'interface="wg0",state="suspended",reason="quota"'): 0,
    ("wggw_peers_online", ""): 0,
    ("wggw_degraded", ""): 0,
    ("wggw_pool_used_addresses", 'interface="wg0",family="ipv4"'): 3,
    ("wggw_pool_total_addresses", 'interface="wg0",family="ipv4"'): 253,
    ("wggw_interface_receive_bytes_total", 'interface="wg0"'): 0,
    ("wggw_interface_transmit_bytes_total", 'interface="wg0"'): 0,
    ("wggw_journal_records_total", ""): 5,
    ("wggw_peer_receive_bytes_total", f'interface="wg0",key="{a_key(0)[:8]}"'): 0,
    ("wggw_peer_last_handshake_timestamp_seconds", f'interface="wg0",key="{a_key(2)[:8]}"'): 0,
}


def test_values_are_true(watched: GatewayProcess) -> None:
    found = samples(scrape(watched.client()))
    assert {row: found.get(row) for row in EXPECTED} == EXPECTED
    assert watched.process is not None
    pid = watched.process.pid
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(next(re.finditer(r"VmRSS:\s+(\d+)", status))[1]) * 1024
    assert found["process_resident_memory_bytes", ""] == pytest.approx(resident, rel=0.2)
    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    assert found["process_open_fds", ""] == pytest.approx(files, abs=5)
    assert found["wggw_journal_sync_duration_seconds_count", ""] >= 1
    assert sum(v for (name, _), v in found.items() if name == "wggw_auth_failures_total") == 1


@pytest.mark.parametrize(
    "header",
    ["Forwarded", "X-Forwarded-For", "x-forwarded-proto", "X-Forwarded-Host", "X-Real-IP", "Via"],
)
def test_a_proxy_on_this_host_opens_them_to_nobody(gateway: GatewayProcess, header: str) -> None:
    client = gateway.client()
    answer = client.raw("GET", "/metrics", b"", {header: "192.0.2.1"})
    assert (answer.status, "METRICS_TOKEN" in answer.json["detail"]) == (403, True)
    assert client.raw("HEAD", "/metrics", b"", {header: ""}).status == 403
    assert client.raw("GET", "/healthz", b"", {header: "192.0.2.1"}).status == 200
    assert client.raw("GET", "/metrics", b"", {"X-Request-Id": "via"}).status == 200


def test_with_a_token_a_proxy_may_pass_it_on(tmp_path: Path) -> None:
    with running(tmp_path, METRICS_TOKEN="the-token-of-the-metrics") as gateway:
        client = gateway.client()
        for token, status in (("the-token-of-the-metrics", 200), ("another", 401)):
            headers = {"X-Forwarded-For": "192.0.2.1", "Authorization": f"Bearer {token}"}
            assert client.raw("GET", "/metrics", b"", headers).status == status


def test_keys_are_truncated_and_there_only_on_request(gateway: GatewayProcess) -> None:
    client = gateway.client()
    client.create(a_key(1))
    text = scrape(client)
    assert "wggw_peer_" not in text and a_key(1)[:8] not in text


def test_per_peer_series_hold_no_whole_key(watched: GatewayProcess) -> None:
    text = scrape(watched.client())
    assert text.count("wggw_peer_receive_bytes_total{") == 3
    assert a_key(1)[:9] not in text


def metrics_of(client: Client) -> str:
    """All that a gateway shows, with what a remote copy adds."""
    return scrape(client) + "".join(
        wggw.render_copy(wggw.CopyState(3, "node", 7, 2, 1.5, 40, 50, 60, None))
    )


def names_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:wggw|process)_[a-z_]+", expression))


def queries() -> dict[str, list[str]]:
    board = json.loads((DOCS / "grafana.json").read_text())
    panels = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = re.findall(r"(?m)^\s+expr: (.*)$", (DOCS / "alerts.yml").read_text())
    tables = re.findall(r"(?m)^\| (`wggw.*?) \|", (DOCS / "README.md").read_text())
    return {"grafana.json": panels, "alerts.yml": rules, "README.md": tables}


@pytest.mark.parametrize("name", ["grafana.json", "alerts.yml", "README.md"])
def test_documents_name_only_metrics_that_there_are(watched: GatewayProcess, name: str) -> None:
    client = watched.client()
    client.send("GET", "/api/v1/server/status")
    heads = set(re.findall(r"# TYPE (\S+)", metrics_of(client)))
    found = {n for n, _ in samples(metrics_of(client))}
    named = set().union(*(names_in(expression) for expression in queries()[name]))
    assert len(named) >= 8
    assert named - found - heads == set()


def test_every_metric_is_in_the_list(watched: GatewayProcess) -> None:
    heads = set(re.findall(r"# TYPE (wggw_\S+)", metrics_of(watched.client())))
    text = " ".join(queries()["README.md"])
    ends = re.findall(r"…(_[a-z_]+)", text)
    assert {head for head in heads if head not in text and not head.endswith(tuple(ends))} == set()


def test_a_sample_fills_the_age_in_status(watched: GatewayProcess) -> None:
    client = watched.client()

    def fresh() -> bool:
        (interface,) = client.send("GET", "/api/v1/server/status").json["interfaces"]
        return 0 <= float(interface["sample_age_seconds"]) < 5

    wait_for(fresh, what="a sample")


def test_a_board_s_rates_fit_any_interval_of_scrapes() -> None:
    rates = [q for q in queries()["grafana.json"] if "rate(" in q]
    assert len(rates) >= 8
    assert [q for q in rates if "[$__rate_interval]" not in q or re.search(r"\[\d", q)] == []


def test_a_board_s_series_tell_gateways_apart() -> None:
    board = json.loads((DOCS / "grafana.json").read_text())
    targets = [target for panel in board["panels"] for target in panel["targets"]]
    of_each = [target for target in targets if "sum" not in target["expr"]]
    assert len(of_each) >= 12
    assert [t["expr"] for t in of_each if "{{instance}}" not in t["legendFormat"]] == []


@pytest.mark.parametrize(("user", "waited", "percent"), [(130, 480, 100.0), (80, 530, 0.0)])
def test_a_host_is_at_most_busy_and_at_least_idle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: int, waited: int, percent: float
) -> None:
    """The kernel may take back time that it had counted, as waiting for I/O for example."""
    times = iter([(100, 500), (user, waited)])

    def read(*_: object) -> str:
        of, wait = next(times)
        return f"cpu {of} 0 0 1000 {wait} 0 0 0 0 0\n"

    monkeypatch.setattr(wggw.Path, "read_text", read)
    host = wggw.HostMetrics(str(tmp_path))
    host.tick()
    assert host.cpu_percent == percent
