"""What to do about an error of a file system."""

from __future__ import annotations

import errno

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the quota is used up: free some space",
    errno.EFBIG: "files may not grow so large: raise the limit (ulimit -f)",
    errno.EROFS: "the file system is read-only: make it writable",
    errno.EACCES: "this user may not write there: mend the permissions",
    errno.EPERM: "this user may not write there: mend the permissions",
    errno.EEXIST: "a file of that name is in the way: move it away",
    errno.ENOTDIR: "a file is in the way: move it away",
}


def remedy(code: int | None) -> str | None:
    """The cause and the remedy of an errno, in words; None for one that a user cannot mend."""
    return _REMEDIES.get(code or 0)
