"""What must be so whenever a gateway is at rest, whatever happened before."""

from __future__ import annotations

from typing import Any

from fakes import World
from harness import wait_for

import wggw


def rows(store: wggw.Store) -> dict[str, Any]:
    """All that a store holds, in a form that can be compared."""
    return {
        "peers": store.peers_after(0, wggw.MAX_INTEGER),
        "traffic": sorted(
            map(tuple, store._db.execute("SELECT * FROM traffic WHERE rx_bytes >= 0"))
        ),
        "released": store.released.addresses(),
        "settings": sorted(
            store._db.execute("SELECT name, value FROM meta WHERE name = 'obfuscation'")
        ),
        "number": store.number,
        "counts": {kind: count for kind, count in store.counts.peers.items() if count},
    }


def read_files(world: World) -> wggw.Store:
    """The state that a start would find."""
    vault = wggw.Vault(world.config.snapshot_key) if world.config.snapshot_key else None
    return wggw.Files(world.config.db_path, "commit", wggw.Disk(), vault).load()


def check_at_rest(world: World) -> list[wggw.Peer]:
    """Rows, files, interfaces and pools agree, and nothing is in flight; returns the peers."""
    gateway, store = world.gateway, world.store
    ledger = gateway.ledger
    wait_for(lambda: not gateway.lander.applying)  # who waited is told before the last of it
    peers = store.peers_after(0, wggw.MAX_INTEGER)
    left = (ledger.in_flight, ledger.airborne, ledger.exclusive, ledger._gathered)
    assert not any(left), left
    left = (ledger.watchers, gateway.lander.applying, ledger.broken)
    assert not any(left), left
    assert gateway.degraded() == [], gateway.degraded()
    if world.config.durability != "none":
        kept, held = rows(read_files(world)), rows(store)
        for name, value in held.items():
            assert kept[name] == value, name
    for name, tunnel in gateway.tunnels.items():
        mine = [peer for peer in peers if peer.interface == name]
        wanted = {p.public_key: wggw.wire_peer(p) for p in mine if p.status == "active"}
        there = world.backends[name].peers
        differing = {k: (there.get(k), wanted.get(k)) for k in there.keys() | wanted.keys()}
        assert there == wanted, [pair for pair in differing.values() if pair[0] != pair[1]]
        assert not world.backends[name].device_is_foreign()
        fresh = tunnel.make_pools(store)
        for family, pool in tunnel.pools.items():
            held_here = {getattr(peer, wggw.ADDRESS_FIELD[family]) for peer in mine} - {None}
            assert pool.used == fresh[family].used == len(held_here)
            assert not any(pool.is_free(address) for address in held_here)
            assert pool.peek() == fresh[family].peek()
            turns = pool._released
            assert sorted(turns, key=turns.__getitem__) == list(fresh[family]._released)
    return peers


def check_restart_changes_nothing(world: World) -> None:
    """A second start finds the same rows, and touches no interface."""
    world.gateway.projection.sample()  # nothing moves from here on
    before = rows(world.store)
    changes = {name: backend.changes for name, backend in world.backends.items()}
    world.reopen()
    after = rows(world.store)
    if world.config.privacy_scrub:  # the last sample may have made more peers' counters begin anew
        for given in (before, after):
            given["traffic"] = [row[:3] for row in given["traffic"]]
            del given["number"]
    else:
        now = {name: backend.changes for name, backend in world.backends.items()}
        assert now == changes, (changes, now)
    if world.config.durability != "commit":  # each start skips sequences, which is a record
        before.pop("number", None)
    for name, value in before.items():
        assert after[name] == value, (name, value, after[name])
    check_at_rest(world)
