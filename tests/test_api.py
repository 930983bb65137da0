"""The API of the contract, over TLS, against a gateway with the memory backend."""

from harness import Client, a_key


def test_second_create_returns_the_same_addresses(client: Client) -> None:
    first = client.create(a_key(1), protocol="dual").json
    second = client.create(a_key(1), protocol="ipv4").json
    assert (first["status"], second["status"]) == ("created", "exists")
    assert first["assigned_ip"] == second["assigned_ip"] == "10.0.1.2"
    assert first["assigned_ipv6"] == second["assigned_ipv6"] == "fd42:4242:1::2"
