"""A corpus to be filled, and a captioner that is served."""

import pytest

from tests.corpora.make import Corpus, Served


@pytest.fixture
def corpus(tmp_path):
    return Corpus(tmp_path)


@pytest.fixture
def served():
    captioner = Served(pictures=100)
    yield captioner
    captioner.close()
