"""Strict settings: unknown keys, wrong types and typos are errors that say where, what, and what instead."""

from __future__ import annotations

import msgspec


class UserError(Exception):
    """A mistake that the user can mend. Its text is one clear line: where, what, what instead."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, dict=True):
    """Base of everything a user can set. Frozen: a run's settings never change after they were hashed.

    ``dict=True`` lets subclasses keep a loaded model in a ``functools.cached_property``; only the fields are settings.
    """
