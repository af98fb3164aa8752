"""Random networks, judges and data that test files share."""

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{judge}" for judge in ("conversions", "random_chains", "random_graphs")))
