"""Tests; a package, so that helpers are imported as `from tests.support import tiny`."""
