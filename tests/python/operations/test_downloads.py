"""Downloads that fail, and what the Hub says: a part is never taken for the whole, and refusals reach the user."""

from __future__ import annotations

import http.server
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import FakeHub

from nybble.cli import main
from nybble.models import hub
from nybble.models.repository import discard

REPOSITORY = "maker/checkpoint"
FILES = {
    "config.json": b"{}",
    "generation_config.json": b'{"eos_token_id": [2, 3]}',
    "model.safetensors": b"weights",
    "tokenizer.json": b'{"a": 1}',
}
REASON = "The token lacks the right to read this repository"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that the Hub asked for, which take no time."""
    found: list[float] = []
    monkeypatch.setattr("nybble.models.hub_client.time.sleep", found.append)
    return found


def _fault(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, fault: Callable[[str], tuple[int, dict[str, str]] | None]
) -> None:
    """Lets the Hub answer requests by a status and headers, where `fault` of the path gives them."""
    answer = fake._answer

    def faulty(request: http.server.BaseHTTPRequestHandler, body: bool) -> None:
        found = fault(request.path)
        if found is None:
            answer(request, body)
        else:
            fake._send(request, found[0], b"", body, found[1])

    monkeypatch.setattr(fake, "_answer", faulty)


def test_a_partial_checkpoint_is_refused_by_name_without_network(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    fake_hub.repositories[REPOSITORY] = FILES
    with monkeypatch.context() as patch:
        _fault(fake_hub, patch, lambda path: (500, {}) if path.endswith("/generation_config.json") else None)
        with pytest.raises(ConnectionError, match=r"generation_config\.json"):
            hub.resolve(REPOSITORY)
    fake_hub.broken = True
    with pytest.raises(ConnectionError, match=r"lacks .*generation_config\.json"):
        hub.resolve(REPOSITORY)
    fake_hub.broken = False
    assert (hub.resolve(REPOSITORY) / "generation_config.json").is_file()


def test_a_failed_update_leaves_the_older_copy_in_use(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    fake_hub.repositories[REPOSITORY] = FILES
    old = hub.resolve(REPOSITORY)
    fake_hub.repositories[REPOSITORY] = {**FILES, "config.json": b'{"new": true}', "model.safetensors": b"new weights"}
    monkeypatch.setattr(fake_hub, "commit", lambda repository: "b" * 40)
    with monkeypatch.context() as patch:
        _fault(fake_hub, patch, lambda path: (500, {}) if path.endswith("/model.safetensors") else None)
        assert hub.resolve(REPOSITORY) == old
    fake_hub.broken = True
    assert hub.resolve(REPOSITORY) == old
    fake_hub.broken = False
    new = hub.resolve(REPOSITORY)
    assert (new / "model.safetensors").read_bytes() == b"new weights"
    fake_hub.broken = True
    assert hub.resolve(REPOSITORY) == new


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
def test_the_reason_of_a_refusal_reaches_the_user(
    status: int, where: str, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.repositories[REPOSITORY] = FILES
    _fault(fake_hub, monkeypatch, lambda path: (status, {"X-Error-Message": REASON}) if where in path else None)
    with pytest.raises(PermissionError, match=REASON) as caught:
        hub.resolve(REPOSITORY)
    assert "cannot be reached" not in str(caught.value)


@pytest.mark.parametrize(("status", "headers", "pause"), [(429, {"Retry-After": "7"}, 7.0), (503, {}, 1.0)])
def test_a_busy_hub_is_asked_again_after_the_time_that_it_names(
    status: int,
    headers: dict[str, str],
    pause: float,
    fake_hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    pauses: list[float],
) -> None:
    fake_hub.repositories[REPOSITORY] = FILES
    left = [(status, headers)]
    _fault(fake_hub, monkeypatch, lambda path: left.pop() if left and "/api/" in path else None)
    assert hub.resolve(REPOSITORY).is_dir()
    assert pause in pauses


def test_a_limit_of_an_hour_is_reported_and_not_waited_for(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    _fault(fake_hub, monkeypatch, lambda path: (429, {"Retry-After": "3600"}))
    with pytest.raises(ConnectionError, match="ask again in 3600 s"):
        hub.resolve(REPOSITORY)
    assert pauses == []


def test_a_discarded_file_goes_with_its_blob(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"m.gguf": b"GGUF"}
    path = hub.resolve(REPOSITORY)
    blob = path.resolve()
    discard(path)
    assert not path.is_symlink()
    assert not blob.exists()


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "nowhere.gguf")
    with pytest.raises(FileNotFoundError, match=r"a link to .*nowhere\.gguf, which does not exist"):
        hub.resolve(tmp_path / "dangling.gguf")
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    with pytest.raises(FileNotFoundError, match="a loop of links"):
        hub.resolve(tmp_path / "loop.gguf")


def test_a_user_without_home_is_told_which_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NYBBLE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(FileNotFoundError, match="set NYBBLE_CACHE"):
        hub.cache_dir()
    with pytest.raises(FileNotFoundError, match="there is no such user"):
        hub.resolve("~no-such-user-here/model.gguf")


def test_cached_files_are_compared_with_their_sizes_and_hashes(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "own-cache"))
    fake_hub.repositories[REPOSITORY] = FILES
    fake_hub.repositories["maker/split"] = {"m-00001-of-00002.gguf": b"GGUF 1", "m-00002-of-00002.gguf": b"GGUF 2"}
    folder, first = hub.resolve(REPOSITORY), hub.resolve("maker/split")
    assert main(["models", "--verify"]) == 0
    assert capsys.readouterr().out.count(": ok") == len(FILES) + 2
    (folder / "model.safetensors").resolve().write_bytes(b"Weights")
    (folder / "tokenizer.json").resolve().write_bytes(b"{")
    (folder / "config.json").resolve().unlink()
    discard(first.with_name("m-00002-of-00002.gguf"))
    assert main(["models", "--verify"]) == 1
    out = capsys.readouterr().out
    assert f"{REPOSITORY}: model.safetensors: found hash" in out
    assert f"{REPOSITORY}: tokenizer.json: found 1 bytes, expected 8" in out
    assert f"{REPOSITORY}: config.json: missing" in out
    assert "maker/split: m-00002-of-00002.gguf: missing" in out
    assert out.count(": ok") == 2


def test_a_function_is_called_with_the_bytes_of_all_files(fake_hub: FakeHub) -> None:
    fake_hub.repositories[REPOSITORY] = {"m-00001-of-00002.gguf": b"GGUF" * 1000, "m-00002-of-00002.gguf": b"GG" * 1000}
    seen: list[tuple[int, int]] = []
    hub.resolve(REPOSITORY, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert {total for _, total in seen} == {6000}
    assert [done for done, _ in seen if done in (4000, 6000)] == [4000, 6000]
    hub.resolve(REPOSITORY, progress=lambda done, total: seen.clear())
    assert seen, "nothing was downloaded the second time"


@pytest.mark.parametrize("kind", [ZeroDivisionError, ConnectionError, FileNotFoundError])
def test_an_exception_of_the_function_stops_the_download(fake_hub: FakeHub, kind: type[Exception]) -> None:
    fake_hub.repositories[REPOSITORY] = {"m.gguf": b"GGUF"}

    def stop(done: int, total: int) -> None:
        raise kind("enough")

    with pytest.raises(kind, match="enough"):
        hub.resolve(REPOSITORY, progress=stop)
    assert hub.resolve(REPOSITORY).read_bytes() == b"GGUF"


@pytest.mark.parametrize(
    ("progress", "written"), [(None, ""), (False, ""), (True, f"downloading {REPOSITORY}: 100%\n")]
)
def test_a_log_has_lines_of_a_download_only_if_asked(
    progress: bool | None, written: str, fake_hub: FakeHub, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_hub.repositories[REPOSITORY] = {"m.gguf": b"GGUF"}
    hub.resolve(REPOSITORY, progress=progress)
    assert capfd.readouterr().err == written
