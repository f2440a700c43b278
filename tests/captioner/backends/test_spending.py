"""What a served captioner costs is counted, and bounded."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.backends.endpoint import tokens_of
from captioner.backends.http import Budget
from infra.cluster import Cluster
from tests.captioner.backends import server
from workflows.corpora.shapes import ShapesConfig, write_shards
from workflows.direct import DirectOptions, direct
from workflows.options import direct_options, recipe_options

ROWS = 12
USED = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}


@given(st.integers(1, 20), st.integers(1, 200), st.integers(1, 50))
def test_no_more_is_asked_than_may_be(requests, tokens, each):
    budget = Budget(requests, tokens)
    for _ in range(min(requests, -(-tokens // each))):
        assert not budget.ask()
        budget.told(each)
    assert budget.ask() in (f"{requests} requests", f"{tokens} tokens")


def test_threads_share_a_budget():
    budget, asked = Budget(requests=100), []

    def ask():
        for _ in range(50):
            if not budget.ask():
                asked.append(1)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 100


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ({"usage": USED}, (100, 7)),
        ({"usage": {"prompt_tokens": 5}}, (5, 0)),
        ({"usage": None}, (0, 0)),
        ({"usage": {"prompt_tokens": "many", "completion_tokens": -3}}, (0, 0)),
        ({}, (0, 0)),
        ([], (0, 0)),
    ],
)
def test_what_a_server_tells_of_tokens(answer, wanted):
    assert tokens_of(answer) == wanted


@pytest.mark.timeout(180)
def test_a_budget_stops_a_run_that_goes_on_later(ray_cluster, tmp_path):
    write_shards(ShapesConfig(samples=ROWS, labelled=2, shard_size=6), str(tmp_path / "corpus"))
    endpoint = server.Endpoint(
        lambda body, number: server.completion(f"caption {number}", finish_reason="stop") | {"usage": USED}
    )
    corpus = str(tmp_path / "corpus" / "{00000..00001}.tar")
    options = {"corpus": corpus, "captioner": endpoint.url, "model": "m", "out": str(tmp_path / "out")}
    options |= {"styles": "short", "concurrency": 2}
    try:
        frugal = Cluster(name="test", actors=(1, 1), max_requests=8)
        told = r"The budget of 8 requests is used up\. Give the line again, and it goes on\. 8 of 12 rows are done\."
        with pytest.raises(RuntimeError, match=told):
            direct(DirectOptions(cluster=frugal, **options))
        assert len(endpoint.bodies) == 8
        captions = direct(
            DirectOptions(cluster=Cluster(name="test", actors=(1, 1), token_prices=(2.0, 10.0)), **options)
        )
    finally:
        endpoint.close()
    assert captions.summary["accepted"] == ROWS
    assert len(endpoint.bodies) == ROWS, "what was answered is not asked for again"
    assert (captions.summary["prompt_tokens"], captions.summary["answer_tokens"]) == (100 * ROWS, 7 * ROWS)
    assert captions.summary["price"] == pytest.approx((2 * 100 + 10 * 7) * ROWS / 1e6, abs=1e-4)


@pytest.mark.timeout(180)
def test_processes_spend_a_budget_to_the_last_request(ray_cluster, tmp_path):
    write_shards(ShapesConfig(samples=40, labelled=2, shard_size=5), str(tmp_path / "corpus"))
    endpoint = server.Endpoint(lambda body, number: server.completion(f"caption {number}", finish_reason="stop"))
    corpus = str(tmp_path / "corpus" / "{00000..00007}.tar")
    options = {"corpus": corpus, "captioner": endpoint.url, "model": "m", "out": str(tmp_path / "out")}
    cluster = Cluster(name="test", actors=(2, 2), cpus_per_actor=0.5, max_requests=31)
    try:
        with pytest.raises(RuntimeError, match=r"The budget of 31 requests is used up\. .* 31 of 40 rows are done\."):
            direct(DirectOptions(cluster=cluster, styles="short", concurrency=2, **options))
        assert len(endpoint.bodies) == 31, "each process had 15 of them"
    finally:
        endpoint.close()


def test_they_are_options_of_every_line():
    line = ["--max-requests", "9", "--max-tokens=70", "--token-prices", "2", "10"]
    for cluster in (
        recipe_options(["debug", *line], "run").cluster,
        direct_options(["--corpus", "x", "--captioner", "y", "--out", "z", *line]).cluster,
    ):
        assert (cluster.max_requests, cluster.max_tokens, cluster.token_prices) == (9, 70, (2.0, 10.0))
