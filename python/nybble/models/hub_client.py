"""Asks the Hugging Face Hub: waits where it asks for time, and passes on its reasons for a refusal."""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

log: logging.Logger = logging.getLogger("nybble")

HUB_SECONDS = 10.0
"""How long the Hub may take to list a repository before the cache is used instead."""
_MOST_PAUSE = 120.0
"""The longest time that the Hub may ask for, in seconds."""
_BUSY_TRIES = 5


class UnreachableError(Exception):
    """The Hub did not answer, or not with a valid answer."""


def ask(repository: str, revision: str | None, request: Callable[[], T], name: str | None = None) -> T:
    """Returns the result of `request`, a call of the Hub's client.

    If the Hub limits requests (429), it is asked again after the time that it names; if it is not available (503), once
    more.

    Args:
        repository: The repository, for messages.
        revision: Its revision.
        request: The call.
        name: The file that the call is for.

    Raises:
        PermissionError: The Hub refuses access. The message has its reason.
        FileNotFoundError: There is no such repository, revision or file.
        UnreachableError: The Hub cannot be reached, or has failed.
    """
    tries = {429: _BUSY_TRIES, 503: 1}
    while True:
        try:
            return request()
        except Exception as error:  # The client's errors depend on its HTTP library.
            response = _response(error)
            status = getattr(response, "status_code", None)
            pause = _pause(response) if status in tries else None
            if status is None or pause is None or pause > _MOST_PAUSE or tries[status] == 0:
                raise _translated(error, response, repository, revision, name) from error
            tries[status] -= 1
            log.info("the Hub answered %d; asking again in %g s", status, pause)
            time.sleep(pause)


def _response(error: BaseException | None) -> Any:
    """The response that led to an error of the client, which may have wrapped it in other errors."""
    for _ in range(8):
        if error is None:
            return None
        response = getattr(error, "response", None)
        if getattr(response, "status_code", None) is not None:
            return response
        error = error.__cause__ or error.__context__
    return None


def _pause(response: Any) -> float:
    """The seconds that the Hub asks to wait."""
    named = response.headers.get("Retry-After", "")
    if re.fullmatch(r"\d{1,9}", named.strip()):
        return float(named)
    import email.utils  # Takes 15 ms, and the Hub is rarely busy.

    try:
        return max(0.0, email.utils.parsedate_to_datetime(named).timestamp() - time.time())
    except (TypeError, ValueError):
        pass
    # The Hub's own header, such as `"api";r=0;t=55`: t is the time until the limit is lifted.
    found = re.search(r"\bt=(\d{1,9})\b", response.headers.get("RateLimit", ""))
    return float(found[1]) if found else 1.0


def _translated(error: Exception, response: Any, repository: str, revision: str | None, name: str | None) -> Exception:
    """An error of the client as one of Python's own, with advice for the user."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repository}/{name}" if name else repository
    status = getattr(response, "status_code", None)
    reason = _reason(response)
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{repository}"
        advice = f"accept its terms at {page} and set HF_TOKEN{_in_brackets(reason)}"
        return PermissionError(errno.EACCES, advice, where)
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(errno.ENOENT, f"the repository has no revision {revision!r}", where)
    is_refusal = status in (401, 403) and (not isinstance(error, RepositoryNotFoundError) or _is_about_token(response))
    if is_refusal:
        said = reason or f"status {status}"
        return PermissionError(
            errno.EACCES, f"{constants.ENDPOINT} refuses access: {said} (HF_TOKEN sets the token)", where
        )
    if isinstance(error, RepositoryNotFoundError):
        missing = f"no such file or folder, and no such repository at {constants.ENDPOINT}"
        advice = f"(a private one needs HF_TOKEN){_in_brackets(reason)}"
        return FileNotFoundError(errno.ENOENT, f"{missing} {advice}", repository)
    if status == 404 and isinstance(error, EntryNotFoundError):
        return FileNotFoundError(errno.ENOENT, f"the Hub has no such file{_in_brackets(reason)}", where)
    if isinstance(error, OSError) and error.errno is not None and response is None:
        return error  # An error of the disk, not of the Hub.
    if status == 429:
        pause = f"ask again in {_pause(response):g} s"
        return UnreachableError(f"{constants.ENDPOINT} limits requests: status 429{_in_brackets(reason)}; {pause}")
    if status is not None and status < 500:
        return UnreachableError(f"{constants.ENDPOINT} answered status {status}: {reason or one_line(error)}")
    said = f"status {status}: {reason}" if status is not None and reason else one_line(error)
    return UnreachableError(f"{constants.ENDPOINT} cannot be reached: {said}")


def _is_about_token(response: Any) -> bool:
    """Whether a refusal concerns the token. Without one, the Hub refuses repositories that do not exist, too."""
    is_missing = response.headers.get("X-Error-Code") == "RepoNotFound"
    return not is_missing and bool(response.headers.get("X-Error-Message"))


def _reason(response: Any) -> str:
    """The reason that the Hub gives; empty if it gives none."""
    if response is None:
        return ""
    if said := response.headers.get("X-Error-Message"):
        return " ".join(str(said).split())
    try:
        said = response.json().get("error")
    except Exception:  # The body is not JSON, or was not read.
        return ""
    return " ".join(said.split())[:500] if isinstance(said, str) else ""


def _in_brackets(reason: str) -> str:
    return f" ({reason})" if reason else ""


def one_line(error: BaseException) -> str:
    """The message of an error on one line."""
    return " ".join(str(error).split()) or type(error).__name__
