"""A training's batches without Ray: what the feed's tasks would prepare, in this process."""

from infra.train.feed import Feed
from infra.train.prepare import Prepare, pack, unpack


class PlainFeed:
    """`feed(start)` yields the micro-batches of each step from `start` to before `stop`."""

    def __init__(self, training, rank=0, world=1, micro_steps=1, stop=None):
        counts = training.count()
        self.plan = training.plan(counts)
        self.stop = stop or training.config.steps
        self.source = Feed(
            training.task, training.inputs, list(counts), self.plan, self.stop, rank, world,
            -(-self.plan.batch // world // micro_steps), micro_steps,
        )  # fmt: skip
        self.work = Prepare(training.task, training.inputs, self.plan.seed, self.source.rows, 0, training.out)

    def __call__(self, start):
        for chunk in self.source.chunks(start, self.stop, 3):
            for table in pack(self.work.batches(chunk), 2000):  # batches of several shapes travel together
                yield from (self.source._micro_batches(batch) for batch in unpack(table))
