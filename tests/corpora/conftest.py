"""A corpus to be filled."""

import pytest

from tests.corpora.make import Corpus


@pytest.fixture
def corpus(tmp_path):
    return Corpus(tmp_path)
