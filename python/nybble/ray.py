"""Deprecated: use `nybble.integrations.ray`."""

import warnings

from nybble.integrations.ray import *  # noqa: F403

warnings.warn("nybble.ray is now nybble.integrations.ray", DeprecationWarning, stacklevel=2)
