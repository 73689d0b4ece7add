"""Fixtures over the small models of hf_models.py."""

import copy

import pytest
from hf_models import PAPER, SMALL, coda_model

from coda_attn.modeling import SUPPORTED


@pytest.fixture(params=SUPPORTED)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def converted():
    """The converted Llama models that tests only read, by configuration name."""
    models = {"retention": coda_model(SMALL), "paper": coda_model(PAPER)}
    return lambda name: copy.deepcopy(models[name])
