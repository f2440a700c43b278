"""One object for all processes of a run, such as a count that they share."""

from collections.abc import Callable
from typing import Any


class Shared:
    """Stands for an object that lives in a process of its own on this node: its methods are called there, in turn.

    It can be sent to any process of the cluster, and ends with the process that made it. What its methods are given and
    return is pickled; what they raise comes with Ray's layers around it.
    """

    def __init__(self, make: type, *arguments: Any) -> None:
        import ray  # slow to import: `plan` does without

        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        self._there: Any = ray.remote(num_cpus=0, label_selector=here)(make).remote(*arguments)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):  # those of Python, as pickle looks for them
            raise AttributeError(name)

        def call(*arguments: Any) -> Any:
            import ray

            return ray.get(getattr(self._there, name).remote(*arguments))

        return call
