"""A configuration from the Hugging Face hub by its id, "org/name": config.json alone, never code and never weights.

Needs the package huggingface_hub, which keeps what it once fetched: a model looked at before is there without a network.
"""

from __future__ import annotations

import re
from pathlib import Path

from archcompass.errors import FileFormatError, UnknownNameError

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

_INSTALL = "as a hub id it needs huggingface_hub: pip install 'archcompass[hub]'"


def is_id(text: str) -> bool:
    """Whether `text` could name a model of the hub."""
    return _ID.fullmatch(text) is not None


def config_path(name: str) -> Path:
    """Where the model's config.json lies, fetched if need be.

    Args:
        name: "org/name".

    Raises:
        UnknownNameError: the hub has no such model, or not for this user.
        FileFormatError: huggingface_hub is not installed, the hub cannot be reached, or the model has no config.json.
    """
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise FileFormatError(f"{name!r} is no file or folder here; {_INSTALL}") from None
    try:
        return Path(hf_hub_download(name, "config.json"))
    except errors.GatedRepoError:
        raise FileFormatError(f"{name!r} is gated: accept its terms on its page, then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise UnknownNameError("model of the hub", name, ()) from None
    except errors.LocalEntryNotFoundError:
        raise FileFormatError(
            f"{name!r} is no file or folder here, was never fetched, and the Hugging Face hub cannot be reached"
        ) from None
    except errors.EntryNotFoundError:
        raise FileFormatError(f"{name!r} has no config.json on the hub") from None
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise FileFormatError(f"{name!r} could not be fetched from the hub: {type(error).__name__}") from error
