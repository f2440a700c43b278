"""Keep secrets out of what Ray writes to its logs: a line that holds one is refused, unseen."""

import os
import re
from collections.abc import Iterable

_NAMED = re.compile(r"(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY)", re.IGNORECASE)
_LOOKS = {
    "credentials within an address": re.compile(r"://[^/\s@]*:[^/\s@]+@"),
    "an AWS access key": re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{16,}"),
    "a GitHub token": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{20,})"),
    "a signed address": re.compile(r"[?&](X-Amz-Signature|Signature|sig|token|access_token)=", re.IGNORECASE),
}
_SHORTEST = 8  # letters; a shorter value of a variable is a word that a line may well hold


def refuse_secrets(texts: Iterable[tuple[str, str]]) -> None:
    """ValueError, which does not repeat it, where a text looks like a secret, or holds one of this environment.

    `texts` are pairs: what to call it, and itself. The line of a job is shown to all who may see the cluster's
    dashboard, and stays in its logs.
    """
    values = {
        value: name for name, value in os.environ.items() if _NAMED.search(name) and len(value.strip()) >= _SHORTEST
    }
    for where, text in texts:
        for what, pattern in _LOOKS.items():
            if pattern.search(text):
                raise ValueError(f"{where} holds {what}. {_ADVICE}")
        for value, name in values.items():
            if value in text and not os.path.exists(value):  # RAY_AUTH_TOKEN_PATH is no secret
                raise ValueError(f"{where} holds the value of {name}. {_ADVICE}")


_ADVICE = (
    "A job's line is logged in clear text: leave it out, and give it to the nodes by their environment (set where "
    "`ray start` runs) or by a role."
)
