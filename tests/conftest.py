"""What every test may ask for."""

import os

import pytest


@pytest.fixture
def campaign_seed() -> int:
    """The seed of scripts/campaign; tests marked slow derive all their randomness from it."""
    return int(os.environ.get("WEFT_CAMPAIGN_SEED", "1"))


@pytest.fixture
def campaign_full() -> bool:
    """Whether scripts/campaign was asked for its full length."""
    return os.environ.get("WEFT_CAMPAIGN_FULL", "0") == "1"
