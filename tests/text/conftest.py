"""Every test starts without loaded models."""

import pytest

import comfy.model_management


@pytest.fixture(autouse=True)
def no_loaded_models():
    """Models of one test are not those of the next."""
    comfy.model_management.current_loaded_models.clear()
    yield
    comfy.model_management.current_loaded_models.clear()
