"""Every exception of the daemon that crosses a file.

The text of each is one line. Texts for clients name the field and what is allowed; they contain no paths. Texts for
the operator name the setting or the file.
"""

from __future__ import annotations


class DaemonError(Exception):
    """Base class of the daemon's own exceptions."""


# --- for clients ------------------------------------------------------------------------------------------------


class BadInput(DaemonError):
    """A request cannot be answered as it is."""


class NotReady(DaemonError):
    """A request asks for something that is not available yet."""


class Overload(DaemonError):
    """The memory that is set aside for requests is in use."""


# --- for the operator -------------------------------------------------------------------------------------------


class SettingError(DaemonError):
    """The value of a setting is not allowed, or what it names does not exist or is not of the right kind.

    Only the operator can change that, so the exit status is 2 and systemd does not try again. For the errors below it
    is 1.
    """


class BackendError(DaemonError):
    """A model cannot be downloaded, its files are damaged, or it does not run on this machine."""


class NPURefused(DaemonError):
    """The NPU of this board cannot be used or trusted. The text is a clause, without its library's messages.

    `detail` is the library's own message, for the log alone.
    """

    def __init__(self, text: str, detail: str = "") -> None:
        super().__init__(text)
        self.detail = f" ({detail[:300]})" if detail else ""


class LabelError(DaemonError):
    """A label file cannot be downloaded, or its content is not allowed."""


class DamagedCache(DaemonError):
    """A file of text vectors is damaged. It is computed again."""


def unreadable(error: PermissionError) -> SettingError:
    """For a file that a setting names and that may not be read: one in /home under systemd, for example."""
    return SettingError(f"cannot read {error.filename} ({error.strerror})")


def one_line(error: BaseException) -> str:
    """An exception as a part of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
