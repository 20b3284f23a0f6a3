"""What to do about an error of a file system or of an object store, and about URLs that must not be."""

from __future__ import annotations

import errno
import re

from gentrain.document import ConfigError

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the quota is used up: free some space",
    errno.EFBIG: "files may not grow so large: raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only: make it writable",
    errno.EACCES: "this user may not write there: mend the permissions",
    errno.EPERM: "this user may not write there: mend the permissions",
    errno.EEXIST: "a file of that name is in the way: move it away",
    errno.EISDIR: "a directory is in the way: move it away",
    errno.ENOTDIR: "a file is in the way: move it away",
}


def remedy(code: int | None) -> str | None:
    """The cause and the remedy of an errno, in words; None for one that a user cannot mend."""
    return _REMEDIES.get(code or 0)


def remedy_of(error: Exception) -> str | None:
    """As `remedy`, of an OSError, or of what safetensors says of one."""
    if isinstance(error, FileNotFoundError) and error.filename is None:
        return "was the directory that this shell is in removed? Change to another one"
    said = re.search(r"\(os error (\d+)\)", str(error))
    return remedy(int(said[1]) if said else getattr(error, "errno", None))


# --- object stores ----------------------------------------------------------------------------------------------------------

# what the type or the text of a store library's error shows -> the cause and the remedy
_STORE_REMEDIES = (
    ("TooSkewed|difference between the request time", "the clock of this machine is wrong: set it, such as with timedatectl set-ntp true"),
    (
        "credential|AuthorizationHeaderMalformed",
        "no usable credentials: export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    ),
    ("NoSuchBucket|FileNotFound|bucket does not exist", "there is no such bucket: create it, or correct the URL"),
    (
        "Permission|AccessDenied|Forbidden|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken",
        "access is denied: give these credentials the right to list, read, write and delete there, or take others",
    ),
    ("Connect|Timeout|Unreachable|resolve|Errno 111", "it is out of reach: mend the network or the endpoint (AWS_ENDPOINT_URL)"),
)
_PASSWORD = re.compile(r"(://[^/:\s]*):(?!\d+/)\S*@")  # up to the last @: a password may hold one that is not encoded
_SECRET_QUERY = re.compile(r"([?&][^=&#\s]*(?:key|token|secret|sig|password|credential|auth)[^=&#\s]*=)[^&#\s]+", re.IGNORECASE)


class StoreError(RuntimeError):
    """An object store that cannot be used. The message names the key, what went wrong and the remedy."""


def store_error(where: str, error: Exception) -> StoreError:
    """What to tell about an error that the library of the store at `where` raised."""
    said = f"{type(error).__name__}: {error}"
    what = next((told for sign, told in _STORE_REMEDIES if re.search(sign, said, re.IGNORECASE)), "mend that, or choose another place")
    return StoreError(f"training.checkpoints: {where} cannot be used: {what} ({without_secrets(said)[:300]})")


def has_secret(url: str) -> bool:
    """Whether a URL holds a password, or a token in its query."""
    return without_secrets(url) != url


def without_secrets(text: str) -> str:
    """A text with the passwords and tokens of the URLs in it replaced by ***."""
    return _SECRET_QUERY.sub(r"\1***", _PASSWORD.sub(r"\1:***@", text))


def refuse_mistaken(directory: str, key: str) -> None:
    """Raises ConfigError, about `key`, for what would only become a directory with a strange name: `~/run`, `s3:bucket`."""
    if directory.startswith("~"):
        raise ConfigError(f"{directory} would be a directory called {directory.split('/')[0]!r} here; write the path out", key=key)
    if found := re.match("([a-z][a-z0-9+]+):", directory):
        raise ConfigError(f"{without_secrets(directory)} is neither a path nor a URL; write ./{found[0]}... or {found[0]}//...", key=key)


def refuse_url(directory: str, key: str) -> None:
    """Raises ConfigError, about `key`, for a directory that is written as a URL, or meant as one."""
    if "://" in directory:
        raise ConfigError(
            f"{without_secrets(directory)} is a URL, and this has to be a directory; choose one, and keep checkpoints in a bucket with "
            "training.checkpoints",
            key=key,
        )
    refuse_mistaken(directory, key)
