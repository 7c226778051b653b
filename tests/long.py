"""The mark of tests that show at greater length what another one shows too: run them with LAUNCHER_LONG=1."""

from __future__ import annotations

import os

import pytest

LONG = pytest.mark.skipif("LAUNCHER_LONG" not in os.environ, reason="a minute each: set LAUNCHER_LONG=1")
