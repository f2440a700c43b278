"""LCM's way, small: a student begins from a teacher and follows an average of itself."""

import numpy as np
import pytest
import torch

from infra.train.optim import OptimConfig
from t2i.conditions.hearing import Conditions
from t2i.conditions.labels import LabelConfig
from t2i.diffusion.consistency import Consistency
from t2i.diffusion.prior import DiffusionPrior, DiffusionSampling
from t2i.diffusion.process import Process
from t2i.diffusion.schedules import Betas, Flow
from t2i.protocol import Asked, Space, Start
from t2i.random import keys_of
from tests.t2i.house.spot import Net, Spot, asker, falls, moments, normal, trained

LABEL = LabelConfig(labels=("left", "right"), drop=0.1)
SPACE, WIDTH = Space((2,)), 64
MEANS = np.array([[-0.8, 0.4], [0.8, 0.4]])
MIX = np.array([[0.5, 0.0], [0.2, 0.3]])


def data(rows, draw):
    label = rows % 2
    values = MEANS[label] + normal(rows, 0, 2) @ MIX.T
    return {"values": values.astype(np.float32), "label": label.astype(np.int64), "dropped_label": draw("drop") < 0.1}


def prior():
    conditions = Conditions((LABEL,), WIDTH, SPACE, {"vector"})
    schedule = Betas(shape="scaled_linear", steps=100, beta_first=0.001, beta_last=0.2)
    process = Process(schedule=schedule, prediction="v")
    return DiffusionPrior(Net(2, times=100.0), process, SPACE, conditions)


def teacher_spot():
    return Spot(prior, data)


@pytest.fixture(scope="module")
def teacher():
    return trained(teacher_spot(), steps=400)[0].state_dict()


def student_spot(state):
    def learner():
        teacher = prior()
        teacher.load_state_dict(state)
        return Consistency(teacher, prior(), prior(), WIDTH, solver_steps=20, scales=(0.0, 1.0), decay=0.9)

    return Spot(learner, data, {"student": OptimConfig(lr=2e-3, warmup_steps=5)})


def test_student_and_target_begin_as_the_teacher(teacher):
    (update,) = student_spot(teacher).updates()
    for part in (update.module.student, update.module.target):
        assert all(torch.equal(value, teacher[name]) for name, value in part.state_dict().items())
    assert update.rebuilt == ("teacher",)
    assert not any(parameter.requires_grad for parameter in update.module.target.parameters())


def test_the_target_follows_the_student(teacher):
    (update,) = student_spot(teacher).updates()
    module = update.module
    with torch.no_grad():
        module.student.network.enter.weight.add_(1.0)
    module.stepped({})
    wanted = teacher["network.enter.weight"] + 0.1
    torch.testing.assert_close(module.target.network.enter.weight, wanted, rtol=0, atol=1e-6)


def test_no_rows_condition_is_dropped(teacher):
    """Else the teacher would be guided, and the student told nothing of what to."""
    (update,) = student_spot(teacher).updates()
    with torch.no_grad():
        update.module.student.network.tell.weight.add_(0.3)
    arrays = {**data(np.arange(6), lambda salt: np.zeros(6)), "weight": np.ones(6, np.float32)}
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()} | {"noise_key": keys_of(range(6))}
    assert batch["dropped_label"].all()
    lost = [update.module({**batch, "dropped_label": torch.full((6,), dropped)}) for dropped in (True, False)]
    assert torch.equal(*[sums["consistency"] for sums in lost])


@pytest.fixture(scope="module")
def student(teacher):
    return trained(student_spot(teacher), steps=800)


def drawn_by(prior, sampling, start=None, rows=2000):
    seeds, told = list(range(rows)), {"class_label": [LABEL.labels[row % 2] for row in range(rows)]}
    return prior.sample(asker(LABEL)(told, seeds), seeds, sampling, start)


def test_a_student_draws_in_four_steps_what_the_teacher_draws_in_many(student):
    student, losses = student
    assert falls(losses, "consistency", to=0.8)
    drawn = drawn_by(student, DiffusionSampling(steps=4))
    for label in range(2):
        mean, covariance = moments(drawn[label::2])
        torch.testing.assert_close(mean, torch.tensor(MEANS[label]), rtol=0, atol=0.2)
        torch.testing.assert_close(covariance, torch.tensor(MIX @ MIX.T), rtol=0, atol=0.1)


def test_a_student_is_led_as_far_as_it_is_told(student):
    """The classes' means lie further apart the further it is guided, as the teacher's do."""
    student, _ = student

    def apart(prior, guidance, **options):
        drawn = drawn_by(prior, DiffusionSampling(guidance=guidance, **options))
        return float((drawn[1::2] - drawn[::2]).mean(0)[0])

    found = [apart(student, guidance, steps=4) for guidance in (1.0, 1.5, 2.0)]
    wanted = [apart(student.teacher, guidance, steps=25, sampler="dpm_solver_2m") for guidance in (1.0, 1.5, 2.0)]
    assert found[0] < found[1] < found[2]
    assert wanted[2] - wanted[0] > 0.2
    assert found[2] - found[0] == pytest.approx(wanted[2] - wanted[0], rel=0.5)
    with pytest.raises(ValueError, match=r"within \[1, 2\].*not of 3"):
        apart(student, 3.0, steps=4)
    negative = Asked(1, {"label": torch.zeros(1, dtype=torch.int64)}, {"label": torch.ones(1, dtype=torch.int64)})
    with pytest.raises(ValueError, match="negative prompts"):
        student.sample(negative, [1], DiffusionSampling(steps=4, guidance=2.0))


def test_a_student_stops_where_it_is_said_and_may_be_thresholded(student):
    student, _ = student
    left = drawn_by(student, DiffusionSampling(steps=4, stops=50.0))
    whole = drawn_by(student, DiffusionSampling(steps=4))
    assert not torch.equal(left, whole)
    rest = drawn_by(student, DiffusionSampling(steps=4), Start(left, at=50.0, noised=True))
    torch.testing.assert_close(moments(rest)[0], moments(whole)[0], rtol=0, atol=0.15)
    with pytest.raises(ValueError, match="have none"):
        drawn_by(student, DiffusionSampling(steps=4, percentile=0.99))


def test_only_whole_strides_of_betas_are_distilled():
    with pytest.raises(ValueError, match="whole strides"):
        Consistency(prior(), prior(), prior(), WIDTH, solver_steps=30)
    flow = DiffusionPrior(
        Net(2), Process(schedule=Flow(), prediction="velocity"), SPACE, Conditions((), WIDTH, SPACE, {"vector"})
    )
    with pytest.raises(ValueError, match="Betas"):
        Consistency(flow, prior(), prior(), WIDTH)
