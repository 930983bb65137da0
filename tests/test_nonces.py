"""Which signatures were used before: over orderly restarts, crashes, and clocks that move."""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import API_KEY, GatewayProcess, a_key, running, wait_for
from objects import tls_store
from test_remote_serve import settings_of, wait_for_copy
from test_rfc9421 import STATUS, get, signed

import wggw

WINDOW = 60
T = 1_800_000_000  # the clock's time when a test begins


class World:
    """A wall clock, a steady one, and the file between the runs of a gateway."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "nonces"
        self.now = T + 0.5
        self.steady = 1000.0
        self.start(first=True)

    def start(self, first: bool = False, elsewhere: bool = False) -> None:
        self.guard = wggw.NonceGuard(WINDOW, steady=lambda: self.steady)
        self.guard.close(self.now)  # as serve does it until the files are read
        with pytest.raises(wggw.Unavailable):
            self.guard.first_use("k", "too early", int(self.now), self.now)
        self.guard.keep(str(self.path), first, elsewhere)

    def stop(self) -> None:
        self.guard.close(self.now)

    def restart(self, seconds: float = 0.0) -> None:
        self.stop()
        self.pass_(seconds)
        self.start()

    def crash(self, seconds: float = 0.0) -> None:
        self.pass_(seconds)
        self.start()

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        self.steady += seconds

    def use(self, nonce: object, created: int) -> str | int:
        """ "new", "used", or the seconds of Retry-After."""
        try:
            return "new" if self._first_use(str(nonce), created) else "used"
        except wggw.Unavailable as error:
            return int(dict(error.headers)["Retry-After"])

    def _first_use(self, nonce: str, created: int) -> bool:
        try:
            return self.guard.first_use("k", nonce, created, self.now)
        except wggw.EarlySignature as early:
            self.guard.raise_ceiling(early.wanted)
            return self.guard.first_use("k", nonce, created, self.now)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


OFFSETS = (-WINDOW, -30, -1, 0, 1, 30, WINDOW)


def test_a_first_start_refuses_nothing(world: World) -> None:
    for offset in OFFSETS:
        assert world.use(("n", offset), T + offset) == "new"


@pytest.mark.parametrize("down", [0.0, 0.3, 7.0])
def test_an_orderly_restart_refuses_nothing_that_is_new_and_all_that_was_used(
    world: World, down: float
) -> None:
    offsets = [offset for offset in OFFSETS if offset >= down - WINDOW]
    for offset in OFFSETS:
        assert world.use(("used", offset), T + offset) == "new"
    for _ in range(3):
        world.restart(down / 3)
        for offset in offsets:
            assert world.use(("used", offset), T + offset) == "used"
    for offset in offsets:
        assert world.use(("unused", offset), T + offset) == "new"
    assert world.path.stat().st_mode & 0o777 == 0o600


def test_after_a_crash_what_was_made_after_the_start_is_good_at_once(world: World) -> None:
    for offset in (-WINDOW, -1, 0):
        assert world.use(offset, T + offset) == "new"
    world.crash()
    assert [world.use(offset, T + offset) for offset in (-WINDOW, -1, 0)] == [61, 2, 1]
    world.pass_(1)
    assert world.use("n", T + 1) == "new"
    assert world.use(0, T) == 1
    world.pass_(WINDOW - 2)
    assert [world.use(0, T) for _ in range(2)] == [1, 1]
    world.pass_(2)
    assert world.use("late", T + 2) == "new"


def test_after_a_crash_a_client_that_was_ahead_holds_up_up_to_its_clock_only(world: World) -> None:
    assert world.use("ahead", T + 40) == "new"
    world.crash()
    assert world.use("ahead", T + 40) == wggw.NONCE_RESERVE + 1
    world.pass_(1)
    assert world.use("in step", T + 1) == 40 + wggw.NONCE_RESERVE
    world.pass_(40 + wggw.NONCE_RESERVE)
    assert world.use("in step", T + 41 + wggw.NONCE_RESERVE) == "new"


def test_a_second_crash_forgets_nothing_of_the_first(world: World) -> None:
    assert world.use("ahead", T + 50) == "new"
    for _ in range(3):
        world.crash(0.1)
        assert isinstance(world.use("ahead", T + 50), int)


@pytest.mark.parametrize("crashes", [1, 2])
def test_without_a_file_the_whole_window_is_in_doubt(world: World, crashes: int) -> None:
    assert world.use("ahead", T + WINDOW) == "new"
    world.path.unlink()
    for _ in range(crashes):
        world.crash()
        assert world.use("ahead", T + WINDOW) == 1
        assert world.use("in step", T) == WINDOW + 1
    world.pass_(1)
    assert world.use("nobody could have", T + 1 + WINDOW) == "new"
    world.pass_(WINDOW)
    assert world.use("ahead", T + WINDOW) == 1
    assert world.use("in step", T + 1 + WINDOW) == "new"
    world.crash()  # the file is there again: what is behind it is known to the second
    assert world.use("nobody could have", T + 1 + WINDOW) != "new"


def test_without_a_file_a_clock_set_back_later_makes_nothing_new_again(world: World) -> None:
    assert world.use("n", T) == "new"
    world.pass_(1000)
    world.path.unlink()
    world.crash()
    world.pass_(3 * WINDOW)
    assert world.use("later", T + 1000 + 3 * WINDOW) == "new"
    world.now = T + 0.5
    assert world.use("n", T) != "new"


@pytest.mark.parametrize("swept", [False, True])
def test_a_clock_that_was_years_ahead_is_over_without_the_file(world: World, swept: bool) -> None:
    """The way out that docs/SECURITY.md names."""
    world.pass_(10**8)
    assert world.use("ahead", T + 10**8) == "new"
    if swept:
        world.pass_(2 * WINDOW)
        assert world.use("then", T + 10**8 + 2 * WINDOW) == "new"
    world.guard.save()
    world.now = T + 1000.5
    world.crash()
    assert world.use("n", T + 1000) == 10**8 - 1000 + 1 + 2 * WINDOW * swept
    world.stop()
    world.path.unlink()
    world.start()
    world.pass_(WINDOW + 1)
    assert world.use("n", T + 1001 + WINDOW) == "new"


def test_what_another_node_accepted_is_in_doubt_and_the_file_here_says_nothing(
    world: World,
) -> None:
    world.stop()
    for _ in range(2):
        world.start(elsewhere=True)
        assert world.use("elsewhere", T + WINDOW) == 1
    world.start()
    assert world.use("elsewhere", T + WINDOW) == 1


def test_a_clock_set_right_after_the_start_neither_lets_in_nor_keeps_out(world: World) -> None:
    """A machine whose clock is wrong until the network is there."""
    for error in (-(10**8), 7200, -7200):
        assert world.use(("n", error), int(world.now)) == "new"
        used = int(world.now)
        world.crash()
        world.now += error
        world.start()
        world.pass_(2)
        world.now -= error
        assert isinstance(world.use(("n", error), used), int)
        assert world.use(("new", error), int(world.now)) == "new"
        world.pass_(3 * WINDOW)


def test_a_clock_set_back_over_a_restart_makes_nothing_new_again(world: World) -> None:
    used = [int(world.now) + n for n in range(0, 300, 20)]
    for created in used:
        assert world.use(created, created) == "new"
        world.pass_(20)
    for again in (world.restart, world.crash, world.crash, world.restart):
        world.guard.save()
        world.now = T + 150
        again()
        for created in used:
            assert world.use(created, created) != "new"
    world.now = T + 300  # nobody signed anything later than this
    assert world.use("n", T + 300) == "new"


def test_a_clock_that_jumps_ahead_and_comes_back_makes_no_nonce_new_again(world: World) -> None:
    assert world.use("n", T) == "new"
    world.now += 5000
    assert world.use("meanwhile", T + 5000) == "new"
    world.now -= 4999
    assert world.use("n", T) != "new"
    assert world.use("other", T + 1) == "new"


def test_no_signature_is_accepted_twice_whatever_happens(tmp_path: Path) -> None:
    """Random histories; what an attacker recorded is sent again after each event."""
    total = 0
    for seed in range(60):
        chance = random.Random(seed)
        (tmp_path / str(seed)).mkdir()
        world = World(tmp_path / str(seed))
        accepted: list[tuple[tuple[int, int], int]] = []
        doubt = 0.0  # until then a new signature may be refused
        highest = float(T)
        for step in range(120):
            event = chance.choice(["use"] * 6 + ["pass", "restart", "crash", "back"])
            if event == "use":
                for offset in {0, chance.randint(-WINDOW, WINDOW)}:
                    created = int(world.now) + offset
                    found = world.use((step, offset), created)
                    if found == "new":
                        accepted.append(((step, offset), created))
                        highest = max(highest, created)
                    elif offset == 0:
                        assert world.now <= doubt, (seed, step)
            elif event == "pass":
                world.pass_(chance.choice([0.2, 1, 5, 70]))
            elif event == "restart":
                world.restart(chance.choice([0, 0.5, 3]))
            elif event == "crash":
                world.guard.save()
                world.crash(chance.choice([0, 0.5, 3]))
                doubt = max(doubt, world.now + 1, highest + wggw.NONCE_RESERVE + 1)
            else:
                world.guard.save()
                world.now -= chance.choice([1, 30] * 9 + [1000])
                doubt = max(doubt, highest + wggw.NONCE_RESERVE + 1)
            for nonce, created in accepted:
                if abs(created - world.now) <= WINDOW:
                    assert world.use(nonce, created) != "new", (seed, step)
        total += len(accepted)
    assert total > 1000


def test_a_replay_after_the_clock_was_set_back_and_the_service_restarted(tmp_path: Path) -> None:
    now = float(T)
    message = wggw.SignedMessage("GET", "host", STATUS, {}, 0)
    given, mac = wggw.sign_rfc9421("default", API_KEY, message, T, "recorded")
    recorded = message._replace(
        headers={b"signature-input": given.encode(), b"signature": mac.encode()}
    )

    def started() -> wggw.Authenticator:
        authenticator = wggw.Authenticator({"default": API_KEY}, WINDOW, lambda: now)
        authenticator.nonces.keep(str(tmp_path / "nonces"), first=now == T)
        return authenticator

    first = started()
    assert first.verify(recorded).key_id == "default"
    now = T + 3600.0
    with pytest.raises(wggw.Unauthorized, match="server's time"):
        first.verify(recorded)
    assert first.nonces.first_use("default", "an hour later", T + 3600, now)
    first.nonces.close(now)
    now = T - 10.0  # and the second time a little later
    second = started()
    with pytest.raises(wggw.Unavailable):
        second.verify(recorded)
    second.nonces.close(now)
    now = T + 20.0
    with pytest.raises(wggw.Unavailable):
        started().verify(recorded)


# --- the file -------------------------------------------------------------------------------------


def test_the_file_of_the_version_before_is_read(tmp_path: Path) -> None:
    """Lines of the end of an early signature's time, and its nonce: it was written at once."""
    path = tmp_path / "nonces"
    world = World(tmp_path)
    assert world.use("early", T + 30) == "new"
    [entry] = world.guard._live
    path.write_text(f"99 {'0' * 32}\n{T + 30 + WINDOW} {entry.hex()}\ngarbage\n1800 {'2' * 31}")
    world.crash()
    assert world.use("early", T + 30) == "used"
    assert [world.use("n", T), world.use("n", T + 30), world.use("n", T + 1)] == [1, "new", "used"]
    path.write_text("")
    world.crash()
    assert [world.use("o", T), world.use("o", T + 1)] == [1, "new"]


def replaced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    replace = wggw.Disk.replace

    def counted(self: wggw.Disk, path: str, parts: Iterable[Any]) -> None:
        calls.append(path)
        replace(self, path, parts)

    monkeypatch.setattr(wggw.Disk, "replace", counted)
    return calls


def test_requests_write_nothing_and_early_ones_once_in_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = replaced(monkeypatch)
    for number in range(1000):
        assert world.use(number, int(world.now)) == "new"
        world.pass_(0.01)
    assert calls == []
    for number in range(1000):
        assert world.use(("early", number), int(world.now) + 9) == "new"
        world.pass_(0.01)
    assert 1 <= len(calls) <= 10 / wggw.NONCE_RESERVE + 1
    before = len(calls)
    for _ in range(3):
        world.guard.save()
    assert len(calls) <= before + 1


def test_an_early_signature_that_cannot_be_kept_is_not_accepted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: wggw.Disk, path: str, parts: Iterable[Any]) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(wggw.Disk, "replace", full)
        for _ in range(2):
            with pytest.raises(wggw.EarlySignature) as early:
                world.guard.first_use("k", "early", T + 5, world.now)
            with pytest.raises(OSError, match="No space left"):
                world.guard.raise_ceiling(early.value.wanted)
        assert world.use("in step", T) == "new"
        with pytest.raises(OSError, match="No space left"):
            world.guard.close(world.now)
    assert world.use("stopped", T) == 1
    world.start()  # not an orderly stop: it was not written
    assert world.use("in step", T) == 1
    assert world.use("early", T + 5) == "new"


# --- a whole gateway ------------------------------------------------------------------------------


def statuses(gateway: GatewayProcess, headers: Sequence[dict[str, str]]) -> list[int]:
    client = gateway.client()
    try:
        return [get(client, each).status for each in headers]
    finally:
        client.close()


def test_over_an_orderly_restart_used_ones_are_used_and_others_are_good(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        client = gateway.client()
        now = int(time.time())
        pairs = [[signed(client, created=now + n) for n in (-20, 0, 30)] for _ in range(2)]
        assert statuses(gateway, pairs[0]) == [200, 200, 200]
        for _ in range(2):
            assert gateway.stop() == 0
            gateway.start()
            assert statuses(gateway, pairs[0]) == [401, 401, 401]
        assert statuses(gateway, pairs[1]) == [200, 200, 200]


def test_after_a_kill_503_says_when_and_then_all_is_well(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        client = gateway.client()
        used = signed(client)
        assert statuses(gateway, [used]) == [200]
        gateway.kill()
        gateway.start()
        answer = get(gateway.client(), used)
        assert answer.status == 503
        assert "sign again" in answer.json["detail"]
        wait = int(answer.headers["Retry-After"])
        assert 1 <= wait <= 3
        ends = time.time() + wait
        wait_for(lambda: time.time() >= ends, what="Retry-After")
        assert get(gateway.client(), signed(client)).status == 200
        assert get(gateway.client(), used).status == 503  # it stays what it is


def test_a_first_start_and_a_lost_file(tmp_path: Path) -> None:
    with running(tmp_path) as gateway:
        client = gateway.client()
        old = [signed(client, created=int(time.time()) + n) for n in (-30, 30)]
        assert statuses(gateway, old) == [200, 200]
        gateway.stop()
        (tmp_path / "wireguard.db.nonces").unlink()
        gateway.start()
        answer = get(gateway.client(), signed(client))
        assert answer.status == 503
        assert 50 <= int(answer.headers["Retry-After"]) <= WINDOW + 1
        assert statuses(gateway, old) == [503, 503]


def test_a_node_that_boots_from_the_copy_is_in_doubt(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("first", "second", "tls")]
    for place in places:
        place.mkdir()
    with tls_store(tmp_path / "tls") as store:
        given = settings_of(store, tmp_path)
        with running(places[0], **given) as gateway:
            client = gateway.client()
            assert get(client, signed(client)).status == 200  # nobody ever wrote there
            assert client.create(a_key("peer")).status == 200
            wait_for_copy(gateway)
            assert gateway.stop() == 0
        with running(places[1], **given) as gateway:
            client = gateway.client()
            assert client.get(a_key("peer")).status == 200
            answer = get(client, signed(client))
            assert (answer.status, int(answer.headers["Retry-After"]) > 50) == (503, True)
            assert gateway.stop() == 0
            gateway.start()  # an orderly restart leaves the doubt as it is
            assert get(gateway.client(), signed(client)).status == 503


def test_the_command_line_client_waits_out_a_crash(tmp_path: Path) -> None:
    with running(tmp_path, AUTH_SCHEMES="rfc9421") as gateway:
        fingerprint = hashlib.sha256(wggw.read_certificate(str(tmp_path / "cert.pem"))).hexdigest()
        url = f"https://127.0.0.1:{gateway.port}"
        client = wggw.RemoteClient(url, "default", API_KEY, fingerprint, "rfc9421")
        assert client.call("GET", STATUS)[0] == 200
        gateway.kill()
        gateway.start()
        assert client.call("GET", STATUS)[0] == 200


def test_a_running_gateway_keeps_its_ceiling(tmp_path: Path) -> None:
    """For a clock that is set back over a crash."""
    with running(tmp_path) as gateway:
        client = gateway.client()
        before = int(time.time())
        assert get(client, signed(client)).status == 200

        def ceiling() -> int:
            match = re.fullmatch(
                r"wggw-nonces 1 running (\d+)\n", (tmp_path / "wireguard.db.nonces").read_text()
            )
            assert match
            return int(match[1])

        wait_for(lambda: ceiling() >= before, what="the ceiling")
