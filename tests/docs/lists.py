"""What of the pages' commands is not run as it stands: what is put in whose place, what is not run, and why."""

# What cannot be had where tests run, and what is put in its place before a line or a program is run. The test fills in
# what stands there in capitals.
INSTEAD = {
    "s3://bucket": "BUCKET",  # of moto's server
    "http://localhost:8000/v1": "SERVER",  # tests/captioner/backends/server.py; one caption now and then is refused
    "Salesforce/blip-image-captioning-base": "BLIP",  # random weights: tests/captioner/backends/tiny.py
    "llava-hf/llava-1.5-7b-hf": "LLAVA",  # likewise
    "google/t5-v1_1-large": "T5",  # likewise: tests/t2i/conditions/tiny.py
    "run demo": "run debug",  # trainings of six steps
    "run own": "run own --tokenizer.train.steps 6 --prior.train.steps 6",
    "{00000..00099}": "{00000..00001}",
    "--image-size 256 256": "--image-size 32 32",
}

# What a line begins with (settings of variables aside), and why it is not run. It is parsed, as far as that can be.
NOT_RUN = {
    "make install": "what runs this was installed by it",
    "make demo": "minutes; `rescribe run demo` is run as `run debug`",
    "make check": "a part of .ci/run",
    "make test": "a part of .ci/run",
    "docker build": "there is no Docker engine",
    "helm install": "there is no Kubernetes",
    "kubectl ": "there is no Kubernetes",
    "export RAY_AUTH_MODE=token": "there is no cluster on Kubernetes or AWS that would ask for it",
    "pip install": "the suite runs on what is pinned, without these extras; tests/infra/test_track.py has stand-ins",
    "rescribe run debug --cluster.track": "likewise",
    "tensorboard ": "it serves until it is stopped; tests/infra/test_metrics.py reads the files as it does",
    "rescribe run debug --cluster.address auto": "tests/test_end_to_end.py runs it on a cluster of its own",
    "ray stop": "it would end every Ray of the machine",
    "ray start": "tests/workflows/head.py starts nodes by such lines",
    "ray get-auth-token": "it would write into the home of whoever runs the tests",
    "ray up": "there is no AWS account",
    "ray dashboard": "there is no AWS account",
    "ray job": "there is no cluster on Kubernetes or AWS",
    "ray down": "there is no AWS account",
    "rescribe recaption --corpus 'photos/*.tar' --captioner vllm:": "it needs a GPU, and vLLM",
    "rescribe submit --address http://HEAD:8265": "docs/cluster.md has the same, and its lines are run",
}

# Likewise, what another test runs, and which: it takes these lines from docs/cluster.md.
_ON_A_CLUSTER = "tests/workflows/test_submit.py::test_the_commands_of_the_page"
_SCRAPED = "tests/infra/test_gauges.py::test_prometheus_finds_what_a_step_and_a_training_tell"
ELSEWHERE = {
    "export RAY_API_SERVER_ADDRESS=": _ON_A_CLUSTER,
    "rescribe rate --score": "tests/workflows/test_rate.py::test_a_person_judges_by_keys_and_taps",
    "rescribe plan demo --probe": "tests/workflows/test_probe.py::test_every_kind_is_probed",
    "rescribe plan debug --probe": "tests/workflows/test_probe.py::test_every_kind_is_probed",
    "rescribe run cascade": "tests/workflows/test_cascade.py::test_a_cascade_runs_and_every_command_knows_it",
    "rescribe convert_dvae": "tests/t2i/tokenizers/test_pickled_dvae.py::test_the_command_wants_trust",
    "rescribe submit run debug": _ON_A_CLUSTER,
    "rescribe status": _ON_A_CLUSTER,
    "rescribe stop JOB": _ON_A_CLUSTER,
    "rescribe logs JOB": _ON_A_CLUSTER,
    "curl -s http://127.0.0.1:8080/metrics": _SCRAPED,
}

# What may be run beside `rescribe`. Another program is a new command: run it, or say above why not.
PROGRAMS = ("cp", "export", "ls", "python", "rm", "truncate")
